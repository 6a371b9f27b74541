"""What is found in a data folder: each file with its checksum, what it holds and what is wrong.

Files are read whole but piece by piece or as bytes: no float array is made.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray

from bncpu.data import cifar10, digits, mnist
from bncpu.data.files import PIECE, find, named_folder, opened


class Source(Protocol):
    """A dataset that is kept in files: what mnist.py and cifar10.py have in common."""

    NAMES: tuple[str, ...]
    SUBFOLDERS: tuple[str, ...]
    PUBLISHED: tuple[str, ...]
    ORIGINALS: dict[str, str]

    def missing(self, found: Mapping[str, Path], /) -> list[str]:
        """Return the names of the files that are still needed."""

    def read_checked(self, path: Path, name: str, /) -> NDArray[Any]:
        """Return the bytes of a file as an array, or raise ValueError."""

    def array_shapes(
        self, paths: Mapping[str, Path], shapes: Mapping[str, tuple[int, ...]], /
    ) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the dataset's arrays, or raise ValueError."""


SOURCES: dict[str, Source] = {"mnist": mnist, "cifar10": cifar10}


class FoundFile(NamedTuple):
    """A file of a dataset.

    Attributes
    ----------
    path : Path
        Where it is.
    size : int
        Its length in bytes.
    sha256 : str
        Its checksum as it is, gzipped or not; empty if it cannot be read.
    shape : tuple of int
        Of the bytes that it holds; empty if it is damaged.
    original : bool or None
        Whether it holds, unzipped, to the last bit what was published; None if that is not known.
    problem : str
        What is wrong with it, or nothing.
    """

    path: Path
    size: int
    sha256: str
    shape: tuple[int, ...]
    original: bool | None
    problem: str


class Found(NamedTuple):
    """What there is of a dataset.

    Attributes
    ----------
    name : str
        One of `bncpu.data.NAMES`.
    published : tuple of str
        Where its originals are.
    files : list of FoundFile
        Those of its files that are there.
    missing : list of str
        The names of those that it still needs; gzipped they end in .gz.
    absent : list of str
        The names of those that are not there either, without which it is smaller.
    places : list of Path
        The folders where they are looked for.
    shapes : dict of str to tuple of int
        Those of its arrays x_train, y_train, x_test and y_test; empty if it cannot be loaded.
    problem : str
        Why it cannot be loaded, other than by what is missing, or nothing.
    """

    name: str
    published: tuple[str, ...]
    files: list[FoundFile]
    missing: list[str]
    absent: list[str]
    places: list[Path]
    shapes: dict[str, tuple[int, ...]]
    problem: str


def inventory(folder: str | os.PathLike[str] | None = None) -> list[Found]:
    """Return what is found of every dataset, in the order of `bncpu.data.NAMES`.

    `folder` is by default the value of the environment variable BNCPU_DATA. What is wrong with a
    file is an entry and no error.

    Raises
    ------
    FileNotFoundError, NotADirectoryError
        If a folder is named that is not there, or that is something other than a folder.
    """
    base = named_folder(folder)
    return [_digits(), *(_found(name, source, base) for name, source in SOURCES.items())]


def _digits() -> Found:
    """Return the shapes of the embedded digits, or that they cannot be had."""
    try:
        dataset = digits.load_digits()
    except ImportError as error:
        return Found("digits", digits.PUBLISHED, [], [], [], [], {}, str(error))
    arrays = ("x_train", "y_train", "x_test", "y_test")
    shapes = {array: getattr(dataset, array).shape for array in arrays}
    return Found("digits", digits.PUBLISHED, [], [], [], [], shapes, "")


def _found(name: str, source: Source, base: Path | None) -> Found:
    """Look into the files of one dataset, each by itself and then together."""
    places = [] if base is None else [base, *(base / sub for sub in source.SUBFOLDERS)]
    paths = {} if base is None else find(base, source.SUBFOLDERS, source.NAMES)
    files = {each: _look_into(path, each, source) for each, path in paths.items()}
    missing = source.missing(paths)
    absent = [each for each in source.NAMES if each not in paths and each not in missing]
    shapes: dict[str, tuple[int, ...]] = {}
    problem = ""
    damaged = [str(file.path) for file in files.values() if file.problem]
    if damaged:
        problem = f"damaged: {', '.join(damaged)}"
    elif not missing:
        try:
            shapes = source.array_shapes(paths, {each: file.shape for each, file in files.items()})
        except ValueError as error:
            problem = str(error)
    return Found(
        name, source.PUBLISHED, list(files.values()), missing, absent, places, shapes, problem
    )


def _look_into(path: Path, name: str, source: Source) -> FoundFile:
    """Read one file and say what it holds, or what is wrong with it."""
    checksum, original, problem = "", None, ""
    shape: tuple[int, ...] = ()
    try:
        with path.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        shape = source.read_checked(path, name).shape
        if name in source.ORIGINALS:
            original = content_sha256(path) == source.ORIGINALS[name]
    except OSError as error:
        problem = error.strerror or str(error)
    except ValueError as error:
        problem = str(error).removeprefix(f"{path}: ")
    return FoundFile(path, path.stat().st_size, checksum, shape, original, problem)


def content_sha256(path: Path) -> str:
    """Return the checksum of what a file holds, unzipped if it is gzipped."""
    digest = hashlib.sha256()
    with opened(path) as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
