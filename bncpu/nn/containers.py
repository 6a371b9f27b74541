"""Layers that are made of layers: Sequential, Concat (branches), Residual."""

import warnings
from collections.abc import Mapping
from itertools import accumulate, pairwise

import numpy as np

from bncpu.backends import to_numpy
from bncpu.layer import BatchNorm
from bncpu.nn.base import Array, Layer, gradients_of, kept, parameters_of
from bncpu.nn.buffers import Buffers
from bncpu.nn.convolution import Conv2d
from bncpu.nn.linear import Linear


class Container(Layer):
    """What containers share: modes, parameters and states of the layers inside.

    Names are preceded by the layer's index, as in PyTorch's Sequential: "0.weight" and so on.

    Parameters
    ----------
    *layers : Layer or BatchNorm
        What is inside.

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

    def __repr__(self) -> str:
        """List the layers."""
        return f"{type(self).__name__}({', '.join(map(repr, self.layers))})"

    def inside(self) -> tuple[Layer | BatchNorm, ...]:
        """Return the layers."""
        return self.layers

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

    def _take(self, state: Mapping[str, Array]) -> None:
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


class Sequential(Container):
    """Apply layers one after another; parameters are named as in PyTorch, "0.weight" and so on.

    A `Linear` or `Conv2d` directly before a `bncpu.BatchNorm` should be made with ``bias=False``.
    Batch normalisation subtracts the mean over the batch, and with it whatever constant b was
    added: BN(Wu + b) = BN(Wu). The gradient of b is zero, and beta takes its part (Ioffe & Szegedy
    2015, section 3.2). A bias left there does no harm but is memory and time for nothing, and so is
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
        super().__init__(*layers)
        self._buffers = [Buffers() for _ in layers]
        redundant = [
            str(i)
            for i, (layer, following) in enumerate(pairwise(layers))
            if isinstance(layer, Linear | Conv2d)
            and layer.bias is not None
            and isinstance(following, BatchNorm)
        ]
        if redundant:
            warnings.warn(
                f"layer {', '.join(redundant)}: its bias is redundant before a BatchNorm, "
                "whose beta takes its part; make it with bias=False",
                UserWarning,
                stacklevel=2,
            )

    def forward(self, x: Array) -> Array:
        """Return the last layer's output."""
        for layer, buffers in zip(self.layers, self._buffers, strict=True):
            if isinstance(layer, BatchNorm):
                x = layer.forward(x, out=buffers.like(x))
            else:
                x = layer.forward(x)
        return x

    def backward(self, dy: Array) -> Array:
        """Return the gradient of the first layer's input."""
        for layer, buffers in zip(reversed(self.layers), reversed(self._buffers), strict=True):
            if isinstance(layer, BatchNorm):
                dy = layer.backward(dy, out=buffers.like(dy))
            else:
                dy = layer.backward(dy)
        return dy


class Concat(Container):
    """y = the results of several layers on the same x, one after another on the channel axis.

    The branches of an Inception module (Szegedy et al. 2014) are such layers.

    Parameters
    ----------
    *branches : Layer or BatchNorm
        Results may differ in their number of channels alone.

    Raises
    ------
    TypeError
        If an argument is not a layer.
    ValueError
        If there is none.
    """

    def __init__(self, *branches: Layer | BatchNorm) -> None:
        super().__init__(*branches)
        if not branches:
            raise ValueError("branches: expected at least one layer; got none")
        self._ends: list[int] | None = None
        self._buffers = Buffers()

    def forward(self, x: Array) -> Array:
        """Return y, channels on axis 1."""
        parts = [branch.forward(x) for branch in self.layers]
        self._ends = list(accumulate(part.shape[1] for part in parts))
        shape = (len(x), self._ends[-1], *parts[0].shape[2:])
        return np.concatenate(parts, axis=1, out=self._buffers.empty(shape, parts[0].dtype))

    def backward(self, dy: Array) -> Array:
        """Return dx, the sum of what the branches return for their channels of dy."""
        parts = np.split(dy, kept(self._ends)[:-1], axis=1)
        dx, *others = (
            branch.backward(np.ascontiguousarray(part))
            for branch, part in zip(self.layers, parts, strict=True)
        )
        if others:
            dx = dx + others[0]  # a new array: a branch may have returned dy itself
        for each in others[1:]:
            dx += each
        return dx


class Residual(Container):
    """y = act(layer(x) + shortcut(x)): He et al. (2015).

    Parameters
    ----------
    layer : Layer or BatchNorm
        The residual.
    shortcut : Layer or BatchNorm, optional
        What x goes through beside it; by default nothing.
    activation : Layer, optional
        What the sum goes through.

    Raises
    ------
    TypeError
        If an argument is not a layer.
    """

    def __init__(
        self,
        layer: Layer | BatchNorm,
        shortcut: Layer | BatchNorm | None = None,
        activation: Layer | None = None,
    ) -> None:
        super().__init__(*(each for each in (layer, shortcut, activation) if each is not None))
        self.layer, self.shortcut, self.activation = layer, shortcut, activation

    def __repr__(self) -> str:
        """Tell what each layer is for."""
        parts = [repr(self.layer)]
        parts += [f"shortcut={self.shortcut!r}"] if self.shortcut else []
        parts += [f"activation={self.activation!r}"] if self.activation else []
        return f"Residual({', '.join(parts)})"

    def forward(self, x: Array) -> Array:
        """Return y."""
        z: Array = self.layer.forward(x) + (self.shortcut.forward(x) if self.shortcut else x)
        return self.activation.forward(z) if self.activation else z

    def backward(self, dy: Array) -> Array:
        """Return dx, the sum of both ways."""
        if self.activation:
            dy = self.activation.backward(dy)
        dx: Array = self.layer.backward(dy) + (self.shortcut.backward(dy) if self.shortcut else dy)
        return dx
