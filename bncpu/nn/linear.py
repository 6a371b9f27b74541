"""Linear: y = x W^T + b, the fully connected layer. Arrays are NumPy's or CuPy's."""

from typing import Literal

import numpy as np
from numpy.typing import DTypeLike

from bncpu.backends import module_on
from bncpu.nn.arguments import integer
from bncpu.nn.base import Array, WeightedLayer, kept
from bncpu.nn.initialization import gaussian


class Linear(WeightedLayer):
    """y = x W^T + b, for x of shape (n, in_features) and W of (out_features, in_features).

    Parameters
    ----------
    in_features, out_features : int
        The sizes of an input and of an output.
    bias : bool
        Whether b is there. Leave it out before a batch normalisation, which subtracts it again.
    rng : numpy.random.Generator
        Draws the initial weights; b starts at zero and draws nothing, so that a network with
        biases and one without start from the same weights.
    std : float, optional
        The standard deviation of the Gaussian initial weights. The default, 1 / sqrt(in_features),
        keeps the variance of a standardised input; before a ReLU, sqrt(2 / in_features) does.
    dtype : dtype
        float32 or float64, the dtype of x and of the parameters.
    device : "cpu" or "cuda"
        Where x and the parameters are: NumPy or CuPy arrays. The weights are the same ones.

    Raises
    ------
    TypeError
        If `rng` is not a Generator, a size not an integer, `std` not a number, or `dtype` not a
        floating one.
    ValueError
        If a size is not positive, there are more weights than any memory holds, or `std` is
        negative or not finite.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        rng: np.random.Generator,
        std: float | None = None,
        dtype: DTypeLike = np.float32,
        device: Literal["cpu", "cuda"] = "cpu",
    ) -> None:
        self.in_features = integer("in_features", in_features, 1)
        self.out_features = integer("out_features", out_features, 1)
        module = module_on(device)
        weight = gaussian((self.out_features, self.in_features), rng=rng, std=std, dtype=dtype)
        self.weight = module.asarray(weight)
        self.bias = module.zeros(self.out_features, dtype) if bias else None
        self._x: Array | None = None

    def __repr__(self) -> str:
        """Name the layer with its sizes, and its bias where there is none."""
        bias = "" if self.bias is not None else ", bias=False"
        return f"Linear({self.in_features}, {self.out_features}{bias})"

    def forward(self, x: Array) -> Array:
        """Return x W^T + b, shape (n, out_features)."""
        if x.ndim != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"x: expected shape (n, {self.in_features}); got {x.shape}")
        if x.dtype != self.weight.dtype:
            raise TypeError(f"x: expected {self.weight.dtype} like the weights; got {x.dtype}")
        self._x = x
        y: Array = x @ self.weight.T
        if self.bias is not None:
            y += self.bias
        return y

    def backward(self, dy: Array) -> Array:
        """Return dx = dy W; dW = dy^T x and db = sum over n of dy become gradients."""
        x = kept(self._x)
        self.dweight = dy.T @ x
        if self.bias is not None:
            self.dbias = dy.sum(axis=0)
        dx: Array = dy @ self.weight
        return dx
