"""Arrays for a layer's results, in memory of its earlier ones where nobody holds those any more.

A fresh page costs a fault and is cleared by the system: for the results of a training step that is
a tenth of its time. Who counts on a result keeps it: only what no variable, layer or view refers to
is taken again.
"""

import sys
from typing import Any

import numpy as np

from bncpu.nn.base import Array

# One may still be held by the next layer when the following one is asked for; and an evaluation has
# batches of another size.
KEPT = 4
# Bytes; what is smaller finds pages that are there.
LARGE = 1 << 17


class Buffers:
    """The memory of one layer's results."""

    def __init__(self) -> None:
        self._kept: list[Array] = []

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return an uninitialised array; like `numpy.empty`, whatever memory it has."""
        kept = self._kept
        for i in range(len(kept)):
            fits = kept[i].shape == shape and kept[i].dtype == dtype
            if fits and sys.getrefcount(kept[i]) == ALONE:
                return kept[i]
        del kept[: len(kept) - KEPT + 1]
        kept.append(np.empty(shape, dtype))
        return kept[-1]

    def like(self, x: Any) -> Array | None:
        """Return an array for a result like x if x is NumPy's, in C order and large, else None."""
        large = isinstance(x, np.ndarray) and x.nbytes >= LARGE and x.flags.c_contiguous
        return self.empty(x.shape, x.dtype) if large else None


def _references_when_alone() -> int:
    kept = [np.empty(0)]
    return sys.getrefcount(kept[0])


# How Python counts the list's own reference, and the call's, differs between versions.
ALONE = _references_when_alone()
