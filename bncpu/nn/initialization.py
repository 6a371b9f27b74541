"""The initial weights of the layers: Gaussian, of a deviation that depends on the inputs."""

import math

import numpy as np
from numpy.typing import DTypeLike

from bncpu.nn.arguments import real
from bncpu.nn.base import Array

# Of float64, the dtype in which weights are drawn; NumPy refuses more without naming anybody.
MAX_WEIGHTS = np.iinfo(np.intp).max // 8


def gaussian(
    shape: tuple[int, ...], *, rng: np.random.Generator, std: float | None, dtype: DTypeLike
) -> Array:
    """Return weights (outputs, inputs, ...) of mean 0.

    They are drawn in float64 whatever the dtype, so that float32 and float64 networks start alike.

    Parameters
    ----------
    shape : tuple of int
        The weights that make one output are ``math.prod(shape[1:])``.
    std : float or None
        Their standard deviation; None is one over the square root of that number, which keeps the
        variance of a standardised input (LeCun et al. 1998).

    Raises
    ------
    TypeError
        If `rng` is not a Generator, `std` not a number, or `dtype` neither float32 nor float64.
    ValueError
        If there are more weights than any memory holds, or `std` is negative or not finite.
    """
    if math.prod(shape) > MAX_WEIGHTS:
        raise ValueError(
            f"weights: expected at most {MAX_WEIGHTS}; got {' x '.join(map(str, shape))}"
        )
    if not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng: expected a numpy.random.Generator; got {rng!r}")
    if np.dtype(dtype) not in (np.float32, np.float64):
        raise TypeError(f"dtype: expected float32 or float64; got {np.dtype(dtype)}")
    std = math.prod(shape[1:]) ** -0.5 if std is None else real("std", std)
    if not 0 <= std < np.inf:
        raise ValueError(f"std: expected a finite number >= 0; got {std}")
    return (std * rng.standard_normal(shape)).astype(dtype)
