"""The command line: what it prints and writes, and its one line and status when it cannot."""

import json
import os
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest
import threadpoolctl
from PIL import Image

import bncpu
from bncpu import bench, cli, nn
from bncpu.bench import measure
from bncpu.cli import train as training

TRAIN = ["train", "--hidden", "20", "--steps", "30", "--no-progress"]


pytestmark = pytest.mark.usefixtures("default_threads")


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    """Run every command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BNCPU_DATA", raising=False)


def run(*argv):
    """Return the exit status of a command, whichever way it ends."""
    try:
        return cli.main([str(arg) for arg in argv])
    except SystemExit as end:
        return end.code


def assert_refused(capsys, tmp_path, argv, message):
    """One line on stderr, status 2, nothing on stdout, no file more or less than before."""
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert run(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"bncpu {argv[0]}: " if argv and argv[0][0] != "-" else "bncpu: ")
    assert message in err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_as_a_module(tmp_path):
    def module(*argv):
        command = [sys.executable, "-m", "bncpu", *argv]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = module("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"bncpu {version('bncpu')}\n", "")
    done = module("train", "--epochs", "none")
    assert (done.returncode, done.stdout) == (2, "")
    expected = "bncpu train: argument --epochs: expected a positive integer; got 'none'\n"
    assert done.stderr == expected


def test_info(capsys):
    assert run("info") == 0
    shown = capsys.readouterr().out
    bncpu.show_config()
    assert shown == capsys.readouterr().out != ""


def test_bench_hands_over_its_arguments(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(bench, "run", lambda **options: calls.append(options))
    assert run("bench") == 0
    file, picture = tmp_path / "speed.json", tmp_path / "speed.png"
    options = ["--quick", "--threads", 2, "--dtype", "float16", "--json", file, "--plot", picture]
    options += ["--shape", "8,3", "--shape", "2,3,4,5", "--layout", "nhwc", "--in-cache"]
    options += ["--op", "train,infer", "--op", "moments", "--against", "torch,numpy"]
    options += ["--device", "cpu"]
    assert run("bench", *options, "--level", bncpu.cpu.level) == 0
    assert run("bench", "--against", "none") == 0
    default = {
        "shapes": None,
        "operations": None,
        "dtype": "float32",
        "layout": "nchw",
        "num_threads": None,
        "level": None,
        "device": "cpu",
        "against": None,
        "quick": False,
        "in_cache": False,
        "json_path": None,
        "plot_path": None,
    }
    given = {
        "shapes": [(8, 3), (2, 3, 4, 5)],
        "operations": ["train", "infer", "moments"],
        "dtype": "float16",
        "layout": "nhwc",
        "num_threads": 2,
        "level": bncpu.cpu.level,
        "device": "cpu",
        "against": ["torch", "numpy"],
        "quick": True,
        "in_cache": True,
        "json_path": file,
        "plot_path": picture,
    }
    assert calls == [default, given, default | {"against": []}]


def test_bench(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(measure, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(bench, "SECONDS", 0.0)
    options = ["--shape", "3,4,5,6", "--op", "train_add_relu", "--against", "numpy"]
    assert run("bench", *options, "--json", "speed.json", "--plot", "speed.png") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "(3, 4, 5, 6)  train_add_relu" in out
    assert bncpu.cpu.level in out
    (row,) = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert row["bytes"] == 3 * 360 * 4 + 45
    with Image.open("speed.png") as figure:
        assert figure.width > 500


@pytest.mark.parametrize(
    "command", [[], ["info"], ["bench"], ["train"], ["moments"], ["data"], ["reproduce"]]
)
def test_help(capsys, command):
    assert run(*command, "--help") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "usage: bncpu" in out
    if command:
        assert f"  bncpu {command[0]}" in out  # an example
    if command == ["bench"]:
        for name in bench.OPERATIONS:
            assert f"\n  {name} " in out
    if command == ["train"]:
        for name, default in training.DEFAULTS.items():
            assert f"--{name.replace('_', '-')}" in out
            assert isinstance(default, list) or f"(default: {default})" in " ".join(out.split())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["--frobnicate"], "required: COMMAND"),
        (["train", "--frobnicate", "more"], "unrecognized arguments: --frobnicate more"),
        (["train", "--epochs", "0"], "argument --epochs: expected a positive integer; got '0'"),
        (["train", "--epochs", "1", "--steps", "1"], "not allowed with argument --epochs"),
        (["train", "--seed", "-1"], "argument --seed: expected an integer >= 0; got '-1'"),
        (["train", "--learning-rate", "nan"], "expected a positive number; got 'nan'"),
        (["train", "--momentum", "1"], "expected a number >= 0 and < 1; got '1'"),
        (["train", "--hidden", "10", "x"], "argument --hidden: expected a positive integer"),
        (["train", "--dataset", "letters"], "invalid choice: 'letters'"),
        (["train", "--activation", "swish"], "invalid choice: 'swish'"),
        (["train", "--threads", "0"], "argument --threads: expected a positive integer"),
        (["train", "--batch-size", "1"], "--batch-size: batch normalisation needs at least 2"),
        (["train", "--dataset", "mnist"], "mnist: no data folder; name the one with"),
        (["train", "--dataset", "mnist", "--data-dir", "no"], "no: no such folder"),
        (["train", "--dataset", "cifar10"], "cifar10: no data folder; name the one with"),
        (["train", "--dataset", "cifar10", "--data-dir", "."], ".: holds no data_batch_1.bin or"),
        (["train", "--load", "no.safetensors"], "no.safetensors: No such file or directory"),
        (["train", "--load", "."], ".: Is a directory"),
        (["train", "--dataset", "mnist", "--data-dir", "plain"], "plain: is not a folder"),
        (["train", "--hidden", *["10000000"] * 2], "not enough memory; Unable to allocate"),
        (["train", "--hidden", "9" * 20], "not enough memory; Unable to allocate"),
        (["train", "--save", "no/file"], "no/file: its folder does not exist"),
        (["train", "--save", "."], ".: exists and is not a regular file"),
        (["train", "--out", "plain"], "plain: is not a folder"),
        (["train", "--out", "plain/deeper"], "plain/deeper: Not a directory"),
        (["train", "--load", "plain"], "plain: damaged, cut short, or not a safetensors file"),
        (["train", "--dtype", "float16"], "invalid choice: 'float16'"),
        (
            ["train", "--resume"],
            "--resume: goes on from the file of --save, and there is no --save",
        ),
        (["train", "--resume", "--save", "no.st"], "no.st: No such file or directory"),
        (["train", "--resume", "--load", "x"], "--load: not allowed with argument --resume"),
        (["train", "--resume", "--save", "plain"], "plain: damaged, cut short, or not a safetens"),
        (["moments"], "the following arguments are required: FILE"),
        (["moments", "no.npy"], "no.npy: No such file or directory"),
        (["moments", "."], ".: Is a directory"),
        (["moments", "plain"], "plain: damaged, or not a .npy file"),
        (["data", "--data-dir", "no"], "no: no such folder"),
        (["data", "--data-dir", "plain"], "plain: is not a folder"),
        (["data", "mnist"], "unrecognized arguments: mnist"),
        (["reproduce"], "NAME: expected an experiment or more, or all; --list shows them"),
        (["reproduce", "imagenet"], "argument NAME: expected "),
        (["reproduce", "imagenet"], "or all; got 'imagenet'"),
        (["reproduce", "all", "imagenet"], "or all; got 'imagenet'"),
        (["reproduce", "mnist", "--out", "plain"], "plain: is not a folder"),
        (["reproduce", "mnist", "--quick", "--full"], "not allowed with argument --quick"),
        (["reproduce", "mnist", "--jobs", "0"], "--jobs: expected a positive integer; got '0'"),
        (["reproduce", "mnist", "--seed", "-1"], "--seed: expected an integer >= 0; got '-1'"),
        (["reproduce", "mnist", "--dataset", "letters"], "invalid choice: 'letters'"),
        (["reproduce", "mnist", "--dataset", "cifar10"], "; got 'cifar10'"),
        (["reproduce", "mnist", "--data-dir", "no"], "no: no such folder"),
        (["bench", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["bench", "--layout", "hwcn"], "invalid choice: 'hwcn'"),
        (["bench", "--level", "mmx"], "invalid choice: 'mmx'"),
        (["bench", "--shape", "8"], "argument --shape: expected N,C or N,C,L or N,C,H,W"),
        (["bench", "--shape", "8,0"], "all of them positive; got '8,0'"),
        (["bench", "--shape", "a,b"], "all of them positive; got 'a,b'"),
        (["bench", "--shape", "1,5"], "shape (1, 5): training needs more than one value"),
        (["bench", "--shape", "9999999,9999999"], "GB for its arrays, of this machine's"),
        (["bench", "--op", "train,fly"], "argument --op: expected names out of train, train_relu,"),
        (
            ["bench", "--against", "tensor"],
            "expected names out of numpy, torch, jax, cupy or none; got 'te",
        ),
        (["bench", "--against", "numpy,none"], "got 'none'"),
        (["bench", "--threads", "2000"], "num_threads: expected 1 to 1024; got 2000"),
        (["bench", "--json", "no/file"], "no/file: its folder does not exist"),
        (["bench", "--plot", "."], ".: exists and is not a regular file"),
    ],
)
def test_wrong_usage_is_one_line(capsys, tmp_path, argv, message):
    (tmp_path / "plain").write_text("a file\n")
    assert_refused(capsys, tmp_path, argv, message)


def test_an_error_without_an_extra(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = 'figures: need matplotlib; pip install "bncpu[train]"'
    assert_refused(capsys, tmp_path, ["reproduce", "mnist"], message)


def test_a_plot_without_an_extra(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = '--plot: needs matplotlib; pip install "bncpu[bench]"'
    assert_refused(capsys, tmp_path, ["bench", "--plot", "x.png"], message)


def test_train_prints_and_writes(capsys, tmp_path):
    assert run(*TRAIN, "--seed", 3, "--out", "deep/er", "--save", "m.safetensors") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "digits: 1438 images to train, 359 to test" in out
    assert "64 inputs, sigmoid layers of 20, 10 classes, with batch normalisation" in out
    results = json.loads((tmp_path / "deep/er/results.json").read_text())
    assert results["settings"] == training.DEFAULTS | {"hidden": [20], "seed": 3}
    assert [record["step"] for record in results["records"]] == [0, 24, 30]
    assert f"{results['records'][-1]['accuracy']:.2%}" in out
    with Image.open(tmp_path / "deep/er/figure.png") as figure:
        assert figure.width > 500
    for name in ("m.safetensors", "deep/er/results.json", "deep/er/figure.png"):
        assert name in out
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {"m.safetensors", "deep/er/results.json", "deep/er/figure.png"}


def test_a_model_goes_into_the_new_folder_of_the_results(tmp_path):
    assert run(*TRAIN, "--out", "run", "--save", "run/m.safetensors") == 0
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["figure.png", "m.safetensors", "results.json"]


def test_a_long_table_is_thinned(capsys):
    training.print_records(
        [nn.Record(step, 0.5 if step else None, 0.25) for step in range(0, 1010, 10)]
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["0", "25.00%"]
    assert [int(line.split()[0]) for line in lines[1:]] == [*range(0, 1000, 60), 1000]


def test_train_shows_a_progress_bar_on_stderr(capsys):
    assert run("train", "--hidden", 20, "--steps", 5) == 0
    out, err = capsys.readouterr()
    assert "5/5" in err
    assert "5/5" not in out


def test_train_without_batch_norm(capsys, tmp_path):
    assert run(*TRAIN, "--no-batch-norm", "--out", "out") == 0
    assert "without batch normalisation" in capsys.readouterr().out
    assert not json.loads((tmp_path / "out/results.json").read_text())["settings"]["batch_norm"]


@pytest.mark.parametrize("activation", training.ACTIVATIONS)
def test_every_activation_trains(activation, capsys):
    options = ["--activation", activation, "--learning-rate", 0.1, "--momentum", 0.5]
    assert run(*TRAIN, *options) == 0
    assert f"{activation} layers" in capsys.readouterr().out


def test_threads_are_those_of_bncpu_and_of_blas():
    with threadpoolctl.threadpool_limits(user_api="blas"):  # put back what the command changes
        assert run(*TRAIN, "--threads", 1) == 0
        assert bncpu.get_num_threads() == 1
        pools = threadpoolctl.threadpool_info()
        assert {pool["num_threads"] for pool in pools if pool["user_api"] == "blas"} <= {1}


def test_a_loaded_training_goes_on_exactly(capsys, tmp_path):
    options = ["--hidden", 20, 10, "--momentum", 0.9, "--learning-rate", 0.1, "--seed", 3]
    options += ["--batch-size", 50, "--activation", "tanh"]
    assert run("train", *options, "--steps", 40, "--save", "whole") == 0
    assert run("train", *options, "--steps", 15, "--save", "half") == 0
    # What is not said again comes from the file, the place in the epoch too.
    assert run("train", "--load", "half", "--steps", 25, "--save", "rest") == 0
    assert (tmp_path / "rest").read_bytes() == (tmp_path / "whole").read_bytes()
    assert (tmp_path / "rest").read_bytes() != (tmp_path / "half").read_bytes()
    # What is said again overrules it, where the architecture allows.
    assert run("train", "--load", "half", "--steps", 1, "--learning-rate", 0.2, "--save", "x") == 0
    assert nn.read_checkpoint("x").settings["learning_rate"] == 0.2
    assert nn.read_checkpoint("x").step == 16
    capsys.readouterr()
    for change, message in (
        (["--hidden", "30"], "half: another architecture; the weights of linear layer 0 have"),
        (["--no-batch-norm"], "half: another architecture; layer 0 is"),
        (["--activation", "relu"], "layer 2 is Tanh() in the file and ReLU() in the model"),
    ):
        argv = ["train", "--load", "half", *change, "--save", "y", "--out", "z"]
        assert_refused(capsys, tmp_path, argv, message)


def test_a_resumed_training_goes_on_to_the_length_of_the_whole(capsys, tmp_path):
    options = ["--hidden", 20, "--momentum", 0.9, "--learning-rate", 0.1]
    assert run("train", *options, "--epochs", 3, "--save", "whole") == 0
    assert run("train", *options, "--epochs", 1, "--save", "m") == 0
    assert run("train", *options, "--epochs", 3, "--save", "m", "--resume") == 0
    assert (tmp_path / "m").read_bytes() == (tmp_path / "whole").read_bytes()
    capsys.readouterr()
    argv = ["train", "--epochs", "3", "--save", "m", "--resume"]
    message = "--resume: m has taken 72 steps, and 72 are asked for in all; ask for more"
    assert_refused(capsys, tmp_path, argv, message)


def test_a_model_is_saved_every_epoch(monkeypatch):
    """So that a run that ends too soon leaves the last one."""
    step, taken = nn.SGD.step, iter(range(50))

    def interrupted(self, model):
        if next(taken, None) is None:
            raise KeyboardInterrupt
        step(self, model)

    monkeypatch.setattr(nn.SGD, "step", interrupted)
    assert run("train", "--hidden", 20, "--epochs", 3, "--no-progress", "--save", "m") == 130
    assert nn.read_checkpoint("m").step == 48


def test_training_in_float64(tmp_path):
    assert run(*TRAIN, "--dtype", "float64", "--save", "m") == 0
    model = nn.read_checkpoint(tmp_path / "m").model
    assert {array.dtype.name for array in model.values()} == {"float64", "int64"}


def saved(**settings):
    """Write the checkpoint m of a network with one hidden layer of 20,."""
    settings = training.DEFAULTS | {"hidden": [20]} | settings
    model = nn.fully_connected(
        [64, 20, 10], batch_norm=settings["batch_norm"] is True, rng=np.random.default_rng(0)
    )
    nn.save_checkpoint("m", model, nn.SGD(1.0), step=0, seed=0, settings=settings)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("hidden", "20", 'expected a list of sizes; got "20"'),
        ("hidden", [], "expected a list of sizes; got []"),
        ("hidden", [2.5], "expected a positive integer; got '2.5'"),
        ("hidden", [-5, 3], "expected a positive integer; got '-5'"),
        ("hidden", [True], "expected a positive integer; got 'true'"),
        ("activation", "exec", 'expected one of sigmoid, tanh, relu; got "exec"'),
        ("activation", ["relu"], 'expected one of sigmoid, tanh, relu; got ["relu"]'),
        ("dataset", "zzz", 'expected one of digits, mnist, cifar10; got "zzz"'),
        ("batch_norm", 1, "expected true or false; got 1"),
        ("seed", "a", "expected an integer >= 0; got '\"a\"'"),
        ("seed", -3, "expected an integer >= 0; got '-3'"),
        ("momentum", None, "expected a number >= 0 and < 1; got 'null'"),
        ("momentum", 7.0, "expected a number >= 0 and < 1; got '7.0'"),
        ("learning_rate", float("nan"), "expected a positive number; got 'NaN'"),
        ("learning_rate", float("inf"), "expected a positive number; got 'Infinity'"),
        ("batch_size", 0, "expected a positive integer; got '0'"),
    ],
)
def test_damaged_settings_in_a_file(capsys, tmp_path, name, value, expected):
    saved(**{name: value})
    message = f"bncpu train: m: its setting of {name} is damaged; {expected}"
    assert_refused(capsys, tmp_path, ["train", "--load", "m"], message)


def test_settings_in_a_file_that_contradict_it(capsys, tmp_path):
    argv = ["train", "--load", "m"]
    saved(batch_size=1)
    message = "bncpu train: m: its setting of batch_size: batch normalisation needs at least 2"
    assert_refused(capsys, tmp_path, argv, message)
    # Arrays of that size are never made on the word of the file, which does not hold them.
    saved(hidden=[10**7, 10**7])
    message = "m: another architecture; the weights of linear layer 0 have shape (20, 64) in the "
    assert_refused(capsys, tmp_path, argv, message)


def test_values_in_a_file_that_no_layer_has(capsys, tmp_path):
    model = nn.fully_connected([64, 20, 10], rng=np.random.default_rng(0))
    settings = training.DEFAULTS | {"hidden": [20]}
    model.layers[1].running_var[3] = -1
    nn.save_checkpoint("m", model, nn.SGD(1.0), step=0, seed=0, settings=settings)
    message = "m: does not fit the model; 1.running_var: expected no negative variance"
    assert_refused(capsys, tmp_path, ["train", "--load", "m"], message)
    model.layers[1].running_var[3] = 1
    nn.save_checkpoint("m", model, nn.SGD(1.0), step=10**30, seed=0, settings=settings)
    message = "m: its description is damaged (step is 1000"
    assert_refused(capsys, tmp_path, ["train", "--load", "m"], message)


@pytest.mark.parametrize("argv", [["info"], ["--help"], [*TRAIN, "--save", "m"]])
def test_a_reader_that_has_gone_away(tmp_path, argv):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "bncpu", *argv],
            cwd=tmp_path,
            # Unbuffered, argparse would hide the error of --help and end with 0.
            env=os.environ | {"PYTHONUNBUFFERED": ""},
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (141, "")
    assert (tmp_path / "m").exists() == ("--save" in argv)


def test_a_stdout_that_takes_nothing(capsys, monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bncpu, "show_config", refuse)
    assert run("info") == 2
    assert capsys.readouterr().err == "bncpu info: No space left on device\n"


def test_a_diverging_training(capsys, tmp_path):
    options = ["--no-batch-norm", "--activation", "relu", "--learning-rate", 1e30]
    assert run(*TRAIN, *options, "--save", "m") == 2
    err = capsys.readouterr().err
    assert err.startswith("bncpu train: loss: ")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moment", ["bncpu.nn.SGD.step", "os.fsync", "pathlib.Path.replace"])
def test_an_interrupt_leaves_the_old_files(capsys, tmp_path, monkeypatch, moment):
    (tmp_path / "m").write_bytes(b"old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(moment, interrupt)
    assert run(*TRAIN, "--save", "m", "--out", "out") == 130
    assert capsys.readouterr().err == "bncpu train: interrupted\n"
    assert (tmp_path / "m").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["m", "out"]
