"""Arrays to try: memory layouts of any shape, with the bytes around them watched, and plain data.

A layout is a function of (shape, dtype) that returns an array of that shape which looks at memory
in its own way, and the buffer it looks at. Channels are on axis 1 where a layout cares.
"""

from typing import NamedTuple

import ml_dtypes
import numpy as np

FLOATS = [np.dtype(np.float32), np.dtype(np.float64)]
HALVES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]

# (N, C, S) around the widths of vectors, runs and tiles; the last ones have channels larger than
# a core's L2 cache. Every case has m > 1.
SIZES = [
    (2, 1, 1),
    (2, 3, 1),
    (127, 5, 1),
    (128, 64, 1),
    (129, 1000, 1),
    (300, 2, 1),
    (3, 1000, 1),
    (1, 1, 2),
    (1, 5, 3),
    (1, 1, 7),
    (2, 3, 7),
    (300, 5, 7),
    (3, 2, 8),
    (1, 64, 9),
    (2, 5, 15),
    (1, 3, 16),
    (5, 64, 17),
    (2, 5, 31),
    (127, 3, 32),
    (128, 2, 33),
    (129, 1, 49),
    (8, 64, 49),
    (2, 1000, 49),
    (3, 64, 65),
    (7, 5, 97),
    (4, 3, 196),
    (2, 64, 511),
    (3, 5, 513),
    (2, 3, 2047),
    (1, 2, 2049),
    (5, 1, 5000),
    (2, 64, 5000),
    (1, 1, 600_001),
    (300, 2, 2049),
]

# (M, C) with the channels innermost.
ROWS_OF_CHANNELS = [
    (2, 1),
    (5000, 1),
    (3, 3),
    (129, 7),
    (65, 8),
    (300, 9),
    (33, 15),
    (127, 16),
    (97, 17),
    (128, 31),
    (31, 33),
    (511, 49),
    (49, 65),
    (2, 97),
    (2049, 64),
    (17, 1000),
    (200_001, 3),
]


class Laid(NamedTuple):
    """An array, and the one-dimensional run of bytes that it is a view of."""

    array: np.ndarray
    memory: np.ndarray


def _whole(array):
    """Return the memory of a C-ordered array, as bytes."""
    return array.reshape(-1).view(np.uint8)


def _empty(shape, dtype):
    """Return a new array filled with a value that no result has."""
    array = np.empty(shape, dtype)
    _whole(array)[...] = 0xA5
    return array


def _by_order(order):
    """Lay the axes out in memory in the order that a function of their number gives."""

    def layout(shape, dtype):
        axes = order(len(shape))
        base = _empty([shape[a] for a in axes], dtype)
        return Laid(base.transpose(np.argsort(axes)), _whole(base))

    return layout


def _by_slices(slices):
    """Cut the array out of a larger one: slices(ndim) gives, per axis, (before, step, after)."""

    def layout(shape, dtype):
        cuts = slices(len(shape))
        sizes, index = [], []
        for size, (before, step, after) in zip(shape, cuts, strict=True):
            length = before + max(size - 1, 0) * abs(step) + (size > 0) + after
            cut = slice(before, before + size * abs(step), abs(step))
            sizes.append(length)
            index.append(cut)
        base = _empty(sizes, dtype)
        flips = tuple(slice(None, None, -1 if step < 0 else 1) for _, step, _ in cuts)
        return Laid(base[tuple(index)][flips], _whole(base))

    return layout


def _misaligned(shape, dtype):
    """Start one byte past a whole item: NumPy calls such an array not aligned."""
    memory = _empty(int(np.prod(shape)) * dtype.itemsize + 2, np.dtype(np.uint8))
    array = np.ndarray(shape, dtype, buffer=memory.data, offset=1)
    return Laid(array, memory)


def _off_by_an_item(shape, dtype):
    """Start one item past where the allocator put the memory: no vector is aligned."""
    base = _empty(int(np.prod(shape)) + 2, dtype)
    return Laid(base[1:-1].reshape(shape), _whole(base))


def _keep(ndim):
    return [(0, 1, 0)] * ndim


def _on(axes, cut):
    """Cut on some axes (negative ones count from the end) and leave the others whole."""

    def slices(ndim):
        cuts = _keep(ndim)
        for a in axes:
            if -ndim <= a < ndim:
                cuts[a] = cut
        return cuts

    return slices


LAYOUTS = {
    "c": _by_order(lambda n: list(range(n))),
    "fortran": _by_order(lambda n: list(range(n))[::-1]),
    "channels_last": _by_order(lambda n: [0, *range(2, n), 1]),
    "channels_first": _by_order(lambda n: [1, 0, *range(2, n)]),
    "samples_innermost": _by_order(lambda n: [*range(1, n), 0]),
    "inner_transposed": _by_order(lambda n: [*range(n - 2), n - 1, n - 2]),
    "cropped": _by_slices(_on([-1, -2], (1, 1, 2))),
    "cropped_all": _by_slices(lambda n: [(2, 1, 1)] * n),
    "channels_cut": _by_slices(_on([1], (1, 1, 2))),
    "channels_strided": _by_slices(_on([1], (1, 2, 0))),
    "samples_strided": _by_slices(_on([0], (0, 3, 1))),
    "inner_strided": _by_slices(_on([-1], (1, 2, 1))),
    "reversed": _by_slices(lambda n: [(0, -1, 0)] * n),
    "reversed_samples": _by_slices(_on([0], (0, -1, 0))),
    "reversed_channels": _by_slices(_on([1], (0, -1, 0))),
    "reversed_inner": _by_slices(_on([-1], (0, -1, 0))),
    "reversed_strided": _by_slices(lambda n: [(1, -2, 1)] * n),
    "off_by_an_item": _off_by_an_item,
    "misaligned": _misaligned,
}


def lay(name, values):
    """Return values in the layout of that name."""
    array, _ = LAYOUTS[name](values.shape, values.dtype)
    array[...] = values
    return array


class Output:
    """Memory to write a result into, in a layout, that knows whether anything else was written."""

    def __init__(self, name, shape, dtype):
        self.array, self._memory = LAYOUTS[name](shape, np.dtype(dtype))
        self._before = self._memory.copy()

    def assert_untouched(self):
        assert np.array_equal(self._memory, self._before), "something was written"

    def assert_only_inside(self):
        """Check that the bytes between and around the array's elements are as they were."""
        inside = self.array.copy()
        filler = b"\xa5" * self.array.itemsize
        self.array[...] = np.frombuffer(filler, self.array.dtype)[0]
        try:
            assert np.array_equal(self._memory, self._before), "written outside the output"
        finally:
            self.array[...] = inside


def of_size(size):
    """Return the shape for (N, C, S): (N, C) where S is one, which is how people have it."""
    return size[:2] if size[-1] == 1 else size


def memory_order(x):
    """Return the axes of x as they lie in memory, outermost first; None if they do not step on."""
    if any(s <= 0 for s, n in zip(x.strides, x.shape, strict=True) if n > 1):
        return None
    return sorted(range(x.ndim), key=lambda a: -x.strides[a])


def new_mask(x):
    """Return memory for the mask of x, full of bits that nobody has set."""
    return np.full((x.size + 7) // 8, 0xA5, np.uint8)


def normal(rng, shape, dtype, *, mean=0.5, std=2.0):
    return (rng.standard_normal(shape) * std + mean).astype(dtype)


def parameter_dtype(dtype):
    """Return the dtype that gamma and beta have for an x of a dtype."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def parameters(rng, shape, dtype):
    """Return gamma, of either sign, and beta for channels of that shape of an x of that dtype."""
    dtype = parameter_dtype(dtype)
    return normal(rng, shape, dtype, mean=0.3, std=1.0), normal(rng, shape, dtype)


def statistics(rng, shape, dtype=np.float64):
    """Return a mean and a variance to infer with."""
    mean = rng.standard_normal(shape) + 0.5
    return mean.astype(dtype), (rng.random(shape) * 4.0 + 0.1).astype(dtype)
