"""The scripts of benchmarks/ run, print and draw; how fast is not tested."""

import importlib
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bncpu import nn
from bncpu.bench import measure, operations
from bncpu.bench.operations import OPERATIONS, Problem

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    """Let the scripts of benchmarks/ be imported, and have little to do."""
    if not BENCHMARKS.is_dir():
        pytest.skip("only a checkout has benchmarks/")
    monkeypatch.setattr(measure, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(measure, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(measure, "ROUNDS", 1)
    monkeypatch.setattr(operations, "MOST_MEMORY", 1 << 16)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("setting", "sweeps", "onednn", "small_calls", "against_memory", "against_peers")
    modules = {name: importlib.import_module(name) for name in names}
    monkeypatch.setattr(modules["sweeps"], "PIXELS", (1, 4))
    monkeypatch.setattr(modules["sweeps"], "SIZE", 1 << 9)
    monkeypatch.setattr(modules["sweeps"], "BATCHES", (1, 2))
    monkeypatch.setattr(modules["sweeps"], "IMAGES", ((3, 2, 2),))
    monkeypatch.setattr(modules["small_calls"], "CALLS", 1)
    monkeypatch.setattr(modules["small_calls"], "REPEATS", 1)
    monkeypatch.setattr(modules["against_peers"], "UNTUNED", [(2, 3, 2, 2)])
    monkeypatch.setattr(modules["against_peers"], "PLAIN", [(4, 3)])
    yield modules
    for name in (*names, "tables", "figures", "resnet", "trainer"):
        sys.modules.pop(name, None)


def test_tables_of_benchmarks(scripts, capsys, tmp_path):  # noqa: ARG001
    tables = importlib.import_module("tables")
    path = tmp_path / "tables.json"
    options = ["--shape", "2,3,4,4", "--seconds", "0.001", "--against", "numpy", "--threads", "2"]
    tables.main(["all", "--json", str(path), *options])
    printed = capsys.readouterr().out
    for name in tables.TABLES:
        assert f"### {name}: " in printed
    assert "| (2, 3, 4, 4) |" in printed
    assert "| 4096 |" not in printed
    assert {row["operation"] for row in json.loads(path.read_text())["rows"]} <= set(OPERATIONS)


def test_figures_of_benchmarks(scripts, monkeypatch, capsys, tmp_path):  # noqa: ARG001
    figures = importlib.import_module("figures")
    monkeypatch.setattr(figures, "QUICK_SHAPES", [(2, 3, 4, 4)])
    monkeypatch.setattr(figures, "MATRIX", 8)
    monkeypatch.setattr(figures, "FEW_CHANNELS", (2, 3, 2, 2))
    monkeypatch.setattr(figures, "QUICK_SECONDS", 0.0)
    out = tmp_path / "deep" / "bench"
    figures.main(["--quick", "--out", str(out), "--against", "none", "--threads", "2"])
    printed = capsys.readouterr().out
    for name in figures.FIGURES:
        assert f"{name}.png" in printed
        with Image.open(out / f"{name}.png") as image:
            assert image.width > 500
        assert json.loads((out / f"{name}.json").read_text())["rows"]
    with pytest.raises(SystemExit):
        figures.main(["bars", "pies"])


def test_why_there_is_no_onednn(scripts, monkeypatch, tmp_path):
    onednn = scripts["onednn"]
    monkeypatch.setattr(onednn, "PROGRAM", tmp_path / "build" / "onednn_bench")
    compiler = tmp_path / "c++"
    for script, reason in (
        ("echo 'x.cpp:3:10: fatal error: dnnl.hpp: No such file' >&2", "apt-get install libdnnl"),
        ("echo 'x.cpp:3:10: error: what is this?' >&2", "does not compile: x.cpp:3:10: error: wh"),
    ):
        compiler.write_text(f"#!/bin/sh\n{script}\nexit 1\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        onednn.program.cache_clear()
        assert reason in onednn.why_not()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    onednn.program.cache_clear()
    assert "no C++ compiler" in onednn.why_not()
    onednn.program.cache_clear()


def test_onednn_takes_its_turn(scripts, monkeypatch):
    onednn = scripts["onednn"]
    if reason := onednn.why_not():
        pytest.skip(reason)
    monkeypatch.setattr(operations, "CACHES_TO_FILL", 0)
    problem = Problem((2, 3, 4, 4), operations=OPERATIONS.values(), rotate=False)
    for name in OPERATIONS:
        found = onednn.contenders(problem, OPERATIONS[name], 1)
        assert bool(found) == (name in onednn.OPERATIONS)
        for contender in found.values():
            assert min(contender.turn(0.0)) > 0
    process = onednn.Process((2, 3), "float32", 1)
    with pytest.raises(RuntimeError, match="no such operation"):
        process.ask("fly", "nchw", 0.0)
    process.close()


def test_scaling_of_benchmarks(scripts, monkeypatch, capsys):  # noqa: ARG001
    """In one process; under mpiexec it is run by hand."""
    pytest.importorskip("mpi4py.MPI", exc_type=(ImportError, RuntimeError))
    scaling = importlib.import_module("scaling")
    monkeypatch.setattr(scaling, "LAYERS", ((2, 3, 2, 2),))
    monkeypatch.setattr(scaling, "HIDDEN", (4,))
    monkeypatch.setattr(scaling, "CHANNELS", (3,))
    monkeypatch.setattr(scaling, "ROUNDS", 10)
    scaling.main(["--quick"])
    sys.modules.pop("scaling")
    printed = capsys.readouterr().out
    assert printed.count("### ") == 3
    assert "| (2, 3, 2, 2) |" in printed


@pytest.mark.usefixtures("torch_threads")
def test_resnet(scripts, monkeypatch, capsys, tmp_path):  # noqa: ARG001
    resnet = importlib.import_module("resnet")
    monkeypatch.setattr(resnet, "resnet", partial(resnet.resnet, blocks=(2, 1), width=8))
    monkeypatch.setattr(
        resnet, "ERRORS_OF_PYTORCH", 1e3
    )  # a matter of luck where so little is summed
    path = tmp_path / "resnet.json"
    options = ["--batch", "4", "--image", "32", "--steps", "2", "--rounds", "1"]
    assert resnet.main([*options, "--threads", "1", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "outputs and gradients: equal within tolerance" in printed
    document = json.loads(path.read_text())
    for part in ("training", "inference"):
        assert set(document[part]) == set(resnet.NAMES)
        assert all(row["norm"] > 0 for row in document[part].values())
        assert document[part]["PyTorch"]["both"] > document[part]["PyTorch"]["norm"]
    assert len(document["losses"]["PyTorch, float64"]) == 2
    monkeypatch.setattr(resnet, "TOLERANCE", 0.0)
    assert not resnet.equality(resnet.resnet(), 32)[1]


@pytest.mark.usefixtures("default_threads", "torch_threads")
def test_trainer_of_benchmarks(scripts, monkeypatch, capsys, tmp_path):  # noqa: ARG001
    trainer = importlib.import_module("trainer")

    def here(command, args):
        return json.dumps(trainer.turn(*command[1:], args.batch, args.steps, args.threads))

    monkeypatch.setattr(trainer, "in_process", here)
    out = tmp_path / "trainer.json"
    trainer.main(["--quick", "--batch", "2", "--threads", "1", "--json", str(out)])
    text = capsys.readouterr().out
    assert "4.2 million multiplications an image" in text
    assert "| Conv2d, backward |" in text
    results = json.loads(out.read_text())
    assert list(results) == list(trainer.NETWORKS)
    assert all(result["ratio"] > 0 for result in results.values())


@pytest.mark.parametrize("network", ["with BN", "without BN, with LRN"])
def test_the_trainers_network_is_pytorchs(scripts, network):  # noqa: ARG001
    torch = pytest.importorskip("torch")
    trainer = importlib.import_module("trainer")
    model, x, y = trainer.problem(network, 3, np.float64)
    there = trainer.in_pytorch(model)
    theirs = torch.nn.functional.cross_entropy(there(torch.from_numpy(x)), torch.from_numpy(y))
    theirs.backward()
    loss = nn.SoftmaxCrossEntropy()
    assert loss.forward(model.forward(x), y) == pytest.approx(theirs.item(), rel=1e-12)
    model.backward(loss.backward())
    gradients = list(model.gradients().values())
    for ours, parameter in zip(gradients, there.parameters(), strict=True):
        size = np.abs(ours).max()
        np.testing.assert_allclose(parameter.grad.numpy(), ours, rtol=0, atol=1e-9 * size)
