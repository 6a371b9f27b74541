"""What a kernel call takes: one walk, and arrays that fit it; the rest is copied.

The arrays of a call are checked (bncpu.arguments) but of any strides. Those that the kernels can
walk beside x go to them as they are, the others as copies, and a result that was computed beside
its array is brought there in the end.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bncpu.backends import as_stored
from bncpu.layout import Geometry, geometry, memory_order

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


class Problem(NamedTuple):
    """A checked call as the kernels take it.

    geometry: the walk, with one place for every array that is given.
    arrays: what is read, x first, what is written, and the mask; None for what is not given.
    results: pairs of a user's array and the one in which its values are computed.
    """

    geometry: Geometry
    arrays: tuple[Array | None, ...]
    results: tuple[tuple[Array, Array], ...]
    bits: _Bits | None = None  # the mask to fill, if it is filled in another order

    def finish(self) -> None:
        """Bring to the user's arrays what was computed beside them."""
        for array, beside in self.results:
            np.copyto(array, beside)
        if self.bits is not None:
            mask, beside, shape, walked, order = self.bits
            mask[...] = _reordered(beside, shape, walked, order)


class _Bits(NamedTuple):
    # A mask that is filled in the order of the walk, and the orders of the axes of both.
    mask: Array
    beside: Array
    shape: tuple[int, ...]
    walked: tuple[int, ...]
    order: tuple[int, ...]


def problem(
    axes: tuple[int, ...],
    read: tuple[Array | None, ...],
    written: tuple[Array | None, ...] = (),
    mask: Array | None = None,
    *,
    fills_mask: bool = False,
) -> Problem:
    """Return the arrays as the kernels can walk them, copying those that they cannot.

    Parameters
    ----------
    axes
        The channel axes.
    read, written
        The arrays that a kernel reads and writes, in its order; x is the first, and decides the
        walk. It is copied if it is misaligned or no axis of it is contiguous. Others are copied,
        or computed beside the user's array, if their strides do not allow the same walk.
    mask
        The bits, in the order in which x lies in memory; they go through a copy where the kernels
        walk in another.
    fills_mask
        Whether it is written.
    """
    given = as_stored(read + written)
    arrays = [array for array in given if array is not None]
    x = arrays[0]
    walk = _walk(axes, arrays)
    results: tuple[tuple[Array, Array], ...] = ()
    if walk is None or not walk.complete or not all(array.flags.aligned for array in arrays):
        first_written = sum(array is not None for array in read)
        walk, arrays, results = _beside(axes, walk, arrays, first_written)
        walkable = iter(arrays)
        given = tuple([None if array is None else next(walkable) for array in given])
    if mask is None:
        return Problem(walk, (*given, None), results)

    order = memory_order(x.shape, x.strides)
    walked = tuple([a for a in walk.order if x.shape[a] > 1])
    if order == walked:
        return Problem(walk, (*given, mask), results)
    if not fills_mask:
        return Problem(walk, (*given, _reordered(mask, x.shape, order, walked)), results)
    beside = np.empty_like(mask)
    bits = _Bits(mask, beside, x.shape, walked, order)
    return Problem(walk, (*given, beside), results, bits)


def _walk(axes: tuple[int, ...], arrays: list[Array]) -> Geometry | None:
    x = arrays[0]
    return geometry(x.shape, axes, x.itemsize, tuple([array.strides for array in arrays]))


def _beside(
    axes: tuple[int, ...], walk: Geometry | None, arrays: list[Array], first_written: int
) -> tuple[Geometry, list[Array], tuple[tuple[Array, Array], ...]]:
    # Copies of what has no place in the walk; the walk, all arrays, and the results among them.
    x, results = arrays[0], []
    if walk is None or not x.flags.aligned:
        arrays[0] = x = _walkable(axes, x)
        walk = _walk(axes, arrays)
        assert walk is not None, "a copy of x has a walk"
    for i, array in enumerate(arrays):
        if walk.places[i] is not None and array.flags.aligned:
            continue
        beside = np.empty([x.shape[a] for a in walk.order], x.dtype)
        arrays[i] = beside = beside.transpose(np.argsort(walk.order))
        if i >= first_written:
            results.append((array, beside))
        else:
            np.copyto(beside, array)
    walk = _walk(axes, arrays)
    assert walk is not None, "what is contiguous in the walk's order has a place"
    return walk, arrays, tuple(results)


def _walkable(axes: tuple[int, ...], x: Array) -> Array:
    copy = x.copy(order="K")
    if _walk(axes, [copy]) is not None:
        return copy
    # Channel axes that are not neighbours in memory: put them last, in the order given.
    order = [a for a in range(x.ndim) if a not in axes] + list(axes)
    return np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))


def _reordered(
    mask: Array, shape: tuple[int, ...], before: tuple[int, ...], after: tuple[int, ...]
) -> Array:
    # The bits of elements of that shape, in another order of its axes of more than one element.
    sizes = [shape[a] for a in before]
    bits = np.unpackbits(mask, count=prod(sizes), bitorder="little").reshape(sizes)
    return np.packbits(bits.transpose([before.index(a) for a in after]).ravel(), bitorder="little")
