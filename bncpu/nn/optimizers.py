"""The optimizer of the paper: stochastic gradient descent, with momentum and L2 if wanted.

Not adaptive; how the learning rate falls over time is schedules.py's. The update is Polyak's (1964)
heavy ball in the form that PyTorch uses, where the learning rate stands outside the velocity.
"""

from collections.abc import Mapping

import numpy as np

from bncpu.backends import array_module, to_numpy
from bncpu.layer import BatchNorm
from bncpu.nn.arguments import fraction, nonnegative
from bncpu.nn.base import Array, Layer, check_state, layers_of, parameters_of


class SGD:
    """v <- momentum v + g + l2 w; w <- w - learning_rate v, for each parameter w with gradient g.

    Parameters
    ----------
    learning_rate : float
        Finite and >= 0.
    momentum : float
        In [0, 1). With 0, v is g + l2 w and no velocity is kept.
    l2 : float
        Finite and >= 0: the loss grows by l2 / 2 times the sum of squared weights. Weights are the
        parameters with two dimensions or more that are not a batch normalisation's: biases, gamma
        and beta are left alone.

    Attributes
    ----------
    learning_rate, momentum, l2 : float
        As given; `fit` with a schedule sets the first one before every step.
    velocity : dict of arrays
        v by the parameter's name; empty before the first step.

    Raises
    ------
    TypeError, ValueError
        If a number is none, or out of range.

    Notes
    -----
    Before a batch normalisation, L2 does not hold the function back, which is the same for any
    scale of the weights; it holds their scale, and by it the effective learning rate, in place.
    """

    def __init__(self, learning_rate: float, momentum: float = 0.0, l2: float = 0.0) -> None:
        self.learning_rate = nonnegative("learning_rate", learning_rate)
        self.momentum = fraction("momentum", momentum, below_one=True)
        self.l2 = nonnegative("l2", l2)
        self.velocity: dict[str, Array] = {}

    def __repr__(self) -> str:
        """Name the optimizer with its numbers."""
        return f"SGD({self.learning_rate}, momentum={self.momentum}, l2={self.l2})"

    def step(self, model: Layer) -> None:
        """Change the model's parameters in place, by the gradients of its last backward.

        Raises
        ------
        RuntimeError
            If a parameter has no gradient yet; nothing has been changed then.
        """
        parameters, gradients = model.parameters(), model.gradients()
        for name in parameters:
            if name not in gradients:
                raise RuntimeError(f"{name}: has no gradient; call backward before step")
        weights = _weights(model) if self.l2 else set()
        for name, value in parameters.items():
            change = gradients[name]
            if name in weights:
                change = change + self.l2 * value
            if self.momentum:
                if name not in self.velocity:
                    self.velocity[name] = np.zeros_like(value)
                velocity = self.velocity[name]
                velocity *= self.momentum
                velocity += change
                change = velocity
            value -= self.learning_rate * change

    def state_dict(self) -> dict[str, Array]:
        """Return NumPy copies of the velocities."""
        return {name: np.array(to_numpy(value)) for name, value in self.velocity.items()}

    def load_state_dict(self, state: Mapping[str, Array], model: Layer) -> None:
        """Take over the velocities of `state`, which belong to the parameters of `model`.

        An empty state means that no velocity was kept, and is always welcome; without momentum
        there is nothing to keep, and a state is checked and dropped.

        Raises
        ------
        ValueError
            If names, shapes or kinds of dtype are not those of the parameters.
        """
        parameters = model.parameters()
        if state:
            check_state(parameters, state)
        self.velocity = {
            name: array_module(parameters[name]).array(value, parameters[name].dtype)
            for name, value in state.items()
            if self.momentum
        }


def _weights(model: Layer) -> set[str]:
    """Return the names of the parameters that L2 holds small."""
    # By the arrays themselves: gamma of a batch normalisation per activation has dimensions too.
    normalising = {
        id(value)
        for layer in layers_of(model)
        if isinstance(layer, BatchNorm)
        for value in parameters_of(layer).values()
    }
    return {
        name
        for name, value in model.parameters().items()
        if value.ndim >= 2 and id(value) not in normalising
    }
