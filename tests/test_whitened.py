"""Full whitening: what it makes of a covariance, its gradient, and its use in inference."""

import numpy as np
import pytest
from accuracy import assert_close, assert_gradient, tolerance

from bncpu import nn
from bncpu.experiments.whitened import WhiteningLayer, whiten, whiten_backward


def correlated(rng, n=60, d=5, dtype=np.float64):
    """Return a batch whose covariance is well conditioned, so that a tolerance can be named."""
    mixing = np.eye(d) + 0.3 * rng.uniform(-1, 1, (d, d)) / np.sqrt(d)
    return (3 + rng.standard_normal((n, d)) @ mixing).astype(dtype)


def test_the_covariance_is_the_identity(rng, dtype):
    x = correlated(rng, dtype=dtype)
    y, mean, cov, _, _ = whiten(x, eps=0.0)
    limit = 1e3 * tolerance(dtype, len(x))
    assert_close(y.mean(axis=0), np.zeros(5), limit=limit, what="mean")
    assert_close(y.T @ y / len(x), np.eye(5), limit=limit, what="covariance")
    assert_close(cov, np.cov(x.T, ddof=0), limit=limit, what="cov")
    assert_close(mean, x.mean(axis=0), limit=limit, what="mean before")
    assert y.dtype == dtype


def test_uncorrelated_features_are_normalised_each_alone(rng):
    x = rng.standard_normal((40, 4))
    x, _ = np.linalg.qr(x - x.mean(axis=0))  # uncorrelated and of one variance: equal eigenvalues
    y = whiten(x, eps=0.0).y
    assert_close(y, x / x.std(axis=0), limit=1e3 * tolerance(np.float64, 40), what="y")


@pytest.mark.parametrize("equal", [False, True])
def test_gradient(rng, equal):
    x = correlated(rng, n=12, d=3)
    if equal:  # where a quotient of differences of eigenvalues would be 0 / 0
        x = np.linalg.qr(x - x.mean(axis=0))[0] * 3
    dy = rng.standard_normal(x.shape)
    dx = whiten_backward(dy, x, whiten(x, 0.1))
    assert_gradient(dx, lambda: float(np.vdot(dy, whiten(x, 0.1).y)), x)


def test_the_layer_scales_shifts_and_infers(rng):
    layer = WhiteningLayer(3, momentum=1.0)
    x = correlated(rng, n=500, d=3, dtype=np.float32)
    dy = rng.standard_normal(x.shape).astype(np.float32)
    layer.gamma[:], layer.beta[:] = (1, 2, 3), (4, 5, 6)
    y = layer(x)
    dx = layer.backward(dy)
    plain = whiten(x)
    limit = 1e3 * tolerance(np.float32, len(x))
    assert_close(y, plain.y * layer.gamma + layer.beta, limit=limit, what="y")
    assert_close(dx, whiten_backward(dy * layer.gamma, x, plain), limit=limit, what="dx")
    gradients = layer.gradients()
    assert gradients.keys() == layer.parameters().keys()
    assert_close(gradients["weight"], (dy * plain.y).sum(axis=0), limit=limit, what="dgamma")
    assert_close(gradients["bias"], dy.sum(axis=0), limit=limit, what="dbeta")
    # With momentum 1 the running statistics are the last batch's.
    layer.eval()
    assert_close(layer(x), y, limit=limit, what="inference")
    assert layer(x[:1]).shape == (1, 3)


def test_the_layer_needs_a_forward_in_training():
    with pytest.raises(RuntimeError, match=r"backward: .* call forward first"):
        WhiteningLayer(2).backward(np.zeros((3, 2), np.float32))


def test_the_layer_trains_a_network(rng):
    x = correlated(rng, n=200, d=6, dtype=np.float32)
    labels = (x[:, 0] > x[:, 1]).astype(np.int64)
    layers = (nn.Linear(6, 4, bias=False, rng=rng), WhiteningLayer(4), nn.Tanh())
    model = nn.Sequential(*layers, nn.Linear(4, 2, rng=rng))
    records = nn.fit(model, nn.SGD(0.5), x, labels, steps=100, batch_size=50, test=(x, labels))
    assert records[-1].accuracy > 0.8
