"""The training forward against the paper's Algorithm 1 in float64, on every level."""

import numpy as np
import pytest
from accuracy import assert_running, assert_same_bits, assert_train
from cases import ROWS_OF_CHANNELS, SIZES, normal, of_size, parameters

import bncpu

pytestmark = pytest.mark.usefixtures("level")


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(rng, dtype, size):
    x = normal(rng, of_size(size), dtype)
    gamma, beta = parameters(rng, size[1], dtype)
    assert_train(bncpu.batch_norm_train(x, gamma, beta), x, gamma, beta)


@pytest.mark.parametrize("size", ROWS_OF_CHANNELS, ids=str)
def test_channels_innermost(rng, dtype, size):
    x = normal(rng, size, dtype)
    gamma, beta = parameters(rng, size[1], dtype)
    assert_train(bncpu.batch_norm_train(x, gamma, beta, axis=-1), x, gamma, beta, axis=-1)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((6, 4), 1),
        ((6, 4), 0),
        ((6, 4, 5), 1),
        ((2, 3, 5, 7), 1),
        ((2, 3, 2, 5, 3), 1),
        ((2, 5, 7, 3), -1),
        ((2, 2, 5, 3, 17), 4),
        ((5, 3, 4), 0),
        ((3, 4, 2, 6), 2),
        ((9,), 0),
    ],
)
def test_any_rank_and_axis(rng, dtype, shape, axis):
    if len(shape) == 1:
        with pytest.raises(ValueError, match=r"^x: .*batch_norm_infer"):
            bncpu.batch_norm_train(normal(rng, shape, dtype), axis=axis)
        return
    x = normal(rng, shape, dtype)
    gamma, beta = parameters(rng, shape[axis], dtype)
    got = bncpu.batch_norm_train(x, gamma, beta, axis=axis)
    assert_train(got, x, gamma, beta, axis=axis)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((5, 3, 4, 2), (1, 2, 3)),
        ((5, 3, 4, 2), (1, -1)),
        ((300, 17), (1,)),
        ((5, 3, 4, 2), (0, 2)),
        ((5, 3, 4, 2), (0, 1)),
        ((129, 2, 33), (2, 1)),
    ],
)
def test_per_activation(rng, dtype, shape, axis):
    x = normal(rng, shape, dtype)
    gamma, beta = parameters(rng, [shape[a] for a in axis], dtype)
    got = bncpu.batch_norm_train(x, gamma, beta, axis=axis)
    assert got.mean.shape == got.invstd.shape == gamma.shape
    assert_train(got, x, gamma, beta, axis=axis)


@pytest.mark.parametrize("with_gamma", [False, True])
@pytest.mark.parametrize("with_beta", [False, True])
def test_absent_parameters(rng, dtype, with_gamma, with_beta):
    x = normal(rng, (4, 5, 9), dtype)
    gamma, beta = parameters(rng, 5, dtype)
    gamma, beta = gamma if with_gamma else None, beta if with_beta else None
    assert_train(bncpu.batch_norm_train(x, gamma, beta), x, gamma, beta)
    ones, zeros = np.ones(5, dtype), np.zeros(5, dtype)
    spelled_out = bncpu.batch_norm_train(
        x, ones if gamma is None else gamma, zeros if beta is None else beta
    )
    np.testing.assert_array_equal(bncpu.batch_norm_train(x, gamma, beta).y, spelled_out.y)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-3, 10.0])
def test_eps_has_the_units_of_var(rng, dtype, eps):
    x = normal(rng, (8, 3, 5), dtype, std=0.1)
    assert_train(bncpu.batch_norm_train(x, eps=eps), x, eps=eps)


@pytest.mark.parametrize("ratio", [1.0, 1e3, 1e6])
@pytest.mark.parametrize(
    ("shape", "axis"), [((8, 4, 5000), 1), ((16, 3, 49), 1), ((5000, 5), 1), ((2, 9, 9, 17), -1)]
)
def test_large_mean(rng, dtype, shape, axis, ratio):
    """|mean| / std = 1e6 leaves float32 four bits of deviation; all four must survive."""
    x = normal(rng, shape, dtype, mean=0.0, std=1.0)
    sign = rng.choice([-1.0, 1.0], shape[axis])
    x = x + ratio * np.reshape(sign, [-1 if a == axis % x.ndim else 1 for a in range(x.ndim)])
    x = x.astype(dtype)
    gamma, beta = parameters(rng, shape[axis], dtype)
    got = bncpu.batch_norm_train(x, gamma, beta, axis=axis)
    assert_train(got, x, gamma, beta, axis=axis)


@pytest.mark.parametrize("first", ["value", "sample"])
@pytest.mark.parametrize("size", [(300, 2, 2049), (2, 3, 2047), (200_001, 3)], ids=str)
def test_first_values_far_from_the_rest(rng, dtype, size, first):
    """Sums about a pivot that nobody bounded lose (pivot - mean)^2 / var of their digits."""
    x = normal(rng, size, dtype, mean=0.0, std=1.0)
    x[(0, slice(None), 0)[: x.ndim] if first == "value" else 0] = 1e5
    assert_train(bncpu.batch_norm_train(x), x)


@pytest.mark.parametrize("value", [0.0, 0.1, -0.3, 1e6 + 1 / 3, 16777217.0, 1e30, -1e-30])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((3, 5, 7), 1), ((129, 5), 1), ((7, 5, 513), 1), ((1, 5, 70_001), 1), ((2, 3, 33, 5), -1)],
)
def test_constant_channel_is_exactly_beta(rng, dtype, shape, axis, value):
    x = normal(rng, shape, dtype)
    channel = np.moveaxis(x, axis, 0)[2]
    channel[...] = value
    gamma, beta = parameters(rng, 5, dtype)
    got = bncpu.batch_norm_train(x, gamma, beta, axis=axis)
    assert np.all(np.moveaxis(got.y, axis, 0)[2] == beta[2])
    assert got.mean[2] == dtype.type(value)
    assert got.invstd[2] == 1.0 / np.sqrt(1e-5)
    assert_train(got, x, gamma, beta, axis=axis)


@pytest.mark.parametrize(
    ("std", "eps"), [(1e30, 1e-5), (1e38, 1e-5), (1e19, 1e-5), (1e-25, 0.0), (1e-19, 0.0)]
)
@pytest.mark.parametrize("shape", [(9, 3, 33), (300, 5), (5, 2, 2049), (1, 1, 600_001)], ids=str)
def test_huge_and_tiny_values(rng, dtype, shape, std, eps):
    """Squares and sums that float32 cannot hold do not spoil a result that it can."""
    x = (rng.uniform(-3.0, 3.0, shape) * std).astype(dtype)
    # With std = 1e38 a smaller gamma would make gamma * invstd a float32 of hardly any digits.
    gamma = rng.uniform(0.5, 2.0, shape[1]).astype(dtype)
    beta = normal(rng, shape[1], dtype)
    got = bncpu.batch_norm_train(x, gamma, beta, eps=eps)
    assert np.isfinite(got.y).all()
    assert_train(got, x, gamma, beta, eps=eps)


def test_huge_values_of_one_sign(rng):
    """The sum of a few of these is past float32's end; their mean is not."""
    x = rng.uniform(2.9e38, 3.4e38, (64, 3, 17)).astype(np.float32)
    assert_train(bncpu.batch_norm_train(x), x)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("shape", "axis"), [((4, 7, 5), 1), ((9, 17), 1), ((3, 33, 513), 1), ((2, 9, 9, 5), -1)]
)
def test_special_values_stay_in_their_channel(rng, dtype, shape, axis, poison):
    x = normal(rng, shape, dtype)
    channels = shape[axis]
    gamma, beta = parameters(rng, channels, dtype)
    clean = bncpu.batch_norm_train(x, gamma, beta, axis=axis)
    victim = int(rng.integers(channels))
    spoiled = x.copy()
    flat = np.moveaxis(spoiled, axis, 0)[victim]
    flat[np.unravel_index(rng.integers(flat.size), flat.shape)] = poison

    got = bncpu.batch_norm_train(spoiled, gamma, beta, axis=axis)
    assert np.isnan(np.moveaxis(got.y, axis, 0)[victim]).all()
    assert not np.isfinite(got.mean[victim])
    assert not got.invstd[victim] > 0.0  # NaN, or 1 / sqrt(inf)
    others = np.arange(channels) != victim
    for a, b in zip(got[1:], clean[1:], strict=True):
        assert_same_bits(a[others], b[others])
    assert_same_bits(np.moveaxis(got.y, axis, 0)[others], np.moveaxis(clean.y, axis, 0)[others])


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.25, 1.0])
def test_running_statistics(rng, dtype, momentum):
    x = normal(rng, (5, 3, 7), dtype)
    mean, var = normal(rng, 3, dtype), np.abs(normal(rng, 3, dtype)) + dtype.type(0.1)
    before = {"mean": mean.copy(), "var": var.copy()}
    bncpu.batch_norm_train(x, running_mean=mean, running_var=var, momentum=momentum)
    assert_running(mean, var, x, **before, momentum=momentum)


def test_running_var_is_unbiased():
    """Two values one apart have variance 1/4 about their mean, and 1/2 without the bias."""
    x = np.array([[0.0], [1.0]])
    mean, var = np.zeros(1), np.zeros(1)
    bncpu.batch_norm_train(x, running_mean=mean, running_var=var, momentum=1.0)
    assert mean == 0.5
    assert var == 0.5


@pytest.mark.parametrize("statistics_dtype", [np.float32, np.float64])
def test_running_statistics_of_either_precision(rng, dtype, statistics_dtype):
    x = normal(rng, (9, 4), dtype)
    mean, var = np.zeros(4, statistics_dtype), np.ones(4, statistics_dtype)
    bncpu.batch_norm_train(x, running_mean=mean, running_var=var)
    assert mean.dtype == var.dtype == statistics_dtype
    assert_running(mean, var, x)


def test_running_statistics_keep_digits_of_a_float64_buffer(rng):
    """A momentum of 0 leaves what was there, to the last bit of the wider type."""
    x = normal(rng, (9, 4), np.float32)
    mean, var = rng.standard_normal(4), rng.random(4)
    before = mean.copy(), var.copy()
    bncpu.batch_norm_train(x, running_mean=mean, running_var=var, momentum=0.0)
    assert_same_bits(mean, before[0])
    assert_same_bits(var, before[1])


@pytest.mark.parametrize(("std", "old"), [(1e25, 1.0), (5e37, 1.0), (1e-22, 0.0), (1e-25, 0.0)])
def test_running_statistics_past_the_ends_of_float32(rng, std, old):
    """Infinite or zero there, both updated, and no warning, although warnings are errors here."""
    x = normal(rng, (6, 3, 5), np.float32, mean=0.0, std=1.0)
    x[:, 1] *= np.float32(std)
    mean, var = np.zeros(3, np.float32), np.full(3, old, np.float32)
    with np.errstate(all="raise"):
        bncpu.batch_norm_train(x, running_mean=mean, running_var=var)
    assert_running(mean, var, x, var=old)


def test_results(rng, dtype):
    """Names, types and memory of what comes back."""
    x = normal(rng, (6, 3, 5), dtype)
    x.flags.writeable = False
    before = x.copy()
    result = bncpu.batch_norm_train(x)
    y, mean, invstd = result
    assert result._fields == ("y", "mean", "invstd")
    assert result.y is y
    assert result.mean is mean
    assert result.invstd is invstd
    assert type(y) is type(mean) is type(invstd) is np.ndarray
    assert mean.shape == invstd.shape == (3,)
    assert y.flags.writeable
    assert not np.shares_memory(x, y)
    assert_same_bits(x, before, "x")


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0), (0, 3, 0, 2)])
def test_empty_batch(dtype, shape):
    running_mean, running_var = np.full(3, 0.3, dtype), np.full(3, 0.7, dtype)
    got = bncpu.batch_norm_train(
        np.empty(shape, dtype),
        np.ones(3, dtype),
        np.ones(3, dtype),
        running_mean=running_mean,
        running_var=running_var,
        eps=0.25,
    )
    assert got.y.shape == shape
    assert got.y.dtype == dtype
    np.testing.assert_array_equal(got.mean, np.zeros(3))
    np.testing.assert_array_equal(got.invstd, np.full(3, 2.0))
    assert_same_bits(running_mean, np.full(3, 0.3, dtype))
    assert_same_bits(running_var, np.full(3, 0.7, dtype))


@pytest.mark.parametrize("shape", [(4, 0), (4, 0, 3), (0, 0)])
def test_no_channels(dtype, shape):
    got = bncpu.batch_norm_train(np.empty(shape, dtype), np.empty(0, dtype), np.empty(0, dtype))
    assert got.y.shape == shape
    assert got.mean.shape == got.invstd.shape == (0,)


def test_repeated_calls_agree_to_the_bit(rng, dtype):
    x = normal(rng, (12, 33, 65), dtype)
    first, second = bncpu.batch_norm_train(x), bncpu.batch_norm_train(x)
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)
