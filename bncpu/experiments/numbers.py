"""Numbers as a page shows them: the mean over the seeds, and how far they lie from each other.

The number after ± is half the range, (max - min) / 2: of three seeds a standard deviation says
little more.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# One, or one for each seed.
Numbers = float | Sequence[float] | NDArray[Any]


def mean(values: Numbers) -> float:
    """Return the mean.

    Raises
    ------
    ValueError
        If there is no value.

    Examples
    --------
    >>> from bncpu.experiments.numbers import mean
    >>> mean([1.0, 2.0, 6.0])
    3.0
    """
    array = np.atleast_1d(np.asarray(values, np.float64))
    if not array.size:
        raise ValueError("values: expected at least one; got none")
    return float(array.mean())


def percent(values: Numbers, decimals: int = 1) -> str:
    """Return fractions as a percentage.

    Examples
    --------
    >>> from bncpu.experiments.numbers import percent
    >>> percent([0.978, 0.979, 0.98])
    '97.9 ± 0.1 %'
    >>> percent(0.97853, decimals=2)
    '97.85 %'
    """
    return f"{_joined(100 * np.atleast_1d(np.asarray(values)), f'.{decimals}f')} %"


def spread(values: Numbers, digits: int = 3) -> str:
    """Return numbers with so many significant digits of their mean.

    Examples
    --------
    >>> from bncpu.experiments.numbers import spread
    >>> spread([1.19, 1.23, 1.27])
    '1.23 ± 0.04'
    >>> spread(1502.3), spread(2e-9)
    ('1502', '2.00e-09')
    """
    array = np.atleast_1d(np.asarray(values, np.float64))
    size = abs(mean(array))
    if size and not 1e-4 <= size < 1e6:
        return _joined(array, f".{digits - 1}e")
    before = math.floor(math.log10(size)) + 1 if size else 1
    return _joined(array, f".{max(0, digits - before)}f")


def _joined(array: NDArray[Any], form: str) -> str:
    middle = format(mean(array), form)
    if array.size == 1:
        return middle
    return f"{middle} ± {format((float(array.max()) - float(array.min())) / 2, form)}"
