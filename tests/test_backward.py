"""Both backwards against the six equations of the paper's section 3 in float64, on every level."""

import numpy as np
import pytest
from accuracy import assert_backward, assert_infer_backward, assert_same_bits
from cases import ROWS_OF_CHANNELS, SIZES, normal, of_size, parameters, statistics

import bncpu
from bncpu import reference

pytestmark = pytest.mark.usefixtures("level")


def problem(rng, shape, dtype, axis=1, *, mean=0.5, std=2.0, eps=1e-5):
    """Return dy, x, the batch's own mean and invstd, and gamma."""
    x = normal(rng, shape, dtype, mean=mean, std=std)
    dy = normal(rng, shape, dtype, mean=0.1, std=1.0)
    axes = axis if isinstance(axis, tuple) else (axis,)
    gamma, _ = parameters(rng, [shape[a] for a in axes], dtype)
    _, mean, invstd = reference.batch_norm_train(x, axis=axis, eps=eps)
    return dy, x, mean, invstd, gamma


def check_both(dy, x, mean, invstd, gamma, axis=1):
    got = bncpu.batch_norm_backward(dy, x, mean, invstd, gamma, axis=axis)
    assert_backward(got, dy, x, mean, invstd, gamma, axis=axis)
    var = 1.0 / invstd**2
    got = bncpu.batch_norm_infer_backward(dy, x, mean, var, gamma, axis=axis)
    assert_infer_backward(got, dy, x, mean, var, gamma, axis=axis)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(rng, dtype, size):
    check_both(*problem(rng, of_size(size), dtype))


@pytest.mark.parametrize("size", ROWS_OF_CHANNELS, ids=str)
def test_channels_innermost(rng, dtype, size):
    check_both(*problem(rng, size, dtype, -1), axis=-1)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((6, 4), 0),
        ((2, 3, 2, 5, 3), 1),
        ((3, 4, 2, 6), -2),
        ((5, 3, 4), 0),
        ((5, 3, 4, 2), (1, 2, 3)),
        ((5, 3, 4, 2), (0, -1)),
        ((129, 2, 33), (2, 1)),
    ],
)
def test_any_rank_and_axis(rng, dtype, shape, axis):
    check_both(*problem(rng, shape, dtype, axis), axis=axis)


def test_absent_gamma_is_ones(rng, dtype):
    dy, x, mean, invstd, _ = problem(rng, (6, 5, 9), dtype)
    check_both(dy, x, mean, invstd, None)
    with_ones = bncpu.batch_norm_backward(dy, x, mean, invstd, np.ones(5, dtype))
    for a, b in zip(bncpu.batch_norm_backward(dy, x, mean, invstd), with_ones, strict=True):
        if a is not None:
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("statistics_dtype", [np.float32, np.float64])
def test_statistics_of_either_precision(rng, dtype, statistics_dtype):
    dy, x, mean, invstd, gamma = problem(rng, (5, 3, 7), dtype)
    mean, var = statistics(rng, 3, statistics_dtype)
    got = bncpu.batch_norm_infer_backward(dy, x, mean, var, gamma)
    assert_infer_backward(got, dy, x, mean, var, gamma)
    # A mean that float32 has rounded is no longer the batch's, and the terms that vanish at the
    # batch's own mean come back; so the statistics here are of values that float32 holds exactly.
    x = np.concatenate([x.round(), -x.round()])
    dy = np.concatenate([dy, dy])
    mean, invstd = np.zeros(3, statistics_dtype), np.full(3, 0.5, statistics_dtype)
    got = bncpu.batch_norm_backward(dy, x, mean, invstd, gamma)
    assert_backward(got, dy, x, mean, invstd, gamma)


@pytest.mark.parametrize("ratio", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("shape", [(8, 4, 5000), (16, 3, 49), (5000, 5)], ids=str)
def test_large_mean(rng, dtype, shape, ratio):
    check_both(*problem(rng, shape, dtype, mean=ratio, std=1.0))


def test_large_mean_of_the_gradient(rng, dtype):
    """The part of dy that is the same everywhere cancels in dx."""
    dy, x, mean, invstd, gamma = problem(rng, (8, 3, 513), dtype)
    check_both(dy + dtype.type(1e4), x, mean, invstd, gamma)


@pytest.mark.parametrize(("std", "eps"), [(1e30, 1e-5), (1e-25, 0.0)])
@pytest.mark.parametrize("shape", [(9, 3, 33), (300, 5), (5, 2, 2049)], ids=str)
def test_huge_and_tiny_values(rng, dtype, shape, std, eps):
    """Where invstd is 1e-30, dx is in the last digits that float32 holds; dgamma is ordinary."""
    dy, x, mean, invstd, gamma = problem(rng, shape, dtype, mean=0.0, std=std, eps=eps)
    got = bncpu.batch_norm_backward(dy, x, mean, invstd, gamma)
    assert_backward(got, dy, x, mean, invstd, gamma)


@pytest.mark.parametrize("size", [1e36, 1e37])
@pytest.mark.parametrize(
    ("shape", "axis"), [((4, 2, 2048), 1), ((64, 5, 7), 1), ((64, 5, 7), -1), ((300, 5), 1)]
)
def test_huge_gradients(rng, dtype, shape, axis, size):
    """Sums that float32 cannot hold, of a dx that it can; where dgamma is past its end, inf."""
    dy, x, mean, invstd, gamma = problem(rng, shape, dtype, axis)
    dy = (size * (1.0 + rng.standard_normal(shape))).astype(dtype)
    assert np.isfinite(bncpu.batch_norm_backward(dy, x, mean, invstd, gamma, axis=axis).dx).all()
    check_both(dy, x, mean, invstd, gamma, axis=axis)


@pytest.mark.parametrize("shape", [(4, 2, 2048), (64, 5, 7), (300, 5)], ids=str)
def test_huge_gradients_that_cancel(rng, shape):
    """First all of one sign, then all of the other: the sums come back from beyond float32."""
    dy, x, mean, invstd, gamma = problem(rng, shape, np.float32)
    dy[...] = 1e38
    dy[shape[0] // 2 :] *= -1.0
    x[shape[0] // 2 :] = x[: shape[0] // 2]
    mean = reference.batch_moments(x).mean
    got = bncpu.batch_norm_backward(dy, x, mean, invstd, gamma)
    assert all(np.isfinite(a).all() for a in got[:3])
    assert_backward(got, dy, x, mean, invstd, gamma)


@pytest.mark.parametrize("where", ["x", "dy", "gamma", "mean", "invstd"])
@pytest.mark.parametrize(("shape", "axis"), [((4, 7, 5), 1), ((3, 7, 513), 1), ((9, 7), -1)])
def test_special_values_stay_in_their_channel(rng, dtype, shape, axis, where):
    arrays = dict(
        zip(["dy", "x", "mean", "invstd", "gamma"], problem(rng, shape, dtype, axis), strict=True)
    )
    clean = bncpu.batch_norm_backward(**arrays, axis=axis)
    victim = arrays[where] if arrays[where].ndim == 1 else np.moveaxis(arrays[where], axis, 0)
    victim[(3,) + (0,) * (victim.ndim - 1)] = np.nan
    got = bncpu.batch_norm_backward(**arrays, axis=axis)
    assert_backward(got, **arrays, axis=axis)
    assert np.isnan(np.moveaxis(got.dx, axis, 0)[3]).all()
    others = np.arange(7) != 3
    assert_same_bits(
        np.moveaxis(got.dx, axis, 0)[others], np.moveaxis(clean.dx, axis, 0)[others], "dx"
    )
    assert_same_bits(got.dgamma[others], clean.dgamma[others], "dgamma")
    assert_same_bits(got.dbeta[others], clean.dbeta[others], "dbeta")


@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0), (4, 0)])
def test_empty(dtype, shape):
    channels = shape[1]
    empty, zeros, ones = np.empty(shape, dtype), np.zeros(channels), np.ones(channels)
    for got in [
        bncpu.batch_norm_backward(empty, empty.copy(), zeros, ones),
        bncpu.batch_norm_infer_backward(empty, empty.copy(), zeros, ones),
    ]:
        assert got.dx.shape == shape
        assert got.dx.dtype == got.dgamma.dtype == got.dbeta.dtype == dtype
        np.testing.assert_array_equal(got.dgamma, np.zeros(channels, dtype))
        np.testing.assert_array_equal(got.dbeta, np.zeros(channels, dtype))


def test_in_place(rng, dtype):
    dy, x, mean, invstd, gamma = problem(rng, (6, 5, 33), dtype)
    for backward, spread in [
        (bncpu.batch_norm_backward, invstd),
        (bncpu.batch_norm_infer_backward, 1.0 / invstd**2),
    ]:
        expected = backward(dy, x, mean, spread, gamma)
        buffer = dy.copy()
        got = backward(buffer, x, mean, spread, gamma, out=buffer)
        assert got.dx is buffer
        for a, b in zip(got, expected, strict=True):
            assert_same_bits(a, b)


def test_same_array_as_dy_and_x(rng, dtype):
    """Two inputs may be one array: nothing is written to either."""
    _, x, mean, invstd, gamma = problem(rng, (6, 5, 33), dtype)
    check_both(x, x, mean, invstd, gamma)


def test_results(rng, dtype):
    arrays = problem(rng, (6, 3, 5), dtype)
    copies = [a.copy() for a in arrays]
    for a in arrays:
        a.flags.writeable = False
    dy, x, mean, invstd, gamma = arrays
    for result in [
        bncpu.batch_norm_backward(dy, x, mean, invstd, gamma),
        bncpu.batch_norm_infer_backward(dy, x, mean, 1.0 / invstd**2, gamma),
    ]:
        assert result._fields == ("dx", "dgamma", "dbeta", "dresidual")
        assert all(type(a) is np.ndarray for a in result[:3])
        assert result.dresidual is None
        assert not any(np.shares_memory(result.dx, a) for a in arrays)
    for a, b in zip(arrays, copies, strict=True):
        assert_same_bits(a, b)


def test_train_then_backward(rng, dtype):
    """The forward's mean and invstd are what the backward takes."""
    dy, x, _, _, gamma = problem(rng, (7, 5, 11), dtype)
    y, mean, invstd = bncpu.batch_norm_train(x, gamma)
    assert y.shape == x.shape
    got = bncpu.batch_norm_backward(dy, x, mean, invstd, gamma)
    assert_backward(got, dy, x, mean, invstd, gamma)
