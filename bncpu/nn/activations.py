"""Nonlinearities, element by element: Sigmoid, Tanh, ReLU. They have no parameters.

Arrays are NumPy's or CuPy's: NumPy's functions hand CuPy's arrays to CuPy.
"""

import numpy as np

from bncpu.nn.base import Array, Layer, kept


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
