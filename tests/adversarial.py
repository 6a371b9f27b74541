"""Values that make the sums of batch normalisation lose digits: one channel of x, or of dy, each.

Every set is a function of (random numbers, count, dtype) and returns float64, to be rounded to the
dtype; what the rounding costs is in the values then, and costs nobody. Sets of x stand in X, sets
of dy in DY. None is so large that a y or dx of it overflows, and no float64 x so large that its
square does.
"""

import ml_dtypes
import numpy as np


def plain(rng, m, _dtype):
    return rng.standard_normal(m)


def large_mean(ratio):
    """Return |mean| / std = ratio, or what the dtype holds of it, with digits in every place."""

    def values(rng, m, dtype):
        return rng.standard_normal(m) + min(ratio, 3e4 if dtype == np.float16 else ratio) * 1.2345

    return values


def outlier_first(rng, m, _dtype):
    x = rng.standard_normal(m)
    x[0] = 3e4
    return x


def outliers_first_large_mean(rng, m, dtype):
    """Return integers far from 0 (their sums round, all to one side) after a few farther off."""
    offset = 2e4 if dtype in (np.float16, ml_dtypes.bfloat16) else 1e6 / 3
    x = rng.integers(0, 2, m) + offset
    x[: min(16, m // 8)] += offset / 300
    return x


def one_huge(rng, m, dtype):
    x = rng.standard_normal(m)
    x[m // 2] = 6e4 if dtype == np.float16 else 1e18
    return x


def alternating(rng, m, _dtype):
    """Return large and small magnitudes and signs in turn."""
    sizes = np.array([1e3, -1e-3, -1e3, 1e-3])[np.arange(m) % 4]
    return sizes * (1.0 + rng.random(m))


def denormals(rng, m, dtype):
    return rng.standard_normal(m) * float(_info(dtype).smallest_normal) / 16


def constant(_rng, m, _dtype):
    return np.full(m, 1e3 / 3)


def constant_tiny(_rng, m, dtype):
    return np.full(m, float(_info(dtype).smallest_normal) * 8 / 3)


def ascending(rng, m, _dtype):
    return np.sort(rng.standard_normal(m))


def ascending_large_mean(rng, m, _dtype):
    return np.sort(rng.standard_normal(m)) + 1e3 / 3


def integers(rng, m, _dtype):
    return np.rint(rng.normal(100.0, 20.0, m))


def variance_near_eps(rng, m, _dtype):
    return 1.0 + rng.standard_normal(m) * 3e-3


def variance_below_eps(rng, m, _dtype):
    return 0.3 + rng.standard_normal(m) * 1e-5


def last_digits(rng, m, dtype):
    """Return values that differ in their last few digits only."""
    return 1.0 + rng.integers(0, 3, m) * float(_info(dtype).eps)


def far_apart(rng, m, _dtype):
    """Return two halves with means far apart: parts that merge are not alike."""
    return rng.standard_normal(m) + np.where(np.arange(m) < m // 2, 3e4, -1e4)


def huge(rng, m, dtype):
    size = {"float16": 1e4, "float64": 1e150}.get(np.dtype(dtype).name, 1e35)
    return rng.standard_normal(m) * size


X = {
    "plain": plain,
    "mean/std 1e2": large_mean(1e2),
    "mean/std 1e4": large_mean(1e4),
    "mean/std 1e6": large_mean(1e6),
    "mean/std 1e8": large_mean(1e8),
    "outlier first": outlier_first,
    "outliers first, large mean": outliers_first_large_mean,
    "one huge value": one_huge,
    "alternating magnitudes": alternating,
    "denormals": denormals,
    "constant": constant,
    "constant, tiny": constant_tiny,
    "ascending": ascending,
    "ascending, large mean": ascending_large_mean,
    "integers": integers,
    "variance near eps": variance_near_eps,
    "variance below eps": variance_below_eps,
    "last digits": last_digits,
    "halves far apart": far_apart,
    "huge": huge,
}


def cancelling(rng, m, _dtype):
    """Return pairs that cancel but for their last digits, large and small: dbeta is next to 0."""
    dy = rng.standard_normal(m) * 10.0 ** rng.uniform(-3, 3, m)
    dy[1::2] = -dy[: m - m % 2 : 2]
    return dy


def alike(rng, m, _dtype):
    """Return one value but for small deviations: dx is next to 0, and so is dgamma."""
    return 1.0 / 3 + rng.standard_normal(m) * 1e-4


def outlier_last(rng, m, _dtype):
    dy = rng.standard_normal(m)
    dy[-1] = 3e4
    return dy


def within(values):
    """Return a set of dy that float16 has room for, behind an invstd of 1 / sqrt(eps)."""

    def scaled(rng, m, dtype):
        return values(rng, m, dtype) * (2.0**-10 if dtype == np.float16 else 1.0)

    return scaled


DY = {
    "plain": within(plain),
    "cancelling": within(cancelling),
    "alike": within(alike),
    "outlier last": within(outlier_last),
    "integers": within(integers),
    "tiny": denormals,
    "alternating magnitudes": within(alternating),
}


def some(*names):
    return {name: X[name] for name in names}


def channels(rng, sets, names, m, dtype):
    """Return one channel for each named set, (C, m) of the dtype."""
    return np.stack([sets[name](rng, m, dtype) for name in names]).astype(dtype)


def laid_out(values, rows):
    """Return channels (C, m) as (rows, C, m / rows), or as (m, C) where a row has one value."""
    c, m = values.shape
    x = np.ascontiguousarray(values.reshape(c, rows, m // rows).transpose(1, 0, 2))
    return x[..., 0] if m == rows else x


def channel_of(x, c):
    """Return the values of one channel of what is laid out, in the order of laid_out."""
    return x[:, c].reshape(-1)


def _info(dtype):
    return ml_dtypes.finfo(dtype)
