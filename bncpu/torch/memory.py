"""The memory of a module's last large result, used again once nobody holds it.

A training step holds the results of all its layers at once, far more than the pool of bncpu keeps,
and fresh pages cost more than normalising what stands in them. So each module keeps the memory of
its own result from step to step: what a step needs at its peak anyway. In the backward pass the
result has mostly been let go of, and the gradient takes its place.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from bncpu import cpu

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

LEAST = 4 << 20  # bytes; the pool's own bound (bncpu.cpu.pool)


class Kept:
    """One array at most, and whether anybody else holds it: PyTorch's tensors count as holders."""

    def __init__(self) -> None:
        self._last: list[Array] = []

    def take(self, x: Array) -> Array | None:
        """Return the kept array if it is of x's shape, dtype and strides, and free; else None."""
        try:
            array, holders = _popped(self._last)
        except IndexError:
            return None
        fits = array.shape == x.shape and array.strides == x.strides and array.dtype == x.dtype
        if fits and holders == _ALONE:
            return array
        self._last.append(array)
        return None

    def keep(self, result: Array) -> None:
        """Keep a result instead of the one before, if it is large and the pool keeps anything."""
        large = result.nbytes >= LEAST and cpu.pool.limit() > 0
        self._last[:] = [result] if large else []


# By module and not on it: neither its copies nor its pickles carry the memory along.
_of_modules: WeakKeyDictionary[Any, Kept] = WeakKeyDictionary()


def kept_for(module: Any) -> Kept:
    """Return what a module keeps."""
    kept = _of_modules.get(module)
    if kept is None:
        kept = _of_modules[module] = Kept()
    return kept


def release(module: Any) -> None:
    """Keep nothing for a module."""
    _of_modules.pop(module, None)


def _popped(last: list[Array]) -> tuple[Array, int]:
    # Taking it out is one step, so that of two threads only one gets it.
    array = last.pop()
    return array, sys.getrefcount(array)


# The count of an array that nobody else holds, as this interpreter counts.
_ALONE = _popped([np.empty(0)])[1]
