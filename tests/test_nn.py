"""The trainer: gradients against central differences, the order of batches, reproducibility."""

import sys

import numpy as np
import pytest
from accuracy import assert_close, assert_gradient, assert_same_bits, tolerance

from bncpu import data, nn


def network(**options):
    options = {"rng": np.random.default_rng(5), "dtype": np.float64} | options
    return nn.fully_connected([6, 7, 5, 4], **options)


def examples(rng, n=61, dtype=np.float64):
    return rng.standard_normal((n, 6)).astype(dtype), rng.integers(0, 4, n)


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert_same_bits(a[name], b[name], name)


@pytest.mark.parametrize("kind", ["linear", "linear without bias", "sigmoid", "tanh", "relu"])
def test_gradients_of_a_layer(rng, kind):
    layer = {
        "linear": lambda: nn.Linear(4, 3, rng=rng, dtype=np.float64),
        "linear without bias": lambda: nn.Linear(4, 3, bias=False, rng=rng, dtype=np.float64),
        "sigmoid": nn.Sigmoid,
        "tanh": nn.Tanh,
        "relu": nn.ReLU,
    }[kind]()
    x = rng.standard_normal((5, 4))
    x += np.copysign(0.1, x)  # no difference reaches across the kink of a ReLU
    dy = rng.standard_normal(layer(x).shape)

    def loss():
        return float(np.vdot(dy, layer.forward(x)))

    dx = layer.backward(dy)
    gradients = layer.gradients()
    assert gradients.keys() == layer.parameters().keys()
    assert_gradient(dx, loss, x)
    for name, value in layer.parameters().items():
        assert_gradient(gradients[name], loss, value)


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_a_network_and_its_loss(rng, batch_norm, training):
    model, cross_entropy = network(batch_norm=batch_norm), nn.SoftmaxCrossEntropy()
    x, y = examples(rng, 8)
    model.forward(x)  # running statistics other than their initial ones
    model.train(training)

    def loss():
        return cross_entropy.forward(model.forward(x), y)

    loss()
    dx = model.backward(cross_entropy.backward())
    gradients = {name: value.copy() for name, value in model.gradients().items()}
    assert gradients.keys() == model.parameters().keys()
    assert_gradient(dx, loss, x)
    for name, value in model.parameters().items():
        assert_gradient(gradients[name], loss, value)


def test_activations_at_the_ends_of_the_range(dtype):
    x = np.array([[-1e30, -100, 0, 100, 1e30, np.nan]], dtype)
    for layer, y in (
        (nn.Sigmoid(), [0, 0, 0.5, 1, 1, np.nan]),
        (nn.Tanh(), [-1, -1, 0, 1, 1, np.nan]),
        (nn.ReLU(), [0, 0, 0, 100, 1e30, np.nan]),
    ):
        got = layer(x)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, np.array([y], dtype))
        assert layer.backward(np.ones_like(x)).dtype == dtype


def test_cross_entropy_is_stable(dtype):
    loss = nn.SoftmaxCrossEntropy()
    logits = np.array([[1e4, 0, -1e4], [1e4, 0, -1e4]], dtype)
    assert loss.forward(logits, np.array([0, 2])) == 1e4
    np.testing.assert_array_equal(loss.backward(), np.array([[0, 0, 0], [0.5, 0, -0.5]], dtype))


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        ((2, 3), [0, 3], ValueError, r"labels: expected 0 to 2; got 0 to 3"),
        ((2, 3), [-1, 0], ValueError, r"labels: expected 0 to 2; got -1 to 0"),
        ((2, 3), [0], ValueError, r"labels: expected shape \(2,\)"),
        ((2, 3), [0.0, 1.0], TypeError, r"labels: expected integers; got float64"),
        ((0, 3), [], ValueError, r"logits: expected shape \(n, classes\), not empty"),
        ((3,), [0], ValueError, r"logits: expected shape \(n, classes\)"),
    ],
)
def test_cross_entropy_refuses(logits, labels, error, message):
    with pytest.raises(error, match=message):
        nn.SoftmaxCrossEntropy().forward(np.zeros(logits), np.array(labels))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"in_features": 0}, ValueError, "in_features: expected an integer >= 1; got 0"),
        ({"in_features": True}, TypeError, "in_features: expected an integer; got True"),
        ({"out_features": 2.0}, TypeError, r"out_features: expected an integer; got 2\.0"),
        (
            {"out_features": 10**20},
            ValueError,
            r"weights: expected at most \d+; got 1",
        ),
        ({"rng": 3}, TypeError, r"rng: expected a numpy\.random\.Generator; got 3"),
        ({"dtype": np.int32}, TypeError, "dtype: expected float32 or float64; got int32"),
        ({"std": -1.0}, ValueError, r"std: expected a finite number >= 0; got -1\.0"),
        ({"std": np.nan}, ValueError, "std: expected a finite number >= 0; got nan"),
        ({"std": "a"}, TypeError, "std: expected a number; got 'a'"),
        ({"std": 10**400}, ValueError, "std: expected a number that a float can hold"),
    ],
)
def test_linear_refuses_to_be_made(options, error, message):
    options = {"in_features": 2, "out_features": 3, "rng": np.random.default_rng(0)} | options
    with pytest.raises(error, match=message):
        nn.Linear(options.pop("in_features"), options.pop("out_features"), **options)


def test_linear_refuses_other_inputs(rng):
    layer = nn.Linear(4, 3, rng=rng)
    with pytest.raises(ValueError, match=r"x: expected shape \(n, 4\); got \(2, 3\)"):
        layer(np.zeros((2, 3), np.float32))
    with pytest.raises(TypeError, match="x: expected float32 like the weights; got float64"):
        layer(np.zeros((2, 4)))


def test_initial_weights_have_the_deviation_asked_for():
    for std, expected in ((None, 0.05), (0.5, 0.5)):
        weight = nn.Linear(400, 300, std=std, rng=np.random.default_rng(1)).weight
        assert weight.shape == (300, 400)
        assert abs(weight.std() / expected - 1) < 0.01


@pytest.mark.parametrize("make", [nn.Sigmoid, nn.SoftmaxCrossEntropy])
def test_backward_needs_a_forward(make):
    with pytest.raises(RuntimeError, match="call forward first"):
        make().backward(*([np.zeros((1, 1))] if make is nn.Sigmoid else []))


def test_a_redundant_bias_is_told_of_once(rng):
    def layers(bias):
        for _ in range(2):
            yield nn.Linear(3, 3, bias=bias, rng=rng)
            yield nn.BatchNorm(3)

    with pytest.warns(UserWarning, match=r"layer 0, 2: its bias is redundant") as caught:
        nn.Sequential(*layers(True))
    assert len(caught) == 1
    # Warnings are errors here: neither of these makes one.
    nn.Sequential(*layers(False))
    nn.Sequential(nn.Linear(3, 3, rng=rng), nn.Sigmoid(), nn.BatchNorm(3))


def test_that_bias_is_redundant(rng):
    x, y = examples(rng)
    with pytest.warns(UserWarning, match="redundant"):
        model = nn.Sequential(nn.Linear(6, 4, rng=rng, dtype=float), nn.BatchNorm(4, dtype=float))
    loss = nn.SoftmaxCrossEntropy()
    before = loss.forward(model.forward(x), y)
    model.backward(loss.backward())
    assert np.abs(model.gradients()["0.bias"]).max() < 1e-15
    model.layers[0].bias += 3
    assert abs(loss.forward(model.forward(x), y) - before) < 1e-13


def test_sequential_refuses_what_is_no_layer():
    with pytest.raises(TypeError, match="layers: expected a layer at index 1; got 7"):
        nn.Sequential(nn.Tanh(), 7)


def test_names_and_shapes_are_pytorchs():
    """As listed by torch.nn.Sequential(Linear(bias=False), BatchNorm1d, Sigmoid, Linear)."""
    model = nn.fully_connected([6, 7, 4], rng=np.random.default_rng(0))
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        "0.weight": (7, 6),
        "1.weight": (7,),
        "1.bias": (7,),
        "1.running_mean": (7,),
        "1.running_var": (7,),
        "1.num_batches_tracked": (),
        "3.weight": (4, 7),
        "3.bias": (4,),
    }
    assert list(model.parameters()) == ["0.weight", "1.weight", "1.bias", "3.weight", "3.bias"]


def test_state_dict_holds_copies_and_loads_back(rng):
    model, other = network(), network(rng=np.random.default_rng(6))
    x, y = examples(rng)
    nn.fit(model, nn.SGD(0.5), x, y, steps=3)
    state = model.state_dict()
    other.load_state_dict(state)
    assert_same_state(other.state_dict(), state)
    for m in (model, other):
        m.eval()
    assert_same_bits(other.forward(x), model.forward(x))
    nn.fit(other, nn.SGD(0.5), x, y, steps=1)
    assert_same_state(model.state_dict(), state)


def spoil(state, change):
    if change == "missing":
        del state["4.running_var"], state["6.bias"]
    elif change == "unexpected":
        state["9.weight"] = np.zeros(3)
    elif change == "shape":
        state["6.weight"] = state["6.weight"].T.copy()
    elif change == "dtype":
        state["6.bias"] = state["6.bias"].astype(complex)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"state: missing 4\.running_var, 6\.bias$"),
        ("unexpected", r"state: unexpected 9\.weight$"),
        ("shape", r"6\.weight: expected shape \(4, 5\); got \(5, 4\)"),
        ("dtype", r"6\.bias: expected dtype float64; got complex128"),
    ],
)
def test_a_wrong_state_is_refused_and_nothing_is_loaded(change, message):
    model = network()
    before = model.state_dict()
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(spoil(network(rng=np.random.default_rng(6)).state_dict(), change))
    assert_same_state(model.state_dict(), before)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("running_var", [1.0, -2.0, 1.0], r"running_var: expected no negative variance; got -2\.0"),
        ("num_batches_tracked", -7, "num_batches_tracked: expected a count; got -7"),
    ],
)
def test_a_value_that_only_its_layer_refuses(rng, name, value, message):
    model = nn.Sequential(nn.Linear(2, 3, bias=False, rng=rng), nn.BatchNorm(3))
    before = model.state_dict()
    with pytest.raises(ValueError, match=rf"^1\.{message}"):
        model.load_state_dict(before | {f"1.{name}": np.array(value)})
    assert_same_state(model.state_dict(), before)


@pytest.mark.parametrize("layer", [nn.BatchNorm(3), nn.Sequential(nn.BatchNorm(3))])
@pytest.mark.parametrize("names", [{}, {"other": np.zeros(3)}])
def test_missing_and_unknown_names_are_one_kind_of_error(layer, names):
    with pytest.raises(ValueError, match=r"^state: missing .*weight"):
        layer.load_state_dict(names)


def test_a_layer_that_refuses_late_leaves_nothing_half_loaded(monkeypatch):
    model = network()
    before = model.state_dict()
    other = network(rng=np.random.default_rng(6)).state_dict()
    load = nn.Linear.load_state_dict

    def interrupted(self, state):
        if self is model.layers[-1] and np.array_equal(state["weight"], other["6.weight"]):
            raise KeyboardInterrupt
        load(self, state)

    monkeypatch.setattr(nn.Linear, "load_state_dict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.load_state_dict(other)
    assert_same_state(model.state_dict(), before)


def test_sgd_with_momentum_is_the_recursion(rng):
    layer = nn.Linear(3, 2, bias=False, rng=rng, dtype=np.float64)
    optimizer = nn.SGD(0.1, 0.9)
    weight, velocity = layer.weight.copy(), np.zeros((2, 3))
    for _ in range(4):
        layer.dweight = rng.standard_normal((2, 3))
        optimizer.step(layer)
        velocity = 0.9 * velocity + layer.dweight
        weight -= 0.1 * velocity
        assert_close(layer.weight, weight, limit=tolerance(np.float64, 4), what="weight")
    assert optimizer.velocity.keys() == {"weight"}


def test_sgd_without_momentum_keeps_no_velocity(rng):
    model, optimizer = network(), nn.SGD(0.5)
    nn.fit(model, optimizer, *examples(rng), steps=2)
    assert optimizer.velocity == {}


def test_sgd_refuses():
    with pytest.raises(ValueError, match="learning_rate: expected a finite number >= 0; got nan"):
        nn.SGD(np.nan)
    with pytest.raises(ValueError, match=r"momentum: expected a number in \[0, 1\); got 1"):
        nn.SGD(0.1, 1)
    for kind, number in (
        (TypeError, "a"),
        (TypeError, None),
        (TypeError, True),
        (ValueError, 10**400),
    ):
        with pytest.raises(kind, match="learning_rate: expected a number"):
            nn.SGD(number)
        with pytest.raises(kind, match="momentum: expected a number"):
            nn.SGD(0.1, number)
    model = network()
    before = model.state_dict()
    with pytest.raises(RuntimeError, match=r"0\.weight: has no gradient; call backward"):
        nn.SGD(0.1).step(model)
    assert_same_state(model.state_dict(), before)
    optimizer = nn.SGD(0.1, 0.9)
    with pytest.raises(ValueError, match="state: missing"):
        optimizer.load_state_dict({"0.weight": np.zeros((7, 6))}, model)
    assert optimizer.velocity == {}


@pytest.mark.parametrize("n", [1, 2, 59, 60, 61, 120, 121, 122])
@pytest.mark.parametrize("batch_size", [1, 2, 60])
def test_an_epoch_is_every_example_once(n, batch_size):
    from bncpu.nn.training import batches

    count = nn.steps_per_epoch(n, batch_size)
    order = batches(n, batch_size, seed=3)
    epochs = [[next(order) for _ in range(count)] for _ in range(2)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(np.concatenate(epoch)), np.arange(n))
        sizes = [len(rows) for rows in epoch]
        assert all(size == batch_size for size in sizes[:-1])
        # No batch of one, which cannot be normalised, unless it was asked for or is all there is.
        assert min(sizes) > 1 or batch_size == 1 or n == 1
    if n > 2:
        assert not np.array_equal(np.concatenate(epochs[0]), np.concatenate(epochs[1]))
    for start in range(2 * count):
        resumed = next(batches(n, batch_size, seed=3, start=start))
        np.testing.assert_array_equal(resumed, [*epochs[0], *epochs[1]][start])


def trained(rng_seed, **options):
    model, optimizer = network(dtype=np.float32), nn.SGD(0.3, 0.9)
    x, y = examples(np.random.default_rng(rng_seed), dtype=np.float32)
    options = {"steps": 13, "batch_size": 10, "seed": 4, "test": (x, y)} | options
    records = nn.fit(model, optimizer, x, y, **options)
    return model.state_dict() | optimizer.state_dict(), records


def test_training_is_reproducible_bit_by_bit():
    (first, first_records), (again, again_records) = trained(0), trained(0)
    assert_same_state(first, again)
    assert first_records == again_records
    assert np.any(trained(0, seed=5)[0]["0.weight"] != first["0.weight"])


@pytest.mark.parametrize("stop", [1, 6, 7, 12])
def test_training_goes_on_exactly_where_it_stopped(rng, stop):
    x, y = examples(rng, dtype=np.float32)
    states = []
    for lengths in ([13], [stop, 13 - stop]):
        model, optimizer, start = network(dtype=np.float32), nn.SGD(0.3, 0.9), 0
        for steps in lengths:
            options = {"steps": steps, "batch_size": 10, "seed": 4, "start": start}
            start = nn.fit(model, optimizer, x, y, **options)[-1].step
        states.append(model.state_dict() | optimizer.state_dict())
    assert_same_state(*states)


def test_records(rng):
    x, y = examples(rng, 64)
    model, seen = network(), []
    options = {"batch_size": 9, "every": 4, "test": (x[:9], y[:9]), "callback": seen.append}
    records = nn.fit(model, nn.SGD(0.1), x, y, epochs=2, **options)
    assert seen == records
    assert [record.step for record in records] == [0, 4, 8, 12, 14]  # 7 batches: 64 = 7 * 9 + 1
    assert records[0].loss is None
    assert all(record.loss > 0 for record in records[1:])
    assert records[-1].accuracy == nn.evaluate(model, x[:9], y[:9])
    assert [r.accuracy for r in nn.fit(model, nn.SGD(0.1), x, y, epochs=1)] == [None, None]


def test_evaluation_is_inference_in_batches(rng):
    model = network()
    x, y = examples(rng)
    model.forward(x)
    before = model.state_dict()
    whole = nn.evaluate(model, x, y)
    assert model.training
    assert whole == nn.evaluate(model, x, y, batch_size=1) == nn.evaluate(model, x, y, batch_size=7)
    assert_same_state(model.state_dict(), before)
    model.eval()
    nn.evaluate(model, x, y)
    assert not model.training
    assert not any(layer.training for layer in model.layers)
    with pytest.raises(ValueError, match=r"x: expected at least one example; got shape \(0, 6\)"):
        nn.evaluate(model, x[:0], y[:0])
    for batch_size, error in ((0, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match="batch_size: expected an integer"):
            nn.evaluate(model, x, y, batch_size=batch_size)


@pytest.mark.parametrize("interrupted", [False, True])
def test_every_layer_gets_its_own_mode_back(rng, interrupted):
    frozen, inner = nn.BatchNorm(4), nn.Sequential(nn.Tanh(), nn.BatchNorm(4))
    model = nn.Sequential(nn.Linear(6, 4, bias=False, rng=rng), frozen, inner)
    frozen.eval()
    inner.layers[1].eval()
    layers = [model, *model.layers, *inner.layers]
    before = [layer.training for layer in layers]
    assert before == [True, True, False, True, True, False]
    if interrupted:
        with pytest.raises(KeyboardInterrupt), nn.inference(model):
            raise KeyboardInterrupt
    else:
        with nn.inference(model):
            assert not any(layer.training for layer in layers)
        x, y = examples(rng, dtype=np.float32)
        nn.evaluate(model, x, y)
    assert [layer.training for layer in layers] == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "epochs, steps: expected exactly one of the two"),
        ({"epochs": 1, "steps": 1}, "epochs, steps: expected exactly one of the two"),
        ({"steps": 0}, "steps: expected an integer >= 1; got 0"),
        ({"epochs": 1, "batch_size": 0}, "batch_size: expected an integer >= 1; got 0"),
        ({"epochs": 1, "seed": -1}, "seed: expected an integer >= 0; got -1"),
        ({"epochs": 1, "start": -1}, "start: expected an integer >= 0; got -1"),
        ({"epochs": 1, "every": 0}, "every: expected an integer >= 1; got 0"),
        ({"epochs": 1, "y": np.zeros(3, int)}, r"y: expected one label per example of x \(61\)"),
        ({"epochs": 1, "y": np.array(3)}, "y: expected one row per example; got an array without"),
        (
            {"epochs": 1, "test": (np.zeros((2, 6)), np.zeros(3, int))},
            r"test\[1\]: expected one label per example of test\[0\] \(2\); got 3",
        ),
    ],
)
def test_fit_refuses_before_any_step(rng, options, message):
    x, y = examples(rng)
    model = network()
    before = model.state_dict()
    with pytest.raises(ValueError, match=message):
        nn.fit(model, nn.SGD(0.1), x, options.pop("y", y), **options)
    assert_same_state(model.state_dict(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 2.5}, r"steps: expected an integer; got 2\.5"),
        ({"steps": True}, "steps: expected an integer; got True"),
        ({"epochs": "3"}, "epochs: expected an integer; got '3'"),
        ({"epochs": 1, "batch_size": 2.5}, r"batch_size: expected an integer; got 2\.5"),
        ({"epochs": 1, "seed": "3"}, "seed: expected an integer; got '3'"),
        ({"epochs": 1, "start": None}, "start: expected an integer; got None"),
        ({"epochs": 1, "every": 0.5}, r"every: expected an integer; got 0\.5"),
        ({"epochs": 1, "x": [[1.0]]}, "x: expected a NumPy or CuPy array; got list"),
        ({"epochs": 1, "y": 3}, "y: expected a NumPy or CuPy array; got int"),
        ({"epochs": 1, "test": 3}, "test: expected two arrays, x and y; got int"),
        ({"epochs": 1, "test": (3, 4)}, r"test\[0\]: expected a NumPy or CuPy array; got int"),
    ],
)
def test_fit_refuses_other_kinds_before_any_step(rng, options, message):
    x, y = examples(rng)
    model = network()
    before = model.state_dict()
    with pytest.raises(TypeError, match=message):
        nn.fit(model, nn.SGD(0.1), options.pop("x", x), options.pop("y", y), **options)
    assert_same_state(model.state_dict(), before)


def test_a_diverging_training_is_told_of(rng):
    x, y = examples(rng)
    model = network(batch_norm=False, activation=nn.ReLU)
    with pytest.raises(FloatingPointError, match=r"loss: \S+ at step \d+; .*lower the learning"):
        nn.fit(model, nn.SGD(1e200), x, y, steps=50, batch_size=20)


def test_batches_of_one_cannot_be_normalised(rng):
    x, y = examples(rng)
    with pytest.raises(ValueError, match="x: "):
        nn.fit(network(), nn.SGD(0.1), x, y, steps=1, batch_size=1)
    nn.fit(network(batch_norm=False), nn.SGD(0.1), x, y, steps=1, batch_size=1)


def test_the_progress_bar_goes_to_stderr_if_wanted(rng, capsys):
    x, y = examples(rng)
    nn.fit(network(), nn.SGD(0.1), x, y, steps=3, test=(x, y))
    assert capsys.readouterr() == ("", "")
    nn.fit(network(), nn.SGD(0.1), x, y, steps=3, test=(x, y), progress=True, title="here")
    out, err = capsys.readouterr()
    assert out == ""
    assert "here" in err
    assert "3/3" in err
    assert "test accuracy" in err


def test_a_progress_bar_without_tqdm(rng, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r'progress: needs tqdm; pip install "bncpu\[train\]"'):
        nn.fit(network(), nn.SGD(0.1), *examples(rng), steps=3, progress=True)


def test_networks_with_and_without_bn_start_from_the_same_weights():
    with_bn, without = network(), network(batch_norm=False)
    for a, b in zip((0, 3, 6), (0, 2, 4), strict=True):
        assert_same_bits(with_bn.layers[a].weight, without.layers[b].weight)
    with pytest.raises(ValueError, match=r"sizes: expected at least an input and an output"):
        nn.fully_connected([3], rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"sizes: expected an integer >= 1; got 0"):
        nn.fully_connected([3, 0, 2], rng=np.random.default_rng(0))
    with pytest.raises(TypeError, match=r"sizes: expected an integer; got 2\.5"):
        nn.fully_connected([3, 2.5, 2], rng=np.random.default_rng(0))
    with pytest.raises(TypeError, match=r"gain: expected a number; got 'a'"):
        nn.fully_connected([3, 2, 2], gain="a", rng=np.random.default_rng(0))


def test_batch_norm_trains_faster_on_digits():
    digits = data.load_digits()
    accuracy = {}
    for batch_norm in (True, False):
        rng = np.random.default_rng(0)
        model = nn.fully_connected([64, 100, 100, 100, 10], batch_norm=batch_norm, rng=rng)
        nn.fit(model, nn.SGD(1.0), digits.x_train, digits.y_train, steps=150)
        accuracy[batch_norm] = nn.evaluate(model, digits.x_test, digits.y_test)
    assert accuracy[True] > 0.9
    assert accuracy[False] < 0.5
