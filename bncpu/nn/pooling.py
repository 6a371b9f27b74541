"""Layers that make images smaller: MaxPool2d, AvgPool2d, GlobalAvgPool, Flatten.

For NumPy arrays (N, C, H, W); they have no parameters.
"""

import math

import numpy as np

from bncpu.nn.base import Array, Layer, kept
from bncpu.nn.buffers import Buffers
from bncpu.nn.windows import Pair, Windows
from bncpu.nn.workers import over_images


class MaxPool2d(Layer):
    """y[n, c, h, w] = the largest pixel of the window at (s h, s w).

    Parameters
    ----------
    kernel_size : int or (int, int)
        Height and width of the window.
    stride : int or (int, int), optional
        The step s from one window to the next; by default the window's size.
    padding : int or (int, int)
        The pixels of minus infinity around the image.

    Raises
    ------
    TypeError, ValueError
        If a size is no integer, or out of range.

    Notes
    -----
    Of several largest pixels the first one of the window gets the gradient, as in PyTorch. A NaN
    is the largest pixel of its windows, and lets no gradient through.
    """

    def __init__(self, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0) -> None:
        stride = kernel_size if stride is None else stride
        self.windows = Windows(kernel_size, stride, padding, fill=-np.inf)
        self._padded: Array | None = None
        self._y: Array | None = None
        self._shape: tuple[int, ...] = ()
        self._buffers = Buffers()

    def __repr__(self) -> str:
        """Name the layer with its sizes."""
        return f"MaxPool2d({self.windows})"

    def forward(self, x: Array) -> Array:
        """Return y, shape (N, C, OH, OW)."""
        windows = self.windows.over(x.shape)
        y = self._buffers.empty((*x.shape[:2], *windows), x.dtype)
        padded = self.windows.padded(x)

        def images(part: slice) -> None:
            first, *others = self.windows.each(self.windows.fill_padded(x, part), windows)
            y[part] = first
            for pixels in others:
                np.maximum(y[part], pixels, out=y[part])

        over_images(len(x), images, size=x.size)
        self._padded, self._y, self._shape = padded, y, x.shape
        return y

    def backward(self, dy: Array) -> Array:
        """Return dx: dy where the largest pixel was, else 0; windows that overlap add up."""
        y, padded = kept(self._y), kept(self._padded)
        dx = self._buffers.empty(self._shape, dy.dtype)
        gradient = self.windows.gradient(dx)

        def images(part: slice) -> None:
            gradient[part] = 0
            to_find = np.ones(y[part].shape, bool)
            places = (self.windows.each(each[part], y.shape[2:]) for each in (padded, gradient))
            for pixels, sums in zip(*places, strict=True):
                largest = pixels == y[part]
                largest &= to_find
                to_find ^= largest
                sums += dy[part] * largest
            self.windows.take_gradient(dx, part)

        over_images(len(dy), images, size=dx.size)
        return dx


class AvgPool2d(Layer):
    """y[n, c, h, w] = the mean of the window at (s h, s w), padding included.

    Parameters
    ----------
    kernel_size : int or (int, int)
        Height and width of the window.
    stride : int or (int, int), optional
        The step s from one window to the next; by default the window's size.
    padding : int or (int, int)
        The zeros around the image, which count in the mean.

    Raises
    ------
    TypeError, ValueError
        If a size is no integer, or out of range.
    """

    def __init__(self, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0) -> None:
        self.windows = Windows(kernel_size, kernel_size if stride is None else stride, padding)
        self._shape: tuple[int, ...] | None = None
        self._buffers = Buffers()

    def __repr__(self) -> str:
        """Name the layer with its sizes."""
        return f"AvgPool2d({self.windows})"

    def forward(self, x: Array) -> Array:
        """Return y, shape (N, C, OH, OW)."""
        windows = self.windows.over(x.shape)
        y = self._buffers.empty((*x.shape[:2], *windows), x.dtype)
        self.windows.padded(x)  # before threads ask for it

        def images(part: slice) -> None:
            first, *others = self.windows.each(self.windows.fill_padded(x, part), windows)
            y[part] = first
            for pixels in others:
                y[part] += pixels
            y[part] *= 1 / math.prod(self.windows.kernel)

        over_images(len(x), images, size=x.size)
        self._shape = x.shape
        return y

    def backward(self, dy: Array) -> Array:
        """Return dx: every pixel gets its share of the gradients of its windows."""
        dx = self._buffers.empty(kept(self._shape), dy.dtype)
        gradient = self.windows.gradient(dx)

        def images(part: slice) -> None:
            gradient[part] = 0
            share = dy[part] * dy.dtype.type(1 / math.prod(self.windows.kernel))
            for sums in self.windows.each(gradient[part], dy.shape[2:]):
                sums += share
            self.windows.take_gradient(dx, part)

        over_images(len(dy), images, size=dx.size)
        return dx


class GlobalAvgPool(Layer):
    """y[n, c] = the mean of x[n, c] over all pixels (Lin, Chen & Yan 2013)."""

    _shape: tuple[int, ...] | None = None

    def __repr__(self) -> str:
        """Name the layer."""
        return "GlobalAvgPool()"

    def forward(self, x: Array) -> Array:
        """Return y, shape (N, C)."""
        if x.ndim != 4:
            raise ValueError(f"x: expected shape (N, C, H, W); got {x.shape}")
        self._shape = x.shape
        y: Array = x.mean(axis=(2, 3))
        return y

    def backward(self, dy: Array) -> Array:
        """Return dx, the same for every pixel of a channel."""
        shape = kept(self._shape)
        share = dy * dy.dtype.type(1 / math.prod(shape[2:]))
        return np.broadcast_to(share[:, :, np.newaxis, np.newaxis], shape).copy()


class Flatten(Layer):
    """y[n] = all values of x[n] in one row, so that a `Linear` can follow a convolution."""

    _shape: tuple[int, ...] | None = None

    def __repr__(self) -> str:
        """Name the layer."""
        return "Flatten()"

    def forward(self, x: Array) -> Array:
        """Return x as (N, C H W)."""
        self._shape = x.shape
        return x.reshape(len(x), math.prod(x.shape[1:]))

    def backward(self, dy: Array) -> Array:
        """Return dy in the shape of x."""
        return dy.reshape(kept(self._shape))
