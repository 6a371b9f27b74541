"""The windows of an image that a convolution or a pooling looks at: where they are, and copies.

Window (h, w) holds the pixels (stride h + i, stride w + j) of the padded image; taken by (i, j)
instead, the windows are kh kw images that NumPy copies, adds or compares at once.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from bncpu.nn.arguments import integer
from bncpu.nn.base import Array

Pair = int | tuple[int, int]


class Windows:
    """Windows of one size, stride and padding, over arrays (N, C, H, W), with memory of their own.

    Parameters
    ----------
    kernel_size, stride, padding : int or (int, int)
        Height and width of a window, steps from one to the next, zeros (or `fill`) around.
    fill : float
        What stands around the image.

    Raises
    ------
    TypeError, ValueError
        If a size is no integer, or out of range; padding is less than a window.
    """

    def __init__(self, kernel_size: Pair, stride: Pair, padding: Pair, fill: float = 0.0) -> None:
        self.kernel = pair("kernel_size", kernel_size, 1)
        self.stride = pair("stride", stride, 1)
        self.padding = pair("padding", padding, 0)
        if self.padding[0] >= self.kernel[0] or self.padding[1] >= self.kernel[1]:
            raise ValueError(
                f"padding: expected less than the window {self.kernel}; got {self.padding}"
            )
        self.fill = fill
        self._memory: dict[str, Array] = {}

    def __repr__(self) -> str:
        """Name what differs from the defaults of a convolution."""
        text = f"kernel_size={plain(self.kernel)}"
        text += f", stride={plain(self.stride)}" if self.stride != (1, 1) else ""
        return text + (f", padding={plain(self.padding)}" if self.padding != (0, 0) else "")

    def over(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return how many windows there are down and across images of shape (N, C, H, W).

        Raises
        ------
        ValueError
            If there are not four dimensions, or an image is smaller than a window.
        """
        if len(shape) != 4:
            raise ValueError(f"x: expected shape (N, C, H, W); got {shape}")
        high, wide = (
            (size + 2 * pad - kernel) // stride + 1
            for size, pad, kernel, stride in zip(
                shape[2:], self.padding, self.kernel, self.stride, strict=True
            )
        )
        if high < 1 or wide < 1:
            raise ValueError(
                f"x: expected images of at least {self.kernel} pixels, the padding of "
                f"{self.padding} included; got {shape[2:]}"
            )
        return high, wide

    @property
    def are_pixels(self) -> bool:
        """Whether each window is one pixel, and every pixel a window."""
        return (self.kernel, self.stride, self.padding) == ((1, 1), (1, 1), (0, 0))

    def turned(self) -> "Windows":
        """Return those over the results of these that lead back to the image, for a stride of 1."""
        high, wide = (
            kernel - 1 - pad for kernel, pad in zip(self.kernel, self.padding, strict=True)
        )
        return Windows(self.kernel, 1, (high, wide))

    def padded(self, x: Array) -> Array:
        """Return memory for x with its padding, not filled but for the padding; x without one."""
        if self.padding == (0, 0):
            return x
        return self._memory_of("padded", self._padded_shape(x.shape), x.dtype)

    def fill_padded(self, x: Array, part: slice) -> Array:
        """Return some images of x with their padding."""
        padded = self.padded(x)[part]
        if self.padding != (0, 0):
            self.inner(padded)[...] = x[part]
        return padded

    def columns(self, x: Array) -> tuple[Array, Callable[[slice], None]]:
        """Return the windows of x as (N, C kh kw, OH OW), and what fills in those of some images.

        Like `padded` and `gradient` it is called before threads share out the images. All that
        Python has to prepare is done then, because at Python code threads wait for each other.
        """
        n, c, *_ = x.shape
        size = self.over(x.shape)
        if self.are_pixels:
            return x.reshape(n, c, math.prod(size)), lambda _: None
        shape = (n, c * math.prod(self.kernel), math.prod(size))
        columns = self._memory_of("columns", shape, x.dtype)
        padded = self.padded(x)
        inner = None if padded is x else self.inner(padded)
        # Element (n, c, i, j, h, w) is pixel (stride h + i, stride w + j): one copy for all.
        down, across = padded.strides[2:]
        steps = (down, across, down * self.stride[0], across * self.stride[1])
        pixels = as_strided(
            padded, (n, c, *self.kernel, *size), (*padded.strides[:2], *steps), writeable=False
        )
        places = columns.reshape(pixels.shape)

        def fill(part: slice) -> None:
            if inner is not None:
                inner[part] = x[part]
            places[part] = pixels[part]

        return columns, fill

    def add_back(self, columns: Array, image: Array, part: slice) -> None:
        """Make each pixel of some images the sum of the values in its columns."""
        if self.are_pixels:
            image[part] = columns[part].reshape(image[part].shape)
            return
        windows = self.over(image.shape)
        gradient = self.gradient(image)[part]
        gradient[...] = 0
        images = columns[part].reshape(*gradient.shape[:2], -1, *windows)
        for k, pixels in enumerate(self.each(gradient, windows)):
            pixels += images[:, :, k]
        self.take_gradient(image, part)

    def gradient(self, image: Array) -> Array:
        """Return memory for the gradient of `image` with its padding; `image` without one."""
        if self.padding == (0, 0):
            return image
        return self._memory_of("gradient", self._padded_shape(image.shape), image.dtype)

    def take_gradient(self, image: Array, part: slice) -> None:
        """Write some images of `gradient`, without their padding, into `image`."""
        if self.padding != (0, 0):
            image[part] = self.inner(self.gradient(image)[part])

    def each(self, padded: Array, windows: tuple[int, int]) -> Iterator[Array]:
        """Yield, for each (i, j) in turn, pixel (i, j) of all windows: views (N, C, OH, OW)."""
        rows, columns = (
            [slice(i, i + stride * (count - 1) + 1, stride) for i in range(kernel)]
            for kernel, stride, count in zip(self.kernel, self.stride, windows, strict=True)
        )
        for row in rows:
            for column in columns:
                yield padded[:, :, row, column]

    def inner(self, padded: Array) -> Array:
        """Return padded images without their padding, a view."""
        top, left = self.padding
        high, wide = padded.shape[2:]
        return padded[:, :, top : high - top, left : wide - left]

    def _padded_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        n, c, high, wide = shape
        return n, c, high + 2 * self.padding[0], wide + 2 * self.padding[1]

    def _memory_of(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return memory of that name, new if the shape or dtype is; a border keeps its fill."""
        memory = self._memory.get(name)
        if memory is None or memory.shape != shape or memory.dtype != dtype:
            memory = self._memory[name] = np.full(shape, self.fill, dtype)
        return memory


def pair(name: str, value: Pair, low: int) -> tuple[int, int]:
    """Return an integer twice, or a pair of integers, each at least `low`."""
    if isinstance(value, tuple | list):
        if len(value) != 2:
            raise ValueError(f"{name}: expected an integer or a pair; got {value!r:.60}")
        return integer(name, value[0], low), integer(name, value[1], low)
    both = integer(name, value, low)
    return both, both


def plain(value: tuple[int, int]) -> str:
    """Return a pair of equal numbers as one."""
    return str(value[0]) if value[0] == value[1] else str(value)
