"""Which elements of two arrays are the same memory: what may be written while what is read.

Questions only; bncpu.arguments refuses.
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


def overlap(a: Array, b: Array) -> bool:
    """Return whether two arrays share an element's memory, or cannot be shown not to."""
    if not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=_OVERLAP_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def same(a: Array, b: Array) -> bool:
    """Return whether two arrays of one shape and dtype are the same memory, element by element."""
    return (
        a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
        and a.strides == b.strides
    )


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
