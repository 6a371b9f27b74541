"""What varies over a training, rates, orders, augmentation, and that it resumes exactly."""

import dataclasses
import math

import numpy as np
import pytest
from accuracy import assert_gradient, assert_same_bits

from bncpu import nn

SHAPE = (3, 4, 4)


def network(dtype=np.float32, seed=5):
    """Return what has every kind of state: weights, running statistics, a count of calls."""
    rng = np.random.default_rng(seed)
    return nn.Sequential(
        nn.Linear(48, 9, bias=False, rng=rng, dtype=dtype),
        nn.BatchNorm(9, dtype=dtype),
        nn.Sequential(nn.Sigmoid(), nn.Dropout(0.25, seed=3)),
        nn.Linear(9, 4, rng=rng, dtype=dtype),
        nn.Dropout(0.1, seed=4),
    )


def examples(n=61):
    rng = np.random.default_rng(0)
    return rng.random((n, 48), dtype=np.float32), rng.integers(0, 4, n)


def on_images(augment):
    """Return an augmentation of images that takes and returns their pixels in rows."""
    return lambda x, rng: augment(x.reshape(-1, *SHAPE), rng).reshape(x.shape)


AUGMENT = on_images(nn.Compose(nn.Flip(), nn.Shift(1), nn.PhotometricDistortion()))


def state(model, optimizer):
    return model.state_dict() | {"velocity." + k: v for k, v in optimizer.state_dict().items()}


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert_same_bits(a[name], b[name], name)


# The schedules.


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (nn.ExponentialDecay(0.8, 0.25, 1000), {0: 0.8, 500: 0.4, 1000: 0.2, 2000: 0.05}),
        (nn.ExponentialDecay(0.8, 0.5, 1000 / 4), {250: 0.4, 1000: 0.05}),
        (nn.ExponentialDecay(3, 1, 10), {0: 3.0, 7: 3.0}),
        (nn.StepDecay(0.5, 0.5, 1000), {0: 0.5, 999: 0.5, 1000: 0.25, 1999: 0.25, 2000: 0.125}),
    ],
)
def test_schedules(schedule, rates):
    for step, rate in rates.items():
        assert type(schedule(step)) is float
        assert math.isclose(schedule(step), rate, rel_tol=1e-14)
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.rate = 1.0


@pytest.mark.parametrize("make", [nn.ExponentialDecay, nn.StepDecay])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rate": -1}, ValueError, r"rate: expected a finite number >= 0; got -1\.0"),
        ({"rate": math.inf}, ValueError, "rate: expected a finite number >= 0; got inf"),
        ({"rate": "a"}, TypeError, "rate: expected a number; got 'a'"),
        ({"factor": 0}, ValueError, r"factor: expected a number in \(0, 1\]; got 0\.0"),
        ({"factor": 1.5}, ValueError, r"factor: expected a number in \(0, 1\]; got 1\.5"),
        ({"factor": math.nan}, ValueError, r"factor: expected a number in \(0, 1\]; got nan"),
        ({"every": 0}, ValueError, "every: expected .*; got 0"),
        ({"every": None}, TypeError, "every: expected .*; got None"),
    ],
)
def test_schedules_refuse(make, options, error, message):
    with pytest.raises(error, match=message):
        make(**({"rate": 0.1, "factor": 0.5, "every": 10} | options))


def test_a_step_decay_counts_whole_steps():
    with pytest.raises(TypeError, match=r"every: expected an integer; got 2\.5"):
        nn.StepDecay(0.1, 0.5, 2.5)


class Noting(nn.SGD):
    """SGD that notes its learning rate at each step."""

    def step(self, model):
        self.rates = [*getattr(self, "rates", []), self.learning_rate]
        super().step(model)


def test_the_schedule_is_asked_before_each_step_for_the_steps_taken():
    model, optimizer, (x, y) = network(), Noting(9.0), examples()

    def schedule(step):
        return np.float32(1 / (step + 1))

    nn.fit(model, optimizer, x, y, steps=4, start=3, batch_size=10, schedule=schedule)
    assert optimizer.rates == [float(schedule(k)) for k in (3, 4, 5, 6)]
    assert type(optimizer.learning_rate) is float
    for rate, error in ((math.nan, ValueError), (-1, ValueError), ("a", TypeError)):
        with pytest.raises(error, match="schedule: expected a"):
            nn.fit(model, optimizer, x, y, steps=1, schedule=lambda _, rate=rate: rate)


# L2.


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_l2_holds_weights_and_nothing_else(rng, momentum):
    per_activation = nn.BatchNorm((3, 2), axis=(1, 2), dtype=np.float64)
    linear = nn.Linear(6, 3, rng=rng, dtype=np.float64)
    model = nn.Sequential(linear, nn.Sequential(nn.Tanh(), per_activation))
    optimizer = nn.SGD(0.1, momentum, l2=0.5)
    expected = {name: value.copy() for name, value in model.parameters().items()}
    velocity = {name: np.zeros_like(value) for name, value in expected.items()}
    for _ in range(3):
        gradients = {name: rng.standard_normal(value.shape) for name, value in expected.items()}
        linear.dweight, linear.dbias = gradients["0.weight"], gradients["0.bias"]
        per_activation.dgamma = gradients["1.1.weight"]
        per_activation.dbeta = gradients["1.1.bias"]
        before = {name: value.copy() for name, value in gradients.items()}
        optimizer.step(model)
        for name, weight in expected.items():
            decay = 0.5 * weight if name == "0.weight" else 0
            velocity[name] = momentum * velocity[name] + gradients[name] + decay
            weight -= 0.1 * velocity[name]
            np.testing.assert_allclose(model.parameters()[name], weight, rtol=1e-13, atol=1e-13)
            assert_same_bits(gradients[name], before[name])


def test_l2_is_the_gradient_of_half_the_squares(rng):
    """One step of rate 1 moves a weight by the gradient of loss + l2 / 2 |w|^2."""
    layer, l2 = nn.Linear(3, 2, bias=False, rng=rng, dtype=np.float64), 0.3
    x, dy = rng.standard_normal((5, 3)), rng.standard_normal((5, 2))

    def loss():
        return float(np.vdot(dy, layer(x)) + l2 / 2 * (layer.weight**2).sum())

    layer(x)
    layer.backward(dy)
    before = layer.weight.copy()
    nn.SGD(1.0, l2=l2).step(layer)
    change = before - layer.weight
    layer.weight[...] = before
    assert_gradient(change, loss, layer.weight)


@pytest.mark.parametrize(
    ("l2", "error", "message"),
    [
        (-1, ValueError, r"l2: expected a finite number >= 0; got -1\.0"),
        (math.nan, ValueError, "l2: expected a finite number >= 0; got nan"),
        ("a", TypeError, "l2: expected a number; got 'a'"),
    ],
)
def test_l2_refuses(l2, error, message):
    with pytest.raises(error, match=message):
        nn.SGD(0.1, l2=l2)


# Orders and augmentation.


def seen(steps, start=0, **options):
    """Return what the model was given at each step, and the labels that belong to it."""
    x, y = np.arange(21.0)[:, None], np.arange(21) % 4
    model = nn.Sequential(nn.Linear(1, 4, rng=np.random.default_rng(0), dtype=np.float64))
    with nn.recording(model, model) as inputs:
        options = {"batch_size": 5, "seed": 4, "every": 1000} | options
        nn.fit(model, nn.SGD(0.0), x, y, steps=steps, start=start, **options)
    return [batch for (batch,) in inputs]


def test_shuffled_once_every_epoch_has_the_same_batches():
    once, again = seen(8, shuffle="once"), seen(8)  # 21 = 4 * 5 + 1: four batches in an epoch
    for a, b, c, d in zip(once[:4], once[4:], again[:4], again[4:], strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
        assert not np.array_equal(c, d)
    assert sorted(np.concatenate(once[:4])[:, 0]) == list(range(21))


@pytest.mark.parametrize("shuffle", ["epoch", "once"])
def test_augmentation_depends_on_seed_and_step_alone(shuffle):
    def augment(x, rng):
        return x + rng.random(x.shape)

    whole = seen(9, augment=augment, shuffle=shuffle)
    for start in (1, 3, 4, 8):
        rest = seen(9 - start, start, augment=augment, shuffle=shuffle)
        for a, b in zip(whole[start:], rest, strict=True):
            assert_same_bits(a, b)
    plain = seen(9, shuffle=shuffle)
    noise = [a - b for a, b in zip(whole, plain, strict=True)]
    assert all(((n + 1e-9 >= 0) & (n < 1)).all() for n in noise)
    for i in range(9):
        for j in range(i):
            assert not np.allclose(noise[i][:5], noise[j][:5])
    other = seen(1, augment=augment, shuffle=shuffle, seed=5)[0] % 1
    assert not np.allclose(noise[0][:5], other[:5])


def test_the_training_set_is_not_changed_by_augmentation():
    x, y = examples()
    before = x.copy()
    nn.fit(network(), nn.SGD(0.1), x, y, steps=3, batch_size=10, augment=AUGMENT)
    assert_same_bits(x, before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"schedule": 0.1}, TypeError, r"schedule: expected a callable; got 0\.1"),
        ({"augment": 3}, TypeError, "augment: expected a callable; got 3"),
        ({"shuffle": "never"}, ValueError, 'shuffle: expected "epoch" or "once"; got \'never\''),
        ({"test_batch_size": 0}, ValueError, "test_batch_size: expected an integer >= 1; got 0"),
        ({"shuffle": None}, ValueError, 'shuffle: expected "epoch" or "once"; got None'),
        ({"progress": "bar"}, TypeError, r"progress: expected True, False or an object with upd"),
        (
            {"augment": lambda x, _: x[:3]},
            ValueError,
            r"augment: expected an array of shape \(60, 48\), float32 .* got \(3, 48\), float32",
        ),
        (
            {"augment": lambda x, _: x.astype(float)},
            ValueError,
            r"augment: expected an array of shape \(60, 48\), float32 .* got \(60, 48\), float64",
        ),
        ({"augment": lambda *_: None}, ValueError, "augment: expected an array .* got None, None"),
    ],
)
def test_fit_refuses(options, error, message):
    model = network()
    before = model.state_dict()
    with pytest.raises(error, match=message):
        nn.fit(model, nn.SGD(0.1), *examples(60), steps=1, **options)
    assert_same_state(model.state_dict(), before)


def test_ranks_refuse_what_needs_the_whole_batch():
    MPI = pytest.importorskip("mpi4py.MPI", exc_type=(ImportError, RuntimeError))  # noqa: N806
    with pytest.raises(ValueError, match=r"model: expected no Dropout .*got Dropout\(0\.25, seed"):
        nn.fit(network(), nn.SGD(0.1), *examples(), steps=1, comm=MPI.COMM_SELF)
    plain = nn.Sequential(nn.Linear(48, 4, rng=np.random.default_rng(0)))
    options = {"steps": 6, "batch_size": 10, "schedule": nn.StepDecay(0.5, 0.5, 2)}
    with pytest.raises(ValueError, match="augment: expected None beside comm"):
        nn.fit(plain, nn.SGD(0.1), *examples(), comm=MPI.COMM_SELF, augment=AUGMENT, **options)
    # Schedules and orders are the same everywhere.
    states = []
    for comm in (None, MPI.COMM_SELF):
        plain = nn.Sequential(nn.Linear(48, 4, rng=np.random.default_rng(0)))
        nn.fit(plain, nn.SGD(0.1, l2=0.1), *examples(), comm=comm, shuffle="once", **options)
        states.append(plain.state_dict())
    assert_same_state(*states)


# Resumption.


@pytest.mark.parametrize("shuffle", ["epoch", "once"])
@pytest.mark.parametrize("stop", range(1, 14))
def test_everything_together_resumes_bit_by_bit(tmp_path, shuffle, stop):
    """61 examples in batches of 10 make 6 steps an epoch; 14 steps end in the third."""
    x, y = examples()
    options = {
        "batch_size": 10,
        "schedule": nn.ExponentialDecay(0.3, 0.5, 5),
        "augment": AUGMENT,
        "shuffle": shuffle,
        "every": 1,
    }
    whole, optimizer = network(), nn.SGD(0.3, 0.9, l2=1e-3)
    records = nn.fit(whole, optimizer, x, y, steps=14, seed=7, **options)
    expected = state(whole, optimizer)
    assert expected["2.1.calls"] == 14

    first, optimizer = network(), nn.SGD(0.3, 0.9, l2=1e-3)
    nn.fit(first, optimizer, x, y, steps=stop, seed=7, **options)
    nn.save_checkpoint(tmp_path / "run", first, optimizer, step=stop, seed=7)

    second, optimizer = network(seed=99), nn.SGD(0.3, 0.9, l2=1e-3)
    checkpoint = nn.read_checkpoint(tmp_path / "run")
    checkpoint.restore(second, optimizer)
    options |= {"seed": checkpoint.seed, "start": checkpoint.step}
    rest = nn.fit(second, optimizer, x, y, steps=14 - stop, **options)
    assert_same_state(state(second, optimizer), expected)
    assert rest[1:] == records[stop + 1 :]


# Progress and prediction.


class Counter:
    steps = 0

    def update(self, n=1):
        self.steps += n


def test_the_test_set_goes_through_in_batches():
    model, (x, y) = network(), examples()
    with nn.recording(model, model) as inputs:
        options = {"batch_size": 61, "test": (x, y), "test_batch_size": 25}
        nn.fit(model, nn.SGD(0.1), x, y, steps=1, **options)
    assert [len(batch) for (batch,) in inputs] == [25, 25, 11, 61, 25, 25, 11]


def test_an_object_is_told_of_every_step(capsys):
    counter, (x, y) = Counter(), examples()
    options = {"batch_size": 10, "test": (x, y), "progress": counter}
    nn.fit(network(), nn.SGD(0.1), x, y, steps=7, start=2, **options)
    assert counter.steps == 7
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("batch_size", [1, 7, 60, 61, 1000])
def test_predictions_are_inference_in_batches(batch_size):
    model, (x, y) = network(np.float64), examples()
    x = x.astype(np.float64)
    model.forward(x)
    before = model.state_dict()
    logits = nn.predict(model, x, batch_size=batch_size)
    assert model.training
    assert_same_state(model.state_dict(), before)
    with nn.inference(model):
        truth = model.forward(x)
    assert logits.dtype == truth.dtype
    np.testing.assert_allclose(logits, truth, rtol=1e-12, atol=1e-12)
    assert nn.evaluate(model, x, y) == np.mean(truth.argmax(axis=1) == y)


def test_predictions_refuse():
    model = network()
    with pytest.raises(TypeError, match="x: expected a NumPy or CuPy array; got list"):
        nn.predict(model, [[1.0]])
    with pytest.raises(ValueError, match=r"x: expected at least one example; got shape \(0, 48\)"):
        nn.predict(model, np.zeros((0, 48), np.float32))
    with pytest.raises(ValueError, match="batch_size: expected an integer >= 1; got 0"):
        nn.predict(model, np.zeros((1, 48), np.float32), batch_size=0)
