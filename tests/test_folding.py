"""Batch normalisation at inference is one linear map, and goes into the layer before it."""

import numpy as np
import pytest
from accuracy import assert_close, tolerance
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
    np.testing.assert_allclose(scale, 1.0 / np.sqrt(var + 0.5), rtol=1e-14)
    np.testing.assert_allclose(shift, -mean / np.sqrt(var + 0.5), rtol=1e-14)
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
    np.testing.assert_allclose(folded, weight * scale[:, None], rtol=1e-14)
    np.testing.assert_allclose(bias, shift, rtol=1e-14)


@pytest.mark.parametrize("fold", ["fold_into_linear", "fold_into_conv"])
def test_wrong_shapes_are_refused(fold):
    fold = getattr(bncpu, fold)
    weight = np.ones((4, 3)) if fold is bncpu.fold_into_linear else np.ones((4, 3, 1, 1))
    with pytest.raises(ValueError, match=r"^mean: .*\(4,\).*\(3,\)"):
        fold(weight, None, np.zeros(3), np.ones(3))
    with pytest.raises(ValueError, match=r"^bias: .*\(4,\).*\(3,\)"):
        fold(weight, np.zeros(3), np.zeros(4), np.ones(4))
    with pytest.raises(ValueError, match=r"^axis: "):
        fold(weight, None, np.zeros(4), np.ones(4), axis=7)
    with pytest.raises(ValueError, match=r"^eps: "):
        fold(weight, None, np.zeros(4), np.ones(4), eps=-1.0)
