"""The peers NumPy and CuPy: batch normalisation as people write it, in x's own precision.

Not the reference (bncpu.reference computes in float64): what one would have without bncpu.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from bncpu.bench.operations import EPS

if TYPE_CHECKING:
    from bncpu.bench.measure import Contender
    from bncpu.bench.operations import Array, Operation, Problem


def over(x: Array, axis: int) -> tuple[int, ...]:
    """Return the axes of x but the channels'."""
    return tuple(i for i in range(x.ndim) if i != axis % x.ndim)


def along(vector: Array, x: Array, axis: int) -> Array:
    """Return a vector of the channels in x's dtype, shaped to broadcast against x."""
    shape = [1] * x.ndim
    shape[axis] = x.shape[axis]
    return vector.astype(x.dtype, copy=False).reshape(shape)


def moments(x: Array, axis: int = 1) -> tuple[Array, Array]:
    """Return mean and variance of the channels."""
    return x.mean(axis=over(x, axis)), x.var(axis=over(x, axis))


def train(x: Array, gamma: Array, beta: Array, axis: int = 1) -> Array:
    """Return y, normalised by the batch's statistics."""
    return infer(x, *moments(x, axis), gamma, beta, axis)


def infer(x: Array, mean: Array, var: Array, gamma: Array, beta: Array, axis: int = 1) -> Array:
    """Return y, normalised by given statistics."""
    mean, var, gamma, beta = (along(v, x, axis) for v in (mean, var, gamma, beta))
    xhat = (x - mean) / np.sqrt(var + x.dtype.type(EPS))
    y: Array = gamma * xhat + beta
    return y


def backward(
    dy: Array, x: Array, mean: Array, invstd: Array, gamma: Array, axis: int = 1
) -> tuple[Array, Array, Array]:
    """Return dx, dgamma, dbeta through the batch's statistics."""
    m = x.dtype.type(x.size // x.shape[axis])
    mean, invstd, gamma = (along(v, x, axis) for v in (mean, invstd, gamma))
    xhat = (x - mean) * invstd
    dbeta = dy.sum(axis=over(x, axis))
    dgamma = (dy * xhat).sum(axis=over(x, axis))
    dx = gamma * invstd / m * (m * dy - along(dbeta, x, axis) - xhat * along(dgamma, x, axis))
    return dx, dgamma, dbeta


def infer_backward(
    dy: Array, x: Array, mean: Array, var: Array, gamma: Array, axis: int = 1
) -> tuple[Array, Array, Array]:
    """Return dx, dgamma, dbeta where the statistics are constants."""
    mean, var, gamma = (along(v, x, axis) for v in (mean, var, gamma))
    invstd = 1 / np.sqrt(var + x.dtype.type(EPS))
    dbeta = dy.sum(axis=over(x, axis))
    dgamma = (dy * (x - mean) * invstd).sum(axis=over(x, axis))
    return gamma * invstd * dy, dgamma, dbeta


def contenders(problem: Problem, operation: Operation) -> dict[str, Contender]:
    """Return "numpy" or "cupy"; each call takes the next set of arrays and allocates its result."""
    if problem.device == "cuda" and problem.dtype == "bfloat16":
        return {}  # CuPy stores it, and has not all of this arithmetic for it
    kind = problem.sets[0].x.dtype
    vectors = (problem.gamma, problem.beta, problem.mean, problem.var, problem.invstd)
    gamma, beta, mean, var, invstd = (vector.astype(kind) for vector in vectors)
    axis = problem.axis

    def call(x: Array, dy: Array, out: Array) -> object:
        if operation.function == "moments":
            return moments(x, axis)
        if operation.forward:
            y = (
                train(x, gamma, beta, axis)
                if operation.function == "train"
                else infer(x, mean, var, gamma, beta, axis)
            )
            if operation.add:
                y = y + dy
            return np.maximum(y, 0) if operation.relu else y
        if operation.relu:
            dy = dy * (out > 0)  # out stands for the forward's result
        if operation.function == "backward":
            return backward(dy, x, mean, invstd, gamma, axis)
        return infer_backward(dy, x, mean, var, gamma, axis)

    # Half sums of many values overflow, which is the textbook's own doing.
    quiet = np.errstate(all="ignore")(call) if kind.itemsize == 2 else call
    calls = [partial(quiet, *arrays[:3]) for arrays in problem.sets]
    name = "cupy" if problem.device == "cuda" else "numpy"
    return {name: problem.timed(problem.rotating(calls))}
