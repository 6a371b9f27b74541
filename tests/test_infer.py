"""Inference against line 11 of the paper's Algorithm 2 in float64, on every level."""

import itertools

import numpy as np
import pytest
from accuracy import assert_infer, assert_same_bits
from cases import ROWS_OF_CHANNELS, SIZES, normal, of_size, parameters, statistics

import bncpu

pytestmark = pytest.mark.usefixtures("level")


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(rng, dtype, size):
    x = normal(rng, of_size(size), dtype)
    mean, var = statistics(rng, size[1])
    gamma, beta = parameters(rng, size[1], dtype)
    got = bncpu.batch_norm_infer(x, mean, var, gamma, beta)
    assert_infer(got, x, mean, var, gamma, beta)


@pytest.mark.parametrize("size", ROWS_OF_CHANNELS, ids=str)
def test_channels_innermost(rng, dtype, size):
    x = normal(rng, size, dtype)
    mean, var = statistics(rng, size[1])
    gamma, beta = parameters(rng, size[1], dtype)
    got = bncpu.batch_norm_infer(x, mean, var, gamma, beta, axis=-1)
    assert_infer(got, x, mean, var, gamma, beta, axis=-1)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((6,), 0), ((6, 4), 0), ((2, 3, 2, 5, 3), 1), ((3, 4, 2, 6), -2), ((2, 2, 5, 3, 17), -1)],
)
def test_any_rank_and_axis(rng, dtype, shape, axis):
    x = normal(rng, shape, dtype)
    mean, var = statistics(rng, shape[axis])
    gamma, beta = parameters(rng, shape[axis], dtype)
    got = bncpu.batch_norm_infer(x, mean, var, gamma, beta, axis=axis)
    assert_infer(got, x, mean, var, gamma, beta, axis=axis)


@pytest.mark.parametrize("axis", [(1, 2, 3), (3,), (0, 2), (2, 1), (0, 1, 2, 3)])
def test_per_activation(rng, dtype, axis):
    shape = (5, 3, 4, 2)
    x = normal(rng, shape, dtype)
    channels = [shape[a] for a in axis]
    mean, var = statistics(rng, channels)
    gamma, beta = parameters(rng, channels, dtype)
    got = bncpu.batch_norm_infer(x, mean, var, gamma, beta, axis=axis)
    assert_infer(got, x, mean, var, gamma, beta, axis=axis)


@pytest.mark.parametrize("statistics_dtype", [np.float32, np.float64])
def test_statistics_of_either_precision(rng, dtype, statistics_dtype):
    x = normal(rng, (4, 3, 5), dtype)
    mean, var = statistics(rng, 3, statistics_dtype)
    assert_infer(bncpu.batch_norm_infer(x, mean, var), x, mean, var)


@pytest.mark.parametrize("with_gamma", [False, True])
@pytest.mark.parametrize("with_beta", [False, True])
def test_absent_parameters(rng, dtype, with_gamma, with_beta):
    x = normal(rng, (4, 3, 5), dtype)
    mean, var = statistics(rng, 3)
    gamma, beta = parameters(rng, 3, dtype)
    gamma, beta = gamma if with_gamma else None, beta if with_beta else None
    assert_infer(bncpu.batch_norm_infer(x, mean, var, gamma, beta), x, mean, var, gamma, beta)


def test_in_place(rng, dtype):
    x = normal(rng, (4, 3, 33), dtype)
    mean, var = statistics(rng, 3)
    expected = bncpu.batch_norm_infer(x, mean, var)
    got = bncpu.batch_norm_infer(x, mean, var, out=x)
    assert got is x
    assert_same_bits(got, expected)


@pytest.mark.parametrize("ratio", [1e3, 1e6])
def test_large_mean(rng, dtype, ratio):
    """The deviation is taken before the scale: x * scale + shift would cancel."""
    x = normal(rng, (6, 3, 97), dtype, mean=ratio, std=1.0)
    mean, var = np.full(3, ratio) + rng.random(3), np.ones(3)
    assert_infer(bncpu.batch_norm_infer(x, mean, var), x, mean, var)


@pytest.mark.parametrize("size", [(3, 5, 7), (300, 5), (2, 5, 2049)], ids=str)
def test_mean_itself_gives_exactly_beta(rng, dtype, size):
    mean = normal(rng, 5, dtype, std=1e4)
    x = np.empty(size, dtype)
    np.moveaxis(x, 1, -1)[...] = mean
    gamma, beta = parameters(rng, 5, dtype)
    got = bncpu.batch_norm_infer(x, mean, np.full(5, 1e-3), gamma, beta)
    np.testing.assert_array_equal(got, np.moveaxis(np.moveaxis(x, 1, -1) * 0 + beta, -1, 1))


def test_zero_variance_and_zero_eps(dtype):
    """1 / sqrt(0) is infinite, and a value at the mean is 0 * inf: where IEEE sends them."""
    x = np.array([[1.0, 1.0], [2.0, 0.0]], dtype)
    got = bncpu.batch_norm_infer(x, np.ones(2), np.zeros(2), eps=0.0)
    np.testing.assert_array_equal(got, np.array([[np.nan, np.nan], [np.inf, -np.inf]], dtype))


@pytest.mark.parametrize(
    ("where", "poison"),
    [
        *itertools.product(["x", "mean", "gamma", "beta"], [np.nan, np.inf, -np.inf]),
        *itertools.product(["var"], [np.nan, np.inf]),
    ],
)
@pytest.mark.parametrize(("shape", "axis"), [((4, 7, 5), 1), ((3, 7, 513), 1), ((9, 7), -1)])
def test_special_values_stay_in_their_channel(rng, dtype, shape, axis, where, poison):
    x = normal(rng, shape, dtype)
    mean, var = statistics(rng, 7)
    gamma, beta = parameters(rng, 7, dtype)
    clean = bncpu.batch_norm_infer(x, mean, var, gamma, beta, axis=axis)
    if where == "x":
        np.moveaxis(x, axis, 0)[(3,) + (0,) * (x.ndim - 1)] = poison
    else:
        {"mean": mean, "var": var, "gamma": gamma, "beta": beta}[where][3] = poison
    got = bncpu.batch_norm_infer(x, mean, var, gamma, beta, axis=axis)
    assert_infer(got, x, mean, var, gamma, beta, axis=axis)
    others = np.arange(7) != 3
    assert_same_bits(np.moveaxis(got, axis, 0)[others], np.moveaxis(clean, axis, 0)[others])


@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0), (4, 0)])
def test_empty(dtype, shape):
    channels = shape[1]
    got = bncpu.batch_norm_infer(np.empty(shape, dtype), np.zeros(channels), np.ones(channels))
    assert got.shape == shape
    assert got.dtype == dtype


def test_one_value_per_channel(rng, dtype):
    """What training refuses, inference takes."""
    x = normal(rng, (1, 5), dtype)
    mean, var = statistics(rng, 5)
    assert_infer(bncpu.batch_norm_infer(x, mean, var), x, mean, var)


def test_huge_and_tiny_values(rng, dtype):
    for std, eps in [(1e30, 1e-5), (1e-25, 0.0)]:
        x = normal(rng, (3, 2, 17), dtype, mean=0.0, std=std)
        mean, var = np.array([0.3, -0.7]) * std, np.array([1.0, 2.0]) * std**2
        got = bncpu.batch_norm_infer(x, mean, var, eps=eps)
        assert np.isfinite(got).all()
        assert_infer(got, x, mean, var, eps=eps)


def test_inputs_are_left_alone(rng, dtype):
    x = normal(rng, (4, 3, 5), dtype)
    mean, var = statistics(rng, 3)
    gamma, beta = parameters(rng, 3, dtype)
    arrays = [x, mean, var, gamma, beta]
    copies = [a.copy() for a in arrays]
    for a in arrays:
        a.flags.writeable = False
    y = bncpu.batch_norm_infer(x, mean, var, gamma, beta)
    assert type(y) is np.ndarray
    assert y.flags.writeable
    assert not any(np.shares_memory(y, a) for a in arrays)
    for a, b in zip(arrays, copies, strict=True):
        assert_same_bits(a, b)
