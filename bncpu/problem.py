"""What a kernel call takes: one walk, and arrays that fit it; the rest is copied.

The arrays of a call are checked (bncpu.arguments) but of any strides. Those that the kernels can
walk beside x go to them as they are, the others as copies, and a result that was computed beside
its array is brought there in the end.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bncpu.backends import array_module, as_stored, on_gpu
from bncpu.layout import Geometry, geometry, memory_order
from bncpu.memory import aligned

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Array = NDArray[Any]

# cupy.packbits counts bits in 32 bits. A multiple of 8.
_BITS_AT_ONCE = 1 << 30


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
            array[...] = beside
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
    # On a GPU nothing misaligned has come this far.
    if walk is None or not walk.complete or not (on_gpu(x) or all(map(aligned, arrays))):
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
    beside = array_module(mask).empty_like(mask)
    bits = _Bits(mask, beside, x.shape, walked, order)
    return Problem(walk, (*given, beside), results, bits)


def _walk(axes: tuple[int, ...], arrays: list[Array]) -> Geometry | None:
    x = arrays[0]
    walk = geometry(x.shape, axes, x.itemsize, tuple([array.strides for array in arrays]))
    if walk is None or not on_gpu(x):
        return walk
    # The kernels of a GPU step from row to row, not from plane to plane.
    planes = [place.planes for place in walk.places if place is not None]
    return None if planes[0] is not None else walk


def _beside(
    axes: tuple[int, ...], walk: Geometry | None, arrays: list[Array], first_written: int
) -> tuple[Geometry, list[Array], tuple[tuple[Array, Array], ...]]:
    # Copies of what has no place in the walk; the walk, all arrays, and the results among them.
    x, results = arrays[0], []
    if walk is None or not aligned(x):
        arrays[0] = x = _walkable(axes, x)
        walk = _walk(axes, arrays)
        assert walk is not None, "a copy of x has a walk"
    for i, array in enumerate(arrays):
        if walk.places[i] is not None and aligned(array):
            continue
        memory: Array = array_module(x).empty(tuple([x.shape[a] for a in walk.order]), x.dtype)
        arrays[i] = beside = memory.transpose(_inverse(walk.order))
        if i >= first_written:
            results.append((array, beside))
        else:
            beside[...] = array
    walk = _walk(axes, arrays)
    assert walk is not None, "what is contiguous in the walk's order has a place"
    return walk, arrays, tuple(results)


def _walkable(axes: tuple[int, ...], x: Array) -> Array:
    copy = x.copy(order="K")
    if _walk(axes, [copy]) is not None:
        return copy
    # Channel axes that are not neighbours in memory: put them last, in the order given.
    order = [a for a in range(x.ndim) if a not in axes] + list(axes)
    last: Array = array_module(x).ascontiguousarray(x.transpose(order))
    return last.transpose(_inverse(order))


def _inverse(order: Sequence[int]) -> list[int]:
    return [int(a) for a in np.argsort(order)]


def _reordered(
    mask: Array, shape: tuple[int, ...], before: tuple[int, ...], after: tuple[int, ...]
) -> Array:
    # The bits of elements of that shape, in another order of its axes of more than one element.
    sizes = [shape[a] for a in before]
    module = array_module(mask)
    bits = module.unpackbits(mask, bitorder="little")[: prod(sizes)].reshape(sizes)
    moved = bits.transpose([before.index(a) for a in after]).ravel()
    packed = [
        module.packbits(moved[first : first + _BITS_AT_ONCE], bitorder="little")
        for first in range(0, moved.size, _BITS_AT_ONCE)
    ]
    together: Array = module.concatenate(packed) if len(packed) > 1 else packed[0]
    return together
