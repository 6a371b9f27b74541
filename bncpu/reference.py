"""The paper's equations in float64 NumPy: the truth that tests and benchmarks compare with.

Not fast, not for use: every function makes several copies of its input, and nothing is checked
(with m = 1 the unbiased variance divides by zero, as the paper's does).

The mathematics is that of Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network
Training by Reducing Internal Covariate Shift", arXiv:1502.03167, in the paper's own form and order:
Algorithm 1, the six derivatives of section 3, the population statistics of section 3.1 and line 11
of Algorithm 2. Around it stands what is fused with it: a residual is added to what it gives, and an
activation follows,

    z = gamma * xhat + beta + residual,    y = act(z),    act(z) = z, or relu(z) = max(z, 0),

whose derivative lets the gradient pass where y is not 0:

    dz = dy where y != 0, else 0;    dresidual = dz;    the paper's dy is dz.

At z = 0 nothing passes, and a NaN passes. Functions and arguments are those of the package, without
``out`` and ``num_threads``, but for two: ``mask`` is a boolean array like x, one value per element
in place of one bit in memory order, which the forwards fill with y != 0 and the backwards read; and
the backwards' ``residual`` is a bool, whether to return dresidual. Whatever the input (float16 and
ml_dtypes' bfloat16 among it), all arithmetic and all results are float64.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Gradients",
    "Moments",
    "TrainResult",
    "batch_moments",
    "batch_norm_backward",
    "batch_norm_infer",
    "batch_norm_infer_backward",
    "batch_norm_train",
]

Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
Axis = int | tuple[int, ...]


class TrainResult(NamedTuple):
    """What the training forward returns: y like x; mean and invstd one value per channel."""

    y: Float64Array
    mean: Float64Array
    invstd: Float64Array


class Gradients(NamedTuple):
    """What a backward returns: dx like x; dgamma and dbeta one value per channel.

    dresidual is like x where the residual's gradient was asked for, else None.
    """

    dx: Float64Array
    dgamma: Float64Array
    dbeta: Float64Array
    dresidual: Float64Array | None = None


class Moments(NamedTuple):
    """Count m, mean and m2 (sum of squared deviations) of every channel."""

    count: int  # type: ignore[assignment]  # the field; tuple's own count() is of no use here
    mean: Float64Array
    m2: Float64Array


def batch_norm_train(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    running_mean: NDArray[np.floating] | None = None,
    running_var: NDArray[np.floating] | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    axis: Axis = 1,
    residual: ArrayLike | None = None,
    activation: str | None = None,
    mask: BoolArray | None = None,
) -> TrainResult:
    """Normalise a batch by its own statistics: Algorithm 1, line by line, then act(z).

    Running statistics are updated in place as the moving averages that section 3.1 suggests in
    place of Algorithm 2's line 10, with its unbiased variance m / (m - 1).
    """
    m, mean, m2, centred = _centre(x, axis)  # Algorithm 1, lines 1 and 2
    var = m2 / max(m, 1)
    invstd = 1.0 / np.sqrt(var + eps)
    xhat = centred * invstd  # Algorithm 1, line 3
    z = _scale(xhat, gamma) + (0.0 if beta is None else _float64(beta))  # Algorithm 1, line 4
    y = _activate(_channels_back(z, axis), residual, activation, mask)

    if running_mean is not None and running_var is not None and m > 0:
        running_mean[...] = (1.0 - momentum) * _float64(running_mean) + momentum * mean
        unbiased = m2 / (m - 1)  # section 3.1: E[var] m / (m - 1)
        running_var[...] = (1.0 - momentum) * _float64(running_var) + momentum * unbiased
    return TrainResult(y, mean, invstd)


def batch_norm_infer(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: Axis = 1,
    residual: ArrayLike | None = None,
    activation: str | None = None,
    mask: BoolArray | None = None,
) -> Float64Array:
    """Normalise by given statistics: Algorithm 2, line 11, then act(z).

    The paper multiplies the line out to scale * x + shift; here x is centred first, which is the
    same map without the cancellation.
    """
    xhat = (_channels_last(x, axis) - _float64(mean)) / np.sqrt(_float64(var) + eps)
    z = _scale(xhat, gamma) + (0.0 if beta is None else _float64(beta))
    return _activate(_channels_back(z, axis), residual, activation, mask)


def batch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    invstd: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: Axis = 1,
    activation: str | None = None,
    mask: BoolArray | None = None,
    residual: bool = False,
) -> Gradients:
    """Differentiate Algorithm 1: the six equations at the end of section 3, in their order.

    Where an activation followed, their dy is dz. Without the mask of the forward its y is computed
    again, from beta among others, and without a residual, which only the mask remembers.
    """
    if activation == "relu" and mask is None:
        y = _scale((_channels_last(x, axis) - _float64(mean)) * _float64(invstd), gamma)
        y = _channels_back(y + (0.0 if beta is None else _float64(beta)), axis)
        mask = _activate(y, None, activation, None) != 0.0
    dz = _through(dy, activation, mask)
    dy = _channels_last(dz, axis)
    over = _batch_axes(dy, axis)
    m = _count(dy, axis)
    invstd = _float64(invstd)
    centred = _channels_last(x, axis) - _float64(mean)

    dxhat = _scale(dy, gamma)
    dvar = _sum(dxhat * centred, over) * -0.5 * invstd**3  # invstd^3 = (var + eps)^(-3/2)
    dmean = _sum(-dxhat * invstd, over) + dvar * _sum(-2.0 * centred, over) / max(m, 1)
    dx = dxhat * invstd + dvar * 2.0 * centred / max(m, 1) + dmean / max(m, 1)
    dgamma = _sum(dy * (centred * invstd), over)
    dbeta = _sum(dy, over)
    return Gradients(_channels_back(dx, axis), dgamma, dbeta, dz if residual else None)


def batch_norm_infer_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: Axis = 1,
    activation: str | None = None,
    mask: BoolArray | None = None,
    residual: bool = False,
) -> Gradients:
    """Differentiate line 11 of Algorithm 2: as section 3, with mean and var held constant."""
    if activation == "relu" and mask is None:
        y = batch_norm_infer(x, mean, var, gamma, beta, eps=eps, axis=axis, activation=activation)
        mask = y != 0.0
    dz = _through(dy, activation, mask)
    dy = _channels_last(dz, axis)
    over = _batch_axes(dy, axis)
    invstd = 1.0 / np.sqrt(_float64(var) + eps)
    xhat = (_channels_last(x, axis) - _float64(mean)) * invstd
    dx = _channels_back(_scale(dy, gamma) * invstd, axis)
    return Gradients(dx, _sum(dy * xhat, over), _sum(dy, over), dz if residual else None)


def batch_moments(x: ArrayLike, *, axis: Axis = 1) -> Moments:
    """Return count, mean and sum of squared deviations: lines 1 and 2 of Algorithm 1, undivided."""
    m, mean, m2, _ = _centre(x, axis)
    return Moments(m, mean, m2)


def _centre(x: ArrayLike, axis: Axis) -> tuple[int, Float64Array, Float64Array, Float64Array]:
    """Return m, mean, m2 and x - mean with the channels last.

    Two passes, and the mean in two steps: the mean of what the first subtraction left is the
    rounding error of the first mean. So x - mean is right to float64's precision of the deviation,
    however large the mean, and exactly zero in a constant channel.
    """
    x = _channels_last(x, axis)
    over = _batch_axes(x, axis)
    m = _count(x, axis)
    mean = _sum(x, over) / max(m, 1)
    centred = x - mean
    correction = _sum(centred, over) / max(m, 1)
    centred = centred - correction
    return m, mean + correction, _sum(np.square(centred), over), centred


def _sum(a: Float64Array, over: tuple[int, ...]) -> Float64Array:
    """Sum over the first axes of a channels-last array, pairwise.

    NumPy sums pairwise only along contiguous memory. Elsewhere one addition follows the other, and
    where values repeat, as integers do, their rounding errors have one sign and add up.
    """
    values, channels = a.shape[: len(over)], a.shape[len(over) :]
    rows = a.reshape(int(np.prod(values)), int(np.prod(channels)))
    total: Float64Array = np.ascontiguousarray(rows.T).sum(axis=1).reshape(channels)
    return total


def _activate(
    z: Float64Array, residual: ArrayLike | None, activation: str | None, mask: BoolArray | None
) -> Float64Array:
    """Return act(z + residual), and fill the mask with where it is not 0."""
    z = z if residual is None else z + _float64(residual)
    y = np.where(z < 0.0, 0.0, z) if activation == "relu" else z  # relu(NaN) is NaN
    if mask is not None:
        mask[...] = y != 0.0
    return y


def _through(dy: ArrayLike, activation: str | None, mask: BoolArray | None) -> Float64Array:
    """Return dz: dy where the mask lets it pass, 0 elsewhere, whatever stands there in dy."""
    dy = _float64(dy)
    return np.where(mask, dy, 0.0) if activation == "relu" and mask is not None else dy


def _axes(axis: Axis) -> tuple[int, ...]:
    return axis if isinstance(axis, tuple) else (axis,)


def _float64(a: ArrayLike) -> Float64Array:
    return np.asarray(a, dtype=np.float64)


def _channels_last(x: ArrayLike, axis: Axis) -> Float64Array:
    """Move the channel axes behind all others, where one value per channel broadcasts by itself."""
    axes = _axes(axis)
    return np.moveaxis(_float64(x), axes, tuple(range(-len(axes), 0)))


def _channels_back(y: Float64Array, axis: Axis) -> Float64Array:
    axes = _axes(axis)
    return np.moveaxis(y, tuple(range(-len(axes), 0)), axes)


def _batch_axes(x: Float64Array, axis: Axis) -> tuple[int, ...]:
    """Return the axes of a channels-last array that the statistics run over."""
    return tuple(range(x.ndim - len(_axes(axis))))


def _count(x: Float64Array, axis: Axis) -> int:
    """Return m, the number of values per channel, also where there is no channel."""
    sizes = [x.shape[i] for i in _batch_axes(x, axis)]
    return int(np.prod(sizes, dtype=np.int64))


def _scale(a: Float64Array, gamma: ArrayLike | None) -> Float64Array:
    return a if gamma is None else a * _float64(gamma)
