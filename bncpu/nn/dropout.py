"""Dropout: what batch normalisation makes less needed (Ioffe & Szegedy 2015, section 3.4).

Its random numbers are a function of a seed and of a count that belongs to the layer's state, so
that a training resumed from a checkpoint drops what it would have dropped.
"""

from collections.abc import Mapping

import numpy as np

from bncpu.backends import array_module
from bncpu.nn.arguments import fraction, integer
from bncpu.nn.base import Array, Layer, kept

# Set after seed and count, so that the generator is none of those that `fit` makes of its seed.
STREAM = 2


class Dropout(Layer):
    """y = x m / (1 - rate) in training, with m a mask of zeros and ones; y = x in inference.

    Each element of m is 0 with probability `rate`, so that the expectation of y is x ("inverted"
    dropout) and inference has nothing to scale.

    Parameters
    ----------
    rate : float
        The share of elements that are dropped, in [0, 1).
    seed : int
        Of the masks, >= 0. Give the layers of one network different seeds: those of one seed drop
        the same elements of inputs of one shape.

    Attributes
    ----------
    calls : int
        The number of forwards in training so far. The next mask is a function of (seed, calls) and
        the shape of x.

    Raises
    ------
    TypeError, ValueError
        If a number is none, or out of range.

    References
    ----------
    N. Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting",
    JMLR 15 (2014).

    Examples
    --------
    >>> import numpy as np
    >>> from bncpu.nn import Dropout
    >>> layer = Dropout(0.25, seed=0)
    >>> y = layer(np.ones((4, 1000), np.float32))
    >>> sorted({float(value) for value in y.ravel()}), layer.calls
    ([0.0, 1.3333333730697632], 1)
    """

    def __init__(self, rate: float, *, seed: int) -> None:
        self.rate = fraction("rate", rate, below_one=True)
        self.seed = integer("seed", seed, 0)
        self.calls = 0
        # What backward multiplies by: the last forward's mask, or one.
        self._scale: Array | None = None

    def __repr__(self) -> str:
        """Name the layer with its rate and its seed, on which its masks depend."""
        return f"Dropout({self.rate}, seed={self.seed})"

    def forward(self, x: Array) -> Array:
        """Return x with some of its elements dropped; in inference, x itself.

        Parameters
        ----------
        x : array of any shape, floating
            Of NumPy or of CuPy; the mask is the same one.
        """
        if not self.training:
            self._scale = np.ones((), x.dtype)
            return x
        rng = np.random.default_rng([self.seed, self.calls, STREAM])
        self.calls += 1
        scale = (rng.random(x.shape, np.float32) >= self.rate).astype(x.dtype)
        scale /= 1 - self.rate
        self._scale = array_module(x).asarray(scale)
        y: Array = x * self._scale
        return y

    def backward(self, dy: Array) -> Array:
        """Return dx = dy m / (1 - rate); dy itself if the last forward was in inference."""
        scale = kept(self._scale)
        return dy * scale if scale.ndim else dy

    def state_dict(self) -> dict[str, Array]:
        """Return the number of calls, an int64 of shape ()."""
        return {"calls": np.array(self.calls, np.int64)}

    def _take(self, state: Mapping[str, Array]) -> None:
        calls = int(state["calls"])
        if calls < 0:
            raise ValueError(f"calls: expected a count; got {calls}")
        self.calls = calls
