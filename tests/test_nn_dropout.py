"""Dropout: its shares, its gradient, and masks that are a function of seed and calls."""

import numpy as np
import pytest
from accuracy import assert_gradient, assert_same_bits

from bncpu import nn


def test_what_is_kept_is_scaled(rng, dtype):
    layer = nn.Dropout(0.3, seed=1)
    x = (1 + rng.random((200, 500))).astype(dtype)
    before = x.copy()
    y = layer(x)
    assert y.dtype == dtype
    assert_same_bits(x, before)
    dropped = y == 0
    np.testing.assert_allclose(y[~dropped], x[~dropped] / 0.7, rtol=4 * np.finfo(dtype).eps)
    # 100,000 draws: five standard deviations of their share.
    assert abs(dropped.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / x.size)
    dx = layer.backward(np.ones_like(x))
    assert dx.dtype == dtype
    np.testing.assert_array_equal(dx == 0, dropped)


def test_the_gradient_with_the_mask_held(rng):
    layer = nn.Dropout(0.4, seed=2)
    x, dy = rng.standard_normal((5, 3, 2, 2)), rng.standard_normal((5, 3, 2, 2))

    def loss():
        layer.calls = 6
        return float(np.vdot(dy, layer(x)))

    loss()
    assert_gradient(layer.backward(dy), loss, x)


def test_masks_are_a_function_of_seed_and_calls():
    x = np.ones((8, 50), np.float32)
    layer, again, other = (nn.Dropout(0.5, seed=seed) for seed in (1, 1, 2))
    masks = [layer(x) for _ in range(4)]
    for i in range(4):
        assert not any(np.array_equal(masks[i], masks[j]) for j in range(i))
        assert not np.array_equal(masks[i], other(x))
    again.load_state_dict({"calls": np.array(2)})
    again.eval()
    again(x)  # inference is no call
    again.train()
    assert_same_bits(again(x), masks[2])
    assert_same_bits(again.state_dict()["calls"], np.array(3, np.int64))


def test_inference_is_the_identity(rng, dtype):
    layer = nn.Dropout(0.9, seed=0)
    layer.eval()
    x = rng.standard_normal((3, 4)).astype(dtype)
    assert layer(x) is x
    assert layer.backward(x) is x
    assert layer.calls == 0


def test_a_rate_of_zero_drops_nothing(rng, dtype):
    layer = nn.Dropout(0, seed=0)
    x = rng.standard_normal((3, 4)).astype(dtype)
    assert_same_bits(layer(x), x)
    assert_same_bits(layer.backward(x), x)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rate": 1.0}, ValueError, r"rate: expected a number in \[0, 1\); got 1\.0"),
        ({"rate": -0.1}, ValueError, r"rate: expected a number in \[0, 1\); got -0\.1"),
        ({"rate": np.nan}, ValueError, r"rate: expected a number in \[0, 1\); got nan"),
        ({"rate": "a"}, TypeError, "rate: expected a number; got 'a'"),
        ({"seed": -1}, ValueError, "seed: expected an integer >= 0; got -1"),
        ({"seed": 0.5}, TypeError, r"seed: expected an integer; got 0\.5"),
    ],
)
def test_what_is_refused(options, error, message):
    options = {"rate": 0.5, "seed": 0} | options
    with pytest.raises(error, match=message):
        nn.Dropout(options.pop("rate"), **options)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "missing (1.)?calls"),
        ({"calls": np.array(-7)}, "calls: expected a count; got -7"),
        ({"calls": np.array(1.0)}, "calls: expected dtype int64; got float64"),
        ({"calls": np.array([1])}, r"calls: expected shape \(\); got \(1,\)"),
        ({"calls": np.array(1), "other": np.array(1)}, "unexpected (1.)?other"),
    ],
)
def test_a_wrong_state_changes_nothing(inside, state, message):
    dropout = nn.Dropout(0.5, seed=0)
    model = nn.Sequential(nn.Tanh(), dropout) if inside else dropout
    dropout.calls = 5
    start = "1." if inside else ""
    with pytest.raises(ValueError, match=message):
        model.load_state_dict({start + name: value for name, value in state.items()})
    assert dropout.calls == 5


def test_backward_needs_a_forward():
    with pytest.raises(RuntimeError, match="call forward first"):
        nn.Dropout(0.5, seed=0).backward(np.zeros(3))


def test_a_checkpoint_of_another_seed_or_rate_is_another_architecture(tmp_path):
    def model(rate, seed):
        return nn.Sequential(nn.Sequential(nn.Tanh(), nn.Dropout(rate, seed=seed)))

    nn.save_checkpoint(tmp_path / "run", model(0.5, 1), nn.SGD(0.1), step=0, seed=0)
    checkpoint = nn.read_checkpoint(tmp_path / "run")
    checkpoint.restore(model(0.5, 1), nn.SGD(0.1))
    for other in (model(0.5, 2), model(0.25, 1)):
        with pytest.raises(ValueError, match=r"another architecture; layer 0 is Sequential\(Tanh"):
            checkpoint.restore(other, nn.SGD(0.1))


@pytest.mark.usefixtures("cupy")
def test_the_mask_of_a_gpu_is_the_same():
    import cupy_standin

    x = np.ones((4, 9), np.float32)
    here = nn.Dropout(0.5, seed=1)(x)
    layer = nn.Dropout(0.5, seed=1)
    there = layer(cupy_standin.asarray(x))
    assert isinstance(there, cupy_standin.ndarray)
    assert_same_bits(there.get(), here)
    assert_same_bits(layer.backward(cupy_standin.asarray(x)).get(), here)
