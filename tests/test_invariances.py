"""What the paper says batch normalisation does and does not see (sections 3 and 3.3)."""

import numpy as np
import pytest
from accuracy import assert_close, tolerance
from cases import normal, parameters

import bncpu

pytestmark = pytest.mark.usefixtures("level")

# A change of eps * var relative to var is a change of y; the equations of section 3.3 are exact
# where eps is zero.
EPS = 0.0


def layer(u, w, gamma, beta, dy):
    """Return BN(u w^T) and the loss's gradients to w and u, by the chain rule."""
    x = u @ w.T
    y, mean, invstd = bncpu.batch_norm_train(x, gamma, beta, eps=EPS)
    dx = bncpu.batch_norm_backward(dy, x, mean, invstd, gamma).dx
    return y, dx.T @ u, dx @ w


@pytest.mark.parametrize("a", [0.25, 3.0, 1e3, 1e-4])
def test_scale_of_the_weights(rng, a):
    """BN((aW)u) = BN(Wu); the gradient to u is the same and the gradient to W is 1/a of it."""
    u, w = rng.standard_normal((60, 7)), rng.standard_normal((5, 7))
    gamma, beta = parameters(rng, 5, np.float64)
    dy = rng.standard_normal((60, 5))
    y, dw, du = layer(u, w, gamma, beta, dy)
    y_scaled, dw_scaled, du_scaled = layer(u, a * w, gamma, beta, dy)
    # The products around the batch norm add their own roundings, of which there are 60 * 7 at most.
    allowed = 10 * tolerance(np.float64, 60 * 7)
    assert_close(y_scaled, y, limit=allowed * 10, what="y")
    assert_close(dw_scaled * a, dw, limit=allowed * np.abs(dw).max() * 10, what="dW")
    assert_close(du_scaled, du, limit=allowed * np.abs(du).max() * 10, what="du")


@pytest.mark.parametrize("a", [0.25, 2.0, 2.0**20, 2.0**-20])
@pytest.mark.parametrize("shape", [(6, 5, 9), (300, 5), (3, 2, 2049)], ids=str)
def test_scale_of_the_input(rng, dtype, shape, a):
    """A power of two scales x without rounding, so nothing but the exponent may change."""
    x, dy = normal(rng, shape, dtype), normal(rng, shape, dtype)
    a = dtype.type(a)
    y, mean, invstd = bncpu.batch_norm_train(x, eps=EPS)
    scaled = bncpu.batch_norm_train(a * x, eps=EPS)
    np.testing.assert_array_equal(scaled.mean, a * mean)
    m = x.size // shape[1]
    assert_close(scaled.invstd * a, invstd, limit=tolerance(dtype, m) * invstd, what="invstd")
    assert_close(scaled.y, y, limit=tolerance(dtype, m) * (np.abs(y) + 1.0), what="y")
    dx = bncpu.batch_norm_backward(dy, x, mean, invstd).dx
    dx_scaled = bncpu.batch_norm_backward(dy, a * x, scaled.mean, scaled.invstd).dx
    assert_close(dx_scaled * a, dx, limit=tolerance(dtype, m) * np.abs(dx).max() * 5.0, what="dx")


def test_shift_of_the_input(rng):
    """A bias before batch normalisation is taken away by it (section 3.2)."""
    x = normal(rng, (12, 3, 7), np.float64)
    bias = rng.standard_normal((3, 1))
    y, shifted = bncpu.batch_norm_train(x).y, bncpu.batch_norm_train(x + bias).y
    assert_close(shifted, y, limit=tolerance(np.float64, 84) * 10.0, what="y")


@pytest.mark.parametrize("shape", [(6, 5, 9), (300, 5)], ids=str)
def test_the_sign_behind_relu_has_no_scale(rng, dtype, shape):
    """With beta = 0 a power of two on x or on gamma changes no sign, and so no gate."""
    x, dy = normal(rng, shape, dtype), normal(rng, shape, dtype)
    gamma, _ = parameters(rng, shape[1], dtype)
    gates = []
    for a, b in [(1.0, 1.0), (2.0**10, 1.0), (1.0, 2.0**-9)]:
        y, mean, invstd = bncpu.batch_norm_train(
            dtype.type(a) * x, dtype.type(b) * gamma, eps=EPS, activation="relu"
        )
        dbeta = bncpu.batch_norm_backward(
            dy, dtype.type(a) * x, mean, invstd, dtype.type(b) * gamma, activation="relu"
        ).dbeta
        gates.append((y != 0, dbeta))
    for gate, dbeta in gates[1:]:
        np.testing.assert_array_equal(gate, gates[0][0])
        np.testing.assert_array_equal(dbeta, gates[0][1])


def test_a_residual_is_a_shift_of_each_value(rng, dtype):
    """One value per channel as a residual is beta; and the gradient of both is the same sum."""
    x, dy = normal(rng, (6, 5, 9), dtype), normal(rng, (6, 5, 9), dtype)
    gamma, beta = parameters(rng, 5, dtype)
    residual = np.broadcast_to(beta[:, None], x.shape)
    y = bncpu.batch_norm_train(x, gamma, residual=residual)
    shifted = bncpu.batch_norm_train(x, gamma, beta)
    limit = tolerance(dtype, 54) * (np.abs(shifted.y) + np.abs(residual) + 10.0)
    assert_close(y.y, shifted.y.astype(np.float64), limit=limit, what="y")
    got = bncpu.batch_norm_backward(dy, x, y.mean, y.invstd, gamma, residual=True)
    sums = got.dresidual.astype(np.float64).sum((0, 2))
    limit = tolerance(dtype, 54) * np.abs(dy).sum((0, 2))
    assert_close(got.dbeta, sums, limit=limit, what="dbeta")


@pytest.mark.parametrize("shape", [(6, 5, 9), (300, 5)], ids=str)
def test_identity_can_be_represented(rng, dtype, shape):
    """With gamma = sqrt(var + eps) and beta = mean the input comes back (section 3)."""
    x = normal(rng, shape, dtype)
    moments = bncpu.batch_moments(x)
    gamma = np.sqrt(moments.var() + 1e-5).astype(dtype)
    beta = moments.mean.astype(dtype)
    y = bncpu.batch_norm_train(x, gamma, beta).y
    assert_close(y, x, limit=tolerance(dtype, moments.count) * (np.abs(x).max() + 2.0), what="y")


@pytest.mark.parametrize("shape", [(6, 5, 9), (300, 5), (2, 3, 2049)], ids=str)
def test_output_has_mean_beta_and_deviation_gamma(rng, dtype, shape):
    x = normal(rng, shape, dtype)
    gamma, beta = parameters(rng, shape[1], dtype)
    y = bncpu.batch_moments(bncpu.batch_norm_train(x, gamma, beta, eps=0.0).y)
    allowed = tolerance(dtype, y.count) * (np.abs(gamma) + np.abs(beta))
    assert_close(y.mean, beta.astype(np.float64), limit=allowed, what="mean of y")
    assert_close(np.sqrt(y.var()), np.abs(gamma).astype(float), limit=allowed, what="std of y")


def test_normalising_twice_is_normalising_once(rng, dtype):
    x = normal(rng, (20, 3, 5), dtype)
    once = bncpu.batch_norm_train(x, eps=0.0).y
    twice = bncpu.batch_norm_train(once, eps=0.0).y
    assert_close(twice, once, limit=tolerance(dtype, 100) * (np.abs(once) + 1.0), what="y")


def test_training_on_a_batch_is_inference_with_its_statistics(rng, dtype):
    """Algorithms 1 and 2 meet where the population is the batch."""
    x = normal(rng, (20, 3, 5), dtype)
    gamma, beta = parameters(rng, 3, dtype)
    moments = bncpu.batch_moments(x)
    trained = bncpu.batch_norm_train(x, gamma, beta).y
    inferred = bncpu.batch_norm_infer(x, moments.mean, moments.var(), gamma, beta)
    limit = tolerance(dtype, 100) * (np.abs(trained) + 10.0)
    assert_close(trained, inferred.astype(np.float64), limit=limit, what="y")


def test_order_of_the_samples(rng, dtype):
    """Statistics of a set: samples may come in any order (a sum's rounding aside)."""
    x = normal(rng, (40, 3, 5), dtype)
    order = rng.permutation(40)
    y, shuffled = bncpu.batch_norm_train(x).y, bncpu.batch_norm_train(x[order]).y
    limit = tolerance(dtype, 200) * (np.abs(y[order]) + 1.0)
    assert_close(shuffled, y[order], limit=limit, what="y")


def test_channels_do_not_see_each_other(rng, dtype):
    """A channel alone is the same channel among others, up to the order of its sums."""
    x = normal(rng, (9, 33, 7), dtype)
    together = bncpu.batch_norm_train(x).y
    limit = tolerance(dtype, 63) * (np.abs(together) + 1.0)
    for c in (0, 15, 16, 32):
        alone = bncpu.batch_norm_train(x[:, c : c + 1]).y
        assert_close(alone, together[:, c : c + 1], limit=limit[:, c : c + 1], what="y")
