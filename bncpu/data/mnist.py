"""MNIST from its four IDX files, plain or gzipped; nothing is downloaded.

The format is LeCun's: two zero bytes, a type, the number of dimensions, each size as a big-endian
32-bit integer, then the values. A header is believed only when the file can hold what it promises.
"""

import io
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bncpu.data.dataset import Dataset, shard
from bncpu.data.files import (
    MAX_DEFLATE_RATIO,
    MAX_UNZIPPED,
    find,
    named_folder,
    opened,
    read_bytes,
    zipped,
)

UNSIGNED_BYTE = 0x08

FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}
NAMES: tuple[str, ...] = tuple(FILES.values())
SUBFOLDERS: tuple[str, ...] = ("mnist",)
PUBLISHED: tuple[str, ...] = (
    "yann.lecun.com/exdb/mnist",
    "ossci-datasets.s3.amazonaws.com/mnist (a mirror)",
)
# SHA-256 of the files as they were published, unzipped.
ORIGINALS = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


def load_mnist(
    folder: str | os.PathLike[str] | None = None, *, part: int = 0, parts: int = 1
) -> Dataset:
    """Return MNIST, or a set in the same files and format such as Fashion-MNIST.

    Parameters
    ----------
    folder : path, optional
        Holds the files, itself or in a subfolder mnist; by default the value of the environment
        variable BNCPU_DATA.
    part, parts : int
        Which of several shards of the training and the test set is read; all by default.

    Raises
    ------
    FileNotFoundError
        If no folder is given, or it or a file is missing.
    NotADirectoryError
        If it is something other than a folder.
    ValueError
        If a file is damaged, cut short, too long, or does not belong to the others.
    """
    base = named_folder(folder)
    if base is None:
        raise FileNotFoundError(
            f"mnist: no data folder; name the one with {NAMES[0]}(.gz) and its three companions "
            "by --data-dir or BNCPU_DATA"
        )
    paths = find(base, SUBFOLDERS, NAMES)
    if lacking := missing(paths):
        raise FileNotFoundError(
            f"{base}: holds no {lacking[0]} or {lacking[0]}.gz, nor does its mnist"
        )
    shapes = {name: file_shape(path, name) for name, path in paths.items()}
    array_shapes(paths, shapes)  # raises if they do not fit
    arrays = {
        each: read_checked(paths[name], name, shard(shapes[name][0], part, parts))
        for each, name in FILES.items()
    }
    return Dataset(
        "mnist",
        scaled(arrays["x_train"]),
        arrays["y_train"].astype(np.int64),
        scaled(arrays["x_test"]),
        arrays["y_test"].astype(np.int64),
        (1, *arrays["x_train"].shape[1:]),
    )


def missing(found: Mapping[str, Path]) -> list[str]:
    """Return the names of the files that are still needed."""
    return [name for name in NAMES if name not in found]


def file_shape(path: Path, name: str) -> tuple[int, ...]:
    """Return the shape of what a file that stands for `name` holds, by its header."""
    return idx_shape(path, dimensions(name))


def array_shapes(
    paths: Mapping[str, Path], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the dataset's arrays, given those of the files.

    Raises
    ------
    ValueError
        If the files do not belong together, or hold no image.
    """
    result: dict[str, tuple[int, ...]] = {}
    for name in ("train", "test"):
        x, y = FILES[f"x_{name}"], FILES[f"y_{name}"]
        if shapes[x][0] != shapes[y][0]:
            raise ValueError(f"{paths[y]}: {shapes[y][0]} labels for {shapes[x][0]} images")
        if not math.prod(shapes[x]):
            raise ValueError(f"{paths[x]}: holds no image")
        result[f"x_{name}"] = (shapes[x][0], math.prod(shapes[x][1:]))
        result[f"y_{name}"] = shapes[y]
    train, test = shapes[FILES["x_train"]][1:], shapes[FILES["x_test"]][1:]
    if train != test:
        raise ValueError(
            f"{paths[FILES['x_test']]}: images of {test} pixels, but those for training have "
            f"{train}"
        )
    return result


def read_checked(path: Path, name: str, rows: slice = slice(None)) -> NDArray[np.uint8]:
    """Return the images or the labels of a file, or some of them, the labels checked."""
    values = read_idx(path, dimensions(name), rows)
    if values.ndim == 1 and (most := values.max(initial=0)) > 9:
        raise ValueError(f"{path}: expected labels 0 to 9; got {most}")
    return values


def dimensions(name: str) -> int:
    """Return 3 for a file of images, 1 for one of labels."""
    return 3 if "images" in name else 1


def scaled(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return images (n, rows, columns) of bytes as (n, rows * columns) of float32 in [0, 1]."""
    flat: NDArray[np.float32] = images.reshape(len(images), math.prod(images.shape[1:])).astype(
        np.float32
    )
    flat /= 255
    return flat


def idx_shape(path: Path, dimensions: int) -> tuple[int, ...]:
    """Return the shape of the array of unsigned bytes in an IDX file, by its header.

    Raises
    ------
    ValueError
        If the file is not such an array, or cannot hold what its header promises.
    """
    with opened(path) as file:
        return _shape(file, path, dimensions)


def read_idx(path: Path, dimensions: int, rows: slice = slice(None)) -> NDArray[np.uint8]:
    """Return the array of unsigned bytes in an IDX file, or neighbouring rows of it.

    Raises
    ------
    ValueError
        If the file is not such an array, or is shorter or longer than its header says.
    """
    with opened(path) as file:
        shape = _shape(file, path, dimensions)
        first, last, _ = rows.indices(shape[0])
        row = math.prod(shape[1:])
        file.seek(first * row, os.SEEK_CUR)
        values = read_bytes(file, path, (last - first) * row)
        if last == shape[0] and file.read(1):
            raise ValueError(
                f"{path}: longer than the {math.prod(shape)} bytes that its header promises"
            )
        return values.reshape(last - first, *shape[1:])


def _shape(file: io.BufferedIOBase, path: Path, dimensions: int) -> tuple[int, ...]:
    """Read the header, and check that the file is long enough for what it promises."""
    header = file.read(4 + 4 * dimensions)
    magic = bytes([0, 0, UNSIGNED_BYTE, dimensions])
    if header[:4] != magic:
        raise ValueError(
            f"{path}: not an IDX file of {dimensions}-dimensional bytes; expected it to begin with "
            f"{magic.hex()}; got {header[:4].hex() or 'nothing'}"
        )
    if len(header) < 4 + 4 * dimensions:
        raise ValueError(f"{path}: cut short within its header")
    shape = struct.unpack(f">{dimensions}I", header[4:])
    count, size = math.prod(shape), path.stat().st_size
    there = min(size * MAX_DEFLATE_RATIO, MAX_UNZIPPED) if zipped(path) else size - len(header)
    if count > there or (not zipped(path) and count != there):
        bound = "at most" if zipped(path) else "exactly"
        raise ValueError(f"{path}: its header promises {count} bytes, it holds {bound} {there}")
    return shape
