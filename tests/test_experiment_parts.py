"""What single experiments compute besides training: normalising naively, pooling, curves."""

import numpy as np
import pytest
from accuracy import assert_close, assert_gradient, tolerance

from bncpu import data, nn
from bncpu.experiments import naive, recurrent
from bncpu.experiments.curves import best_rate, learning_curve, steps_to
from bncpu.experiments.experiment import Result, Results


@pytest.mark.parametrize("name", [naive.CENTRE_INSIDE, naive.BOTH_INSIDE])
def test_inside_the_step_the_gradient_knows_of_the_normalisation(rng, name):
    layer = naive.Normalise(name)
    x, dy = rng.standard_normal((2, 8, 3))
    layer.forward(x)
    dx = layer.backward(dy)
    assert_gradient(dx, lambda: float(np.vdot(dy, layer.forward(x))), x)
    assert np.abs(dx.sum(axis=0)).max() < 1e-14  # nothing is left for a bias


@pytest.mark.parametrize(("name", "scales"), [(naive.CENTRE, False), (naive.BOTH, True)])
def test_outside_the_step_it_does_not(rng, name, scales):
    layer = naive.Normalise(name)
    x, dy = rng.standard_normal((2, 8, 3))
    y = layer.forward(x)
    # The mean and the deviation are taken for numbers, so this is the gradient of a linear map.
    expected = dy / np.sqrt(x.var(axis=0) + 1e-5) if scales else dy
    limit = tolerance(np.float64, 8)
    assert_close(layer.backward(dy), expected, limit=100 * limit, what="dx")
    db = layer.backward(dy).sum(axis=0)
    assert np.abs(db).min() > 0
    assert_close(layer.forward(x - 10 * db), y, limit=1e4 * limit, what="y after the step")


def test_pooled_statistics_are_those_of_all_values(rng):
    norms = tuple(nn.BatchNorm(3, dtype=np.float64, momentum=1.0) for _ in range(4))
    values = rng.standard_normal((4, 50, 3)) + np.arange(4.0)[:, None, None]
    for norm, x in zip(norms, values, strict=True):
        norm.forward(x)
        norm.running_var *= 49 / 50  # by m, for these 200 values and not a population
    recurrent.pool(norms)
    for norm in norms:
        limit = 100 * tolerance(np.float64, 200)
        assert_close(norm.running_mean, values.mean(axis=(0, 1)), limit=limit, what="mean")
        assert_close(norm.running_var, values.var(axis=(0, 1)), limit=limit, what="var")


def test_reach_leaves_the_model_as_it_is(rng):
    digits = data.load_digits()
    layer = nn.RNN(8, 5, 8, rng=rng)
    model = nn.Sequential(layer, nn.Linear(5, 10, rng=rng))
    before = model.state_dict()
    norms = recurrent.reach(model, layer, digits)
    assert len(norms) == 8
    assert norms[-1] == 1.0
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name], name)


class Count:
    steps = 0

    def update(self, n=1):
        self.steps += n


@pytest.mark.parametrize("rate", [0.5, 1e38])
def test_a_curve_has_a_value_for_every_record(rng, rate):
    digits, seen, count = data.load_digits().subset(200, 50), [], Count()
    model = nn.Sequential(nn.Linear(64, 5, rng=rng), nn.ReLU(), nn.Linear(5, 10, rng=rng))
    how = {"steps": 25, "every": 10, "batch_size": 20, "seed": 0, "progress": count}
    found = learning_curve(model, rate, digits, **how, observe=lambda: seen.append(1))
    assert found["steps"] == [0, 10, 20, 25]
    assert len(found["curve"]) == len(found["loss"]) == 4
    assert found["accuracy"] == found["curve"][-1]
    assert found["diverged"] == (rate > 1)
    if rate > 1:
        assert found["curve"][1:] == [0.0] * 3
        assert len(seen) == 1
    else:
        assert found["accuracy"] == nn.evaluate(model, digits.x_test, digits.y_test)
        assert (len(seen), count.steps) == (4, 25)


def test_steps_and_rates():
    assert steps_to(0.9, [0, 50, 100], [0.1, 0.9, 0.8]) == 50
    assert steps_to(0.95, [0, 50, 100], [0.1, 0.9, 0.8]) is None
    rows = [(3.0, 0.5), (3.0, 0.7), (1.0, 0.2), (1.0, 0.9), (0.3, 0.6), (0.3, 0.6)]
    results = [Result({"rate": rate}, {"accuracy": a}, 0.0) for rate, a in rows]
    assert best_rate(Results(results[:4])) == 3.0
    assert best_rate(Results(results[:2] + results[4:])) == 0.3
