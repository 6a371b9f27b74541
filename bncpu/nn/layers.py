"""Layers of the minimal trainer: Linear, Sigmoid, Tanh, ReLU, and Sequential, which chains them.

This is not a framework: there is no automatic differentiation. Every layer writes out its own
gradient, keeps what its backward needs from the last forward, and names its parameters as
PyTorch's layer of the same name does. Batch normalisation itself is `bncpu.BatchNorm`, used here
as anybody would use it. Arrays are NumPy's or CuPy's: NumPy's functions hand CuPy's arrays to CuPy.
Back-propagation is that of Rumelhart, Hinton & Williams (1986).
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bncpu.backends import array_module, module_on, to_numpy
from bncpu.layer import BatchNorm
from bncpu.nn.arguments import integer, real

Array = NDArray[Any]
# Of float64, the dtype in which weights are drawn; NumPy refuses more without naming anybody.
MAX_WEIGHTS = np.iinfo(np.intp).max // 8


class Layer(ABC):
    """A differentiable function with parameters; the base of the layers below.

    A layer with parameters overrides `parameters` and `gradients`, whose arrays share their names.
    """

    training = True

    @abstractmethod
    def forward(self, x: Array) -> Array:
        """Return y = f(x), keeping what `backward` needs."""

    @abstractmethod
    def backward(self, dy: Array) -> Array:
        """Return dL/dx from dL/dy, and keep the gradients of the parameters."""

    def __call__(self, x: Array) -> Array:
        """Return ``forward(x)``."""
        return self.forward(x)

    def train(self, mode: bool = True) -> None:
        """Behave as in training, or as in inference if `mode` is false."""
        self.training = mode

    def eval(self) -> None:
        """Behave as in inference."""
        self.train(False)

    def parameters(self) -> dict[str, Array]:
        """Return the arrays that an optimizer changes in place, by name."""
        return {}

    def gradients(self) -> dict[str, Array]:
        """Return dL/d(parameter) of the last `backward`, by the parameter's name."""
        return {}

    def state_dict(self) -> dict[str, Array]:
        """Return NumPy copies of all arrays that make up the layer's state, by name."""
        return {name: np.array(to_numpy(value)) for name, value in self.parameters().items()}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Take over the arrays of `state`; on an error nothing has changed.

        Raises
        ------
        ValueError
            If a name is missing or unexpected, or an array's shape or kind of dtype is another.
        """
        check_state(self.parameters(), state)
        for name, value in self.parameters().items():
            value[...] = array_module(value).asarray(state[name])


class Linear(Layer):
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
        if self.in_features * self.out_features > MAX_WEIGHTS:
            raise ValueError(
                f"out_features: expected at most {MAX_WEIGHTS} weights; got {self.out_features} x "
                f"{self.in_features}"
            )
        if not isinstance(rng, np.random.Generator):
            raise TypeError(f"rng: expected a numpy.random.Generator; got {rng!r}")
        if np.dtype(dtype) not in (np.float32, np.float64):
            raise TypeError(f"dtype: expected float32 or float64; got {np.dtype(dtype)}")
        std = self.in_features**-0.5 if std is None else real("std", std)
        if not 0 <= std < np.inf:
            raise ValueError(f"std: expected a finite number >= 0; got {std}")
        module = module_on(device)
        # Drawn in float64 whatever the dtype, so that float32 and float64 networks start alike.
        weight = std * rng.standard_normal((self.out_features, self.in_features))
        self.weight: Array = module.asarray(weight.astype(dtype))
        self.bias: Array | None = module.zeros(self.out_features, dtype) if bias else None
        self.dweight: Array | None = None
        self.dbias: Array | None = None
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

    def parameters(self) -> dict[str, Array]:
        """Return weight and, where there is one, bias."""
        return present(weight=self.weight, bias=self.bias)

    def gradients(self) -> dict[str, Array]:
        """Return the gradients of weight and bias."""
        return present(weight=self.dweight, bias=self.dbias)


class Sigmoid(Layer):
    """y = 1 / (1 + exp(-x)), element by element."""

    _y: Array | None = None

    def __repr__(self) -> str:
        """Name the layer."""
        return "Sigmoid()"

    def forward(self, x: Array) -> Array:
        """Return the sigmoid of x."""
        # The same function, and tanh overflows nowhere where exp(-x) would.
        self._y = 0.5 * np.tanh(0.5 * x) + 0.5
        return self._y

    def backward(self, dy: Array) -> Array:
        """Return dx = dy y (1 - y)."""
        y = kept(self._y)
        dx: Array = dy * y * (1 - y)
        return dx


class Tanh(Layer):
    """y = tanh(x), element by element."""

    _y: Array | None = None

    def __repr__(self) -> str:
        """Name the layer."""
        return "Tanh()"

    def forward(self, x: Array) -> Array:
        """Return the hyperbolic tangent of x."""
        self._y = np.tanh(x)
        return self._y

    def backward(self, dy: Array) -> Array:
        """Return dx = dy (1 - y^2)."""
        y = kept(self._y)
        dx: Array = dy * (1 - y * y)
        return dx


class ReLU(Layer):
    """y = max(x, 0), element by element; NaN stays NaN."""

    _y: Array | None = None

    def __repr__(self) -> str:
        """Name the layer."""
        return "ReLU()"

    def forward(self, x: Array) -> Array:
        """Return x where it is positive, else 0."""
        self._y = np.maximum(x, 0)
        return self._y

    def backward(self, dy: Array) -> Array:
        """Return dx = dy where x > 0, else 0."""
        return dy * (kept(self._y) > 0)


class Sequential(Layer):
    """Apply layers one after another; parameters are named as in PyTorch, "0.weight" and so on.

    A `Linear` directly before a `BatchNorm` should be made with ``bias=False``. Batch normalisation
    subtracts the mean over the batch, and with it whatever constant b was added:
    BN(Wu + b) = BN(Wu). The gradient of b is zero, and beta takes its part (Ioffe & Szegedy 2015,
    section 3.2). A bias left there does no harm but is memory and time for nothing, and so is
    answered by one `UserWarning`.

    Parameters
    ----------
    *layers : Layer or BatchNorm
        In the order of application.

    Raises
    ------
    TypeError
        If an argument is not a layer.
    """

    def __init__(self, *layers: Layer | BatchNorm) -> None:
        for i, layer in enumerate(layers):
            if not isinstance(layer, Layer | BatchNorm):
                raise TypeError(f"layers: expected a layer at index {i}; got {layer!r}")
        self.layers = layers
        redundant = [
            str(i)
            for i, (layer, following) in enumerate(pairwise(layers))
            if isinstance(layer, Linear)
            and layer.bias is not None
            and isinstance(following, BatchNorm)
        ]
        if redundant:
            warnings.warn(
                f"Linear at {', '.join(redundant)}: its bias is redundant before a BatchNorm, "
                "whose beta takes its part; use Linear(..., bias=False)",
                UserWarning,
                stacklevel=2,
            )

    def __repr__(self) -> str:
        """List the layers."""
        return f"Sequential({', '.join(map(repr, self.layers))})"

    def forward(self, x: Array) -> Array:
        """Return the last layer's output."""
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, dy: Array) -> Array:
        """Return the gradient of the first layer's input."""
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
        return dy

    def train(self, mode: bool = True) -> None:
        """Set the mode of every layer."""
        self.training = mode
        for layer in self.layers:
            layer.train(mode)

    def parameters(self) -> dict[str, Array]:
        """Return the parameters of all layers, each name preceded by the layer's index."""
        return self._gather([parameters_of(layer) for layer in self.layers])

    def gradients(self) -> dict[str, Array]:
        """Return the gradients of all layers, each name preceded by the layer's index."""
        return self._gather([gradients_of(layer) for layer in self.layers])

    def state_dict(self) -> dict[str, Array]:
        """Return copies of all parameters and running statistics."""
        state = self._gather([layer.state_dict() for layer in self.layers])
        return {name: np.array(value, order="C") for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Take over all arrays of `state`; on an error nothing has changed.

        Raises
        ------
        ValueError
            If a name is missing or unexpected, or an array's shape or kind of dtype is another.
        """
        before = self.state_dict()
        check_state(before, state)
        try:
            self._load(state)
        except BaseException:  # a layer has checks of its own, and an interrupt comes anywhere
            self._load(before)
            raise

    def _load(self, state: Mapping[str, Array]) -> None:
        for i, layer in enumerate(self.layers):
            start = f"{i}."
            part = {n.removeprefix(start): v for n, v in state.items() if n.startswith(start)}
            try:
                layer.load_state_dict({name: to_numpy(value) for name, value in part.items()})
            except ValueError as error:
                # The layer knows its array's name, not its own place.
                raise ValueError(f"{start}{error}") from error

    @staticmethod
    def _gather(parts: list[dict[str, Array]]) -> dict[str, Array]:
        return {
            f"{i}.{name}": value for i, part in enumerate(parts) for name, value in part.items()
        }


def parameters_of(layer: Layer | BatchNorm) -> dict[str, Array]:
    """Return a layer's trainable arrays; BatchNorm, which knows no trainer, is translated here."""
    if isinstance(layer, BatchNorm):
        return present(weight=layer.gamma, bias=layer.beta)
    return layer.parameters()


def gradients_of(layer: Layer | BatchNorm) -> dict[str, Array]:
    """Return the gradients that belong to `parameters_of`."""
    if isinstance(layer, BatchNorm):
        return present(weight=layer.dgamma, bias=layer.dbeta)
    return layer.gradients()


def modes_of(layer: Layer | BatchNorm) -> list[tuple[Layer | BatchNorm, bool]]:
    """Return a layer and all layers inside it, outermost first, each with its mode."""
    inside = layer.layers if isinstance(layer, Sequential) else ()
    return [(layer, layer.training), *(pair for each in inside for pair in modes_of(each))]


def present(**arrays: Array | None) -> dict[str, Array]:
    """Return the arrays that are there."""
    return {name: value for name, value in arrays.items() if value is not None}


def kept(array: Array | None) -> Array:
    """Return what forward kept for backward."""
    if array is None:
        raise RuntimeError("backward: nothing to differentiate; call forward first")
    return array


def check_state(expected: Mapping[str, Array], state: Mapping[str, Array]) -> None:
    """Refuse a state whose names, shapes or kinds of dtype are not the expected ones."""
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    if missing or unexpected:
        found = [f"missing {', '.join(missing)}"] if missing else []
        found += [f"unexpected {', '.join(unexpected)}"] if unexpected else []
        raise ValueError(f"state: {'; '.join(found)}")
    for name, old in expected.items():
        new = np.asarray(to_numpy(state[name]))
        if new.shape != old.shape:
            raise ValueError(f"{name}: expected shape {old.shape}; got {new.shape}")
        if new.dtype.kind != old.dtype.kind:
            raise ValueError(f"{name}: expected dtype {old.dtype}; got {new.dtype}")
