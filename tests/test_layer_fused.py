"""The BatchNorm layer with an activation, a residual and half types: the functions and their masks.

What the layer does without them is in test_layer.py.
"""

import numpy as np
import pytest
from accuracy import assert_running, assert_same_bits
from cases import HALVES, normal

import bncpu

pytestmark = pytest.mark.usefixtures("level")


def layer_of(rng, dtype, *, activation="relu", **options):
    layer = bncpu.BatchNorm(3, activation=activation, dtype=dtype, **options)
    layer.gamma[...] = rng.standard_normal(3)
    layer.beta[...] = rng.standard_normal(3)
    return layer


def functions_of(layer, *, training):
    """Return forward and backward of a layer as calls of the public functions, before it runs."""
    parameters = (layer.gamma.copy(), layer.beta.copy())
    how = {"activation": layer.activation}
    frozen = layer.running_mean.copy(), layer.running_var.copy()

    def forward(x, **options):
        if training:
            return bncpu.batch_norm_train(x, *parameters, **how, **options)
        return (bncpu.batch_norm_infer(x, *frozen, *parameters, **how, **options), *frozen)

    def backward(dy, x, *statistics, **options):
        function = bncpu.batch_norm_backward if training else bncpu.batch_norm_infer_backward
        return function(dy, x, *statistics, *parameters, **how, **options)

    return forward, backward


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_fused_forms_are_those_of_the_functions(rng, dtype, with_residual, activation, training):
    layer = layer_of(rng, dtype, activation=activation).train(training)
    assert layer.activation == activation
    assert layer.dresidual is None
    forward, backward = functions_of(layer, training=training)
    for shape in [(8, 3, 7), (5, 3, 4, 2), (5, 3, 4, 2)]:
        x, dy, residual = (normal(rng, shape, dtype) for _ in range(3))
        forms = {"residual": residual} if with_residual else {}
        mask = np.zeros((x.size + 7) // 8, np.uint8) if activation and with_residual else None
        y, *statistics = forward(x, mask=mask, **forms)
        expected = backward(dy, x, *statistics, mask=mask, residual=with_residual)
        assert_same_bits(layer(x, **forms), y, "y")
        assert_same_bits(layer.backward(dy), expected.dx, "dx")
        assert_same_bits(layer.dgamma, expected.dgamma, "dgamma")
        assert_same_bits(layer.dbeta, expected.dbeta, "dbeta")
        if with_residual:
            assert_same_bits(layer.dresidual, expected.dresidual, "dresidual")
        else:
            assert layer.dresidual is None


def test_the_mask_is_made_once(rng):
    """For batches of one size; and a forward without a residual makes none."""
    layer = layer_of(rng, np.float32)
    masks = []
    for shape in [(8, 3, 7), (8, 3, 7), (7, 3, 8), (5, 3, 7), (8, 3, 7)]:
        x, residual = normal(rng, shape, np.float32), normal(rng, shape, np.float32)
        layer(x)
        assert layer._last.mask is None
        layer(x, residual=residual)
        masks.append(layer._last.mask)
        assert masks[-1].size == (x.size + 7) // 8
    assert masks[0] is masks[1] is masks[2]
    assert masks[3] is not masks[2]


def test_dresidual_is_of_the_last_forward(rng, dtype):
    layer = layer_of(rng, dtype)
    x, dy, residual = (normal(rng, (8, 3, 7), dtype) for _ in range(3))
    y = layer(x, residual=residual)
    layer.backward(dy)
    assert_same_bits(layer.dresidual, np.where(y != 0, dy, np.zeros((), dtype)))
    layer(x)
    layer.backward(dy)
    assert layer.dresidual is None


@pytest.mark.parametrize("training", [True, False])
def test_fused_in_place(rng, dtype, training):
    """A residual's memory may take y, and that of dy dx: the layer has kept the signs."""
    layer = layer_of(rng, dtype, momentum=0.0).train(training)
    x, dy, residual = (normal(rng, (8, 3, 7), dtype) for _ in range(3))
    y = layer(x, residual=residual)
    dx, dresidual = layer.backward(dy), layer.dresidual
    assert layer(x, residual=residual, out=residual) is residual
    assert_same_bits(residual, y, "y")
    assert layer.backward(dy, out=dy) is dy
    assert_same_bits(dy, dx, "dx")
    assert_same_bits(layer.dresidual, dresidual, "dresidual")


def test_a_residual_without_an_activation_in_place(rng, dtype):
    """The residual's gradient is dy, and survives dx in its memory."""
    layer = layer_of(rng, dtype, activation=None)
    x, dy = normal(rng, (8, 3, 7), dtype), normal(rng, (8, 3, 7), dtype)
    layer(x, residual=x.copy())
    dx = layer.backward(dy)
    assert layer.dresidual is dy
    before = dy.copy()
    assert layer.backward(dy, out=dy) is dy
    assert_same_bits(dy, dx, "dx")
    assert_same_bits(layer.dresidual, before, "dresidual")


def test_evaluation_in_the_memory_of_x_has_no_backward(rng, dtype):
    layer = layer_of(rng, dtype).eval()
    x, residual = normal(rng, (8, 3, 7), dtype), normal(rng, (8, 3, 7), dtype)
    expected = layer(x, residual=residual)
    assert_same_bits(layer(x, residual=residual, out=x), expected)
    with pytest.raises(RuntimeError, match=r"out=x"):
        layer.backward(np.ones_like(x))


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_half_types(rng, half, training):
    """Data of 16 bits with parameters, statistics and their gradients of 32."""
    layer = layer_of(rng, np.float32).train(training)
    forward, backward = functions_of(layer, training=training)
    x, dy, residual = (normal(rng, (8, 3, 7), half) for _ in range(3))
    mask = np.zeros(21, np.uint8)
    y, *statistics = forward(x, residual=residual, mask=mask)
    expected = backward(dy, x, *statistics, residual=True, mask=mask)
    assert_same_bits(layer(x, residual=residual), y, "y")
    assert_same_bits(layer.backward(dy), expected.dx, "dx")
    assert_same_bits(layer.dresidual, expected.dresidual, "dresidual")
    assert y.dtype == expected.dx.dtype == half
    for name in ("gamma", "beta", "dgamma", "dbeta", "running_mean", "running_var"):
        assert getattr(layer, name).dtype == np.float32, name
    if training:
        assert_running(layer.running_mean, layer.running_var, x)
    # The layer is no other for it: the next batch may be of float32 again.
    assert layer(normal(rng, (8, 3, 7), np.float32)).dtype == np.float32


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_half_types_are_not_for_layers_of_float64(half):
    layer = bncpu.BatchNorm(3, dtype=np.float64)
    with pytest.raises(TypeError, match=rf"^x: expected dtype float64 .*got {half}.*float32"):
        layer(np.ones((8, 3), half))


def test_a_wrong_residual_changes_nothing(rng):
    layer = layer_of(rng, np.float32)
    x, dy, residual = (normal(rng, (8, 3), np.float32) for _ in range(3))
    layer(x, residual=residual)
    dx, dresidual, before = layer.backward(dy), layer.dresidual, layer.state_dict()
    for wrong in (residual[:7], residual.astype(np.float64), 1.0):
        with pytest.raises((TypeError, ValueError), match=r"^residual: "):
            layer(-x, residual=wrong)
    for name, a in layer.state_dict().items():
        assert_same_bits(a, before[name], name)
    # The last forward is still the one before, its mask included.
    assert_same_bits(layer.backward(dy), dx)
    assert_same_bits(layer.dresidual, dresidual)


def test_an_empty_batch_with_a_residual(dtype):
    layer = bncpu.BatchNorm(3, activation="relu", dtype=dtype)
    empty = np.empty((0, 3, 2), dtype)
    assert layer(empty, residual=empty.copy()).shape == (0, 3, 2)
    assert layer.backward(empty.copy()).shape == (0, 3, 2)
    assert layer.dresidual.shape == (0, 3, 2)


def test_an_activation_has_no_state(rng):
    plain, fused = layer_of(rng, np.float32, activation=None), bncpu.BatchNorm(3, activation="relu")
    fused.load_state_dict(plain.state_dict())
    assert list(fused.state_dict()) == list(plain.state_dict())
    x = normal(rng, (8, 3, 7), np.float32)
    assert_same_bits(fused(x), np.maximum(plain(x), 0))
    assert repr(fused).endswith("activation='relu')")
