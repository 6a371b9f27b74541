"""What section 3.3's experiment computes of layers: rescaled weights, Jacobians."""

import numpy as np
import pytest
from accuracy import assert_gradient, tolerance

from bncpu import nn
from bncpu.experiments.layerwise import layer_jacobians, rescaling_errors


@pytest.mark.parametrize("batch_norm", [True, False])
def test_jacobians_are_those_of_the_network(rng, batch_norm):
    options = {"activation": nn.Tanh, "batch_norm": batch_norm, "rng": rng, "dtype": np.float64}
    model = nn.fully_connected([6, 4, 4, 4, 3], **options)
    x = rng.standard_normal((3, 6))
    if batch_norm:
        for layer in model.layers:
            if isinstance(layer, nn.BatchNorm):
                layer.gamma += rng.uniform(0.1, 1, 4)
                layer.beta += rng.standard_normal(4)
        nn.population_statistics(model, rng.standard_normal((50, 6)))
    model.train()
    jacobians = layer_jacobians(model, x)
    assert jacobians.shape == (6, 4, 4)
    assert all(layer.training for layer in model.layers)

    # From the first nonlinearity's normalised input to the second's, at the second example.
    places = [i for i, layer in enumerate(model.layers) if isinstance(layer, nn.Tanh)]
    first, second = (model.layers[i - 1] for i in places[:2])
    between = nn.Sequential(*model.layers[places[0] : places[1]])
    with nn.inference(model):
        z = nn.Sequential(*model.layers[: places[0]]).forward(x[1:2])
        gamma, beta = (first.gamma, first.beta) if batch_norm else (1.0, 0.0)
        xhat = (z - beta) / gamma
        for k in range(4):

            def output(k=k):
                y = between.forward(xhat * gamma + beta)[0, k]
                return float((y - second.beta[k]) / second.gamma[k] if batch_norm else y)

            assert_gradient(jacobians[1][k : k + 1], output, xhat)


def test_rescaling_costs_nothing_but_what_eps_costs(rng, dtype):
    u, w, dy = (rng.standard_normal(shape).astype(dtype) for shape in ((30, 5), (4, 5), (30, 4)))
    scales = [0.25, 1.0, 3.0, 8.0]
    exact = np.array(rescaling_errors(u, w, dy, scales, eps=0.0))
    assert exact.shape == (4, 3)
    assert not exact[[0, 1, 3]].any()  # a power of two rounds nothing
    assert exact[2].max() < 100 * tolerance(dtype, 30)
    # BN(aWu) - BN(Wu) is BN(Wu) times 1 - sqrt((var + eps) / (var + eps / a^2)).
    var = np.var(u.astype(np.float64) @ w.T, axis=0)
    off, _, _ = rescaling_errors(u, w, dy, [0.25], eps=0.1)[0]
    share = 1 - np.sqrt((var + 0.1) / (var + 1.6))
    assert share.min() / 4 < off < share.max() * (1 + 1e-3)
