"""CIFAR-10 from its binary version, plain or gzipped; nothing is downloaded.

The format is Krizhevsky's: records of one byte, the label, and 3072, the red, green and blue planes
of 32 x 32 pixels; no header, at most 10,000 records in a file. The last of the five files for
training may be missing, and the set is smaller then.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bncpu.data.dataset import Dataset, shard
from bncpu.data.files import PIECE, find, named_folder, opened, read_bytes, zipped

IMAGE_SHAPE = (3, 32, 32)
PIXELS = 3072
RECORD = 1 + PIXELS
MAX_RECORDS = 10_000

TRAIN_NAMES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_NAME = "test_batch.bin"
NAMES: tuple[str, ...] = (*TRAIN_NAMES, TEST_NAME)
SUBFOLDERS: tuple[str, ...] = ("cifar10", "cifar-10-batches-bin")
PUBLISHED: tuple[str, ...] = (
    "www.cs.toronto.edu/~kriz/cifar.html (the binary version: cifar-10-binary.tar.gz, "
    "MD5 c32a1d4ab5d03f1284b67883e8d87530)",
)
# What is published is the checksum of the archive, not of the files in it.
ORIGINALS: dict[str, str] = {}


def load_cifar10(
    folder: str | os.PathLike[str] | None = None, *, part: int = 0, parts: int = 1
) -> Dataset:
    """Return CIFAR-10, or the part of it whose files are there.

    Parameters
    ----------
    folder : path, optional
        Holds data_batch_1.bin and those that follow, as many as there are, and test_batch.bin,
        itself or in a subfolder cifar10 or cifar-10-batches-bin; by default the value of the
        environment variable BNCPU_DATA.
    part, parts : int
        Which of several shards of the training and the test set is read; all by default.

    Raises
    ------
    FileNotFoundError
        If no folder is given, or it or a file is missing.
    NotADirectoryError
        If it is something other than a folder.
    ValueError
        If a file is damaged, cut short, too long, or something else.
    """
    base = named_folder(folder)
    if base is None:
        raise FileNotFoundError(
            f"cifar10: no data folder; name the one with {TRAIN_NAMES[0]}(.gz), those that follow "
            f"and {TEST_NAME}(.gz) by --data-dir or BNCPU_DATA"
        )
    paths = find(base, SUBFOLDERS, NAMES)
    if lacking := missing(paths):
        raise FileNotFoundError(
            f"{base}: holds no {lacking[0]} or {lacking[0]}.gz, nor do its "
            f"{' and '.join(SUBFOLDERS)}"
        )
    shapes = {name: file_shape(path, name) for name, path in paths.items()}
    train = [name for name in TRAIN_NAMES if name in paths]
    return Dataset(
        "cifar10",
        *_read({paths[name]: shapes[name][0] for name in train}, part, parts),
        *_read({paths[TEST_NAME]: shapes[TEST_NAME][0]}, part, parts),
        IMAGE_SHAPE,
    )


def missing(found: Mapping[str, Path]) -> list[str]:
    """Return the names of the files that are still needed: no gap before the last for training."""
    last = max((i for i, name in enumerate(TRAIN_NAMES) if name in found), default=0)
    return [name for name in (*TRAIN_NAMES[: last + 1], TEST_NAME) if name not in found]


def file_shape(path: Path, _: str) -> tuple[int, ...]:
    """Return the number of records in a file and their length, by the length of the file.

    A gzipped file does not tell it in a way to be trusted, and is read for it, piece by piece and
    no further than a file may be long.

    Raises
    ------
    ValueError
        If it is not a number of whole records, from 1 to 10,000.
    """
    most = MAX_RECORDS * RECORD
    size = path.stat().st_size
    if zipped(path):
        size = 0
        with opened(path) as file:
            while size <= most and (piece := file.read(PIECE)):
                size += len(piece)
    if size > most:
        raise ValueError(
            f"{path}: expected at most {MAX_RECORDS} images of {RECORD} bytes; the file is longer"
        )
    if size == 0:
        raise ValueError(f"{path}: holds no image")
    if size % RECORD:
        raise ValueError(
            f"{path}: cut short, or not of CIFAR-10; expected a multiple of {RECORD} bytes; got "
            f"{size}"
        )
    return size // RECORD, RECORD


def array_shapes(
    paths: Mapping[str, Path], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the dataset's arrays, given those of the files."""
    train = sum(shapes[name][0] for name in TRAIN_NAMES if name in paths)
    test = shapes[TEST_NAME][0]
    return {
        "x_train": (train, PIXELS),
        "y_train": (train,),
        "x_test": (test, PIXELS),
        "y_test": (test,),
    }


def read_checked(path: Path, name: str, rows: slice | None = None) -> NDArray[np.uint8]:
    """Return the records of a file, or neighbouring ones, as (n, 3073), the labels checked."""
    if rows is None:
        rows = slice(0, file_shape(path, name)[0])
    with opened(path) as file:
        file.seek(rows.start * RECORD)
        values = read_bytes(file, path, (rows.stop - rows.start) * RECORD)
    records = values.reshape(-1, RECORD)
    most = records[:, 0].max(initial=0)
    if most > 9:
        raise ValueError(f"{path}: not of CIFAR-10; expected labels 0 to 9; got {most}")
    return records


def _read(
    counts: Mapping[Path, int], part: int, parts: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the images and labels of one shard of the files together, file by file."""
    rows = shard(sum(counts.values()), part, parts)
    n = rows.stop - rows.start
    x, y = np.empty((n, PIXELS), np.float32), np.empty(n, np.int64)
    start = filled = 0  # of the file, and in x
    for path, count in counts.items():
        first, last = max(rows.start - start, 0), min(rows.stop - start, count)
        start += count
        if first >= last:
            continue
        records = read_checked(path, path.name, slice(first, last))
        there = slice(filled, filled + last - first)
        x[there], y[there] = records[:, 1:], records[:, 0]
        filled = there.stop
    x /= 255
    return x, y
