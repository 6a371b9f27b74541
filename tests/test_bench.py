"""The benchmark computes what it times, and reports it; how fast is not tested."""

import importlib
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from accuracy import assert_same_bits
from PIL import Image

import bncpu
from bncpu import bench
from bncpu.bench import contenders, measure, operations, peers, report, rows
from bncpu.bench.operations import OPERATIONS, Problem

SHAPE = (4, 8, 6, 5)


@pytest.fixture
def small(monkeypatch):
    """Let the benchmark run without waiting, on few and small arrays."""
    monkeypatch.setattr(bench, "BATCH", SHAPE[0])
    monkeypatch.setattr(bench, "QUICK", [SHAPE[1:], (3, 2, 2)])
    monkeypatch.setattr(bench, "QUICK_SECONDS", 0.0)
    monkeypatch.setattr(bench, "SECONDS", 0.0)
    monkeypatch.setattr(measure, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(measure, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(measure, "ROUNDS", 2)
    monkeypatch.setattr(operations, "MOST_MEMORY", 1 << 16)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("layout", operations.LAYOUTS)
@pytest.mark.parametrize("dtype", operations.DTYPES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_ours_takes_all_sets_in_turn(name, dtype, layout):
    operation = OPERATIONS[name]
    problem = Problem(SHAPE, dtype, layout, [operation])
    assert len(problem.sets) > 1
    if operation.backward and operation.add:
        for arrays in problem.sets:
            arrays.mask[...] = problem.sets[0].mask
    call = contenders.ours(problem, operation, 2)
    results = [call() for _ in problem.sets]
    new = contenders.ours(problem, operation, 1, allocate=True)()
    if operation.function == "moments":
        assert results[0].count == new.count == problem.size // SHAPE[1]
        return
    for arrays in problem.sets:
        assert_same_bits(arrays.out, problem.sets[0].out)
        assert not np.shares_memory(arrays.x, arrays.out)
    first = new if operation.function == "infer" else new[0]
    assert not any(np.shares_memory(first, arrays.out) for arrays in problem.sets)
    assert_same_bits(first, problem.sets[0].out)
    assert np.any(first != 0)
    if operation.add and operation.backward:
        assert_same_bits(new.dresidual, problem.sets[0].dresidual)
    if operation.mask and operation.forward:
        y = problem.sets[0].out.reshape(-1) != 0
        assert_same_bits(problem.sets[0].mask, np.packbits(y, bitorder="little"))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", operations.DTYPES)
@pytest.mark.parametrize("shape", [SHAPE, (3, 5, 7)])
def test_streams_move_what_they_say(dtype, shape):
    problem = Problem(shape, dtype)
    x, dy, _ = (contenders.as_real(array) for array in problem.sets[0][:3])
    odd = problem.size % 2 and problem.itemsize == 2
    assert x.nbytes == problem.sets[0].x.nbytes - 2 * odd
    for kind, expected in {"copy": x, "triad": x + dy, "read": None}.items():
        assert contenders.stream_bytes(problem, kind) == operations.STREAMS[kind] * x.nbytes
        for name, stream in contenders.streams(problem, kind, 2).items():
            assert name.startswith(kind)
            for arrays in problem.sets:
                arrays.out.fill(0)
            for _ in problem.sets:
                stream.call()
            for arrays in problem.sets:
                if expected is not None:
                    np.testing.assert_array_equal(contenders.as_real(arrays.out), expected)


def test_the_fewest_bytes():
    def of(name):
        return OPERATIONS[name].bytes(800, 4) / 800

    assert of("moments") == 4
    assert of("train") == of("infer_relu") == 8
    assert of("infer_add_relu") == of("backward") == of("backward_relu") == 12
    assert of("train_add_relu") == 12 + 1 / 8
    assert of("backward_add_relu") == 16 + 1 / 8
    kinds = {name: operation.stream for name, operation in OPERATIONS.items()}
    assert kinds["moments"] == "read"
    assert kinds["infer"] == kinds["train_relu"] == "copy"
    assert kinds["train_add_relu"] == kinds["backward"] == "triad"


def test_rotation_leaves_the_cache():
    """Arrays of a megabyte rotate over more than the last cache; small ones over MOST_SETS."""
    problem = Problem((64, 64, 8, 8))
    assert problem.from_memory
    array = problem.sets[0].x.nbytes
    assert len(problem.sets) * array >= operations.CACHES_TO_FILL * bncpu.cpu.cache_sizes().l3
    assert not Problem((64, 64, 8, 8), rotate=False).from_memory
    assert len(Problem((2, 3)).sets) == operations.MOST_SETS


def test_measure_takes_turns():
    order = []
    calls = {name: measure.Timed(lambda name=name: order.append(name)) for name in "ab"}
    turns = measure.measure(calls, seconds=0.0, rounds=3)
    assert {name: len(times) for name, times in turns.items()} == {"a": 3, "b": 3}
    assert all(value >= 0.0 for times in turns.values() for value in times)
    changes = [name for name, before in zip(order, [None, *order], strict=False) if name != before]
    assert changes == ["a", "b", "a", "b", "a"]  # warm-up, then b a, a b, b a


def test_a_ratio_is_of_rounds():
    assert measure.ratio([2.0, 20.0, 3.0], [1.0, 10.0, 10.0]) == 2.0


def test_a_turn_can_have_another_level():
    seen = []
    for level in bncpu.cpu.runnable_levels():
        measure.Timed(lambda: seen.append(bncpu.cpu.level), level).turn(0.0)
    assert tuple(dict.fromkeys(seen)) == bncpu.cpu.runnable_levels()


@pytest.mark.usefixtures("small")
def test_run(capsys, tmp_path):
    path, picture = tmp_path / "figures.json", tmp_path / "bars.png"
    chosen = ["train", "backward", "moments"]
    found = bench.run(
        quick=True,
        num_threads=2,
        dtype="float64",
        operations=chosen,
        against=["numpy"],
        json_path=path,
        plot_path=picture,
    )
    printed = capsys.readouterr().out
    assert bncpu.cpu.level in printed
    assert str(SHAPE) in printed
    assert "geometric mean" in printed
    figures = json.loads(path.read_text())
    assert figures["threads"] == 2
    assert figures["dtype"] == "float64"
    assert figures["level"] == bncpu.cpu.level
    assert {"machine", "caches", "numpy", "torch", "jax", "eps"} <= set(figures)
    assert [(tuple(row["shape"]), row["operation"]) for row in figures["rows"]] == [
        (shape, name) for shape in (SHAPE, (4, 3, 2, 2)) for name in chosen
    ]
    assert [row["bytes"] for row in figures["rows"][:3]] == [2 * 7680, 3 * 7680, 7680]
    for row, measured in zip(figures["rows"], found, strict=True):
        assert row["fraction"] == measured.fraction
        assert row["ratios"] == {"numpy": measured.ratio("numpy")}
        allocating = set() if row["operation"] == "moments" else {"bncpu, allocating"}
        assert set(row["seconds"]) == {"bncpu", "numpy"} | allocating
        assert row["seconds"]["bncpu"] == np.median(row["turns"]["bncpu"])
    with Image.open(picture) as image:
        assert image.width > 500
    assert sorted(tmp_path.iterdir()) == [picture, path]


@pytest.mark.usefixtures("small")
def test_the_peers_that_are_installed_compete(monkeypatch, capsys):
    monkeypatch.delitem(peers.PEERS, "jax")  # see test_jax_computes_the_same
    (row,) = bench.run(shapes=[(7, 5)], operations=["train"])
    torch = {"torch", "torch, out="} if importlib.util.find_spec("torch") else set()
    assert set(row.peers) == {"numpy"} | torch
    assert f"level    {bncpu.cpu.level}" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_an_absent_peer_is_skipped_with_the_reason(monkeypatch, capsys):
    for name in ("torch", "jax"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, peers.PEERS[name].module, raising=False)
    (row,) = bench.run(shapes=[(7, 5)], operations=["train"], against=["jax", "numpy", "torch"])
    assert row.peers == ["numpy"]
    printed = capsys.readouterr().out
    assert "torch    not installed; pip install torch" in printed
    assert "jax      not installed; pip install jax" in printed


def test_a_peer_that_cannot_have_the_threads_is_skipped(monkeypatch):
    class Stubborn:
        @staticmethod
        def threads(number):
            raise ValueError(f"never on {number}")

    monkeypatch.setitem(sys.modules, "bncpu.bench.xla", Stubborn)
    with peers.using(["jax", "numpy"], 3) as found:
        assert found.absent == {"jax": "skipped: never on 3"}
        assert list(found.modules) == ["numpy"]


def test_torch_gets_its_threads_back():
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    with peers.using(["torch"], before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.usefixtures("small")
def test_a_level_holds_for_the_run(capsys):
    level, before = bncpu.cpu.runnable_levels()[0], bncpu.cpu.level
    (row,) = bench.run(shapes=[(7, 5)], operations=["train"], against=[], level=level)
    assert row.level == level
    assert f"level    {level}" in capsys.readouterr().out
    assert bncpu.cpu.level == before


def a_row(**changes):
    values = {
        "shape": SHAPE,
        "operation": "train",
        "dtype": "float32",
        "layout": "nchw",
        "threads": 1,
        "level": "generic",
        "bytes": 1000,
        "stream": "copy",
        "stream_bytes": 1000,
        "stream_turns": [1e-3, 1e-3],
        "from_memory": True,
        "turns": {
            "bncpu": [2e-3, 2e-3],
            "bncpu, allocating": [4e-3] * 2,
            "torch": [8e-3] * 2,
            "torch, out=": [6e-3] * 2,
        },
    }
    return rows.Row(**values | changes)


def test_ratios_compare_like_with_like():
    row = a_row()
    assert row.fraction == 0.5
    assert row.ratio("torch") == 2.0
    assert row.ratio("torch, out=") == 3.0
    turns = {"bncpu": [2e-3], "onednn nchw": [8e-3], "numpy": [4e-3]}
    row = a_row(turns=turns, stream_turns=[1e-3])
    assert row.ratio("onednn nchw") == 4.0
    assert row.ratio("numpy") == 2.0  # moments: nothing to allocate


def test_table():
    cached = a_row(shape=(2, 3), from_memory=False, turns={"bncpu": [2e-6] * 2})
    lines = report.table([a_row(), cached]).splitlines()
    names = ["shape", "operation", "bncpu", "GB/s", "of memory", "torch", "torch, out="]
    assert lines[0].split("  ")[0] == names[0]
    assert " ".join(lines[0].split()) == " ".join(names)
    assert lines[1].split()[-6:] == ["2.00", "ms", "0.0", "50%", "2.0x", "3.0x"]
    assert "50000%*" in lines[2]
    assert lines[2].split()[-2:] == ["-", "-"]
    assert lines[3].split()[:3] == ["geometric", "mean", "train"]
    assert lines[-1] == "* small arrays, which stay in the cache"
    assert report.seconds_text(1.5) == "1.50 s"
    assert report.seconds_text(0.0123) == "12.3 ms"
    assert report.seconds_text(123e-6) == "123 us"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shapes": [(1, 5)]}, "shape (1, 5): training needs more than one value per channel"),
        ({"shapes": [(10**7, 10**7)]}, "GB for its arrays, of this machine's"),
        ({"num_threads": 0}, "num_threads: expected 1 to"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(capsys, tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        bench.run(json_path=tmp_path / "f.json", **options)
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("small")
def test_one_value_per_channel_is_enough_for_inference():
    (row,) = bench.run(shapes=[(1, 5)], operations=["infer"], against=[])
    assert row.shape == (1, 5)


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        ("ml_dtypes", {"dtype": "bfloat16"}, "bfloat16: needs ml_dtypes; pip install ml_dtypes"),
        ("matplotlib", {"plot_path": "x.png"}, "--plot: needs matplotlib; pip install"),
    ],
)
def test_a_missing_package_is_said_first(monkeypatch, capsys, module, options, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=re.escape(message)):
        bench.run(**options)
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("small")
def test_an_interrupt_leaves_no_file(monkeypatch, tmp_path):
    path = tmp_path / "figures.json"
    path.write_text("what was there")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure_part", interrupt)
    with pytest.raises(KeyboardInterrupt):
        bench.run(quick=True, against=[], json_path=path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "what was there"


@pytest.mark.usefixtures("small")
def test_a_file_that_cannot_be_written_is_said_first(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "measure_part", lambda *_, **__: pytest.fail("measured first"))
    with pytest.raises(FileNotFoundError):
        bench.run(quick=True, against=[], json_path=tmp_path / "missing" / "figures.json")


def test_importing_it_imports_no_peer_and_no_plotting():
    code = "import bncpu.bench, bncpu.bench.options, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = {name.partition(".")[0] for name in done.stdout.split()}
    assert not found & {"torch", "jax", "matplotlib", "ml_dtypes", "tqdm"}
