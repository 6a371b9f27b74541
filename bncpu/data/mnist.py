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
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bncpu.data.dataset import Dataset

UNSIGNED_BYTE = 0x08
# Deflate cannot shrink anything further than this, so a gzipped file bounds what it may hold.
MAX_DEFLATE_RATIO = 1032

FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}


def load_mnist(folder: str | os.PathLike[str] | None = None) -> Dataset:
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
    x_train, x_test = read_idx(paths["x_train"], 3), read_idx(paths["x_test"], 3)
    y_train, y_test = read_idx(paths["y_train"], 1), read_idx(paths["y_test"], 1)
    for name, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        path = paths[f"y_{name}"]
        if len(x) != len(y):
            raise ValueError(f"{path}: {len(y)} labels for {len(x)} images")
        if not x.size:
            raise ValueError(f"{paths[f'x_{name}']}: holds no image")
        if y.max() > 9:
            raise ValueError(f"{path}: expected labels 0 to 9; got {y.max()}")
    if x_train.shape[1:] != x_test.shape[1:]:
        raise ValueError(
            f"{paths['x_test']}: images of {x_test.shape[1:]} pixels, but those for training have "
            f"{x_train.shape[1:]}"
        )
    return Dataset(
        "mnist", scaled(x_train), y_train.astype(np.int64), scaled(x_test), y_test.astype(np.int64)
    )


def scaled(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return images (n, rows, columns) of bytes as (n, rows * columns) of float32 in [0, 1]."""
    flat: NDArray[np.float32] = images.reshape(len(images), -1).astype(np.float32)
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


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Return the array of unsigned bytes in an IDX file.

    Raises
    ------
    ValueError
        If the file is not such an array, or is shorter or longer than its header says.
    """
    size = path.stat().st_size
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as file:
                return _read(file, path, dimensions, size * MAX_DEFLATE_RATIO, "at most")
        with path.open("rb") as file:
            return _read(file, path, dimensions, size, "exactly")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged or cut short ({error})") from error


def _read(
    file: io.BufferedIOBase, path: Path, dimensions: int, size: int, bound: str
) -> NDArray[np.uint8]:
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
    count = math.prod(shape)
    there = size - len(header)
    if count > there or (bound == "exactly" and count != there):
        raise ValueError(f"{path}: its header promises {count} bytes, it holds {bound} {there}")
    values = np.empty(count, np.uint8)
    # A GzipFile fills less than asked for where a member of the archive ends.
    filled = 0
    while filled < count:
        got = file.readinto(values.data[filled:])
        if not got:
            raise ValueError(f"{path}: cut short; {filled} of {count} bytes are there")
        filled += got
    if file.read(1):
        raise ValueError(f"{path}: longer than the {count} bytes that its header promises")
    return values.reshape(shape)
