"""MNIST from its four IDX files, plain or gzipped; nothing is downloaded.

The format is LeCun's: two zero bytes, a type, the number of dimensions, each size as a big-endian
32-bit integer, then the values. A header is believed only when the file can hold what it promises.
"""

import gzip
import io
import math
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bncpu.data.dataset import Dataset, shard

UNSIGNED_BYTE = 0x08
# Deflate cannot shrink anything further than this, so a gzipped file bounds what it may hold.
MAX_DEFLATE_RATIO = 1032

FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
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

    Raises
    ------
    FileNotFoundError
        If no folder is given, or it or a file is missing.
    NotADirectoryError
        If it is something other than a folder.
    ValueError
        If a file is damaged, cut short, too long, or does not belong to the others.
    """
    paths = find_files(folder)
    shapes = {name: idx_shape(path, 1 + 2 * (name[0] == "x")) for name, path in paths.items()}
    arrays = {}
    for name in ("train", "test"):
        x, y = f"x_{name}", f"y_{name}"
        if shapes[x][0] != shapes[y][0]:
            raise ValueError(f"{paths[y]}: {shapes[y][0]} labels for {shapes[x][0]} images")
        if not math.prod(shapes[x]):
            raise ValueError(f"{paths[x]}: holds no image")
        for each in (x, y):
            rows = shard(shapes[each][0], part, parts)
            arrays[each] = read_idx(paths[each], len(shapes[each]), rows)
        most = arrays[y].max(initial=0)
        if most > 9:
            raise ValueError(f"{paths[y]}: expected labels 0 to 9; got {most}")
    if shapes["x_train"][1:] != shapes["x_test"][1:]:
        raise ValueError(
            f"{paths['x_test']}: images of {shapes['x_test'][1:]} pixels, but those for training "
            f"have {shapes['x_train'][1:]}"
        )
    return Dataset(
        "mnist",
        scaled(arrays["x_train"]),
        arrays["y_train"].astype(np.int64),
        scaled(arrays["x_test"]),
        arrays["y_test"].astype(np.int64),
    )


def scaled(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return images (n, rows, columns) of bytes as (n, rows * columns) of float32 in [0, 1]."""
    flat: NDArray[np.float32] = images.reshape(len(images), math.prod(images.shape[1:])).astype(
        np.float32
    )
    flat /= 255
    return flat


def find_files(folder: str | os.PathLike[str] | None) -> dict[str, Path]:
    """Return the path of each of the four files, or say what is missing."""
    folder = folder or os.environ.get("BNCPU_DATA")
    if not folder:
        raise FileNotFoundError(
            f"mnist: no data folder; name the one with {FILES['x_train']}(.gz) and its three "
            "companions by --data-dir or BNCPU_DATA"
        )
    base = Path(folder)
    if not base.exists():
        raise FileNotFoundError(f"{base}: no such folder")
    if not base.is_dir():
        raise NotADirectoryError(f"{base}: is not a folder")
    found = {}
    for part, name in FILES.items():
        places = [place / f for place in (base, base / "mnist") for f in (name, f"{name}.gz")]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"{base}: holds no {name} or {name}.gz, nor does its mnist")
        found[part] = path
    return found


def idx_shape(path: Path, dimensions: int) -> tuple[int, ...]:
    """Return the shape of the array of unsigned bytes in an IDX file, by its header.

    Raises
    ------
    ValueError
        If the file is not such an array, or cannot hold what its header promises.
    """
    with _opened(path) as file:
        return _shape(file, path, dimensions)


def read_idx(path: Path, dimensions: int, rows: slice = slice(None)) -> NDArray[np.uint8]:
    """Return the array of unsigned bytes in an IDX file, or neighbouring rows of it.

    Raises
    ------
    ValueError
        If the file is not such an array, or is shorter or longer than its header says.
    """
    with _opened(path) as file:
        shape = _shape(file, path, dimensions)
        first, last, _ = rows.indices(shape[0])
        row = math.prod(shape[1:])
        file.seek(first * row, os.SEEK_CUR)
        values = np.empty((last - first) * row, np.uint8)
        # A GzipFile fills less than asked for where a member of the archive ends.
        filled = 0
        while filled < len(values):
            got = file.readinto(values.data[filled:])
            if not got:
                raise ValueError(f"{path}: cut short; {filled} of {len(values)} bytes are there")
            filled += got
        if last == shape[0] and file.read(1):
            raise ValueError(
                f"{path}: longer than the {math.prod(shape)} bytes that its header promises"
            )
        return values.reshape(last - first, *shape[1:])


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedIOBase]:
    """Open a file, through gzip by its name; what gzip finds wrong with it is a ValueError."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged or cut short ({error})") from error


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
    zipped = path.suffix == ".gz"
    there = size * MAX_DEFLATE_RATIO if zipped else size - len(header)
    if count > there or (not zipped and count != there):
        bound = "at most" if zipped else "exactly"
        raise ValueError(f"{path}: its header promises {count} bytes, it holds {bound} {there}")
    return shape
