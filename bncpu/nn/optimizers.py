"""The optimizer of the paper: stochastic gradient descent, with momentum if wanted.

Not adaptive, no schedule, no weight decay. The update is Polyak's (1964) heavy ball in the form
that PyTorch uses, where the learning rate stands outside the velocity.
"""

import math
from collections.abc import Mapping

import numpy as np

from bncpu.backends import array_module, to_numpy
from bncpu.nn.arguments import real
from bncpu.nn.base import Array, Layer, check_state


class SGD:
    """v <- momentum v + g; w <- w - learning_rate v, for every parameter w with gradient g.

    Parameters
    ----------
    learning_rate : float
        Finite and >= 0.
    momentum : float
        In [0, 1). With 0, v is g and no velocity is kept.

    Attributes
    ----------
    velocity : dict of arrays
        v by the parameter's name; empty before the first step.

    Raises
    ------
    TypeError, ValueError
        If a number is none, or out of range.
    """

    def __init__(self, learning_rate: float, momentum: float = 0.0) -> None:
        self.learning_rate = real("learning_rate", learning_rate)
        self.momentum = real("momentum", momentum)
        if not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: expected a finite number >= 0; got {learning_rate}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: expected a number in [0, 1); got {momentum}")
        self.velocity: dict[str, Array] = {}

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
        for name, value in parameters.items():
            change = gradients[name]
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
