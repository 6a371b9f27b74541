"""The recurrent layer: gradients through time, statistics of every time step, its state."""

import numpy as np
import pytest
from accuracy import assert_close, assert_gradient, assert_same_bits, tolerance

from bncpu import nn, reference


def layer(*, batch_norm=True, seed=5, steps=4, dtype=np.float64, **options):
    rng = np.random.default_rng(seed)
    return nn.RNN(3, 5, steps, batch_norm=batch_norm, rng=rng, dtype=dtype, **options)


def sequences(rng, n=7, steps=4, dtype=np.float64):
    return rng.standard_normal((n, steps, 3)).astype(dtype)


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert_same_bits(a[name], b[name], name)


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_gradients_go_back_through_time(rng, batch_norm, training, steps):
    model = layer(batch_norm=batch_norm, steps=steps, scale=0.7)
    x = sequences(rng, n=9, steps=steps)
    for value in model.parameters().values():
        value += 0.1 * rng.standard_normal(value.shape)
    model.forward(x)  # running statistics other than their initial ones
    model.train(training)
    dy = rng.standard_normal(model(x).shape)

    def loss():
        return float(np.vdot(dy, model.forward(x)))

    loss()
    dx = model.backward(dy)
    gradients = model.gradients()
    assert list(gradients) == list(model.parameters())
    # Normalisations one after another have larger fifth derivatives; a shorter step mends it.
    assert_gradient(dx, loss, x, step=1e-4)
    for name, value in model.parameters().items():
        assert_gradient(gradients[name], loss, value, step=1e-4)


def test_forward_is_the_recursion_with_the_statistics_of_each_step(rng):
    model, x = layer(), sequences(rng)
    y = model.forward(x)
    own = model.parameters()
    h = np.zeros((7, 5))
    for t in range(4):
        z = reference.batch_norm_train(x[:, t] @ own["weight_ih"].T, own["gamma_ih"]).y
        recurrent = h @ own["weight_hh"].T
        z += reference.batch_norm_train(recurrent, own["gamma_hh"]).y
        h = np.tanh(z + own["bias"])
    assert_close(y, h, limit=100 * tolerance(np.float64, 7), what="y")


def test_dz_is_the_gradient_of_a_bias_at_its_step_alone(rng):
    """In inference, where an example's gradient is its own, and so dz of a step adds to db."""
    model, x = layer(), sequences(rng)
    model.forward(x)
    model.eval()
    model.forward(x)
    model.backward(np.ones((7, 5)))
    assert model.dz.shape == (4, 7, 5)
    np.testing.assert_array_equal(model.dz.sum(axis=(0, 1)), model.gradients()["bias"])


def test_inference_uses_the_running_statistics_of_each_step(rng):
    model, x = layer(steps=3), sequences(rng, n=50, steps=3)
    for norm in model.inside():
        norm.momentum = 1.0
    model.forward(x)
    means = [norm.running_mean for norm in model.input_norms]
    for t, mean in enumerate(means):
        expected = (x[:, t] @ model.parameters()["weight_ih"].T).mean(axis=0)
        assert_close(mean, expected, limit=tolerance(np.float64, 50), what="running mean")
    model.eval()
    y = model.forward(x)
    # One example at a time, which a training forward refuses: nothing depends on the batch.
    alone = np.concatenate([model.forward(x[i : i + 1]) for i in range(50)])
    assert_close(alone, y, limit=100 * tolerance(np.float64, 1), what="y")
    model.train()
    with pytest.raises(ValueError, match="one value"):
        model.forward(x[:1])


def test_both_kinds_start_with_the_same_weights_and_scales():
    plain, normalised = layer(batch_norm=False).parameters(), layer().parameters()
    for name, value in plain.items():
        assert_same_bits(value, normalised[name], name)
    np.testing.assert_array_equal(normalised["gamma_hh"], np.full(5, 0.1))
    u = plain["weight_hh"]
    assert_close(u @ u.T, np.eye(5), limit=100 * tolerance(np.float64, 5), what="U U^T")


def test_a_step_changes_the_scales_of_all_time_steps(rng):
    model, x = layer(), sequences(rng)
    model.forward(x)
    model.backward(np.ones((7, 5)))
    nn.SGD(0.1).step(model)
    for norms, name in ((model.input_norms, "gamma_ih"), (model.state_norms, "gamma_hh")):
        assert np.any(norms[0].gamma != (1.0 if name == "gamma_ih" else 0.1))
        for norm in norms:
            assert_same_bits(norm.gamma, model.parameters()[name])


@pytest.mark.parametrize("batch_norm", [True, False])
def test_the_state_loads_back(rng, batch_norm):
    model, other = (layer(batch_norm=batch_norm, seed=s, dtype=np.float32) for s in (1, 2))
    x = sequences(rng, dtype=np.float32)
    y = rng.integers(0, 5, 7)
    nn.fit(model, nn.SGD(0.1, 0.9), x, y, steps=3, batch_size=4)
    state = model.state_dict()
    if batch_norm:
        assert state["running_mean_ih"].shape == (4, 5)
        assert state["num_batches_tracked_hh"].tolist() == [3] * 3
    other.load_state_dict(state)
    assert_same_state(other.state_dict(), state)
    for m in (model, other):
        m.eval()
    assert_same_bits(other.forward(x), model.forward(x))
    other.parameters()["bias"] += 1
    assert_same_state(model.state_dict(), state)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("bias", None, "state: missing bias"),
        ("weight_hh", np.zeros((5, 4)), r"weight_hh: expected shape \(5, 5\); got \(5, 4\)"),
        ("running_var_hh", -np.ones((3, 5)), r"running_var: expected no negative variance"),
    ],
)
def test_a_wrong_state_is_refused_and_nothing_is_loaded(name, value, message):
    model = layer()
    before = model.state_dict()
    state = layer(seed=6).state_dict() | {name: value}
    if value is None:
        del state[name]
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(state)
    assert_same_state(model.state_dict(), before)


def test_rnn_refuses(rng):
    for options, error, message in (
        ({"steps": 0}, ValueError, "steps: expected an integer >= 1; got 0"),
        ({"scale": np.inf}, ValueError, "scale: expected a finite number; got inf"),
        ({"dtype": np.float16}, TypeError, "dtype: expected float32 or float64; got float16"),
        ({"eps": -1.0}, ValueError, "eps: "),
    ):
        with pytest.raises(error, match=message):
            layer(**options)
    with pytest.raises(TypeError, match=r"rng: expected a numpy\.random\.Generator; got 3"):
        nn.RNN(3, 5, 4, rng=3)
    with pytest.raises(ValueError, match=r"x: expected shape \(n, 4, 3\); got \(7, 5, 3\)"):
        layer()(sequences(rng, steps=5))
    with pytest.raises(TypeError, match="x: expected float64 like the weights; got float32"):
        layer()(sequences(rng, dtype=np.float32))
    with pytest.raises(RuntimeError, match="call forward first"):
        layer().backward(np.ones((7, 5)))
