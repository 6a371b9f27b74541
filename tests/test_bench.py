"""The benchmark computes what it times, and reports it; how fast is not tested."""

import json

import numpy as np
import pytest
from accuracy import assert_backward, assert_train

import bncpu
from bncpu import bench

SHAPE = (4, 8, 6, 5)


@pytest.fixture
def small(monkeypatch):
    """Let the benchmark run on shapes that take no time."""
    monkeypatch.setattr(bench, "BATCH", SHAPE[0])
    monkeypatch.setattr(bench, "QUICK", [SHAPE[1:], (3, 2, 2)])
    monkeypatch.setattr(bench, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(bench, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(bench, "QUICK_SECONDS", 0.0)
    monkeypatch.setattr(bench, "MOST_MEMORY", 1 << 16)


def test_textbook_computes_batch_norm(dtype):
    buffers = bench.Buffers(SHAPE, dtype)
    x, dy, _ = buffers.turn()
    y = bench.textbook_train(x, buffers.gamma, buffers.beta)
    result = bncpu.TrainResult(y, buffers.mean, buffers.invstd)
    assert_train(result, x, buffers.gamma, buffers.beta)
    narrow = buffers.mean.astype(dtype), buffers.invstd.astype(dtype)
    gradients = bncpu.Gradients(*bench.textbook_backward(dy, x, *narrow, buffers.gamma))
    assert_backward(gradients, dy, x, buffers.mean, buffers.invstd, buffers.gamma)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("operation", bench.OPERATIONS)
def test_contenders_take_all_sets_in_turn(dtype, operation):
    buffers = bench.Buffers(SHAPE, dtype)
    assert len(buffers.sets) > 1
    for x, _, out in buffers.sets:
        assert not np.shares_memory(x, out)
    calls = bench.contenders(operation, buffers, num_threads=2)
    for _ in buffers.sets:
        calls["bncpu"]()
    x, dy, _ = buffers.sets[0]
    if operation == "train":
        expected = bncpu.batch_norm_train(x, buffers.gamma, buffers.beta).y
    else:
        expected = bncpu.batch_norm_backward(dy, x, buffers.mean, buffers.invstd, buffers.gamma).dx
    for _, _, out in buffers.sets:
        np.testing.assert_array_equal(out, expected)
    for name in ("stream", "stream, non-temporal"):
        for _ in buffers.sets:
            calls[name]()
        for x, dy, out in buffers.sets:
            np.testing.assert_array_equal(out, x if operation == "train" else x + dy)
    calls["numpy"]()


def test_measure_takes_turns():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    medians = bench.measure(calls, seconds=0.0, rounds=3)
    assert set(medians) == {"a", "b"}
    assert all(value >= 0.0 for value in medians.values())
    turns = [name for name, before in zip(order, [None, *order], strict=False) if name != before]
    assert turns == ["a", "b"] * 4  # a warm-up and three rounds


@pytest.mark.usefixtures("small")
def test_run(capsys, tmp_path):
    path = tmp_path / "figures.json"
    bench.run(quick=True, num_threads=2, dtype="float64", json_path=path)
    printed = capsys.readouterr().out
    assert bncpu.cpu.level in printed
    assert str(SHAPE) in printed
    figures = json.loads(path.read_text())
    assert figures["threads"] == 2
    assert figures["dtype"] == "float64"
    assert figures["level"] == bncpu.cpu.level
    rows = figures["rows"]
    assert [(tuple(row["shape"]), row["operation"]) for row in rows] == [
        (SHAPE, "train"),
        (SHAPE, "backward"),
        ((4, 3, 2, 2), "train"),
        ((4, 3, 2, 2), "backward"),
    ]
    assert [row["bytes"] for row in rows[:2]] == [2 * 960 * 8, 3 * 960 * 8]
    for row in rows:
        assert row["fraction"] == row["seconds"]["stream"] / row["seconds"]["bncpu"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("small")
def test_an_interrupt_leaves_no_file(monkeypatch, tmp_path):
    path = tmp_path / "figures.json"
    path.write_text("what was there")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure_shape", interrupt)
    with pytest.raises(KeyboardInterrupt):
        bench.run(quick=True, json_path=path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "what was there"


@pytest.mark.usefixtures("small")
def test_a_file_that_cannot_be_written_is_said_first(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "measure_shape", lambda *_, **__: pytest.fail("measured first"))
    with pytest.raises(FileNotFoundError):
        bench.run(quick=True, json_path=tmp_path / "missing" / "figures.json")
