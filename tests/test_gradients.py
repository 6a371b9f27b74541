"""The second truth: central differences of a random scalar loss, in float64, through the forward.

The forward here is the package's own, so a backward that agrees belongs to this forward and to no
other.
"""

import numpy as np
import pytest
from accuracy import assert_gradient
from cases import normal, parameters, statistics

import bncpu

pytestmark = pytest.mark.usefixtures("level")


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((5, 3), 1), ((2, 3, 4), 1), ((3, 2, 2, 2), -1), ((6, 2, 2), (1, 2)), ((2, 5, 3), 0)],
)
def test_train(rng, shape, axis):
    x = normal(rng, shape, np.float64)
    axes = axis if isinstance(axis, tuple) else (axis,)
    gamma, beta = parameters(rng, [shape[a] for a in axes], np.float64)
    weights = rng.standard_normal(shape)
    eps = 0.1  # of a size that its place in the derivative shows

    def loss():
        return np.vdot(weights, bncpu.batch_norm_train(x, gamma, beta, eps=eps, axis=axis).y)

    _, mean, invstd = bncpu.batch_norm_train(x, gamma, beta, eps=eps, axis=axis)
    dx, dgamma, dbeta = bncpu.batch_norm_backward(weights, x, mean, invstd, gamma, axis=axis)
    assert_gradient(dx, loss, x)
    assert_gradient(dgamma, loss, gamma)
    assert_gradient(dbeta, loss, beta)


@pytest.mark.parametrize(("shape", "axis"), [((5, 3), 1), ((2, 3, 4), 1), ((3, 2, 2, 2), -1)])
def test_infer(rng, shape, axis):
    x = normal(rng, shape, np.float64)
    mean, var = statistics(rng, shape[axis])
    gamma, beta = parameters(rng, shape[axis], np.float64)
    weights = rng.standard_normal(shape)

    def loss():
        return np.vdot(weights, bncpu.batch_norm_infer(x, mean, var, gamma, beta, axis=axis))

    dx, dgamma, dbeta = bncpu.batch_norm_infer_backward(weights, x, mean, var, gamma, axis=axis)
    assert_gradient(dx, loss, x)
    assert_gradient(dgamma, loss, gamma)
    assert_gradient(dbeta, loss, beta)


def test_gradient_is_orthogonal_to_what_normalisation_removes(rng, dtype):
    """A step of x along a constant or along xhat changes no y, so dx has no part along them."""
    x, dy = normal(rng, (16, 5, 9), dtype), normal(rng, (16, 5, 9), dtype)
    y, mean, invstd = bncpu.batch_norm_train(x, eps=0.0)
    dx = bncpu.batch_norm_backward(dy, x, mean, invstd).dx.astype(np.float64)
    size = np.abs(dx).sum((0, 2)) * 50 * np.finfo(dtype).eps
    assert np.all(np.abs(dx.sum((0, 2))) < size)
    assert np.all(np.abs((dx * y).sum((0, 2))) < size)
