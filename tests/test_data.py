"""Datasets: the embedded digits, and IDX files, of which the damaged ones are refused by name."""

import gzip
import os
import struct
import sys

import numpy as np
import pytest

from bncpu import data
from bncpu.data.mnist import FILES, read_idx


def idx(array):
    """Return an array of bytes in the IDX format."""
    header = bytes([0, 0, 0x08, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


@pytest.fixture
def parts():
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (30, 5, 4), np.uint8),
        "y_train": rng.integers(0, 10, 30, np.uint8),
        "x_test": rng.integers(0, 256, (7, 5, 4), np.uint8),
        "y_test": rng.integers(0, 10, 7, np.uint8),
    }


def write(folder, parts, compress=False):
    folder.mkdir(parents=True, exist_ok=True)
    for part, array in parts.items():
        content = idx(array)
        if compress:
            (folder / f"{FILES[part]}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / FILES[part]).write_bytes(content)


def assert_is(dataset, parts):
    assert dataset.name == "mnist"
    for part, array in parts.items():
        got = getattr(dataset, part)
        if part.startswith("x"):
            assert got.dtype == np.float32
            np.testing.assert_array_equal(got, array.reshape(len(array), -1) / np.float32(255))
        else:
            assert got.dtype == np.int64
            np.testing.assert_array_equal(got, array)


def test_digits():
    digits = data.load("digits")
    assert digits.name == "digits"
    assert digits.x_train.shape == (1438, 64)
    assert digits.x_test.shape == (359, 64)
    for x, y in ((digits.x_train, digits.y_train), (digits.x_test, digits.y_test)):
        assert x.dtype == np.float32
        assert y.dtype == np.int64
        assert x.min() == 0
        assert x.max() == 1
    counts = np.bincount(digits.y_test) / np.bincount(digits.y_train)
    assert np.all(np.abs(counts - 0.25) < 0.01)
    again = data.load_digits()
    assert all(np.array_equal(a, b) for a, b in zip(digits[1:], again[1:], strict=True))
    # No image stands on both sides more often than the set itself repeats images.
    rows = np.concatenate([digits.x_train, digits.x_test])
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(
        ImportError, match=r'digits: need scikit-learn; pip install "bncpu\[train\]"'
    ):
        data.load_digits()


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("sub", [".", "mnist"])
def test_mnist(tmp_path, monkeypatch, parts, compress, sub):
    write(tmp_path / sub, parts, compress)
    assert_is(data.load("mnist", tmp_path), parts)
    monkeypatch.setenv("BNCPU_DATA", str(tmp_path))
    assert_is(data.load_mnist(), parts)


def test_the_folder_given_comes_before_the_environment(tmp_path, monkeypatch, parts):
    write(tmp_path, parts)
    monkeypatch.setenv("BNCPU_DATA", "/nowhere")
    assert_is(data.load_mnist(tmp_path), parts)


def test_missing_folders_and_files(tmp_path, monkeypatch, parts):
    monkeypatch.delenv("BNCPU_DATA", raising=False)
    with pytest.raises(
        FileNotFoundError, match=r"mnist: no data folder; .*--data-dir or BNCPU_DATA"
    ):
        data.load_mnist()
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        data.load_mnist(tmp_path / "nowhere")
    file = tmp_path / "file"
    file.write_bytes(b"")
    monkeypatch.setenv("BNCPU_DATA", str(file))
    with pytest.raises(NotADirectoryError, match="file: is not a folder"):
        data.load_mnist()
    write(tmp_path, parts)
    (tmp_path / FILES["y_test"]).unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no t10k-labels-idx1-ubyte or .*\.gz"):
        data.load_mnist(tmp_path)


def test_an_unknown_name():
    with pytest.raises(ValueError, match="dataset: expected one of digits, mnist; got 'letters'"):
        data.load("letters")


def header(count, dimensions=3, magic=b"\0\0\x08"):
    return magic + bytes([dimensions]) + struct.pack(">I", count) * dimensions


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected it to begin with 00000803; got nothing"),
        (b"\0\0", "expected it to begin with 00000803; got 0000"),
        (b"\x89PNG\r\n\x1a\n" * 4, "expected it to begin with 00000803; got 89504e47"),
        (header(2, magic=b"\0\0\x0d") + bytes(32), "not an IDX file"),
        (header(8, dimensions=1) + bytes(8), "begin with 00000803; got 00000801"),
        (header(2)[:9], "cut short within its header"),
        (header(2) + bytes(7), "its header promises 8 bytes, it holds exactly 7"),
        (header(2) + bytes(9), "its header promises 8 bytes, it holds exactly 9"),
        (header(2**32 - 1) + bytes(9), f"its header promises {(2**32 - 1) ** 3} bytes"),
    ],
)
def test_damaged_files(tmp_path, content, message):
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"images: .*{message}"):
        read_idx(path, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(header(2) + bytes(7)), "cut short; 7 of 8 bytes are there"),
        (gzip.compress(header(2) + bytes(9)), "longer than the 8 bytes"),
        (gzip.compress(header(2) + bytes(8))[:-12], "damaged or cut short"),
        (gzip.compress(header(2**32 - 1)), "its header promises .* it holds at most"),
        (gzip.compress(header(2)[:9]), "cut short within its header"),
        (header(2) + bytes(8), "damaged or cut short"),
        (b"", "got nothing"),
        (b"\x1f\x8b\x08" + b"\xff" * 40, "damaged or cut short"),
    ],
)
def test_damaged_gzip_files(tmp_path, content, message):
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"images\.gz: .*{message}"):
        read_idx(path, 3)


def test_a_wrong_checksum(tmp_path):
    content = bytearray(gzip.compress(header(2) + bytes(8)))
    content[-8] ^= 1
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged or cut short"):
        read_idx(path, 3)


def test_nothing_is_allocated_on_the_word_of_a_header(tmp_path, monkeypatch):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(header(2**20)))

    def allocate(*_):
        raise AssertionError("allocated")

    monkeypatch.setattr(np, "empty", allocate)
    with pytest.raises(ValueError, match="its header promises"):
        read_idx(path, 3)


@pytest.mark.parametrize(
    ("part", "array", "message"),
    [
        ("y_train", np.zeros(29, np.uint8), "train-labels.*: 29 labels for 30 images"),
        ("y_test", np.full(7, 10, np.uint8), "t10k-labels.*: expected labels 0 to 9; got 10"),
        ("x_test", np.zeros((7, 4, 5), np.uint8), r"t10k-images.*: images of \(4, 5\) pixels"),
        ("x_test", np.zeros((0, 5, 4), np.uint8), "t10k-labels.*: 7 labels for 0 images"),
        ("x_train", np.zeros((30, 0, 0), np.uint8), "train-images.*: holds no image"),
    ],
)
def test_files_that_do_not_belong_together(tmp_path, parts, part, array, message):
    write(tmp_path, parts | {part: array})
    with pytest.raises(ValueError, match=message):
        data.load_mnist(tmp_path)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("shards", [1, 2, 3, 8])
def test_shards_make_the_whole(tmp_path, parts, shards, compress):
    """Of 8, one has no row of the 7 for test."""
    write(tmp_path, parts, compress)
    for name, folder in (("mnist", tmp_path), ("digits", None)):
        whole = data.load(name, folder)
        pieces = [data.load(name, folder, part=part, parts=shards) for part in range(shards)]
        for arrays, array in zip(zip(*pieces, strict=True), whole, strict=True):
            if isinstance(array, str):
                continue
            np.testing.assert_array_equal(np.concatenate(arrays), array)
            assert len({len(piece) for piece in arrays}) <= 2


def test_a_shard_reads_no_other_rows(tmp_path, parts, monkeypatch):
    write(tmp_path, parts)
    sizes = []
    empty = np.empty
    monkeypatch.setattr(np, "empty", lambda size, dtype: sizes.append(size) or empty(size, dtype))
    read_idx(tmp_path / FILES["x_train"], 3, slice(10, 13))
    assert sizes == [3 * 5 * 4]


# The files that BNCPU_DATA names, of MNIST or of a set like it, are read too where it is set.
SOURCES = ["small files", *filter(None, [os.environ.get("BNCPU_DATA")])]


@pytest.mark.parametrize("source", SOURCES)
def test_what_holds_of_every_set(tmp_path, monkeypatch, parts, source):
    if source == "small files":
        write(tmp_path, parts)
        monkeypatch.setenv("BNCPU_DATA", str(tmp_path))
    name, x_train, y_train, x_test, y_test = data.load_mnist()
    assert name == "mnist"
    assert x_train.shape[1] == x_test.shape[1]
    for x, y in ((x_train, y_train), (x_test, y_test)):
        assert (x.dtype, y.dtype) == (np.float32, np.int64)
        assert x.shape == (len(y), x.shape[1])
        assert 0 <= x.min() < x.max() <= 1
        assert 0 <= y.min() < y.max() <= 9
