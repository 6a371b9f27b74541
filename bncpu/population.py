"""Population statistics of arrays in .npy files, however large: streamed in blocks, then merged.

A file is mapped into memory anew for each block and let go after it, so what the process holds is a
block, not what it has read. Not a file format and no cache; the sums are `bncpu.batch_moments`.
"""

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bncpu import arguments
from bncpu.functional import batch_moments
from bncpu.moments import Moments
from bncpu.progress import bar

# Of a file, in a block: long enough to make a call's cost nothing, short enough for last caches.
BLOCK_BYTES = 1 << 23
# Bytes of a header, in which a shape of 64 axes takes 1500.
MAX_HEADER = 1 << 16


class ArrayFile(NamedTuple):
    """An array in a .npy file, of which the header has been read and found good."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran_order: bool
    channels: arguments.Channels

    @property
    def bytes(self) -> int:
        """The size of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


def open_files(
    paths: Sequence[str | os.PathLike[str]], axis: int | tuple[int, ...] = 1
) -> list[ArrayFile]:
    """Return what the files hold, or say what is wrong with one; no array is read.

    Raises
    ------
    OSError
        If a file cannot be read.
    ValueError
        If one is damaged, cut short, not a .npy file, or holds something other than numbers, if the
        axis does not fit, or if it has other channels than the first.
    """
    files = [_open(os.fspath(path), axis) for path in paths]
    for file in files[1:]:
        if file.channels.shape != files[0].channels.shape:
            raise ValueError(
                f"{file.path}: expected {files[0].channels.shape} channels on axis {axis}, as "
                f"{files[0].path} has; got {file.channels.shape} in shape {file.shape}"
            )
    return files


def file_moments(
    files: Sequence[ArrayFile],
    *,
    part: int = 0,
    parts: int = 1,
    num_threads: int | None = None,
    progress: bool = False,
) -> Moments:
    """Return the moments of each channel over all files, or over one of equal parts of them.

    Parameters
    ----------
    files : sequence of ArrayFile
        As `open_files` returned them, at least one.
    part, parts : int
        Which part, from 0, of how many; parts merge to the whole.
    num_threads : int, optional
        As for `bncpu.batch_moments`.
    progress : bool
        Show a progress bar (tqdm) on stderr.

    Returns
    -------
    Moments
        count, mean and m2 of the values as float64, whatever the dtype of the files.

    Raises
    ------
    OSError, ValueError
        If a file has gone, or changed, since it was opened.
    ImportError
        If there is to be a bar, and tqdm is not installed.

    Notes
    -----
    One pass over the files, in blocks along the slowest axis that holds no channels, each converted
    to float64. Blocks merge in their order by Chan's formula, so that with all the values in memory
    one pass in float64 would give the same to rounding.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from bncpu.population import file_moments, open_files
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(f"{folder}/a.npy", np.array([[1, 5], [3, 5]]))
    ...     np.save(f"{folder}/b.npy", np.array([[5, 5]]))
    ...     file_moments(open_files([f"{folder}/a.npy", f"{folder}/b.npy"]))
    Moments(count=3, mean=array([3., 5.]), m2=array([8., 0.]))
    """
    shape = files[0].channels.shape
    # Where there is no value, nothing but a header says how many channels there are.
    there_is_some = any(file.bytes for file in files)
    zero = np.zeros(shape) if there_is_some else np.broadcast_to(np.float64(0), shape)
    moments = Moments(0, zero, zero)
    size = sum(size for _, _, size in _part(files, part, parts))
    with bar(size, "moments", progress, unit="B", unit_scale=True) as shown:
        for file, block, size in _part(files, part, parts):
            moments += batch_moments(
                _read(file, block), axis=file.channels.axes, num_threads=num_threads
            )
            shown.update(size)
    return moments


def _part(
    files: Sequence[ArrayFile], part: int, parts: int
) -> Iterator[tuple[ArrayFile, tuple[slice, ...], int]]:
    """Yield the blocks, with their sizes in bytes, that begin in a part of all files' bytes."""
    total = sum(file.bytes for file in files)
    first, last = (total * i // parts for i in (part, part + 1))
    at = 0
    for file in files:
        # The slowest axis first; only those without channels are cut.
        axes = [a for a in range(len(file.shape)) if a not in file.channels.axes]
        if file.fortran_order:
            axes.reverse()
        for block in _cut(file, tuple(slice(0, n) for n in file.shape), axes):
            size = _size(block) * file.dtype.itemsize
            if first <= at < last:
                yield file, block, size
            at += size


def _open(path: str, axis: int | tuple[int, ...]) -> ArrayFile:
    with open(path, "rb") as file:  # noqa: PTH123  a missing file is an OSError with the path in it
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # of headers by Python 2, which are read all the same
                version = np.lib.format.read_magic(file)
                _check_header_size(file, version)
                read = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, fortran_order, dtype = read(file)
        except Exception as error:  # a header is read as Python is, and what that raises is many
            raise ValueError(f"{path}: damaged, or not a .npy file ({error!s:.200})") from error
        size = os.fstat(file.fileno()).st_size - file.tell()
    if not all(type(n) is int and n >= 0 for n in shape):  # True is an int to NumPy's reader
        raise ValueError(f"{path}: damaged; its header promises the shape {shape!s:.80}")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise ValueError(
            f"{path}: expected numbers of at most 64 bits; got dtype {dtype}"
            + ("; save bfloat16 as float32" if dtype == np.dtype("V2") else "")
        )
    promised = math.prod(shape) * dtype.itemsize
    if size != promised:
        raise ValueError(f"{path}: its header promises {promised} bytes; it holds {size}")
    if not shape:
        raise ValueError(f"{path}: expected at least one dimension, the channels; got a number")
    try:
        # The shape alone decides; an array of it that takes no memory stands for the file's.
        channels = arguments.channels(np.broadcast_to(np.float32(0), shape), axis)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {str(error).replace('for x of', 'for an array of')}") from error
    return ArrayFile(path, shape, dtype, fortran_order, channels)


def _check_header_size(file: BinaryIO, version: tuple[int, int]) -> None:
    """Refuse a header longer than any that NumPy writes, before memory is made for it."""
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"version {version} of the format is not known")
    start = file.tell()
    size = int.from_bytes(file.read(2 if version == (1, 0) else 4), "little")
    file.seek(start)
    if size > MAX_HEADER:
        raise ValueError(f"its header would have {size} bytes")


def _cut(
    file: ArrayFile, block: tuple[slice, ...], axes: Sequence[int]
) -> Iterator[tuple[slice, ...]]:
    """Yield a block in parts of at most BLOCK_BYTES, as far as cutting these axes allows."""
    size = _size(block) * file.dtype.itemsize
    if size <= BLOCK_BYTES or not axes:
        if size:
            yield block
        return
    axis, *others = axes
    n = file.shape[axis]
    rows = max(1, BLOCK_BYTES * n // size)
    for i in range(0, n, rows):
        part = (*block[:axis], slice(i, min(i + rows, n)), *block[axis + 1 :])
        yield from _cut(file, part, others)


def _size(block: tuple[slice, ...]) -> int:
    return math.prod(part.stop - part.start for part in block)


def _read(file: ArrayFile, block: tuple[slice, ...]) -> NDArray[Any]:
    """Return a block as float64, copied from the file."""
    try:
        array = np.lib.format.open_memmap(file.path, mode="r")
    except ValueError as error:
        raise ValueError(f"{file.path}: has changed since it was opened ({error})") from error
    if array.shape != file.shape or array.dtype != file.dtype:
        raise ValueError(f"{file.path}: has changed since it was opened")
    return array[block].astype(np.float64)
