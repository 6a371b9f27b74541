"""Moments of parts, merged, are the moments of the whole."""

import itertools

import numpy as np
import pytest
from accuracy import (
    assert_close,
    assert_moments,
    assert_same_bits,
    assert_same_to_rounding,
    tolerance,
)
from cases import ROWS_OF_CHANNELS, SIZES, normal, of_size

import bncpu
from bncpu import reference


@pytest.mark.usefixtures("level")
class TestBatchMoments:
    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_sizes(self, rng, dtype, size):
        x = normal(rng, of_size(size), dtype)
        assert_moments(bncpu.batch_moments(x), x)

    @pytest.mark.parametrize("size", ROWS_OF_CHANNELS, ids=str)
    def test_channels_innermost(self, rng, dtype, size):
        x = normal(rng, size, dtype)
        assert_moments(bncpu.batch_moments(x, axis=-1), x, axis=-1)

    @pytest.mark.parametrize("axis", [0, -1, (1, 2), (0, 3), (2, 1), (0, 1, 2, 3)])
    def test_any_axis(self, rng, dtype, axis):
        x = normal(rng, (5, 3, 4, 2), dtype)
        assert_moments(bncpu.batch_moments(x, axis=axis), x, axis=axis)

    @pytest.mark.parametrize("ratio", [1e3, 1e6])
    @pytest.mark.parametrize("shape", [(8, 4, 5000), (5000, 5)], ids=str)
    def test_large_mean(self, rng, dtype, shape, ratio):
        x = normal(rng, shape, dtype, mean=-ratio, std=1.0)
        assert_moments(bncpu.batch_moments(x), x)

    @pytest.mark.parametrize("std", [1e-25, 1e30, 1e38])
    @pytest.mark.parametrize("shape", [(4, 3, 65), (300, 5), (2, 2, 5000)], ids=str)
    def test_huge_and_tiny_values(self, rng, dtype, shape, std):
        x = (rng.uniform(-3.0, 3.0, shape) * std).astype(dtype)
        assert_moments(bncpu.batch_moments(x), x)

    @pytest.mark.parametrize("shape", [(5, 3, 7), (1000, 3), (1, 3, 70_001)], ids=str)
    def test_constant_has_no_deviation(self, dtype, shape):
        got = bncpu.batch_moments(np.full(shape, 0.1, dtype))
        assert np.all(got.mean == dtype.type(0.1))
        assert np.all(got.m2 == 0.0)

    def test_one_value_per_channel(self, rng, dtype):
        x = normal(rng, (1, 5), dtype)
        got = bncpu.batch_moments(x)
        assert got.count == 1
        np.testing.assert_array_equal(got.mean, x[0].astype(np.float64))
        np.testing.assert_array_equal(got.m2, np.zeros(5))

    @pytest.mark.parametrize(("shape", "count"), [((0, 3), 0), ((2, 3, 0), 0), ((4, 0), 4)])
    def test_empty(self, dtype, shape, count):
        got = bncpu.batch_moments(np.empty(shape, dtype))
        assert got.count == count
        np.testing.assert_array_equal(got.mean, np.zeros(shape[1]))
        np.testing.assert_array_equal(got.m2, np.zeros(shape[1]))

    def test_special_values_stay_in_their_channel(self, rng, dtype):
        x = normal(rng, (6, 33, 5), dtype)
        clean = bncpu.batch_moments(x)
        x[2, 7, 1] = np.nan
        x[0, 20, 0] = np.inf
        got = bncpu.batch_moments(x)
        spoiled = np.isin(np.arange(33), [7, 20])
        assert not np.isfinite(got.mean[spoiled]).any()
        assert not np.isfinite(got.m2[spoiled]).any()
        assert_same_bits(got.mean[~spoiled], clean.mean[~spoiled])
        assert_same_bits(got.m2[~spoiled], clean.m2[~spoiled])

    def test_statistics_are_those_of_training(self, rng, dtype):
        x = normal(rng, (6, 33, 5), dtype)
        moments = bncpu.batch_moments(x)
        trained = bncpu.batch_norm_train(x)
        assert_same_bits(trained.mean, moments.mean, "mean")
        expected = 1.0 / np.sqrt(moments.var() + 1e-5)
        how = {"dtype": np.float64, "m": 1, "size": expected}
        assert_same_to_rounding(trained.invstd, expected, what="invstd", **how)


def parts_of(x, sizes):
    """Cut x along the samples and return the moments of each part."""
    ends = np.cumsum(sizes)
    assert ends[-1] == len(x)
    return [bncpu.batch_moments(x[end - size : end]) for end, size in zip(ends, sizes, strict=True)]


def test_merge_is_the_whole(rng, dtype):
    x = normal(rng, (40, 3, 5), dtype, mean=3.0)
    parts = parts_of(x, [1, 7, 0, 20, 12])
    for whole in [
        parts[0].merge(*parts[1:]),
        sum(parts),
        sum(parts[1:], start=parts[0]),
        parts[0] + parts[1] + parts[2] + parts[3] + parts[4],
        parts[4].merge(*parts[:4]),
    ]:
        assert isinstance(whole, bncpu.Moments)
        assert_moments(whole, x)


def test_merge_keeps_a_large_mean(rng):
    x = normal(rng, (64, 2), np.float64, mean=1e9, std=1e-3)
    assert_moments(sum(parts_of(x, [16, 47, 1])), x)


def test_parts_far_apart():
    """Two constants: all of the variance is between the parts."""
    low, high = bncpu.batch_moments(np.zeros((3, 1))), bncpu.batch_moments(np.full((1, 1), 8.0))
    whole = low + high
    assert whole.count == 4
    assert whole.mean == 2.0
    assert whole.m2 == 48.0


def test_merging_nothing_changes_nothing(rng):
    some = bncpu.batch_moments(normal(rng, (9, 4), np.float64))
    none = bncpu.batch_moments(np.empty((0, 4)))
    for merged in [some.merge(), some.merge(none), none.merge(some), some + none, none + some]:
        assert merged.count == some.count
        assert_same_bits(merged.mean, some.mean)
        assert_same_bits(merged.m2, some.m2)
    assert (none + none).count == 0
    assert sum([some]).count == some.count


def test_merging_leaves_the_parts_alone(rng):
    first, second = parts_of(normal(rng, (9, 4), np.float64), [4, 5])
    copies = [a.copy() for a in (first.mean, first.m2, second.mean, second.m2)]
    whole = first.merge(second)
    assert not np.shares_memory(whole.mean, first.mean)
    for a, b in zip((first.mean, first.m2, second.mean, second.m2), copies, strict=True):
        assert_same_bits(a, b)


def test_order_of_merging_hardly_matters(rng):
    x = normal(rng, (12, 3), np.float64)
    parts = parts_of(x, [2, 3, 7])
    for order in itertools.permutations(parts):
        assert_moments(sum(order), x)


def test_var(rng):
    x = normal(rng, (10, 3), np.float64)
    moments = bncpu.batch_moments(x)
    for ddof in (0, 1):
        truth = x.var(axis=0, ddof=ddof)
        limit = tolerance(np.float64, 10) * truth
        assert_close(moments.var(ddof), truth, limit=limit, what="var")
    assert_same_bits(moments.var(), moments.var(ddof=0))


def test_population_statistics_of_a_stream(rng, dtype):
    """Algorithm 2, line 10, without keeping the data: chunks of a memory map, or of workers."""
    x = normal(rng, (100, 5, 3), dtype)
    total = sum(bncpu.batch_moments(chunk) for chunk in np.array_split(x, 7))
    truth = reference.batch_moments(x)
    assert total.count == truth.count
    assert_moments(total, x)


def test_merging_different_channels_is_refused():
    with pytest.raises(ValueError, match=r"\(3,\).*\(4,\)|\(4,\).*\(3,\)"):
        bncpu.batch_moments(np.ones((2, 3))).merge(bncpu.batch_moments(np.ones((2, 4))))


@pytest.mark.parametrize(
    ("shape", "kept"),
    [((1, 3, 4096), 4096), ((2, 3, 2048), 2048), ((130, 3, 64, 3), 2), ((8, 3, 2048, 9), 7)],
    ids=str,
)
def test_values_that_repeat(rng, dtype, shape, kept):
    """Integers, as images have: their rounding errors have one sign; a long chain shows them."""
    for _ in range(5):
        x = np.rint(rng.normal(0.5, 2.0, shape)).astype(dtype)[..., :kept]
        assert_moments(bncpu.batch_moments(x), x)


@pytest.mark.parametrize(
    ("shape", "cut"),
    [((128, 5), np.s_[:4]), ((128, 3, 49), np.s_[:4]), ((1, 2, 4096), np.s_[0, :, :256])],
    ids=str,
)
def test_outliers_come_first(rng, dtype, shape, cut):
    """Sums about a pivot lose (pivot - mean)^2 / var of their digits: one far off is noticed."""
    for _ in range(5):
        x = rng.standard_normal(shape).astype(dtype)
        x[cut] += 100
        assert_moments(bncpu.batch_moments(x), x)
