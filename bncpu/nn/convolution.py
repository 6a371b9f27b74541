"""Conv2d: a convolution as matrix products on BLAS, for NumPy arrays (N, C, H, W).

Not a collection of algorithms: every window of the input becomes a column (im2col: Chellapilla,
Puri & Simard 2006), and weights times columns is what BLAS does best. The columns are kh kw times
as large as the input, and are memory of the layer's own that is used again in every step.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import DTypeLike

from bncpu.nn.arguments import integer
from bncpu.nn.base import Array, WeightedLayer, kept
from bncpu.nn.buffers import Buffers
from bncpu.nn.initialization import gaussian
from bncpu.nn.windows import Pair, Windows
from bncpu.nn.workers import over_images


class Conv2d(WeightedLayer):
    """y[n, o, h, w] = b[o] + sum over c, i, j of W[o, c, i, j] x[n, c, s h + i, s w + j].

    Parameters
    ----------
    in_channels, out_channels : int
        The channels of an input and of an output.
    kernel_size : int or (int, int)
        Height and width of the window.
    stride, padding : int or (int, int)
        The step s from one window to the next, and the zeros around the image.
    bias : bool
        Whether b is there. Leave it out before a batch normalisation, which subtracts it again.
    input_gradient : bool
        Whether `backward` computes dx. That of a network's first layer nobody needs in training;
        without it `backward` returns NaN in its place.
    rng : numpy.random.Generator
        Draws the initial weights; b starts at zero and draws nothing.
    std : float, optional
        The standard deviation of the Gaussian initial weights. The default, 1 / sqrt(in_channels
        kh kw), keeps the variance of a standardised input; before a ReLU, sqrt(2) times it does.
    dtype : dtype
        float32 or float64, the dtype of x and of the parameters.

    Raises
    ------
    TypeError
        If `rng` is not a Generator, a size not an integer, `std` not a number, or `dtype` not a
        floating one.
    ValueError
        If a size is out of range, or `std` negative or not finite.

    Notes
    -----
    The columns of the last forward are kept for `backward`. With windows of one pixel they are x
    itself, which is then to be left as it is until then.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        *,
        stride: Pair = 1,
        padding: Pair = 0,
        bias: bool = True,
        input_gradient: bool = True,
        rng: np.random.Generator,
        std: float | None = None,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.in_channels = integer("in_channels", in_channels, 1)
        self.out_channels = integer("out_channels", out_channels, 1)
        self.windows = Windows(kernel_size, stride, padding)
        stride_1 = self.windows.stride == (1, 1)
        self._turned = self.windows.turned() if stride_1 else None
        shape = (self.out_channels, self.in_channels, *self.windows.kernel)
        self.weight = gaussian(shape, rng=rng, std=std, dtype=dtype)
        self.bias = np.zeros(self.out_channels, dtype) if bias else None
        self.input_gradient = input_gradient
        self._columns: Array | None = None
        self._shape: tuple[int, ...] = ()
        self._buffers = Buffers()

    def __repr__(self) -> str:
        """Name the layer with its sizes, and its bias where there is none."""
        bias = "" if self.bias is not None else ", bias=False"
        return f"Conv2d({self.in_channels}, {self.out_channels}, {self.windows}{bias})"

    def forward(self, x: Array) -> Array:
        """Return y, shape (N, out_channels, OH, OW)."""
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x: expected shape (N, {self.in_channels}, H, W); got {x.shape}")
        if x.dtype != self.weight.dtype:
            raise TypeError(f"x: expected {self.weight.dtype} like the weights; got {x.dtype}")
        n, (high, wide) = len(x), self.windows.over(x.shape)
        columns, fill = self.windows.columns(x)
        y = self._buffers.empty((n, self.out_channels, high * wide), x.dtype)
        matrix = self._matrix()

        def images(part: slice) -> None:
            fill(part)
            np.matmul(matrix, columns[part], out=y[part])
            if self.bias is not None:
                y[part] += self.bias[:, np.newaxis]

        over_images(n, images, size=columns.size)
        self._shape, self._columns = x.shape, columns
        return y.reshape(n, self.out_channels, high, wide)

    def backward(self, dy: Array) -> Array:
        """Return dx; the gradients of W and b, sums over images and windows, are kept."""
        columns, n = kept(self._columns), len(dy)
        if self.input_gradient:
            dx = self._buffers.empty(self._shape, dy.dtype)
        else:
            dx = np.broadcast_to(dy.dtype.type(np.nan), self._shape)
        share = self._input_gradient(dy, dx)
        dy = dy.reshape(n, self.out_channels, -1)
        # One product per image and their sum: the same bits however they are shared out. One of all
        # images would need their columns side by side.
        products = self._buffers.empty((n, self.out_channels, columns.shape[1]), dy.dtype)
        # Products over long rows are fast as they stand. Short ones gain more than a copy costs
        # where the second matrix is not read across its rows.
        long_rows = columns.shape[2] > 3 * columns.shape[1]
        across, products_across = columns.transpose(0, 2, 1), products.transpose(0, 2, 1)
        dy_across = dy.transpose(0, 2, 1)

        def images(part: slice) -> None:
            share(part)
            if long_rows:
                np.matmul(dy[part], across[part], out=products[part])
            else:
                np.matmul(columns[part], dy_across[part].copy("C"), out=products_across[part])

        over_images(n, images, size=columns.size)
        self.dweight = products.sum(axis=0).reshape(self.weight.shape)
        if self.bias is not None:
            self.dbias = dy.sum(axis=(0, 2))
        return dx

    def _input_gradient(self, dy: Array, dx: Array) -> Callable[[slice], None]:
        """Return what computes dx of some images."""
        if not self.input_gradient:
            return lambda _: None
        return self._correlate(dy, dx, self._turned) if self._turned else self._spread(dy, dx)

    def _correlate(self, dy: Array, dx: Array, windows: Windows) -> Callable[[slice], None]:
        """Return what computes dx of some images for a stride of 1.

        dx[n, c] = sum over o, i, j of W[o, c, i, j] dy[n, o, h - i, w - j]: a convolution of dy
        with the weights turned by 180 degrees.
        """
        columns, fill = windows.columns(dy)
        turned = self.weight[:, :, ::-1, ::-1].transpose(1, 0, 2, 3)
        matrix = turned.reshape(self.in_channels, -1)
        result = dx.reshape(len(dx), self.in_channels, -1)

        def images(part: slice) -> None:
            fill(part)
            np.matmul(matrix, columns[part], out=result[part])

        return images

    def _spread(self, dy: Array, dx: Array) -> Callable[[slice], None]:
        """Return what computes dx of some images for any stride.

        Each window's gradient goes back to the pixels that are in it.
        """
        columns = np.empty((len(dy), self._matrix().shape[1], math.prod(dy.shape[2:])), dy.dtype)
        gradient = dy.reshape(len(dy), self.out_channels, -1)
        self.windows.gradient(dx)

        def images(part: slice) -> None:
            np.matmul(self._matrix().T, gradient[part], out=columns[part])
            self.windows.add_back(columns, dx, part)

        return images

    def _matrix(self) -> Array:
        return self.weight.reshape(self.out_channels, math.prod(self.weight.shape[1:]))
