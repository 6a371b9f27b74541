"""Which elements of two arrays are the same memory: what may be written while what is read.

Questions only, about addresses and strides; no element is looked at, so arrays of a GPU are as good
as NumPy's. bncpu.arguments refuses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

# numpy.shares_memory is exact and can take exponential time; this much work decides all but
# contrived views, and those are refused.
_OVERLAP_WORK = 10_000


class _Addresses:
    # What NumPy makes an array of that lies where another one does, in memory it cannot read.
    def __init__(self, array: Array) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (address(array), False),
            "shape": array.shape,
            "strides": array.strides,
            "typestr": f"|V{array.itemsize}",
        }


def _reach(array: Array) -> tuple[int, int]:
    # The first byte of an array that is not empty, and the one behind its last.
    low = high = address(array)
    for stride, n in zip(array.strides, array.shape, strict=True):
        if stride > 0:
            high += stride * (n - 1)
        else:
            low += stride * (n - 1)
    return low, high + array.itemsize


def address(array: Array) -> int:
    """Return where the first element is."""
    if isinstance(array, np.ndarray):
        return int(array.__array_interface__["data"][0])
    return int(array.data.ptr)


def aligned(array: Array) -> bool:
    """Return whether every element is at a multiple of its size."""
    if isinstance(array, np.ndarray):
        return array.flags.aligned
    size = array.itemsize
    return address(array) % size == 0 and not any(s % size for s in array.strides)


def writeable(array: Array) -> bool:
    """Return whether an array may be written; CuPy's always may."""
    return getattr(array.flags, "writeable", True)


def overlap(a: Array, b: Array) -> bool:
    """Return whether two arrays share an element's memory, or cannot be shown not to."""
    if a.size == 0 or b.size == 0:
        return False
    if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)):
        (a_low, a_high), (b_low, b_high) = _reach(a), _reach(b)
        if a_high <= b_low or b_high <= a_low:
            return False
        # Never to be read: NumPy compares the addresses.
        a, b = np.asarray(_Addresses(a)), np.asarray(_Addresses(b))
    if not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=_OVERLAP_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def same(a: Array, b: Array) -> bool:
    """Return whether two arrays of one shape and dtype are the same memory, element by element."""
    return address(a) == address(b) and a.strides == b.strides


def overlaps_itself(array: Array) -> bool:
    """Return whether an array has, or cannot easily be shown not to have, an element twice."""
    if array.flags.c_contiguous or array.size == 0:
        return False
    # Sorted by stride, every axis must step over all that the smaller ones reach.
    reach = array.itemsize
    for stride, n in sorted(
        (abs(s), n) for s, n in zip(array.strides, array.shape, strict=True) if n > 1
    ):
        if stride < reach:
            return True
        reach += stride * (n - 1)
    return False
