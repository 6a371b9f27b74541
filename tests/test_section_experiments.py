"""The experiments on sections 3.1 to 3.4, 4.2.3 and 5, and on the batch: their parts, and reports.

That each runs in its smallest size is a test of all experiments together. Here it is whether what
they measure with is right, and whether their claims can fail.
"""

import numpy as np
import pytest
from accuracy import assert_close, assert_gradient, assert_same_bits, tolerance

import bncpu
from bncpu import data, nn
from bncpu.experiments import fixed_statistics, networks, regularisation, search
from bncpu.experiments.batch_size import BatchSize
from bncpu.experiments.domain import SHIFTS, Domain, shifted
from bncpu.experiments.ensemble import NETWORKS, Ensemble, softmax
from bncpu.experiments.experiment import Result, Results
from bncpu.experiments.inference import Inference
from bncpu.experiments.page import Page
from bncpu.experiments.placement import VARIANTS, Placement, network, skewness
from bncpu.experiments.virtual import VirtualBatchNorm

DIGITS = data.load_digits()


class Steps:
    """Counts the steps of a run."""

    def __init__(self):
        self.taken = 0

    def update(self, n=1):
        self.taken += n


def normaliser(bn):
    return lambda features: [nn.BatchNorm(features)] * bn


def measured(experiment):
    """Return the results of all runs of an experiment."""
    results = Results()
    while True:
        done = [result.settings for result in results]
        new = [run for run in experiment.runs(results) if run.settings not in done]
        if not new:
            return results
        found = []
        for run in new:
            steps = Steps()
            got = experiment.measure(run.settings, DIGITS, steps)
            assert steps.taken <= run.steps
            found.append(Result(run.settings, got, 0.0))
        results = Results([*results, *found])


def claims_of(experiment, results):
    page = Page()
    experiment.report(results, page)
    return {claim.text: claim for claim in page.claims}


def planted(results, change):
    """Return the results with what `change` makes of each."""
    return Results([r._replace(measured=change(r.settings, dict(r.measured))) for r in results])


# Networks


def test_networks_with_and_without_norm_start_alike(rng):
    seed = int(rng.integers(100))
    plain, normal = (
        networks.multilayer(6, (5, 4), normaliser(bn), seed=seed, dropout=0.5)
        for bn in (False, True)
    )
    weights = [
        [layer.weight for layer in model.layers if isinstance(layer, nn.Linear)]
        for model in (plain, normal)
    ]
    for a, b in zip(*weights, strict=True):
        assert_same_bits(a, b)
    biases = [layer.bias is None for layer in normal.layers if isinstance(layer, nn.Linear)]
    assert biases == [True, True, False]
    seeds = [layer.seed for layer in plain.layers if isinstance(layer, nn.Dropout)]
    assert len(set(seeds)) == 2


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 5)])
def test_a_convolutional_network_fits_its_images(rng, shape):
    shapes = []

    def normalise(of_one):
        shapes.append(of_one)
        return [nn.BatchNorm(of_one, axis=tuple(range(1, len(of_one) + 1)))]

    model = networks.convolutional(shape, (4, 6), normalise, hidden=(9,), seed=0)
    y = model.forward(rng.standard_normal((5, *shape)).astype(np.float32))
    assert y.shape == (5, 10)
    assert [of_one[0] for of_one in shapes] == [4, 6, 9]


@pytest.mark.parametrize("variant", VARIANTS, ids=", ".join)
def test_where_a_network_is_normalised(rng, variant):
    net, place, then = variant
    shape = (1, 8, 8) if net == "conv" else (12,)
    model = network(shape, variant, 0)
    kinds = [type(layer).__name__ for layer in model.layers]
    norms = [layer for layer in model.layers if isinstance(layer, nn.BatchNorm)]
    assert len(norms) == (0 if place == "nothing" else 2 if net == "conv" else 3)
    assert all((layer.gamma is not None) == bool(then) for layer in norms)
    if place == "activations":
        assert norms[0].shape == (8, 4, 4)
    if net != "conv":
        start = {"Wu+b": "LB", "u": "BL", "nothing": "LS", "g(Wu+b)": "LS"}[place]
        assert [kind[0] for kind in kinds[:2]] == [*start.replace("S", "SR"[net == "ReLU"])]
        assert (model.layers[-2] in norms) == (place == "g(Wu+b)")
    model.forward(rng.standard_normal((4, *shape)).astype(np.float32))


# The search


def results_of_a_search(accuracies):
    return Results(
        [
            Result({"bn": bn, "part": "validation", "rate": rate, "seed": 3}, {"accuracy": a}, 0.0)
            for (bn, rate), a in accuracies.items()
        ]
    )


def test_every_network_has_its_best_rate():
    variants = [{"bn": False}, {"bn": True}]

    def runs(results):
        return search.runs(results, variants, (0.1, 1.0), (3, 4), lambda v: 7 + v["bn"])

    accuracies = {(False, 0.1): 0.7, (False, 1.0): 0.6, (True, 0.1): 0.9, (True, 1.0): 0.9}
    first = runs(Results())
    assert [run.settings["part"] for run in first] == ["validation"] * 4
    assert [run.steps for run in first] == [7, 7, 8, 8]
    incomplete = dict(list(accuracies.items())[:-1])
    assert runs(results_of_a_search(incomplete)) == first
    then = runs(results_of_a_search(accuracies))
    assert then[:4] == first
    assert [
        (run.settings["bn"], run.settings["rate"], run.settings["seed"]) for run in then[4:]
    ] == [
        (False, 0.1, 3),
        (False, 0.1, 4),
        (True, 0.1, 3),
        (True, 0.1, 4),
    ]
    accuracies[True, 1.0] = 0.95
    assert search.best_rate(results_of_a_search(accuracies), {"bn": True}) == 1.0


def test_the_search_does_not_see_the_test_set():
    part = search.part_of(DIGITS, "validation")
    n = len(part.x_train)
    assert n + len(part.x_test) == len(DIGITS.x_train)
    assert_same_bits(np.concatenate([part.x_train, part.x_test]), DIGITS.x_train)
    assert search.part_of(DIGITS, "test") is DIGITS


def test_better_is_better_for_every_seed():
    assert search.better([0.2, 0.4], [0.1, 0.3])
    assert not search.better([0.2, 0.3], [0.1, 0.3])
    with pytest.raises(ValueError, match=r"longer|shorter"):
        search.better([0.2], [0.1, 0.3])


# Fixed statistics


@pytest.fixture
def trained():
    """Return a small network after a few steps, and images."""
    model = networks.convolutional(
        (1, 8, 8), (4, 5), lambda s: [nn.BatchNorm(s[0])], hidden=(9,), seed=1
    )
    images = DIGITS.images("train")
    nn.fit(model, nn.SGD(0.1), images, DIGITS.y_train, steps=20)
    return model, DIGITS.images("test")[:130]


def test_folding_a_network(trained):
    model, images = trained
    before = model.state_dict()
    folded = fixed_statistics.fold(model)
    assert not any(isinstance(layer, nn.BatchNorm) for layer in folded.layers)
    assert fixed_statistics.relative(nn.predict(folded, images), nn.predict(model, images)) < 1e-5
    for name, value in model.state_dict().items():
        assert_same_bits(value, before[name], name)


def test_linear_map_error(trained, monkeypatch):
    model, images = trained
    assert fixed_statistics.linear_map_error(model, images) < 1e-5
    wrong = bncpu.linear_map

    def other(*args, eps):
        scale, shift = wrong(*args, eps=eps)
        return scale, shift * np.float32(1.01)

    monkeypatch.setattr(bncpu, "linear_map", other)
    assert fixed_statistics.linear_map_error(model, images) > 1e-4


def test_what_outputs_depend_on(trained):
    model, images = trained
    before, threads = model.state_dict(), bncpu.get_num_threads()
    found = fixed_statistics.dependence(model, images, 30, 5, seed=0)
    assert found["same beside others"]
    assert found["same for threads"]
    assert found["same for sizes, BN"]
    assert found["sizes"] < 1e-5
    assert np.shape(found["in training"]) == (5, 10)
    assert np.std(found["in training"], axis=0).max() > 1e-3
    assert bncpu.get_num_threads() == threads
    for name, value in model.state_dict().items():
        assert_same_bits(value, before[name], name)


class Centred(nn.Layer):
    """Subtracts the mean of whatever batch there is, in inference too."""

    def forward(self, x):
        return x - x.mean(axis=0)

    def backward(self, dy):
        return dy


def test_a_dependence_is_found():
    model = nn.Sequential(Centred())
    found = fixed_statistics.dependence(model, DIGITS.x_test[:90], 30, 5, seed=0)
    assert not found["same beside others"]
    assert found["sizes"] > 1e-3


# Virtual batches


def test_the_first_virtual_batch_is_an_ordinary_batch(rng):
    x, dy = (rng.standard_normal((6, 3)).astype(np.float32) for _ in range(2))
    virtual, plain = VirtualBatchNorm(3, 4), nn.BatchNorm(3)
    gamma, beta = rng.standard_normal((2, 3))
    limit = 10 * tolerance(np.float32, 6)
    for layer in (virtual, plain):
        layer.gamma[...], layer.beta[...] = gamma, beta
    assert_close(virtual.forward(x), plain.forward(x), limit=limit, what="y")
    assert_close(virtual.backward(dy), plain.backward(dy), limit=limit, what="dx")
    assert_close(virtual.dgamma, plain.dgamma, limit=6 * limit, what="dgamma")
    assert_close(virtual.dbeta, plain.dbeta, limit=6 * limit, what="dbeta")


def test_a_virtual_batch_is_normalised_by_all_its_parts(rng):
    layer, batches = VirtualBatchNorm(3, 2), rng.standard_normal((5, 4, 3)).astype(np.float32)
    for i, x in enumerate(batches):
        y = layer.forward(x)
        # Two batches make a virtual one; the one before it is kept whole.
        pooled = batches[max(0, i // 2 * 2 - 2) : i + 1].reshape(-1, 3).astype(np.float64)
        expected = (x - pooled.mean(axis=0)) / np.sqrt(pooled.var(axis=0) + layer.eps)
        assert layer.pooled.count == len(pooled)
        assert_close(y, expected, limit=10 * tolerance(np.float32, 20), what="y")
    assert layer.running_mean.tolist() == [0, 0, 0]


def test_the_gradient_of_a_virtual_batch(rng):
    earlier, x, dy = rng.standard_normal((3, 4, 3))
    layer = VirtualBatchNorm(3, 8, dtype=np.float64)
    layer.gamma[...], layer.beta[...] = (0.5, -2.0, 1.5), (0.1, 0.0, -1.0)
    layer.forward(earlier)
    layer.forward(x)
    dx = layer.backward(dy)
    # Earlier values are constants, and only the present batch has a gradient.
    pooled = np.concatenate([earlier, x])
    own = pooled[4:]

    def loss():
        invstd = 1 / np.sqrt(pooled.var(axis=0) + layer.eps)
        y = layer.gamma * (own - pooled.mean(axis=0)) * invstd + layer.beta
        return float(np.vdot(dy, y))

    assert_gradient(dx, loss, own, what="dx")
    assert_gradient(layer.dgamma, loss, layer.gamma, what="dgamma")
    assert_gradient(layer.dbeta, loss, layer.beta, what="dbeta")


def test_a_virtual_batch_norm_in_inference(rng):
    x = rng.standard_normal((4, 3)).astype(np.float32)
    layer, plain = VirtualBatchNorm(3, 2), nn.BatchNorm(3)
    layer.forward(x)
    layer.eval()
    plain.eval()
    assert_same_bits(layer.forward(x), plain.forward(x))
    assert_same_bits(layer.backward(x), plain.backward(x))


# The rest


def test_shifts(rng):
    x = np.array([[0.0, 0.5, 1.0]], np.float32)
    assert shifted(x, "none", rng) is x
    np.testing.assert_allclose(shifted(x, "contrast 1/5", rng), [[0.4, 0.5, 0.6]], rtol=1e-6)
    np.testing.assert_array_equal(shifted(x, "inversion", rng), [[1, 0.5, 0]])
    wide = np.zeros((100, 100), np.float32)
    noisy = shifted(wide, "noise 0.3", rng)
    assert noisy.dtype == np.float32
    assert 0.28 < noisy.std() < 0.32


def test_softmax(rng):
    probabilities = softmax(rng.standard_normal((4, 10)).astype(np.float32) * 300)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(softmax(np.log([[1.0, 3.0]])), [[0.25, 0.75]])


def test_skewness(rng):
    assert skewness(np.zeros((5, 2))) == 0
    assert skewness(rng.standard_normal((20_000, 2))) < 0.1
    assert 1.7 < skewness(rng.exponential(size=(20_000, 2))) < 2.3


def test_noise_comes_from_the_batch():
    x = DIGITS.x_train[:200]
    plain, normal = (networks.multilayer(64, (20,), normaliser(bn), seed=0) for bn in (False, True))
    assert regularisation.noise(plain, x, 0) < 1e-5
    assert regularisation.noise(normal, x, 0) > 1e-2
    for layer in (plain.layers[0], plain.layers[-1]):
        layer.weight[...] = 0
    assert regularisation.noise(plain, x, 0) == 0


# Reports, on results as they are and as they might be


def test_claims_of_placement():
    experiment = Placement("tiny")
    results = measured(experiment)

    def change(settings, got):
        got["accuracy"] = 0.9 if settings["normalised"] == "u" else 0.5
        return got

    claims = claims_of(experiment, planted(results, change))
    assert not claims["ReLU, Wu+b, gamma, beta is better than ReLU, u, gamma, beta"].held
    assert not claims["conv, maps, gamma, beta is better than conv, nothing"].held
    real = claims_of(experiment, results)
    assert real["ReLU: Wu+b is less skewed than u"].held
    assert real["sigmoid, Wu+b, gamma, beta is better than sigmoid, nothing"].held


def test_claims_of_regularisation():
    experiment = regularisation.Regularisation("tiny")
    results = measured(experiment)

    def change(settings, got):
        return got | {"accuracy": 0.5 + settings["dropout"] / 10, "gap": 0.1, "noise": 0.0}

    assert not any(c.held for c in claims_of(experiment, planted(results, change)).values())
    text = "With BN, the logits of an example in training depend on the rest of its batch"
    assert claims_of(experiment, results)[text].held


def test_claims_of_an_ensemble():
    experiment = Ensemble("tiny")
    results = measured(experiment)
    assert [len(results[0].measured[str(k)]) for k in range(1, 7)] == [6, 15, 20, 15, 6, 1]
    for together, expected in ((0.93, True), (0.89, False)):

        def change(_, got, together=together):
            return got | {"1": [0.9] * len(NETWORKS), "6": [together]}

        claims = claims_of(experiment, planted(results, change)).values()
        assert [claim.held for claim in claims] == [expected] * 2


def test_claims_of_batch_size():
    experiment = BatchSize("tiny")
    results = measured(experiment)
    claims = claims_of(experiment, results)
    refused = claims["A batch of 1 is refused with a clear error"]
    assert refused.held
    assert "expected more than one value per channel" in refused.ours

    def change(settings, got):
        return got if settings["batch"] == 1 else got | {"accuracy": 0.5 + settings["batch"] / 1e3}

    others = claims_of(experiment, planted(results, change))
    assert [claim.held for claim in others.values()] == [True, *[False] * 5]


def test_claims_of_inference():
    experiment = Inference("tiny")
    results = measured(experiment)
    real = claims_of(experiment, results)
    assert sum(claim.held for claim in real.values()) >= 5

    def change(_, got):
        return got | {"linear map": 1e-3, "folded": 1e-3, "same beside others": False, "sizes": 1}

    others = claims_of(experiment, planted(results, change))
    assert [claim.held for claim in others.values()][3:] == [False] * 4


def test_claims_of_domain():
    experiment = Domain("tiny")
    results = measured(experiment)
    claims = claims_of(experiment, results)
    texts = {shift: text for shift in SHIFTS for text in claims if text.startswith(shift)}
    assert claims[texts["contrast 1/5"]].held
    assert not claims[texts["inversion"]].held

    def change(_, got):
        got["after"] = {name: [0.3] * len(each) for name, each in got["after"].items()}
        got["before"] = dict.fromkeys(SHIFTS, 0.3) | {"none": 0.9}
        return got

    assert not any(c.held for c in claims_of(experiment, planted(results, change)).values())
