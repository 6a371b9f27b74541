"""Batch normalisation at inference is one linear map, and goes into the layer before it."""

import re

import numpy as np
import pytest
from accuracy import assert_close, assert_same_to_rounding, tolerance
from cases import normal, parameters, statistics

import bncpu
from bncpu import reference


@pytest.fixture(params=["all", "no gamma", "no beta", "neither"])
def batch_norm(request, rng, dtype):
    """Return mean, var, gamma, beta of four channels."""
    gamma, beta = parameters(rng, 4, dtype)
    if request.param in ("no gamma", "neither"):
        gamma = None
    if request.param in ("no beta", "neither"):
        beta = None
    return *statistics(rng, 4, dtype), gamma, beta


def test_linear_map(rng, batch_norm):
    x = rng.standard_normal((10, 4))
    scale, shift = result = bncpu.linear_map(*batch_norm)
    assert result._fields == ("scale", "shift")
    assert scale.dtype == shift.dtype == np.float64
    assert scale.shape == shift.shape == (4,)
    truth = reference.batch_norm_infer(x, *batch_norm)
    # The terms of the shift may cancel, so they count, and not their sum.
    mean, _, _, beta = batch_norm
    size = np.abs(x * scale) + np.abs(mean * scale) + (0.0 if beta is None else np.abs(beta))
    assert_close(x * scale + shift, truth, limit=tolerance(np.float64, 1) * size, what="y")


def test_linear_map_takes_eps(rng):
    mean, var = statistics(rng, 3)
    scale, shift = bncpu.linear_map(mean, var, eps=0.5)
    truth, allowed = 1.0 / np.sqrt(var + 0.5), tolerance(np.float64, 1)
    assert_close(scale, truth, limit=allowed * truth, what="scale")
    assert_close(shift, -mean * truth, limit=allowed * np.abs(mean * truth), what="shift")
    np.testing.assert_array_equal(bncpu.linear_map(mean, var, None, None, 0.5).scale, scale)


def assert_folded(got, x, weight, bias, batch_norm, forward):
    """Compare layer-then-batch-norm with the folded layer, both in float64."""
    new_weight, new_bias = got
    assert new_weight.shape == weight.shape
    assert new_weight.dtype == weight.dtype
    assert new_bias.dtype == weight.dtype
    mean = np.asarray(batch_norm[0], np.float64)
    before = forward(x, weight.astype(np.float64), 0.0 if bias is None else bias)
    truth = reference.batch_norm_infer(before, *batch_norm)
    after = forward(x, new_weight.astype(np.float64), new_bias.astype(np.float64))
    scale, _ = bncpu.linear_map(*batch_norm)
    broad = (slice(None),) + (None,) * (before.ndim - 2)
    size = forward(np.abs(x), np.abs(weight.astype(np.float64)), np.abs(mean) + 3.0)
    size = size * np.abs(scale[broad]) + 10.0
    assert_close(after, truth, limit=tolerance(weight.dtype, 30) * size, what="y")


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_fold_into_linear(rng, dtype, batch_norm, with_bias, axis):
    """Weights of either convention: (outputs, inputs), and (inputs, outputs) with axis=1."""
    weight = normal(rng, (4, 7), dtype)
    bias = normal(rng, 4, dtype) if with_bias else None
    laid = weight if axis == 0 else weight.T
    folded, new_bias = bncpu.fold_into_linear(laid, bias, *batch_norm, axis=axis)
    folded = folded if axis == 0 else folded.T

    def forward(x, weight, bias):
        return x @ weight.T + bias

    x = rng.standard_normal((6, 7))
    assert_folded((folded, new_bias), x, weight, bias, batch_norm, forward)


def convolve(x, weight, bias):
    """Convolve (N, I, H, W) with (O, I, kh, kw), written as the definition."""
    kh, kw = weight.shape[2:]
    windows = np.lib.stride_tricks.sliding_window_view(x, (kh, kw), axis=(2, 3))
    bias = np.broadcast_to(bias, weight.shape[0])
    return np.einsum("nihwkl,oikl->nohw", windows, weight) + bias[:, None, None]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_fold_into_conv(rng, dtype, batch_norm, with_bias, axis):
    """Output channels first, as PyTorch has them; second, for transposed convolutions; or last."""
    weight = normal(rng, (4, 3, 2, 3), dtype)
    bias = normal(rng, 4, dtype) if with_bias else None
    laid = np.ascontiguousarray(np.moveaxis(weight, 0, axis))
    folded, new_bias = bncpu.fold_into_conv(laid, bias, *batch_norm, axis=axis)
    folded = np.moveaxis(folded, axis, 0)
    x = rng.standard_normal((2, 3, 5, 6))
    assert_folded((folded, new_bias), x, weight, bias, batch_norm, convolve)


def test_folding_writes_new_arrays(rng, dtype, batch_norm):
    weight, bias = normal(rng, (4, 7), dtype), normal(rng, 4, dtype)
    kept = weight.copy(), bias.copy()
    weight.flags.writeable = bias.flags.writeable = False
    folded, new_bias = bncpu.fold_into_linear(weight, bias, *batch_norm)
    assert not np.shares_memory(folded, weight)
    assert not np.shares_memory(new_bias, bias)
    np.testing.assert_array_equal(weight, kept[0])
    np.testing.assert_array_equal(bias, kept[1])


def test_fold_takes_eps(rng):
    weight = rng.standard_normal((3, 2))
    mean, var = statistics(rng, 3)
    folded, bias = bncpu.fold_into_linear(weight, None, mean, var, eps=0.5)
    scale, shift = bncpu.linear_map(mean, var, eps=0.5)
    expected, how = weight * scale[:, None], {"dtype": np.float64, "m": 1}
    assert_same_to_rounding(folded, expected, size=np.abs(expected), what="weight", **how)
    assert_same_to_rounding(bias, shift, size=np.abs(shift), what="bias", **how)


def test_no_variance_and_no_eps():
    """The map of 0 / 0 is no map, as IEEE arithmetic has it; no warning is owed."""
    scale, shift = bncpu.linear_map(np.zeros(2), np.zeros(2), eps=0)
    assert np.isinf(scale).all()
    assert np.isnan(shift).all()
    scale, shift = bncpu.linear_map(np.full(2, np.inf), np.full(2, np.inf))
    assert np.all(scale == 0.0)
    assert np.isnan(shift).all()


FOLDS = ("fold_into_linear", "fold_into_conv")
FUNCTIONS = ("linear_map", *FOLDS)


def arguments(function):
    """Return a right call: four channels, all arguments by name."""
    batch_norm = {name: np.linspace(0.5, 2.0, 4) for name in ("mean", "var", "gamma", "beta")}
    if function == "linear_map":
        return batch_norm
    weight = np.ones((4, 3) if function == "fold_into_linear" else (4, 3, 2, 2))
    return {"weight": weight, "bias": np.ones(4)} | batch_norm


def refused(function, error, match, **changed):
    """Call with one thing changed, and expect the error."""
    with pytest.raises(error, match=match):
        getattr(bncpu, function)(**(arguments(function) | changed))


ARRAYS = [(function, name) for function in FUNCTIONS for name in arguments(function)]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_call_itself_is_right(function):
    """What is changed below is the only thing wrong."""
    getattr(bncpu, function)(**arguments(function))


@pytest.mark.parametrize(
    "value", [1.5, "x", [1.0, 2.0, 3.0, 4.0], object()], ids=lambda value: type(value).__name__
)
@pytest.mark.parametrize(("function", "name"), ARRAYS)
def test_not_an_array(function, name, value):
    refused(function, TypeError, rf"^{name}: expected .*array", **{name: value})


@pytest.mark.parametrize(("function", "name"), ARRAYS)
def test_none_stands_for_nothing_but_what_may_be_absent(function, name):
    if name in ("bias", "gamma", "beta"):
        getattr(bncpu, function)(**(arguments(function) | {name: None}))
    else:
        refused(function, TypeError, rf"^{name}: expected .*array", **{name: None})


@pytest.mark.parametrize("dtype", ["int64", "bool", "complex128", "object", "U3"])
@pytest.mark.parametrize(("function", "name"), ARRAYS)
def test_dtypes_that_are_no_floats(function, name, dtype):
    value = arguments(function)[name].astype(dtype)
    match = rf"^{name}: expected .*got .*{re.escape(str(value.dtype))}"
    refused(function, TypeError, match, **{name: value})


# The mean of a linear map has the shape that the others must have.
OF_CHANNELS = [a for a in ARRAYS if a[1] != "weight" and a != ("linear_map", "mean")]


@pytest.mark.parametrize("shape", [(), (3,), (1,), (5,), (4, 1)], ids=str)
@pytest.mark.parametrize(("function", "name"), OF_CHANNELS)
def test_one_value_per_channel(function, name, shape):
    names = ("mean", "var", "gamma", "beta") if name == "mean" else (name,)
    match = rf"^{name}: expected shape \(4,\).*got {re.escape(str(shape))}"
    refused(function, ValueError, match, **dict.fromkeys(names, np.ones(shape)))


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        ("fold_into_linear", (4,)),
        ("fold_into_linear", (4, 3, 1, 1)),
        ("fold_into_linear", ()),
        ("fold_into_conv", (4,)),
        ("fold_into_conv", ()),
    ],
)
def test_a_weight_of_another_rank(function, shape):
    match = rf"^weight: expected .*dimensions.*got .*{re.escape(str(shape))}"
    refused(function, ValueError, match, weight=np.ones(shape))


@pytest.mark.parametrize("function", FOLDS)
def test_channels_of_the_weight(function):
    """They are counted on its axis: three on axis 1."""
    refused(function, ValueError, r"^mean: expected shape \(3,\).*got \(4,\)", axis=1)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("value", [-1.0, -1e-300, -np.inf])
def test_negative_variance(function, value):
    refused(function, ValueError, r"^var: .*channel 2", var=np.array([1.0, 0.0, value, 1.0]))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_eps(function):
    for value in (-1.0, np.nan, np.inf, 10**400):
        refused(function, ValueError, r"^eps: ", eps=value)
    for value in (None, "1e-5", 1j):
        refused(function, TypeError, r"^eps: ", eps=value)


@pytest.mark.parametrize("function", FOLDS)
def test_axis(function):
    for value in (4, -5, 7, 10**20):
        refused(function, ValueError, r"^axis: ", axis=value)
    for value in ("a", (0,), [0], 0.0, None):
        refused(function, TypeError, r"^axis: expected an int", axis=value)
