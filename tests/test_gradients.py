"""The second truth: central differences of a random scalar loss, in float64, through the forward.

The forward here is the package's own, so a backward that agrees belongs to this forward and to no
other.
"""

import numpy as np
import pytest
from accuracy import assert_gradient
from cases import new_mask, normal, parameters, statistics

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
    dx, dgamma, dbeta, _ = bncpu.batch_norm_backward(weights, x, mean, invstd, gamma, axis=axis)
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

    dx, dgamma, dbeta, _ = bncpu.batch_norm_infer_backward(weights, x, mean, var, gamma, axis=axis)
    assert_gradient(dx, loss, x)
    assert_gradient(dgamma, loss, gamma)
    assert_gradient(dbeta, loss, beta)


def away_from_the_kink(z, by=0.1):
    """Return what to add to z, so that no step of the differences crosses the kink of ReLU."""
    return np.where(np.abs(z) < by, np.copysign(2.0 * by, z), 0.0)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((5, 3), 1), ((2, 3, 4), 1), ((3, 2, 2, 2), -1), ((6, 2, 2), (1, 2)), ((2, 5, 3), 0)],
)
@pytest.mark.parametrize("fused", ["relu", "residual", "residual, relu"])
def test_fused(rng, shape, axis, fused):
    """Through the batch's statistics and through given ones, ReLU, and the addition before it."""
    x, residual = normal(rng, shape, np.float64), normal(rng, shape, np.float64)
    axes = axis if isinstance(axis, tuple) else (axis,)
    gamma, beta = parameters(rng, [shape[a] for a in axes], np.float64)
    weights = rng.standard_normal(shape)
    activation = "relu" if "relu" in fused else None
    if "residual" not in fused:
        residual = None
        while np.abs(bncpu.batch_norm_train(x, gamma, beta, axis=axis).y).min() < 0.03:
            x[...] = normal(rng, shape, np.float64)
    else:
        z = bncpu.batch_norm_train(x, gamma, beta, axis=axis, residual=residual).y
        residual += away_from_the_kink(z)

    def forward(**mask):
        how = {"axis": axis, "residual": residual, "activation": activation}
        return bncpu.batch_norm_train(x, gamma, beta, **how, **mask)

    mask = new_mask(x) if activation else None
    _, mean, invstd = forward(mask=mask)
    got = bncpu.batch_norm_backward(
        *(weights, x, mean, invstd, gamma, beta),
        axis=axis,
        activation=activation,
        mask=mask,
        residual=residual is not None,
    )

    def loss():
        return np.vdot(weights, forward().y)

    assert_gradient(got.dx, loss, x)
    assert_gradient(got.dgamma, loss, gamma)
    assert_gradient(got.dbeta, loss, beta)
    if residual is not None:
        assert_gradient(got.dresidual, loss, residual)


@pytest.mark.parametrize(("shape", "axis"), [((5, 3), 1), ((2, 3, 4), 1), ((3, 2, 2, 2), -1)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_fused_infer(rng, shape, axis, with_residual):
    x = normal(rng, shape, np.float64)
    mean, var = statistics(rng, shape[axis])
    gamma, beta = parameters(rng, shape[axis], np.float64)
    weights = rng.standard_normal(shape)
    z = bncpu.batch_norm_infer(x, mean, var, gamma, beta, axis=axis)
    residual = normal(rng, shape, np.float64) if with_residual else None
    if with_residual:
        residual += away_from_the_kink(z + residual)
    while not with_residual and np.abs(z).min() < 0.05:
        x[...] = normal(rng, shape, np.float64)
        z = bncpu.batch_norm_infer(x, mean, var, gamma, beta, axis=axis)

    def forward(**mask):
        how = {"axis": axis, "residual": residual, "activation": "relu"}
        return bncpu.batch_norm_infer(x, mean, var, gamma, beta, **how, **mask)

    mask = new_mask(x)
    forward(mask=mask)
    got = bncpu.batch_norm_infer_backward(
        *(weights, x, mean, var, gamma, beta),
        axis=axis,
        activation="relu",
        mask=mask,
        residual=with_residual,
    )

    def loss():
        return np.vdot(weights, forward())

    assert_gradient(got.dx, loss, x)
    assert_gradient(got.dgamma, loss, gamma)
    assert_gradient(got.dbeta, loss, beta)
    if with_residual:
        assert_gradient(got.dresidual, loss, residual)


def test_gradient_is_orthogonal_to_what_normalisation_removes(rng, dtype):
    """A step of x along a constant or along xhat changes no y, so dx has no part along them."""
    x, dy = normal(rng, (16, 5, 9), dtype), normal(rng, (16, 5, 9), dtype)
    y, mean, invstd = bncpu.batch_norm_train(x, eps=0.0)
    dx = bncpu.batch_norm_backward(dy, x, mean, invstd).dx.astype(np.float64)
    size = np.abs(dx).sum((0, 2)) * 50 * np.finfo(dtype).eps
    assert np.all(np.abs(dx.sum((0, 2))) < size)
    assert np.all(np.abs((dx * y).sum((0, 2))) < size)
