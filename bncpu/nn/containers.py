"""Layers that are made of layers: Sequential chains them."""

import warnings
from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from bncpu.backends import to_numpy
from bncpu.layer import BatchNorm
from bncpu.nn.base import Array, Layer, check_state, gradients_of, parameters_of
from bncpu.nn.linear import Linear


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
