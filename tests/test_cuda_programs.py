"""The trainer and the benchmark on arrays of a GPU, on a stand-in for CuPy."""

import json
import sys

import cupy_standin
import numpy as np
import pytest
from accuracy import assert_same_bits, assert_same_to_rounding

import bncpu
from bncpu import bench, cli, distributed, nn
from bncpu.backends import to_numpy
from bncpu.bench import peers

pytestmark = pytest.mark.usefixtures("cupy")

SIZES = [6, 5, 4]
MEASURED = ["train_add_relu", "infer", "backward_relu", "moments"]


def network(device, **how):
    return nn.fully_connected(SIZES, rng=np.random.default_rng(3), device=device, **how)


def assert_alike(state, other):
    assert state.keys() == other.keys()
    for name, a in state.items():
        assert type(a) is type(other[name]) is np.ndarray
        np.testing.assert_allclose(a, other[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Tanh, nn.ReLU])
def test_training_goes_as_on_the_cpu(rng, activation):
    x, y = rng.standard_normal((40, 6)).astype(np.float32), rng.integers(0, 4, 40)
    states, records = [], []
    for device in ("cpu", "cuda"):
        model = network(device, activation=activation)
        optimizer = nn.SGD(0.2, momentum=0.9)
        place = np.asarray if device == "cpu" else cupy_standin.asarray
        examples = place(x), place(y)
        records += [nn.fit(model, optimizer, *examples, steps=5, batch_size=8, test=examples)]
        states += [model.state_dict() | {f"v {n}": a for n, a in optimizer.state_dict().items()}]
        if device == "cuda":
            for value in model.parameters().values():
                assert isinstance(value, cupy_standin.ndarray)
    assert_alike(*states)
    here, there = records
    assert [r.accuracy for r in here] == [r.accuracy for r in there]
    assert np.allclose([r.loss for r in here[1:]], [r.loss for r in there[1:]], rtol=1e-4)


def test_ranks_train_on_the_cpu(rng):
    MPI = pytest.importorskip("mpi4py.MPI", exc_type=(ImportError, RuntimeError))  # noqa: N806
    x, y = rng.standard_normal((8, 6)).astype(np.float32), rng.integers(0, 4, 8)
    with pytest.raises(ValueError, match="comm: ranks train on the CPU"):
        network("cuda", comm=MPI.COMM_SELF)
    examples = cupy_standin.asarray(x), cupy_standin.asarray(y)
    with pytest.raises(TypeError, match="x: expected a NumPy array beside comm"):
        nn.fit(network("cuda"), nn.SGD(0.1), *examples, steps=1, comm=MPI.COMM_SELF)


@pytest.mark.parametrize("form", ["plain", "relu", "residual"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_a_batch_on_ranks(rng, dtype, form):
    """Arrays of a GPU get what NumPy's get, and stay there."""
    MPI = pytest.importorskip("mpi4py.MPI", exc_type=(ImportError, RuntimeError))  # noqa: N806
    x, dy, residual = (rng.normal(0.5, 2.0, (6, 5, 7)).astype(dtype) for _ in range(3))
    of = np.float64 if dtype is np.float64 else np.float32
    gamma, beta = (rng.standard_normal(5).astype(of) for _ in range(2))
    results = []
    for place in (np.asarray, cupy_standin.asarray):
        running = place(np.zeros(5)), place(np.ones(5))
        how = {"comm": MPI.COMM_SELF, "activation": None if form == "plain" else "relu"}
        if form == "residual":
            how["mask"] = place(np.empty((x.size + 7) // 8, np.uint8))
        affine = place(gamma), place(beta)
        y, moments = distributed.batch_norm_train(
            place(x),
            *affine,
            running_mean=running[0],
            running_var=running[1],
            residual=place(residual) if form == "residual" else None,
            **how,
        )
        gradients = distributed.batch_norm_backward(
            place(dy), place(x), moments, *affine, residual=form == "residual", **how
        )
        arrays = [y, moments.mean, moments.m2, *running, *gradients]
        for array in arrays:
            assert array is None or type(array) is type(place(x))
        results.append([None if a is None else to_numpy(a) for a in arrays])
    for here, there in zip(*results, strict=True):
        if here is not None:
            size = np.abs(here).max()
            assert_same_to_rounding(there, here, dtype=dtype, m=x.size // 5, size=size)


def test_states_travel_between_devices(rng):
    x, y = rng.standard_normal((16, 6)).astype(np.float32), rng.integers(0, 4, 16)
    there, optimizer = network("cuda"), nn.SGD(0.2, momentum=0.5)
    nn.fit(there, optimizer, cupy_standin.asarray(x), cupy_standin.asarray(y), steps=2)
    here, again = network("cpu"), network("cuda")
    here.load_state_dict(there.state_dict())
    again.load_state_dict(here.state_dict())
    for name, a in there.state_dict().items():
        assert_same_bits(here.state_dict()[name], a, name)
        assert_same_bits(again.state_dict()[name], a, name)
    resumed = nn.SGD(0.2, momentum=0.5)
    resumed.load_state_dict(optimizer.state_dict(), again)
    assert all(isinstance(a, cupy_standin.ndarray) for a in resumed.velocity.values())


def test_the_command_trains(tmp_path, capsys):
    """On a GPU, from there on the CPU, and the same as on the CPU alone."""
    saved = {}
    for device in ("cpu", "cuda"):
        saved[device] = tmp_path / f"{device}.safetensors"
        command = ["train", "--steps", "4", "--hidden", "8", "--no-progress", "--device", device]
        assert cli.main([*command, "--save", str(saved[device])]) == 0
    first, second = (nn.read_checkpoint(path) for path in saved.values())
    assert_alike(first.model, second.model)
    command = ["train", "--load", str(saved["cuda"]), "--steps", "1", "--no-progress"]
    assert cli.main(command) == 0
    assert "classes, with batch normalisation" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "bench"])
def test_commands_without_a_gpu(command, capsys, monkeypatch):
    cupy_standin.state.available = False
    assert cli.main([command, "--device", "cuda"]) == 2
    assert "no GPU" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert cli.main([command, "--device", "cuda"]) == 2
    assert 'pip install "bncpu[cuda]"' in capsys.readouterr().err


@pytest.fixture
def only_cupy(monkeypatch):
    """PyTorch computes on no stand-in."""
    monkeypatch.setattr(peers, "GPU_PEERS", {"cupy": peers.GPU_PEERS["cupy"]})
    monkeypatch.setattr(bench, "QUICK_SECONDS", 0.0)


@pytest.mark.parametrize(("dtype", "layout"), [("float32", "nchw"), ("bfloat16", "nhwc")])
@pytest.mark.usefixtures("only_cupy")
def test_the_benchmark(dtype, layout, tmp_path, capsys):
    """The same table and JSON, by the events of the GPU."""
    path, plot = tmp_path / "speed.json", tmp_path / "speed.png"
    rows = bench.run(
        shapes=[(2, 8, 4)],
        operations=MEASURED,
        dtype=dtype,
        layout=layout,
        device="cuda",
        against=["cupy"],
        quick=True,
        json_path=path,
        plot_path=plot,
    )
    assert [row.operation for row in rows] == MEASURED
    assert {row.level for row in rows} == {"sm_90"}
    assert {row.stream for row in rows} == {"copy"}
    assert all(("cupy" in row.turns) == (dtype == "float32") for row in rows)
    printed = capsys.readouterr().out
    assert "a stand-in, sm_90" in printed
    assert "CUDA" in printed
    assert len(json.loads(path.read_text())["rows"]) == len(rows)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "event" in cupy_standin.state.waits


def test_what_a_benchmark_on_a_gpu_cannot_have():
    with pytest.raises(ValueError, match=r"^--threads, --level: .*GPU"):
        bench.run(device="cuda", num_threads=2)
    with pytest.raises(ValueError, match=r"^--against: expected names out of cupy, torch on cuda"):
        bench.run(device="cuda", against=["jax"])
    with pytest.raises(ValueError, match=r"^--against: expected names out of numpy.* on cpu"):
        bench.run(against=["cupy"])
    with pytest.raises(ValueError, match=r"of this GPU's"):
        bench.run(device="cuda", shapes=[(1 << 20, 1 << 12)])


def test_the_configuration_tells_of_gpus(monkeypatch):
    assert bncpu.config()["gpu"].startswith("a stand-in (sm_90), a stand-in (sm_90), ")
    cupy_standin.state.available = False
    assert bncpu.config()["gpu"] == "none that CuPy can use"
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert bncpu.config()["gpu"] == "none, CuPy is not installed"
