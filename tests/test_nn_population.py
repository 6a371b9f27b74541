"""Population statistics against NumPy, layer by layer; records of what layers are given."""

import numpy as np
import pytest
from accuracy import assert_close, assert_same_bits, tolerance

from bncpu import nn


def network(dtype=np.float64, seed=5):
    rng = np.random.default_rng(seed)
    return nn.Sequential(
        nn.Linear(6, 7, bias=False, rng=rng, dtype=dtype),
        nn.BatchNorm(7, dtype=dtype),
        nn.Sigmoid(),
        nn.Dropout(0.5, seed=1),
        nn.Sequential(
            nn.Linear(7, 5, bias=False, rng=rng, dtype=dtype),
            nn.BatchNorm(5, activation="relu", dtype=dtype),
        ),
        nn.Linear(5, 4, rng=rng, dtype=dtype),
    )


def norms(model):
    return model.layers[1], model.layers[4].layers[1]


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert_same_bits(a[name], b[name], name)


def cut(x, batch_size):
    """Return the batches; a last one of a single example joins the one before it."""
    parts = [x[i : i + batch_size] for i in range(0, len(x), batch_size)]
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [np.concatenate(parts[-2:])]
    return parts


def normalised(u, eps=1e-5):
    return (u - u.mean(axis=0)) / np.sqrt(u.var(axis=0) + eps)


def truth(model, x, batch_size, method):
    """Return mean and variance of each BatchNorm's input, by the paper's equations."""
    first, second = model.layers[0].weight, model.layers[4].layers[0].weight
    inputs = ([], [])
    for batch in cut(x.astype(np.float64), batch_size):
        u = batch @ first.T.astype(np.float64)
        inputs[0].append(u)
        inputs[1].append(1 / (1 + np.exp(-normalised(u))) @ second.T.astype(np.float64))
    for batches in inputs:
        if method == "moments":
            values = np.concatenate(batches)
            yield values.mean(axis=0), values.var(axis=0, ddof=1)
        else:
            yield (
                np.mean([u.mean(axis=0) for u in batches], axis=0),
                np.mean([u.var(axis=0, ddof=1) for u in batches], axis=0),
            )


@pytest.mark.parametrize("method", ["moments", "batches"])
@pytest.mark.parametrize("batch_size", [10, 12, 15, 61, 500])
def test_statistics_are_those_of_the_equations(rng, dtype, method, batch_size):
    model = network(dtype)
    x = (3 + rng.standard_normal((61, 6))).astype(dtype)
    model.forward(x[:20])
    before = model.state_dict()
    nn.population_statistics(model, x, batch_size=batch_size, method=method)
    after = model.state_dict()
    for layer, (mean, var) in zip(norms(model), truth(model, x, batch_size, method), strict=True):
        # In units of the inputs' size, for two layers of sums over 6 and 7 products each.
        limit = 4 * tolerance(dtype, 61)
        scale = np.abs(mean) + np.sqrt(var)
        assert_close(layer.running_mean, mean, limit=limit * scale, what="running_mean")
        assert_close(layer.running_var, var, limit=2 * limit * scale**2, what="running_var")
    for name in before:
        if "running" not in name:
            assert_same_bits(after[name], before[name], name)
    assert {layer.training for layer in model.layers} == {True}


def test_statistics_of_images_are_those_of_their_feature_maps(rng):
    model = nn.Sequential(nn.BatchNorm(3, dtype=np.float64))
    x = rng.standard_normal((7, 3, 4, 5))
    nn.population_statistics(model, x, batch_size=1)
    (layer,) = model.layers
    np.testing.assert_allclose(layer.running_mean, x.mean(axis=(0, 2, 3)), atol=1e-14)
    np.testing.assert_allclose(layer.running_var, x.var(axis=(0, 2, 3), ddof=1), rtol=1e-13)
    # Algorithm 2: m / (m - 1) times the mean of the batches' biased variances.
    nn.population_statistics(model, x, batch_size=1, method="batches")
    biased = x.var(axis=(2, 3)).mean(axis=0)
    np.testing.assert_allclose(layer.running_var, 20 / 19 * biased, rtol=1e-13)


def test_statistics_are_taken_over_the_layers_own_axes(rng):
    last, each = nn.BatchNorm(3, axis=-1), nn.BatchNorm((4, 5, 3), axis=(1, 2, 3))
    x = rng.standard_normal((7, 4, 5, 3)).astype(np.float32)
    for layer, over in ((last, (0, 1, 2)), (each, 0)):
        nn.population_statistics(nn.Sequential(layer), x)
        values = x.astype(np.float64)
        np.testing.assert_allclose(layer.running_mean, values.mean(axis=over), atol=1e-6)
        np.testing.assert_allclose(layer.running_var, values.var(axis=over, ddof=1), rtol=1e-6)


def test_with_them_inference_is_what_training_computes_on_the_whole_set(rng):
    """In one batch of all examples, but for the m / (m - 1) of the variance."""
    model = nn.Sequential(nn.BatchNorm(3, dtype=np.float64))
    x = rng.standard_normal((1000, 3))
    y = model.forward(x)
    nn.population_statistics(model, x, batch_size=1000)
    np.testing.assert_allclose(nn.predict(model, x), y * np.sqrt(999 / 1000), rtol=1e-5)


def test_a_layer_that_is_applied_twice_gets_the_statistics_of_both(rng):
    layer = nn.BatchNorm(3, dtype=np.float64)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    x = rng.standard_normal((40, 3))
    nn.population_statistics(model, x, batch_size=40)
    both = np.concatenate([x, np.tanh(normalised(x))])
    np.testing.assert_allclose(layer.running_mean, both.mean(axis=0), atol=1e-13)
    np.testing.assert_allclose(layer.running_var, both.var(axis=0, ddof=1), rtol=1e-12)


def test_modes_stay_as_they_were(rng):
    model = network()
    norms(model)[0].eval()
    model.layers[3].eval()
    before = [layer.training for layer in model.layers]
    nn.population_statistics(model, rng.standard_normal((20, 6)), batch_size=5)
    assert [layer.training for layer in model.layers] == before


def test_without_running_statistics_there_is_nothing_to_do(rng):
    x = rng.standard_normal((20, 6))
    plain = nn.Sequential(nn.Linear(6, 3, rng=rng, dtype=np.float64))
    nn.population_statistics(plain, x)
    untracked = nn.BatchNorm(6, track_running_stats=False, dtype=np.float64)
    model = nn.Sequential(untracked, nn.BatchNorm(6, dtype=np.float64))
    nn.population_statistics(model, x, batch_size=20)
    assert untracked.running_mean is None
    np.testing.assert_allclose(model.layers[1].running_mean, np.zeros(6), atol=1e-13)


class Interrupted(nn.Layer):
    calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt
        return x

    def backward(self, dy):
        return dy


def test_an_interrupt_changes_nothing(rng):
    model = nn.Sequential(*network().layers, Interrupted())
    x = rng.standard_normal((40, 6))
    model.forward(x)
    before = model.state_dict()
    with pytest.raises(KeyboardInterrupt):
        nn.population_statistics(model, x, batch_size=10)
    assert_same_state(model.state_dict(), before)
    assert model.training
    assert all(layer.training and "forward" not in vars(layer) for layer in norms(model))
    nn.population_statistics(model, x, batch_size=10)
    assert np.any(norms(model)[0].running_mean != before["1.running_mean"])


class Counter:
    steps = 0

    def update(self, n=1):
        self.steps += n


def test_progress_is_by_batches(rng, capsys):
    counter = Counter()
    x = rng.standard_normal((41, 6))
    nn.population_statistics(network(), x, batch_size=10, progress=counter)
    assert counter.steps == 4
    assert capsys.readouterr().err == ""
    nn.population_statistics(network(), x, batch_size=10, progress=True)
    assert "population statistics" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size: expected an integer >= 1; got 0"),
        ({"batch_size": 2.5}, TypeError, r"batch_size: expected an integer; got 2\.5"),
        ({"method": "mean"}, ValueError, 'method: expected "moments" or "batches"; got \'mean\''),
        ({"x": [1.0]}, TypeError, "x: expected a NumPy or CuPy array; got list"),
        ({"x": np.zeros((0, 6))}, ValueError, "x: expected at least one example"),
        ({"batch_size": 1}, ValueError, "x: "),  # one value per channel
    ],
)
def test_what_is_refused(rng, options, error, message):
    model = network()
    before = model.state_dict()
    options = {"x": rng.standard_normal((20, 6))} | options
    with pytest.raises(error, match=message):
        nn.population_statistics(model, options.pop("x"), **options)
    assert_same_state(model.state_dict(), before)


def test_a_synchronised_layer_is_refused():
    MPI = pytest.importorskip("mpi4py.MPI", exc_type=(ImportError, RuntimeError))  # noqa: N806
    rng = np.random.default_rng(0)
    model = nn.fully_connected([6, 5, 4], rng=rng, comm=MPI.COMM_SELF)
    with pytest.raises(ValueError, match=r"model: expected layers of one process; got SyncBatchN"):
        nn.population_statistics(model, np.zeros((20, 6), np.float32))


# Recording.


def test_inputs_are_recorded_forward_by_forward(rng):
    model = network()
    plain = network()
    first, second = norms(model)
    batches = [rng.standard_normal((n, 6)) for n in (8, 9)]
    with nn.recording(model, second, first, model) as inputs:
        for x in batches:
            assert_same_bits(model(x), plain(x))
    assert [len(record) for record in inputs] == [3, 3]
    for x, (to_second, to_first, whole) in zip(batches, inputs, strict=True):
        assert_same_bits(whole, x)
        assert_same_bits(to_first, x @ model.layers[0].weight.T)
        assert to_second.shape == (len(x), 5)
    assert_same_bits(model(batches[0]), plain(batches[0]))
    assert len(inputs) == 2
    assert_same_state(model.state_dict(), plain.state_dict())


def test_records_are_copies(rng):
    model = network()
    x = rng.standard_normal((8, 6))
    with nn.recording(model, model.layers[0]) as inputs:
        model(x)
        before = x.copy()
        x[...] = 0
    assert_same_bits(inputs[0][0], before)


def test_gradients_and_trainings_are_as_without(rng):
    x, y = rng.standard_normal((61, 6)), rng.integers(0, 4, 61)
    states = []
    for watch in (False, True):
        model = network()
        layers = model.layers if watch else ()
        with nn.recording(model, *layers) as inputs:
            nn.fit(model, nn.SGD(0.1, 0.9), x, y, steps=9, batch_size=10)
        states.append(model.state_dict())
        assert [len(record) for record in inputs] == [len(layers)] * 9
    assert_same_state(*states)


def test_recordings_are_nested(rng):
    model = network()
    first, second = norms(model)
    x = rng.standard_normal((8, 6))
    with nn.recording(model, first, second) as outer:
        model(x)
        with nn.recording(model, first) as inner:
            model(x)
        model(x)
    assert (len(outer), len(inner)) == (3, 1)
    assert_same_bits(inner[0][0], outer[1][0])
    with nn.recording(model, first, first) as twice:
        model(x)
    assert_same_bits(*twice[0])


def test_layers_are_as_before_after_an_error(rng):
    model = network()
    layers = [model, *model.layers, *model.layers[4].layers]
    with (
        pytest.raises(ValueError, match="x: expected shape"),
        nn.recording(model, *layers) as inputs,
    ):
        model(rng.standard_normal((8, 7)))
    assert inputs == []
    assert not any("forward" in vars(layer) for layer in layers)
    # A forward that did not end leaves nothing behind for the next one.
    with nn.recording(model, *layers) as inputs:
        with pytest.raises(ValueError, match="x: expected shape"):
            model(rng.standard_normal((8, 7)))
        model(rng.standard_normal((8, 6)))
    assert [record[0].shape for record in inputs] == [(8, 6)]


def test_what_is_not_inside_is_refused():
    model = network()
    for other in (nn.Tanh(), nn.BatchNorm(7), network()):
        with pytest.raises(ValueError, match=r"layers: expected layers inside the .* at index 1$"):
            nn.recording(model, model.layers[0], other).__enter__()
    assert not any("forward" in vars(layer) for layer in model.layers)


class Idle(nn.Sequential):
    """A container that applies its first layer alone, unless it is told otherwise."""

    idle = True

    def forward(self, x):
        return self.layers[0].forward(x) if self.idle else super().forward(x)


def test_a_layer_that_is_not_applied(rng):
    layers = nn.BatchNorm(3, dtype=np.float64), nn.BatchNorm(3, dtype=np.float64)
    model = Idle(*layers)
    x = rng.standard_normal((8, 3))
    with nn.recording(model, layers[1]) as inputs:
        model.idle = False
        model(x)
        model.idle = True
        message = r"BatchNorm\(3.* was not applied by the model's forward"
        with pytest.raises(RuntimeError, match=message):
            model(x)
    assert len(inputs) == 1
    before = layers[1].running_mean.copy()
    nn.population_statistics(model, x)
    np.testing.assert_allclose(layers[0].running_mean, x.mean(axis=0), atol=1e-14)
    assert_same_bits(layers[1].running_mean, before)
