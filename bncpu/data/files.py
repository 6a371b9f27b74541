"""Where a dataset's files are, and how they are opened: plain, or through gzip.

What is in them is not this file's business.
"""

import gzip
import io
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# Deflate cannot shrink anything further than this, so a gzipped file bounds what it may hold.
MAX_DEFLATE_RATIO = 1032
# Nor is more than this believed of one: 700,000 images of MNIST's size are half of it, and a
# megabyte of zipped zeros is all of it.
MAX_UNZIPPED = 1 << 30
VARIABLE = "BNCPU_DATA"
PIECE = 1 << 20  # bytes, what a file is read by where it is not kept


def named_folder(folder: str | os.PathLike[str] | None) -> Path | None:
    """Return the folder that is given, else the one that BNCPU_DATA names, else None.

    Raises
    ------
    FileNotFoundError, NotADirectoryError
        If one is named that is not there, or that is something other than a folder.
    """
    folder = folder or os.environ.get(VARIABLE)
    if not folder:
        return None
    base = Path(folder)
    if not base.exists():
        raise FileNotFoundError(f"{base}: no such folder")
    if not base.is_dir():
        raise NotADirectoryError(f"{base}: is not a folder")
    return base


def find(base: Path, subfolders: Iterable[str], names: Iterable[str]) -> dict[str, Path]:
    """Return the paths of those of the files that are there, by name.

    Each may be in the folder itself or in one of the subfolders, plain or as NAME.gz, in this
    order.
    """
    places = [base, *(base / subfolder for subfolder in subfolders)]
    found = {}
    for name in names:
        candidates = (place / file for place in places for file in (name, f"{name}.gz"))
        path = next((candidate for candidate in candidates if candidate.is_file()), None)
        if path is not None:
            found[name] = path
    return found


def zipped(path: Path) -> bool:
    """Return whether a file is read through gzip, which its name says."""
    return path.suffix == ".gz"


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedIOBase]:
    """Open a file, through gzip by its name; what gzip finds wrong with it is a ValueError."""
    try:
        with gzip.open(path, "rb") if zipped(path) else path.open("rb") as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged or cut short ({error})") from error


def read_bytes(file: io.BufferedIOBase, path: Path, count: int) -> NDArray[np.uint8]:
    """Return the next `count` bytes of an opened file.

    Raises
    ------
    ValueError
        If there are fewer.
    """
    values = np.empty(count, np.uint8)
    # A GzipFile fills less than asked for where a member of the archive ends.
    filled = 0
    while filled < count:
        got = file.readinto(values.data[filled:])
        if not got:
            raise ValueError(f"{path}: cut short; {filled} of {count} bytes are there")
        filled += got
    return values
