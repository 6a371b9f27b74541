"""Arrays of files: read-only ones to read from, writeable ones to write to, and private copies."""

import mmap

import numpy as np
import pytest
from accuracy import assert_same_bits
from cases import normal

import bncpu

SHAPE = (8, 6, 40, 41)


@pytest.fixture
def x(rng):
    return normal(rng, SHAPE, np.float32)


@pytest.fixture
def mapped(tmp_path, x):
    """Return a function that maps a file in which x lies, behind some other bytes, in a mode."""
    path = tmp_path / "x.bin"
    path.write_bytes(b"header" + bytes(58) + x.tobytes())

    def open_as(mode):
        return np.memmap(path, x.dtype, mode, offset=64, shape=SHAPE)

    return open_as


def in_file(mapped):
    return np.array(mapped("r"))


def test_a_read_only_map_is_read(mapped, x):
    m = mapped("r")
    result = bncpu.batch_norm_train(m)
    expected = bncpu.batch_norm_train(x)
    assert type(result.y) is np.ndarray
    for got, wanted in zip(result, expected, strict=True):
        assert_same_bits(got, wanted)
    statistics = expected.mean, expected.invstd
    assert_same_bits(
        bncpu.batch_norm_backward(m, m, *statistics).dx,
        bncpu.batch_norm_backward(x, x, *statistics).dx,
    )
    assert_same_bits(bncpu.batch_moments(m).m2, bncpu.batch_moments(x).m2)
    assert_same_bits(in_file(mapped), x, "the file")


def test_a_map_is_read_in_place(mapped, monkeypatch):
    """No copy is made of what may be larger than memory."""
    m = mapped("r")
    monkeypatch.setattr(bncpu.problem, "_beside", None)  # where copies are made
    bncpu.batch_moments(m)
    bncpu.batch_norm_train(m[2:, 1:])


def test_a_writeable_map_is_written(tmp_path, x):
    path = tmp_path / "y.npy"
    y = np.lib.format.open_memmap(path, "w+", x.dtype, SHAPE)
    assert np.shares_memory(bncpu.batch_norm_train(x, out=y).y, y)
    y.flush()
    assert_same_bits(np.load(path, allow_pickle=False), bncpu.batch_norm_train(x).y, "the file")


@pytest.mark.parametrize("view", [(), (slice(None, None, 2),), (..., slice(1, None))], ids=str)
def test_a_map_is_normalised_in_place(mapped, x, view):
    m = mapped("r+")
    statistics = np.full(6, 0.5), np.full(6, 4.0)
    bncpu.batch_norm_infer(m[view], *statistics, activation="relu", out=m[view])
    m.flush()
    x[view] = bncpu.batch_norm_infer(x[view], *statistics, activation="relu")
    assert_same_bits(in_file(mapped), x, "the file")


def test_a_private_map_keeps_the_file(mapped, x):
    m = mapped("c")
    statistics = np.full(6, 0.5), np.full(6, 4.0)
    bncpu.batch_norm_infer(m, *statistics, out=m)
    assert_same_bits(np.array(m), bncpu.batch_norm_infer(x, *statistics))
    assert_same_bits(in_file(mapped), x, "the file")


def test_a_map_of_running_statistics(tmp_path, x):
    mean, var = (np.memmap(tmp_path / name, float, "w+", shape=6) for name in ("mean", "var"))
    var[...] = 1
    expected = np.zeros(6), np.ones(6)
    bncpu.batch_norm_train(x, running_mean=mean, running_var=var)
    bncpu.batch_norm_train(x, running_mean=expected[0], running_var=expected[1])
    for got, wanted in zip((mean, var), expected, strict=True):
        got.flush()
        assert_same_bits(np.fromfile(got.filename), wanted)


@pytest.mark.parametrize("which", ["out", "mask", "running_mean"])
def test_what_is_written_may_not_be_read_only(tmp_path, x, which):
    """The error comes before anything is written; a write would be a segmentation fault."""
    size = {"out": x.nbytes, "mask": (x.size + 7) // 8, "running_mean": 48}[which]
    path = tmp_path / "read-only.bin"
    path.write_bytes(bytes(-(-size // mmap.PAGESIZE) * mmap.PAGESIZE))
    kind = {"out": (np.float32, SHAPE), "mask": (np.uint8, size), "running_mean": (float, 6)}[which]
    arrays = {
        "out": np.full(SHAPE, 7, np.float32),
        "mask": np.full((x.size + 7) // 8, 7, np.uint8),
        "running_mean": np.full(6, 7.0),
        "running_var": np.full(6, 7.0),
    }
    before = {name: array.copy() for name, array in arrays.items()}
    arrays[which] = np.memmap(path, kind[0], "r", shape=kind[1])
    with pytest.raises(ValueError, match=f"^{which}: expected a writeable array; got a read-only"):
        bncpu.batch_norm_train(x, activation="relu", **arrays)
    del before[which]
    for name, array in before.items():
        assert_same_bits(arrays[name], array, name)
    assert not any(path.read_bytes())
