"""How the kernels walk an array of any rank and strides: K rows by C channels by runs of S values.

Pure arithmetic on shapes and strides; no array is touched. The first array of a call, x, leads:
its strides alone decide the form, so that the same x gives the same partial sums whatever the
strides of the other arrays. An array whose strides do not allow that walk has no place in it: its
caller copies.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Runs shorter than this are summed column by column, if there are rows enough to sum down.
# Measured: a loop along the run, four vectors of the widest level, wins from there on.
SHORT_RUN = 64
ROWS_FOR_COLUMNS = 4


class Place(NamedTuple):
    """Where an array's rows begin, in elements: planes[k // rows_per_plane] + (k % ...) * row."""

    planes: NDArray[np.int64] | None
    row: int
    channel: int


class Geometry(NamedTuple):
    """A problem as the kernels see it.

    columns: whether a row is C * S contiguous values (else S contiguous values of each channel).
    rows, channels, run: K, C and S; K * S values per channel.
    order: the axes, outermost first, in which a contiguous array has a place.
    places: one per array, None for an array that does not fit.
    complete: whether every array fits.
    """

    columns: bool
    rows: int
    rows_per_plane: int
    channels: int
    run: int
    order: tuple[int, ...]
    places: tuple[Place | None, ...]
    complete: bool


@lru_cache(maxsize=256)
def geometry(
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    itemsize: int,
    strides: tuple[tuple[int, ...], ...],
) -> Geometry | None:
    """Return the walk over arrays of one shape, led by the first; None if that one has none.

    Parameters
    ----------
    shape
        The shape that all arrays have, without zeros.
    axes
        The channel axes, in the order in which they form the channel index.
    itemsize
        Bytes per element.
    strides
        Of each array, in bytes.
    """
    lead = strides[0]
    channel_axes = [a for a in axes if shape[a] > 1]
    reduced = [a for a in range(len(shape)) if a not in axes and shape[a] > 1]
    reduced.sort(key=lambda a: -abs(lead[a]))
    groups = _merge(shape, lead, reduced)

    columns = False
    if groups and lead[groups[-1][-1]] == itemsize:
        run_group, outer = groups[-1], groups[:-1]
    elif channel_axes and lead[channel_axes[-1]] == itemsize:
        run_group, outer, columns = [], groups, True
    elif not groups:
        run_group, outer = [], []
    else:
        return None
    run = prod(shape[a] for a in run_group)
    rows = prod(shape[a] for group in outer for a in group)
    if (
        channel_axes
        and lead[channel_axes[-1]] == run * itemsize
        and run < SHORT_RUN
        and rows >= ROWS_FOR_COLUMNS
    ):
        columns = True

    def place(array: tuple[int, ...]) -> Place | None:
        contiguous = run_group + (channel_axes if columns and not run_group else [])
        channel = array[channel_axes[-1]] if channel_axes else 0
        fits = (
            all(s % itemsize == 0 for s, n in zip(array, shape, strict=True) if n > 1)
            and all(len(_merge(shape, array, group)) == 1 for group in outer)
            and (not channel_axes or len(_merge(shape, array, channel_axes)) == 1)
            and (not run_group or len(_merge(shape, array, run_group)) == 1)
            and (not contiguous or array[contiguous[-1]] == itemsize)
            and (not columns or channel == run * itemsize)
        )
        if not fits:
            return None
        steps = [array[group[-1]] // itemsize for group in outer]
        planes = None
        if len(outer) > 1:
            planes = np.zeros(1, dtype=np.int64)
            for group, step in zip(outer[:-1], steps[:-1], strict=True):
                offsets = np.arange(prod(shape[a] for a in group), dtype=np.int64) * step
                planes = np.add.outer(planes, offsets).reshape(-1)
            planes.flags.writeable = False
        return Place(planes, steps[-1] if steps else 0, channel // itemsize)

    places = tuple(place(array) for array in strides)
    if places[0] is None:
        return None
    rows_per_plane = prod(shape[a] for a in outer[-1]) if outer else 1
    channels = prod(shape[a] for a in axes)
    used = [a for group in outer for a in group] + channel_axes + run_group
    order = tuple([a for a in range(len(shape)) if shape[a] == 1] + used)
    complete = all(p is not None for p in places)
    return Geometry(columns, rows, rows_per_plane, channels, run, order, places, complete)


@lru_cache(maxsize=256)
def memory_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes of more than one element, outermost first, as the array lies in memory.

    What the bits of a mask follow. Of axes with one stride (which then is 0, or the elements
    overlap) the first is the outer one; a reversed axis is followed from its first element on.
    """
    return tuple(sorted((a for a, n in enumerate(shape) if n > 1), key=lambda a: -abs(strides[a])))


def _merge(shape: tuple[int, ...], strides: tuple[int, ...], axes: list[int]) -> list[list[int]]:
    """Group neighbours in axes (outermost first) that can be walked with one stride."""
    groups: list[list[int]] = []
    for a in axes:
        if groups and strides[groups[-1][-1]] == strides[a] * shape[a]:
            groups[-1].append(a)
        else:
            groups.append([a])
    return groups
