"""Datasets: the embedded digits, and files, of which the damaged ones are refused by name."""

import gzip
import hashlib
import itertools
import os
import struct
import sys

import numpy as np
import pytest

from bncpu import data
from bncpu.data import cifar10, mnist
from bncpu.data.inventory import inventory
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


def records(rng, n):
    """Return records of CIFAR-10 with n images."""
    rows = rng.integers(0, 256, (n, 3073), np.uint8)
    rows[:, 0] %= 10
    return rows


@pytest.fixture
def batches():
    """Return the records in the files of a small CIFAR-10, of which two for training are there."""
    rng = np.random.default_rng(1)
    names = ("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin")
    return {name: records(rng, n) for name, n in zip(names, (9, 5, 7), strict=True)}


def write_batches(folder, batches, compress=False):
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in batches.items():
        if compress:
            (folder / f"{name}.gz").write_bytes(gzip.compress(rows.tobytes(), 1))
        else:
            (folder / name).write_bytes(rows.tobytes())


def assert_is(dataset, parts):
    assert dataset.name == "mnist"
    assert dataset.image_shape == (1, 5, 4)
    np.testing.assert_array_equal(
        dataset.images("test")[:, 0], parts["x_test"] / np.float32(255), strict=True
    )
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
    assert digits.image_shape == (1, 8, 8)
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
    message = "dataset: expected one of digits, mnist, cifar10; got 'letters'"
    with pytest.raises(ValueError, match=message):
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
def test_shards_make_the_whole(tmp_path, parts, batches, shards, compress):
    """Of 8, one has no row of the 7 for test."""
    write(tmp_path, parts, compress)
    write_batches(tmp_path, batches, compress)
    for name, folder in (("mnist", tmp_path), ("cifar10", tmp_path), ("digits", None)):
        whole = data.load(name, folder)
        pieces = [data.load(name, folder, part=part, parts=shards) for part in range(shards)]
        assert {piece.image_shape for piece in pieces} == {whole.image_shape}
        for arrays, array in zip(
            zip(*(p[1:5] for p in pieces), strict=True), whole[1:5], strict=True
        ):
            np.testing.assert_array_equal(np.concatenate(arrays), array)
            assert len({len(piece) for piece in arrays}) <= 2


def test_a_shard_reads_no_other_rows(tmp_path, parts, monkeypatch):
    write(tmp_path, parts)
    sizes = []
    empty = np.empty
    monkeypatch.setattr(np, "empty", lambda size, dtype: sizes.append(size) or empty(size, dtype))
    read_idx(tmp_path / FILES["x_train"], 3, slice(10, 13))
    assert sizes == [3 * 5 * 4]


# The files that BNCPU_DATA names are read too where it is set.
SOURCES = ["small files", *filter(None, [os.environ.get("BNCPU_DATA")])]


@pytest.mark.parametrize("source", SOURCES)
def test_what_holds_of_every_set(tmp_path, monkeypatch, parts, batches, source):
    if source == "small files":
        write(tmp_path, parts)
        write_batches(tmp_path, batches)
        monkeypatch.setenv("BNCPU_DATA", str(tmp_path))
    for name in data.available():
        dataset = data.load(name)
        assert dataset.name == name
        features = np.prod(dataset.image_shape)
        for x, y in (dataset[1:3], dataset[3:5]):
            assert (x.dtype, y.dtype) == (np.float32, np.int64)
            assert x.shape == (len(y), features)
            assert 0 <= x.min() < x.max() <= 1
            assert 0 <= y.min() < y.max() <= 9


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("sub", [".", "cifar10", "cifar-10-batches-bin"])
def test_cifar10(tmp_path, monkeypatch, batches, compress, sub):
    write_batches(tmp_path / sub, batches, compress)
    train = np.concatenate([batches["data_batch_1.bin"], batches["data_batch_2.bin"]])
    dataset = data.load("cifar10", tmp_path)
    assert (dataset.name, dataset.image_shape) == ("cifar10", (3, 32, 32))
    for x, y, rows in ((*dataset[1:3], train), (*dataset[3:5], batches["test_batch.bin"])):
        np.testing.assert_array_equal(x, rows[:, 1:] / np.float32(255), strict=True)
        np.testing.assert_array_equal(y, rows[:, 0].astype(np.int64), strict=True)
    # The planes are red, green and blue, row by row.
    image = dataset.images("train")[3]
    assert image[2, 31, 1] == train[3, 1 + 2 * 1024 + 31 * 32 + 1] / np.float32(255)
    assert np.shares_memory(image, dataset.x_train)
    monkeypatch.setenv("BNCPU_DATA", str(tmp_path))
    np.testing.assert_array_equal(data.load_cifar10().x_test, dataset.x_test)


def test_missing_files_of_cifar10(tmp_path, monkeypatch, batches):
    monkeypatch.delenv("BNCPU_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"cifar10: no data folder; .*BNCPU_DATA"):
        data.load_cifar10()
    for absent, message in (
        ("data_batch_1.bin", "holds no data_batch_1.bin or data_batch_1.bin.gz, nor do its cifar"),
        ("test_batch.bin", "holds no test_batch.bin or"),
    ):
        folder = tmp_path / f"without {absent}"
        write_batches(folder, {name: batches[name] for name in batches if name != absent})
        with pytest.raises(FileNotFoundError, match=message):
            data.load_cifar10(folder)
    write_batches(tmp_path, batches | {"data_batch_4.bin": batches["test_batch.bin"]})
    with pytest.raises(FileNotFoundError, match=r"holds no data_batch_3\.bin or"):
        data.load_cifar10(tmp_path)


ONE = np.zeros((1, 3073), np.uint8).tobytes()


@pytest.mark.parametrize("name", ["data_batch_2.bin", "test_batch.bin"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no image"),
        (ONE[1:], "cut short, or not of CIFAR-10; expected a multiple of 3073 bytes; got 3072"),
        (b"\x89PNG\r\n" + bytes(5000), "cut short, or not of CIFAR-10; expected a multiple"),
        (ONE + b"\x0a" + ONE[1:], "not of CIFAR-10; expected labels 0 to 9; got 10"),
        (ONE * 31, "expected at most 30 images of 3073 bytes; the file is longer"),
    ],
)
def test_damaged_files_of_cifar10(tmp_path, monkeypatch, batches, name, content, message):
    monkeypatch.setattr(cifar10, "MAX_RECORDS", 30)
    for compress in (False, True):
        folder = tmp_path / str(compress)
        write_batches(folder, batches, compress)
        path = folder / f"{name}{'.gz' * compress}"
        path.write_bytes(gzip.compress(content) if compress else content)
        with pytest.raises(ValueError, match=f"{path}: {message}"):
            data.load_cifar10(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:-8] + bytes(8),  # the checksum and the length
        lambda _: ONE,
    ],
)
def test_damaged_gzip_files_of_cifar10(tmp_path, batches, damage):
    write_batches(tmp_path, batches, compress=True)
    path = tmp_path / "data_batch_1.bin.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{path}: damaged or cut short"):
        data.load_cifar10(tmp_path)


def test_a_file_that_is_too_long_is_neither_read_to_its_end_nor_kept(tmp_path, monkeypatch):
    class Endless:
        def __init__(self):
            self.pieces = 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read(self, count):
            self.pieces += 1
            return bytes(count)

    def allocate(*_):
        raise AssertionError("allocated")

    endless = Endless()
    monkeypatch.setattr(gzip, "open", lambda *_: endless)
    monkeypatch.setattr(np, "empty", allocate)
    for name in ("data_batch_1.bin.gz", "test_batch.bin.gz"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="at most 10000 images"):
        data.load_cifar10(tmp_path)
    assert endless.pieces == 30


def test_a_shard_of_cifar10_reads_no_other_rows(tmp_path, monkeypatch, batches):
    write_batches(tmp_path, batches)
    read = []
    checked = cifar10.read_checked
    monkeypatch.setattr(
        cifar10, "read_checked", lambda *args: read.append(args[1:]) or checked(*args)
    )
    data.load_cifar10(tmp_path, part=1, parts=2)  # 7 to 14 of 14, and 3 to 7 of 7
    assert read == [
        ("data_batch_1.bin", slice(7, 9)),
        ("data_batch_2.bin", slice(0, 5)),
        ("test_batch.bin", slice(3, 7)),
    ]


@pytest.fixture
def numbered():
    """Return a dataset that shows which image is which."""
    x = np.arange(20 * 12, dtype=np.float32).reshape(20, 12)
    return data.Dataset("digits", x, np.arange(20), x[:5] + 500, np.arange(5) + 50, (3, 2, 2))


def test_images(numbered):
    for part, x in (("train", numbered.x_train), ("test", numbered.x_test)):
        images = numbered.images(part)
        assert images.shape == (len(x), 3, 2, 2)
        assert np.shares_memory(images, x)
        np.testing.assert_array_equal(images[4].ravel(), x[4])
    assert numbered.subset(0).images("train").shape == (0, 3, 2, 2)
    with pytest.raises(ValueError, match='part: expected "train" or "test"; got \'valid\''):
        numbered.images("valid")


@pytest.mark.parametrize(("fraction", "held"), [(0.1, 2), (0.25, 5), (0.05, 1), (0.95, 19)])
def test_held_out(numbered, fraction, held):
    part = numbered.held_out(fraction)
    assert (part.name, part.image_shape) == ("digits", (3, 2, 2))
    np.testing.assert_array_equal(part.y_train, np.arange(20 - held))
    np.testing.assert_array_equal(part.y_test, np.arange(20 - held, 20))
    np.testing.assert_array_equal(part.x_train, numbered.x_train[: 20 - held])
    np.testing.assert_array_equal(part.x_test, numbered.x_train[20 - held :])


@pytest.mark.parametrize("fraction", [0, 0.01, 0.99, 1, -0.1, float("nan")])
def test_a_held_out_part_that_leaves_nothing(numbered, fraction):
    with pytest.raises(ValueError, match=f"fraction: .* on both sides; got {fraction} of 20"):
        numbered.held_out(fraction)


def test_subset(numbered):
    for n_train, n_test, expected in ((7, None, (7, 5)), (7, 2, (7, 2)), (99, 99, (20, 5))):
        part = numbered.subset(n_train, n_test)
        assert (len(part.x_train), len(part.x_test)) == expected
        np.testing.assert_array_equal(part.y_train, np.arange(expected[0]))
        np.testing.assert_array_equal(part.y_test, 50 + np.arange(expected[1]))
        assert part.name == "digits"
    for numbers, name in (((-1,), "n_train"), ((3, -2), "n_test")):
        with pytest.raises(ValueError, match=f"{name}: expected a number of images >= 0; got -"):
            numbered.subset(*numbers)


def test_what_is_available(tmp_path, monkeypatch, parts, batches):
    monkeypatch.delenv("BNCPU_DATA", raising=False)
    assert data.available() == data.available(tmp_path) == ["digits"]
    write_batches(tmp_path, batches)
    assert data.available(tmp_path) == ["digits", "cifar10"]
    write(tmp_path / "mnist", parts, compress=True)
    monkeypatch.setenv("BNCPU_DATA", str(tmp_path))
    assert data.available() == list(data.NAMES)
    # What is damaged is there; what is incomplete is not.
    (tmp_path / "mnist" / f"{FILES['y_test']}.gz").write_bytes(b"damaged")
    assert data.available() == list(data.NAMES)
    (tmp_path / "mnist" / f"{FILES['y_test']}.gz").unlink()
    (tmp_path / "data_batch_1.bin").unlink()
    assert data.available() == ["digits"]
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        data.available(tmp_path / "nowhere")


def test_an_inventory(tmp_path, monkeypatch, parts, batches):
    write(tmp_path / "mnist", parts, compress=True)
    write_batches(tmp_path, batches)
    original = hashlib.sha256(idx(parts["y_train"])).hexdigest()
    monkeypatch.setitem(mnist.ORIGINALS, FILES["y_train"], original)
    found = {each.name: each for each in inventory(tmp_path)}
    assert tuple(found) == data.NAMES
    for name, each in found.items():
        assert each.problem == ""
        assert each.missing == []
        arrays = data.load(name, tmp_path)._asdict()
        assert each.shapes == {
            array: arrays[array].shape for array in ("x_train", "y_train", "x_test", "y_test")
        }
        for file in each.files:
            assert file.path.is_relative_to(tmp_path)
            assert file.size == file.path.stat().st_size
            assert file.sha256 == hashlib.sha256(file.path.read_bytes()).hexdigest()
    assert [file.shape for file in found["mnist"].files] == [(30, 5, 4), (30,), (7, 5, 4), (7,)]
    assert [file.original for file in found["mnist"].files] == [False, True, False, False]
    assert [file.shape for file in found["cifar10"].files] == [(9, 3073), (5, 3073), (7, 3073)]
    assert {file.original for file in found["cifar10"].files} == {None}
    assert found["cifar10"].absent == [f"data_batch_{i}.bin" for i in (3, 4, 5)]


def test_an_inventory_of_what_is_wrong(tmp_path, monkeypatch, parts, batches):
    write(tmp_path, parts | {"y_test": np.zeros(6, np.uint8)})
    write_batches(tmp_path, batches, compress=True)
    (tmp_path / "data_batch_2.bin.gz").write_bytes(ONE)
    (tmp_path / "test_batch.bin.gz").unlink()
    opened = mnist.read_checked
    digits, numbers, images = inventory(tmp_path)
    assert numbers.problem == f"{tmp_path / FILES['y_test']}: 6 labels for 7 images"
    assert not any(file.problem for file in numbers.files)
    assert images.problem == f"damaged: {tmp_path / 'data_batch_2.bin.gz'}"
    assert images.missing == ["test_batch.bin"]
    good, bad = images.files
    assert (good.problem, good.shape) == ("", (9, 3073))
    assert bad.problem.startswith("damaged or cut short")
    assert bad.sha256 == hashlib.sha256(ONE).hexdigest()
    assert bad.shape == numbers.shapes.get("x_test", ()) == images.shapes.get("x_train", ()) == ()

    def refuse(path, name):
        if name == FILES["x_test"]:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, name)

    monkeypatch.setattr(mnist, "read_checked", refuse)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    digits, numbers, _ = inventory(tmp_path)
    assert digits.problem.startswith("digits: need scikit-learn")
    assert [file.problem for file in numbers.files] == ["", "", "Permission denied", ""]


def test_an_inventory_of_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("BNCPU_DATA", raising=False)
    for folder in (None, tmp_path):
        digits, *others = inventory(folder)
        assert digits.shapes["x_test"] == (359, 64)
        for each, names in zip(others, (mnist.NAMES, cifar10.NAMES), strict=True):
            assert (each.files, each.shapes, each.problem) == ([], {}, "")
            assert sorted(itertools.chain(each.missing, each.absent)) == sorted(names)
            assert (each.places == []) == (folder is None)
