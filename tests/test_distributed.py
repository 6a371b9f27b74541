"""Synchronised batch norm and training under mpiexec: any number of ranks, and one that fails.

What must hold on ranks is in on_ranks.py. Runs under mpiexec take seconds to start, so they are
few; each has a time limit, since what goes wrong between ranks is often that they wait for ever.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_data import write

import bncpu
from bncpu import cli, distributed, nn

MPI = pytest.importorskip("mpi4py.MPI", exc_type=(ImportError, RuntimeError))
on_ranks = pytest.importorskip("on_ranks")

TIME_LIMIT = 120
MPIEXEC = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
# More ranks than cores, on cores that others use too, perhaps as root in a container.
ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
COMMAND = [sys.executable, "-m", "bncpu"]


def mpiexec(*programs, cwd=None):
    """Run programs, given as (ranks, command), together."""
    if MPIEXEC is None:
        pytest.skip("needs mpiexec")
    argv = [MPIEXEC]
    for ranks, command in programs:
        argv += [":"] * (len(argv) > 1) + ["-n", str(ranks), *map(str, command)]
    return subprocess.run(
        argv,
        cwd=cwd,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
        check=False,
    )


def names(folder="."):
    """Return what a folder holds."""
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_on_ranks(ranks, rng):
    seed = rng.integers(2**32)
    done = mpiexec((ranks, [sys.executable, Path(__file__).with_name("on_ranks.py"), seed]))
    assert done.returncode == 0, done.stdout + done.stderr
    for name in on_ranks.CHECKS:
        assert f"held: {name}\n" in done.stdout


@pytest.mark.parametrize("name", on_ranks.CHECKS)
def test_in_one_process(name, rng):
    """The same where nobody else is."""
    on_ranks.CHECKS[name](MPI.COMM_SELF, rng)


class Digits:
    """A small set in MNIST's files, in a folder of its own, and trainings on it."""

    options = ("--hidden", "12", "--momentum", "0.5", "--batch-size", "20", "--dtype", "float64")

    def __init__(self, folder):
        self.folder = folder
        rng = np.random.default_rng(1)
        parts = {}
        for part, n in (("train", 203), ("test", 41)):  # primes, for uneven shards
            y = parts[f"y_{part}"] = rng.integers(0, 10, n, np.uint8)
            x = rng.integers(0, 60, (n, 5, 4), np.uint8)
            x.reshape(n, -1)[np.arange(n), y] = 255
            parts[f"x_{part}"] = x
        write(folder, parts)

    def train(self, *options):
        """Return the arguments of a training."""
        dataset = ["--dataset", "mnist", "--data-dir", self.folder, "--no-progress"]
        return ["train", *dataset, *self.options, *options]


@pytest.fixture
def digits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Digits(tmp_path / "data")


def failing(how):
    """Return a command like bncpu whose 25th step, of 11 in an epoch, fails."""
    code = f"""
import os, signal, sys
from bncpu import cli, nn

def step(self, model, step=nn.SGD.step, steps=iter(range(24))):
    if next(steps, None) is None:
        {how}
    step(self, model)

nn.SGD.step = step
sys.exit(cli.main(sys.argv[1:]))
"""
    return [sys.executable, "-c", code]


def test_a_killed_run_goes_on_with_other_ranks(digits, capsys):
    """To where one process comes without a break, with the same loss curve on the way."""
    assert cli.main([*map(str, digits.train("--epochs", 4, "--save", "one", "--out", "o"))]) == 0
    printed = capsys.readouterr().out

    argv = digits.train("--distributed", "--save", "m", "--epochs")
    done = mpiexec(
        (1, [*COMMAND, *argv, 4]), (1, [*failing("os.kill(os.getpid(), signal.SIGKILL)"), *argv, 4])
    )
    assert done.returncode != 0, done.stderr
    assert nn.read_checkpoint("m").step == 22  # two whole epochs
    assert names() == ["data", "m", "o", "one"]

    done = mpiexec((3, [*COMMAND, *argv, 4, "--resume"]))
    assert done.returncode == 0, done.stderr
    assert "3 ranks share each batch of 20" in done.stdout
    lines = [line for line in printed.splitlines() if line.startswith("      ")]
    assert lines[-2:] == [line for line in done.stdout.splitlines() if line in lines[-2:]]
    got, expected = nn.read_checkpoint("m"), nn.read_checkpoint("one")
    assert got.step == expected.step == 44
    assert got.settings == expected.settings
    for mine, one in ((got.model, expected.model), (got.velocity, expected.velocity)):
        assert list(mine) == list(one)
        for name, array in mine.items():
            np.testing.assert_allclose(array, one[name], rtol=0, atol=1e-10, err_msg=name)


def test_rank_0_killed_in_the_midst_of_a_file(digits):
    """The file before it is still there, whole."""
    code = """
import os, signal, sys
from bncpu import cli

def fsync(file, saves=iter(range(1))):
    if next(saves, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)

os.fsync = fsync
sys.exit(cli.main(sys.argv[1:]))
"""
    argv = digits.train("--distributed", "--save", "m", "--epochs", 4)
    done = mpiexec((1, [sys.executable, "-c", code, *argv]), (1, [*COMMAND, *argv]))
    assert done.returncode != 0, done.stderr
    assert nn.read_checkpoint("m").step == 11  # one epoch


def test_a_bug_on_a_rank_ends_all(digits):
    argv = digits.train("--distributed", "--save", "m", "--epochs", 4)
    done = mpiexec((2, [*COMMAND, *argv]), (1, [*failing('raise KeyError("a bug")'), *argv]))
    assert done.returncode == 1
    assert "KeyError: 'a bug'" in done.stderr
    assert nn.read_checkpoint("m").step == 22


def test_a_missing_shard_ends_all_before_anything_is_written(digits):
    argv = digits.train("--distributed", "--save", "m", "--out", "o")
    done = mpiexec((2, [*COMMAND, *argv]), (1, [*COMMAND, *argv, "--data-dir", "nowhere"]))
    assert done.returncode == 2
    assert "bncpu train: rank 2: nowhere: no such folder\n" in done.stderr
    assert done.stdout.replace("\0", "").strip() == ""
    assert names() == ["data"]


def test_ranks_with_other_settings_end_all(digits):
    argv = digits.train("--distributed", "--save", "m")
    done = mpiexec((1, [*COMMAND, *argv]), (1, [*COMMAND, *argv, "--batch-size", 30]))
    assert done.returncode == 2
    assert "bncpu train: rank 1: expected the settings of rank 0" in done.stderr
    assert names() == ["data"]


def test_moments_of_files_by_ranks(tmp_path, rng):
    x = rng.normal(1e4, 1.0, (500, 6, 7)).astype(np.float32)
    np.save(tmp_path / "a.npy", x[:180])
    np.save(tmp_path / "b.npy", x[180:])
    command = [*COMMAND, "moments", "--distributed", "--no-progress"]
    for programs in (
        [(3, [*command, "a.npy", "b.npy"])],  # shared
        [(1, [*command, "a.npy"]), (1, [*command, "b.npy"])],  # each its own
    ):
        done = mpiexec(*programs, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("3500 values in each of 6 channels") == 1
        with np.load(tmp_path / "moments.npz") as got:
            moments = bncpu.Moments(int(got["count"]), got["mean"], got["m2"])
            np.testing.assert_array_equal(got["var"], moments.var())
        on_ranks.assert_moments(moments, x.astype(np.float64))
        (tmp_path / "moments.npz").unlink()
    done = mpiexec((1, [*command, "a.npy"]), (1, [*command, "b.npy", "--axis", "-1"]), cwd=tmp_path)
    assert done.returncode == 2
    assert "FILE: expected the same channels on every rank; got ((6,), (7,))" in done.stderr
    assert names(tmp_path) == ["a.npy", "b.npy"]


CALLS = {
    "batch_norm_train": lambda comm: distributed.batch_norm_train(np.eye(3), comm=comm),
    "batch_norm_backward": lambda comm: distributed.batch_norm_backward(
        np.eye(3), np.eye(3), bncpu.batch_moments(np.eye(3)), comm=comm
    ),
    "merge_moments": lambda comm: distributed.merge_moments(
        bncpu.batch_moments(np.eye(3)), comm=comm
    ),
    "SyncBatchNorm": lambda comm: distributed.SyncBatchNorm(3, comm=comm),
    "fit": lambda comm: nn.fit(
        nn.fully_connected([3, 3], rng=np.random.default_rng(0)),
        nn.SGD(0.1),
        np.eye(3, dtype=np.float32),
        np.arange(3),
        steps=1,
        comm=comm,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_communicator(name):
    for comm, kind in (("world", "str"), (0, "int"), (MPI, "module"), (MPI.Comm(), "Comm")):
        message = f"comm: expected an intracommunicator of mpi4py; got {kind}; pass mpi4py.MPI."
        with pytest.raises(TypeError, match=re.escape(message)):
            CALLS[name](comm)
    with pytest.raises(ValueError, match="a communicator that this rank is in; got COMM_NULL"):
        CALLS[name](MPI.Intracomm())


@pytest.mark.parametrize("name", CALLS)
def test_without_mpi(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    message = 'comm: needs mpi4py and an MPI; pip install "bncpu[mpi]" brings both'
    with pytest.raises(ImportError, match=re.escape(message)):
        CALLS[name](MPI.COMM_SELF)


@pytest.mark.parametrize("argv", [["train"], ["moments", "a.npy"]])
def test_the_command_without_mpi(argv, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", np.eye(3))
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert cli.main([*argv, "--distributed"]) == 2
    message = f'bncpu {argv[0]}: --distributed: needs mpi4py and an MPI; pip install "bncpu[mpi]"'
    assert capsys.readouterr().err.startswith(message)
    assert names() == ["a.npy"]


X = np.linspace(0, 1, 24).reshape(4, 3, 2)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"eps": -1}, ValueError, "eps: expected a finite number >= 0"),
        ({"momentum": 2}, ValueError, "momentum: expected 0 <= momentum <= 1"),
        ({"gamma": np.ones(4)}, ValueError, r"gamma: expected shape \(3,\)"),
        ({"beta": np.ones(3, np.float32)}, TypeError, "beta: expected dtype float64"),
        ({"axis": 3}, ValueError, "axis: 3 is out of range"),
        ({"residual": X[:2]}, ValueError, "residual: expected shape"),
        ({"activation": "gelu"}, ValueError, 'activation: expected None or "relu"'),
        ({"mask": np.empty(3, np.uint8)}, ValueError, "mask: holds where ReLU lets pass"),
        ({"out": X}, ValueError, "out: overlaps x, which it would overwrite"),
        ({"running_mean": np.zeros(3)}, ValueError, "running_var: expected an array"),
        ({"running_mean": np.zeros(3), "running_var": X[0, :, 0]}, ValueError, "shares memory"),
    ],
)
def test_what_a_rank_alone_finds_wrong(options, kind, message):
    before = X.copy()
    with pytest.raises(kind, match=message):
        distributed.batch_norm_train(X, comm=MPI.COMM_SELF, **options)
    np.testing.assert_array_equal(X, before)


def test_what_backward_finds_wrong():
    _, moments = distributed.batch_norm_train(X, comm=MPI.COMM_SELF)
    with pytest.raises(TypeError, match="moments: expected the Moments that the forward returned"):
        distributed.batch_norm_backward(X, X, moments.mean, comm=MPI.COMM_SELF)
    with pytest.raises(ValueError, match="mask: needed for the gradient of a residual"):
        distributed.batch_norm_backward(
            X, X, moments, comm=MPI.COMM_SELF, activation="relu", residual=True
        )


def test_a_file_of_a_synchronised_model_is_one_of_a_plain_model(tmp_path):
    plain, synchronised = (
        nn.fully_connected([4, 5, 3], rng=np.random.default_rng(0), comm=comm)
        for comm in (None, MPI.COMM_SELF)
    )
    assert repr(synchronised.layers[1]).startswith("SyncBatchNorm(5, eps=1e-05")
    assert nn.architecture(plain) == nn.architecture(synchronised)
    for name, model in (("a", plain), ("b", synchronised)):
        nn.save_checkpoint(tmp_path / name, model, nn.SGD(0.1), step=0, seed=0)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
