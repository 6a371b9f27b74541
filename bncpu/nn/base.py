"""What every layer of the trainer is: a function with a gradient, parameters and a state.

This is not a framework: there is no automatic differentiation. Every layer writes out its own
gradient, keeps what its backward needs from the last forward, and names its parameters as
PyTorch's layer of the same name does. Batch normalisation itself is `bncpu.BatchNorm`, used here
as anybody would use it. Back-propagation is that of Rumelhart, Hinton & Williams (1986).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from bncpu.backends import array_module, to_numpy
from bncpu.layer import BatchNorm

Array = NDArray[Any]
T = TypeVar("T")


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

    def inside(self) -> "tuple[Layer | BatchNorm, ...]":
        """Return the layers that this one is made of, if it is a container."""
        return ()

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
            If a name is missing or unexpected, an array's shape or kind of dtype is another, or a
            value is none that the layer can have.
        """
        before = self.state_dict()
        check_state(before, state)
        try:
            self._take(state)
        except BaseException:  # layers inside have checks of their own; an interrupt comes anywhere
            self._take(before)
            raise

    def _take(self, state: Mapping[str, Array]) -> None:
        """Take over the arrays of a state whose names and shapes are right."""
        for name, value in self.parameters().items():
            value[...] = array_module(value).asarray(state[name])


class WeightedLayer(Layer):
    """A layer whose parameters are a weight, and a bias or none."""

    weight: Array
    bias: Array | None
    dweight: Array | None = None
    dbias: Array | None = None

    def parameters(self) -> dict[str, Array]:
        """Return weight and, where there is one, bias."""
        return present(weight=self.weight, bias=self.bias)

    def gradients(self) -> dict[str, Array]:
        """Return the gradients of weight and bias."""
        return present(weight=self.dweight, bias=self.dbias)


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


def layers_of(layer: Layer | BatchNorm) -> list[Layer | BatchNorm]:
    """Return a layer and all layers inside it, at any depth, outermost first."""
    inside = layer.inside() if isinstance(layer, Layer) else ()
    return [layer, *(found for each in inside for found in layers_of(each))]


def modes_of(layer: Layer | BatchNorm) -> list[tuple[Layer | BatchNorm, bool]]:
    """Return a layer and all layers inside it, outermost first, each with its mode."""
    return [(found, found.training) for found in layers_of(layer)]


def present(**arrays: Array | None) -> dict[str, Array]:
    """Return the arrays that are there."""
    return {name: value for name, value in arrays.items() if value is not None}


def kept(value: T | None) -> T:
    """Return what forward kept for backward."""
    if value is None:
        raise RuntimeError("backward: nothing to differentiate; call forward first")
    return value


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
