"""LocalResponseNorm: each pixel divided by the size of its neighbours in other channels.

What batch normalisation took the place of; after Krizhevsky, Sutskever & Hinton (2012, section
3.3), with PyTorch's convention, in which alpha is divided by the number of channels.
"""

import numpy as np

from bncpu.nn.arguments import integer, real
from bncpu.nn.base import Array, Layer, kept
from bncpu.nn.workers import over_images


class LocalResponseNorm(Layer):
    """y[c] = x[c] / (k + alpha / size * sum of x[c']^2 over `size` channels c' around c)^beta.

    Parameters
    ----------
    size : int
        How many neighbouring channels, size // 2 of them before c and the others from c on.
    alpha, beta, k : float
        As above. The denominator has to be positive.

    Raises
    ------
    TypeError, ValueError
        If a number is none or out of range.
    """

    def __init__(
        self, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
    ) -> None:
        self.size = integer("size", size, 1)
        self.alpha, self.beta, self.k = real("alpha", alpha), real("beta", beta), real("k", k)
        if not 0 <= self.alpha < np.inf:
            raise ValueError(f"alpha: expected a finite number >= 0; got {alpha}")
        if not 0 < self.k < np.inf:
            raise ValueError(f"k: expected a finite number > 0; got {k}")
        self._x: Array | None = None
        self._scale: Array | None = None
        self._power: Array | None = None

    def __repr__(self) -> str:
        """Name the layer with its constants."""
        return f"LocalResponseNorm({self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k})"

    def forward(self, x: Array) -> Array:
        """Return y, shape of x (N, C, ...)."""
        y, scale, power = (np.empty_like(x) for _ in range(3))

        def images(part: slice) -> None:
            scale[part] = self._around(x[part] * x[part], self.size // 2)
            scale[part] *= self.alpha / self.size
            scale[part] += self.k
            np.power(scale[part], -self.beta, out=power[part])
            np.multiply(x[part], power[part], out=y[part])

        over_images(len(x), images, size=x.size)
        self._x, self._scale, self._power = x, scale, power
        return y

    def backward(self, dy: Array) -> Array:
        """Return dx.

        With d the denominator before its power, y[c] = x[c] d[c]^-beta, and x[c] is in d[c'] of its
        neighbours: dx[c] = dy[c] d[c]^-beta - 2 alpha beta / size x[c] sum over c' of dy[c'] y[c']
        / d[c'].
        """
        x, scale, power = kept(self._x), kept(self._scale), kept(self._power)
        dx = np.empty_like(dy)

        def images(part: slice) -> None:
            np.multiply(dy[part], power[part], out=dx[part])
            through = dx[part] * x[part]
            through /= scale[part]
            # c is a neighbour of c' as seen from c': the window turned around.
            around = self._around(through, self.size - 1 - self.size // 2)
            around *= x[part]
            around *= 2 * self.alpha * self.beta / self.size
            dx[part] -= around

        over_images(len(dy), images, size=dy.size)
        return dx

    def _around(self, values: Array, before: int) -> Array:
        """Return the sums over `size` channels, of which `before` come before each one."""
        channels = values.shape[1]
        total = values.copy()
        for step in range(1, self.size):
            # The neighbour `step` places before, or, when those are used up, after.
            if step <= before:
                total[:, step:] += values[:, : max(channels - step, 0)]
            else:
                after = step - before
                total[:, : max(channels - after, 0)] += values[:, after:]
        return total
