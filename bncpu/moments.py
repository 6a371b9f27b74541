"""Moments: count, mean and sum of squared deviations of each channel, and their exact merging.

What population statistics, data spread over workers and memory-mapped files are made of. The
merging is Chan, Golub & LeVeque 1983; no sum of squares about zero is ever formed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bncpu.backends import array_module, on_gpu

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Moments(NamedTuple):
    r"""Count, mean and m2 of the values of each channel.

    Attributes
    ----------
    count : int
        Values per channel.
    mean : ndarray of float64, shape (C,)
        Their mean, in the units of x; zeros for a count of 0.
    m2 : ndarray of float64, shape (C,)
        Sum of squared deviations from the mean, in the squared units of x.

    Notes
    -----
    Two parts a and b merge by

    .. math:: \delta = \bar b - \bar a,\quad
              \bar x = \bar a + \delta \frac{n_b}{n},\quad
              M = M_a + M_b + \delta^2 \frac{n_a n_b}{n}.

    A count of 0 is the neutral element, so ``sum`` over parts works.

    References
    ----------
    T. F. Chan, G. H. Golub, R. J. LeVeque, "Algorithms for computing the sample variance",
    The American Statistician 37 (1983).

    Examples
    --------
    >>> import numpy as np, bncpu
    >>> x = np.arange(12.0).reshape(6, 2)
    >>> parts = [bncpu.batch_moments(x[:1]), bncpu.batch_moments(x[1:])]
    >>> whole = sum(parts)
    >>> whole.count, whole.mean, whole.var()
    (6, array([5., 6.]), array([11.66666667, 11.66666667]))
    """

    count: int  # type: ignore[assignment]  # hides tuple.count
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]

    def merge(self, *others: Moments) -> Moments:
        """Return the moments of all values of this part and the others, merged left to right.

        Raises
        ------
        TypeError
            If some are on a GPU and others are not.
        ValueError
            If the parts do not have the same channels.
        """
        total = self
        for other in others:
            total = _pair(total, other)
        return total

    def var(self, ddof: int = 0) -> NDArray[np.float64]:
        """Return m2 / (count - ddof): biased by default, unbiased with ddof=1.

        Raises
        ------
        ValueError
            If count - ddof is not positive.
        """
        if self.count - ddof <= 0:
            raise ValueError(f"var: needs more than {ddof} values per channel; got {self.count}")
        return self.m2 / (self.count - ddof)

    def __add__(self, other: object) -> Moments:
        if not isinstance(other, Moments):
            return NotImplemented
        return _pair(self, other)

    def __radd__(self, other: object) -> Moments:
        return self if isinstance(other, int) and other == 0 else NotImplemented


def _pair(a: Moments, b: Moments) -> Moments:
    if on_gpu(a.mean) != on_gpu(b.mean):
        raise TypeError(
            "merge: expected moments of one kind of array; got some of NumPy and some of CuPy; "
            "move these with Moments(count, mean.get(), m2.get())"
        )
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"merge: expected moments of the same channels; got {a.mean.shape} and {b.mean.shape}"
        )
    if b.count == 0:
        return a
    if a.count == 0:
        return b
    count = a.count + b.count
    # Infinite means subtract to NaN, as IEEE arithmetic has it; no warning is owed.
    with np.errstate(invalid="ignore", over="ignore"):
        delta = b.mean - a.mean
        module = array_module(delta)
        mean = module.where(
            module.isfinite(delta),
            a.mean + delta * (b.count / count),
            a.mean * (a.count / count) + b.mean * (b.count / count),
        )
        m2 = a.m2 + b.m2 + delta * delta * (a.count * (b.count / count))
    return Moments(count, mean, m2)
