"""The BatchNorm layer: the functions with their state, and PyTorch's names for it."""

import numpy as np
import pytest
from accuracy import (
    assert_backward,
    assert_close,
    assert_running,
    assert_same_bits,
    assert_train,
    tolerance,
)
from cases import HALVES, normal

import bncpu
from bncpu import reference

pytestmark = pytest.mark.usefixtures("level")


def layer_with_parameters(rng, channels, dtype, **options):
    layer = bncpu.BatchNorm(channels, dtype=dtype, **options)
    if layer.gamma is not None:
        layer.gamma[...] = rng.standard_normal(channels)
        layer.beta[...] = rng.standard_normal(channels)
    return layer


def test_a_new_layer(dtype):
    layer = bncpu.BatchNorm(5, dtype=dtype)
    assert layer.training is True
    for name, value in [("gamma", 1), ("beta", 0), ("running_mean", 0), ("running_var", 1)]:
        a = getattr(layer, name)
        assert_same_bits(a, np.full(5, value, dtype), name)
    assert layer.num_batches_tracked == 0
    assert bncpu.BatchNorm(5).gamma.dtype == np.float32


@pytest.mark.parametrize(("shape", "axis"), [((8, 5), 1), ((3, 5, 4, 2), 1), ((3, 4, 2, 5), -1)])
def test_training(rng, dtype, shape, axis):
    layer = layer_with_parameters(rng, 5, dtype, axis=axis, eps=1e-3, momentum=0.3)
    x, dy = normal(rng, shape, dtype), normal(rng, shape, dtype)
    running_mean, running_var = np.zeros(5, dtype), np.ones(5, dtype)
    expected = bncpu.batch_norm_train(
        x,
        layer.gamma,
        layer.beta,
        running_mean=running_mean,
        running_var=running_var,
        momentum=0.3,
        eps=1e-3,
        axis=axis,
    )
    y = layer(x)
    assert_same_bits(y, expected.y, "y")
    assert_same_bits(layer.running_mean, running_mean, "running_mean")
    assert_same_bits(layer.running_var, running_var, "running_var")
    assert layer.num_batches_tracked == 1

    gradients = bncpu.batch_norm_backward(
        dy, x, expected.mean, expected.invstd, layer.gamma, axis=axis
    )
    dx = layer.backward(dy)
    assert_same_bits(dx, gradients.dx, "dx")
    assert_same_bits(layer.dgamma, gradients.dgamma, "dgamma")
    assert_same_bits(layer.dbeta, gradients.dbeta, "dbeta")


def test_evaluation(rng, dtype):
    layer = layer_with_parameters(rng, 5, dtype)
    x, dy = normal(rng, (8, 5, 3), dtype), normal(rng, (8, 5, 3), dtype)
    layer(x)
    assert layer.eval() is layer
    assert layer.training is False
    mean, var = layer.running_mean.copy(), layer.running_var.copy()
    y = layer(x)
    assert_same_bits(y, bncpu.batch_norm_infer(x, mean, var, layer.gamma, layer.beta), "y")
    assert_same_bits(layer.running_mean, mean, "running_mean")
    assert_same_bits(layer.running_var, var, "running_var")
    assert layer.num_batches_tracked == 1

    gradients = bncpu.batch_norm_infer_backward(dy, x, mean, var, layer.gamma)
    assert_same_bits(layer.backward(dy), gradients.dx, "dx")
    assert_same_bits(layer.dgamma, gradients.dgamma, "dgamma")
    assert_same_bits(layer.dbeta, gradients.dbeta, "dbeta")
    assert layer.train() is layer
    assert layer.training is True
    layer.train(False)
    assert layer.training is False


def test_backward_is_of_the_last_forward(rng, dtype):
    """Also where the mode has been switched since."""
    layer = layer_with_parameters(rng, 5, dtype)
    x, dy = normal(rng, (8, 5, 3), dtype), normal(rng, (8, 5, 3), dtype)
    layer(normal(rng, (4, 5, 3), dtype))
    layer(x)
    layer.eval()
    dx = layer.backward(dy)
    truth = reference.batch_norm_train(x)
    got = bncpu.Gradients(dx, layer.dgamma, layer.dbeta)
    assert_backward(got, dy, x, truth.mean, truth.invstd, layer.gamma)


def test_outputs_given(rng, dtype):
    layer = layer_with_parameters(rng, 3, dtype)
    x, dy = normal(rng, (8, 3, 7), dtype), normal(rng, (8, 3, 7), dtype)
    y = np.empty((8, 3, 14), dtype)[..., ::2]
    assert layer.forward(x, out=y) is y
    assert_train(bncpu.TrainResult(y, *bncpu.batch_norm_train(x)[1:]), x, layer.gamma, layer.beta)
    expected = layer.backward(dy)
    assert layer.backward(dy, out=dy) is dy
    assert_same_bits(dy, expected)


def test_without_parameters(rng, dtype):
    layer = bncpu.BatchNorm(3, affine=False, dtype=dtype)
    x, dy = normal(rng, (8, 3, 7), dtype), normal(rng, (8, 3, 7), dtype)
    assert layer.gamma is None
    assert layer.beta is None
    expected = bncpu.batch_norm_train(x)
    assert_same_bits(layer(x), expected.y)
    gradients = bncpu.batch_norm_backward(dy, x, expected.mean, expected.invstd)
    assert_same_bits(layer.backward(dy), gradients.dx)
    assert set(layer.state_dict()) == {"running_mean", "running_var", "num_batches_tracked"}


def test_without_running_statistics(rng, dtype):
    """Batch statistics always, in evaluation too, as PyTorch has it."""
    layer = layer_with_parameters(rng, 3, dtype, track_running_stats=False)
    x = normal(rng, (8, 3, 7), dtype)
    expected = bncpu.batch_norm_train(x, layer.gamma, layer.beta).y
    assert layer.running_mean is None
    assert layer.running_var is None
    assert_same_bits(layer(x), expected)
    assert_same_bits(layer.eval()(x), expected)
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_cumulative_average(rng):
    """With momentum=None every batch weighs the same."""
    layer = bncpu.BatchNorm(3, momentum=None, dtype=np.float64)
    batches = [normal(rng, (n, 3), np.float64) for n in (4, 7, 9, 5)]
    for x in batches:
        layer(x)
    assert layer.num_batches_tracked == 4
    means, variances = (
        np.mean([getattr(x, what)(axis=0, **how) for x in batches], axis=0)
        for what, how in [("mean", {}), ("var", {"ddof": 1})]
    )
    for got, truth in [(layer.running_mean, means), (layer.running_var, variances)]:
        limit = tolerance(np.float64, 25) * (np.abs(truth) + variances)
        assert_close(got, truth, limit=limit, what="cumulative average")


@pytest.mark.parametrize("momentum", [None, 0.1])
def test_an_empty_batch_does_not_count(rng, dtype, momentum):
    """Nothing was seen, so it must not weigh in an average of equal weights."""
    layer = bncpu.BatchNorm(3, momentum=momentum, dtype=dtype)
    x = normal(rng, (6, 3, 2), dtype, mean=5.0)
    for shape in [(0, 3), (4, 3, 0)]:
        assert layer(np.empty(shape, dtype)).shape == shape
        assert layer.num_batches_tracked == 0
    layer(x)
    assert layer.num_batches_tracked == 1
    weight = 1.0 if momentum is None else momentum
    assert_running(layer.running_mean, layer.running_var, x, momentum=weight)


def test_moving_average_over_batches(rng, dtype):
    layer = bncpu.BatchNorm(3, dtype=dtype)
    batches = [normal(rng, (n, 3, 2), dtype) for n in (4, 7, 9, 5)]
    for x in batches:
        layer(x)
    assert_running(layer.running_mean, layer.running_var, *batches)


def test_a_failed_forward_changes_nothing(rng):
    layer = bncpu.BatchNorm(3)
    layer(normal(rng, (8, 3), np.float32))
    before = {name: np.copy(a) for name, a in layer.state_dict().items()}
    with pytest.raises(ValueError, match=r"batch_norm_infer"):
        layer(np.ones((1, 3), np.float32))
    for name, a in layer.state_dict().items():
        np.testing.assert_array_equal(a, before[name])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_another_x_is_refused_as_x(track, affine, training):
    """Not as a gamma or running_mean that nobody passed; and out is not written."""
    layer = bncpu.BatchNorm(3, affine=affine, track_running_stats=track).train(training)
    for shape in [(8, 4), (8, 2, 5), (8, 1), (3, 8)]:
        out = np.full(shape, 7.0, np.float32)
        with pytest.raises(ValueError, match=r"^x: expected .*3.*got .*" + str(shape[1])):
            layer(np.ones(shape, np.float32), out=out)
        assert np.all(out == 7.0)
    for dtype in (np.float64, np.int32):
        out = np.full((8, 3), 7.0, dtype)
        with pytest.raises(TypeError, match=rf"^x: expected .*float32.*got {np.dtype(dtype)}"):
            layer(np.ones((8, 3), dtype), out=out)
        assert np.all(out == 7)
    with pytest.raises(TypeError, match=r"^x: expected .*array"):
        layer([[1.0, 2.0, 3.0]])
    with pytest.raises(ValueError, match=r"^axis: "):
        layer(np.ones(3, np.float32))
    assert layer.num_batches_tracked == 0
    with pytest.raises(RuntimeError, match=r"forward"):
        layer.backward(np.ones((8, 3), np.float32))


def test_another_x_of_several_channel_axes():
    layer = bncpu.BatchNorm((2, 3), axis=(1, 2), affine=False, track_running_stats=False)
    for shape in [(5, 3, 2), (5, 6, 1), (5, 2, 4)]:
        out = np.full(shape, 7.0, np.float32)
        with pytest.raises(ValueError, match=r"^x: expected .*\(2, 3\)"):
            layer(np.ones(shape, np.float32), out=out)
        assert np.all(out == 7.0)


def test_evaluation_in_place(rng, dtype):
    """It overwrites the x that a backward would need; beside x, however near, it does not."""
    layer = layer_with_parameters(rng, 3, dtype).eval()
    both, dy = normal(rng, (8, 3, 14), dtype), normal(rng, (8, 3, 7), dtype)
    x, out = both[..., ::2], both[..., 1::2]
    expected = layer(x.copy())
    expected_dx = layer.backward(dy)
    assert_same_bits(layer(x, out=out), expected)
    assert_same_bits(layer.backward(dy), expected_dx)
    assert_same_bits(layer(x, out=x), expected)
    with pytest.raises(RuntimeError, match=r"out=x"):
        layer.backward(dy)


def test_backward_before_forward():
    with pytest.raises(RuntimeError, match=r"forward"):
        bncpu.BatchNorm(3).backward(np.ones((8, 3), np.float32))


@pytest.mark.parametrize("channels", [(3, 4), 5])
def test_state_dict_round_trip(rng, dtype, channels):
    axis = (1, 2) if isinstance(channels, tuple) else 1
    shape = (6, *channels) if isinstance(channels, tuple) else (6, channels)
    first = layer_with_parameters(rng, channels, dtype, axis=axis)
    for _ in range(3):
        first(normal(rng, shape, dtype))
    state = first.state_dict()
    assert list(state) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert all(isinstance(a, np.ndarray) for a in state.values())
    assert state["num_batches_tracked"].shape == ()
    assert state["num_batches_tracked"].dtype == np.int64

    second = bncpu.BatchNorm(channels, dtype=dtype, axis=axis)
    second.load_state_dict(state)
    x = normal(rng, shape, dtype)
    assert_same_bits(second.eval()(x), first.eval()(x))
    assert second.num_batches_tracked == 3
    # Loaded, not borrowed: one layer's training does not move the other.
    frozen = first.running_mean.copy()
    second.train()(x)
    assert_same_bits(first.running_mean, frozen)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda d: d.pop("weight"), ValueError, r"state: missing .*weight"),
        (lambda d: d.pop("running_var"), ValueError, r"state: missing .*running_var"),
        (lambda d: d.update(scale=np.ones(3)), ValueError, r"state: .*unknown .*scale"),
        (lambda d: d.update(bias=np.ones(4)), ValueError, r"bias: .*\(3,\).*\(4,\)"),
        (lambda d: d.update(running_mean=np.ones((3, 1))), ValueError, r"running_mean: .*\(3,\)"),
        (lambda d: d.update(running_var=np.array([1.0, -0.1, 1.0])), ValueError, r"running_var: "),
        (lambda d: d.update(weight=[1.0, 1.0, 1.0]), TypeError, r"weight: expected .*array"),
        (lambda d: d.update(weight=np.full(3, "1")), TypeError, r"weight: expected .*numbers"),
    ],
)
def test_a_wrong_state_is_refused_whole(rng, change, error, match):
    assert_state_refused(rng, change, error, match)


@pytest.mark.parametrize("count", [-7, -1.0, 2.7, np.nan, np.inf, 1e30, 2**63])
def test_a_number_of_batches_is_a_count(rng, count):
    def change(state):
        state["num_batches_tracked"] = np.array(count)

    assert_state_refused(rng, change, ValueError, r"num_batches_tracked: ")


def assert_state_refused(rng, change, error, match):
    layer = layer_with_parameters(rng, 3, np.float32)
    before = layer.state_dict()
    state = {name: np.copy(a) + 1 for name, a in before.items()}
    change(state)
    with pytest.raises(error, match=f"^{match}"):
        layer.load_state_dict(state)
    for name, a in layer.state_dict().items():
        assert_same_bits(a, before[name], name)


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"num_features": 0}, ValueError, "num_features"),
        ({"num_features": -3}, ValueError, "num_features"),
        ({"num_features": 2.5}, TypeError, "num_features"),
        ({"num_features": (2, 3)}, ValueError, "num_features"),
        ({"axis": "a"}, TypeError, "axis"),
        ({"axis": 7.5}, TypeError, "axis"),
        ({"axis": [1]}, TypeError, "axis"),
        ({"axis": ()}, ValueError, "axis"),
        ({"num_features": (2, 3), "axis": (1, 1)}, ValueError, "axis"),
        ({"eps": -1.0}, ValueError, "eps"),
        ({"eps": np.nan}, ValueError, "eps"),
        ({"eps": 10**400}, ValueError, "eps"),
        ({"momentum": np.nan}, ValueError, "momentum"),
        ({"momentum": 1.5}, ValueError, "momentum"),
        ({"momentum": 10**400}, ValueError, "momentum"),
        ({"dtype": np.int32}, TypeError, "dtype"),
        ({"dtype": np.float16}, TypeError, "dtype"),
        ({"dtype": HALVES[1]}, TypeError, "dtype"),
        ({"activation": "gelu"}, ValueError, "activation"),
        ({"activation": 1}, TypeError, "activation"),
    ],
)
def test_wrong_options(options, error, name):
    with pytest.raises(error, match=rf"^{name}: "):
        bncpu.BatchNorm(**({"num_features": 3} | options))
