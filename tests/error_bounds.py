"""The numerical contract as functions: what docs/accuracy.md derives, in its notation and order.

Every bound is proved from the order of operations that bncpu/cpu/*.hpp have, for any data, any
level and any number of threads, as long as nothing overflows. It is a worst case; what the tests of
ordinary data allow, accuracy.tolerance, is what roundings of random sign add up to.

Channels are the last axis here: x is (m, C), and so are y and dx.
"""

from typing import NamedTuple

import ml_dtypes
import numpy as np

U64 = 2.0**-53
# Lanes of the narrowest vectors; values and rows in a piece; columns of a row: see tiling.hpp.
LANES = {"float32": 4, "float64": 2}
ACCUMULATORS, PIECE, PIECE_ROWS, COLUMNS, SHORT_RUN, FEW_ROWS = 4, 2048, (32, 128), 4096, 64, 4


class Unit(NamedTuple):
    """Of a dtype: its unit roundoff, and its smallest positive value."""

    u: float
    eta: float


def unit(dtype):
    info = ml_dtypes.finfo(dtype)
    return Unit(float(info.eps) / 2, float(info.smallest_subnormal))


def arithmetic(dtype):
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def gamma(n, u):
    """Higham's gamma: what n factors of 1 + d, |d| <= u, are away from 1 at most."""
    return n * u / (1 - n * u)


class Chain(NamedTuple):
    """How many roundings a term of a sum meets: additions in the arithmetic, in float64, parts."""

    narrow: int
    wide: int
    parts: int

    def sum(self, dtype, *, more=0, merged=False):
        """Bound the relative error of sums of terms of one sign that have `more` roundings each."""
        narrow = gamma(self.narrow + more, unit(arithmetic(dtype)).u)
        return narrow + gamma(self.wide + (self.parts if merged else 0), U64)


def chain(dtype, rows, channels, run):
    """Count the additions of m = rows * run values, `run` of them side by side.

    Channels innermost have a run of 1.
    """
    m = rows * run
    if channels == 1:
        rows, run = 1, m
    if channels > 1 and (run == 1 or (run < SHORT_RUN and rows >= FEW_ROWS)):
        narrow, wide, parts = _columns(rows, channels, run)
    else:
        narrow, wide, parts = _rows(arithmetic(dtype).name, rows, run)
    if dtype == np.float64:
        # A second way, for a pivot far from the mean: 8 lanes of 128 additions each.
        wide = max(wide, min(m - 1, 128 + 8 + _largest_part(m, parts) // 1024 + 1))
    return Chain(min(m - 1, narrow), wide, parts)


def _rows(arithmetic_name, rows, run):
    m = rows * run
    parts = min(max(m // 32768, 1), 128)
    narrow = min(run, PIECE) // (ACCUMULATORS * LANES[arithmetic_name]) + 4
    pieces = -(-_largest_part(m, parts) // min(run, PIECE // 2)) + 1
    return narrow, min(pieces, rows * (run // (PIECE // 2) + 1)) + 4, parts


def _columns(rows, channels, run):
    m = rows * run
    fold = max(min(COLUMNS // (channels * run), rows // 8), 1)
    rows = -(-rows // fold)
    piece = min(max(-(-rows // 256) * 4, PIECE_ROWS[0]), PIECE_ROWS[1])
    pieces = -(-rows // piece)
    parts = min(min(max(m * channels // 65536, 1), 32), pieces)
    narrow = min(rows - 1, 38)
    return narrow, -(-pieces // parts) + (run // 8 + 7) * (run > 1) + fold, parts


def _largest_part(m, parts):
    return m if parts == 1 else -(-2 * m // parts)


def mean_error(sums, dtype, mean, std):
    """Bound the error of a mean."""
    merging = (sums.parts + 1) * U64 * (np.abs(mean) + 5 * std)
    nothing = 2 * (sums.parts + 1) * unit(np.float64).eta
    return 2 * sums.sum(dtype, more=2) * std + merging + nothing


def var_error(sums, dtype, mean, std):
    """Bound the error of a biased variance."""
    within = 12 * sums.sum(dtype, more=3)
    nothing = 4 * (sums.parts + 1) * unit(np.float64).eta
    between = np.zeros_like(std)
    if sums.parts > 1:
        shift = (sums.parts + 1) * U64 * (np.abs(mean) + 5 * std)
        between = (2 * std + shift) * shift
    return (within + 4 * (sums.parts + 2) * U64) * std**2 + between + nothing


def invstd_error(error_of_var, var, eps):
    """Bound the relative error of invstd = 1 / sqrt(var + eps); no variance comes out negative."""
    part = error_of_var / (var + eps)
    below = np.where(part < 1, 1 / np.sqrt(np.maximum(1 - part, 1e-300)), np.inf)
    least = np.sqrt((var + eps) / eps) if eps > 0 else np.inf
    return np.minimum(below, least) - 1 + 3 * U64


def y_error(dtype, given, xhat, y, *, mean_error=0.0, invstd_error=3 * U64, residual=0.0):
    """Bound the error of y = gamma * xhat + beta + residual; y is given before the activation.

    given has gamma, beta, mean, invstd of each channel. The defaults are those of inference.
    """
    t = unit(arithmetic(dtype))
    scale = np.abs(given.gamma) * given.invstd
    centring = mean_error + _low_part(dtype) * np.abs(given.mean)
    product = np.abs(given.gamma * xhat)
    error = product * (invstd_error + gamma(6, t.u)) + scale * (1 + invstd_error) * centring
    error = error + t.u * (product + np.abs(given.beta)) * (1 + np.any(residual != 0.0))
    error = error + t.u * np.abs(residual)
    error = error + t.eta * (1 + scale + np.abs(xhat) / given.invstd)
    return stored(dtype, error, y)


class Sizes(NamedTuple):
    """Of all values of each channel: count, sum of dz, of dz * xhat, and of their magnitudes."""

    m: int
    dz: np.ndarray
    dz_xhat: np.ndarray
    abs_dz: np.ndarray
    abs_dz_xhat: np.ndarray


def parameter_gradient_errors(sums, dtype, given, sizes):
    """Bound the errors of dgamma and dbeta."""
    t = unit(arithmetic(dtype))
    rounded = t.u if dtype != np.float64 else 0.0  # to float32, from sums in float64
    dgamma = _dgamma_sum_error(sums, dtype, given, sizes)
    dbeta = sums.sum(dtype, merged=True) * sizes.abs_dz
    dgamma = dgamma + rounded * (np.abs(sizes.dz_xhat) + dgamma) + t.eta
    return dgamma, dbeta + rounded * (np.abs(sizes.dz) + dbeta) + t.eta


def dx_error(sums, dtype, given, sizes, dz, xhat, dx):
    """Bound the error of dx of training, at some of the values or all."""
    t = unit(arithmetic(dtype))
    dz, xhat = np.abs(dz), np.abs(xhat)
    mean_dz, mean_dz_xhat = sizes.abs_dz / sizes.m, sizes.abs_dz_xhat / sizes.m
    scale = np.abs(given.gamma) * given.invstd
    ratio = np.abs(given.mean) * given.invstd
    terms = dz + mean_dz + xhat * mean_dz_xhat
    error = (sums.sum(dtype, more=12, merged=True) + gamma(4, U64)) * terms
    error = error + _low_part(dtype) * (mean_dz + ratio * mean_dz_xhat + ratio * xhat * mean_dz)
    # What is next to nothing: means and their low parts, slope, the sums behind it, a product.
    nothing = given.invstd * mean_dz_xhat + xhat * (1 + (1 + given.invstd) * mean_dz)
    nothing = nothing + xhat * (1 + mean_dz_xhat) / given.invstd
    error = scale * (error + t.eta * (2 + nothing)) + t.eta * (2 + terms)
    return stored(dtype, error, dx)


def infer_dx_error(dtype, dx, dz):
    """Bound the error of dx where mean and variance are constants: two roundings, and invstd's."""
    t = unit(arithmetic(dtype))
    error = gamma(2, t.u) * np.abs(dx) + gamma(4, U64) * np.abs(dx)
    return stored(dtype, error + t.eta * (1 + np.abs(dz)), dx)


def stored(dtype, error, value):
    """Add the one rounding of a storage type, where there is one."""
    if dtype == arithmetic(dtype):
        return error
    s = unit(dtype)
    return error + s.u * (np.abs(value) + error) + s.eta


def _low_part(dtype):
    """Bound the part of |mean| that x - mean loses where the mean is two float32."""
    return 0.0 if dtype == np.float64 else 3 * unit(np.float32).u ** 2


def _dgamma_sum_error(sums, dtype, given, sizes):
    t = unit(arithmetic(dtype))
    ratio = np.abs(given.mean) * given.invstd
    error = sums.sum(dtype, more=5, merged=True) * sizes.abs_dz_xhat
    error = error + _low_part(dtype) * ratio * sizes.abs_dz
    size = sizes.abs_dz * (1 + given.invstd) + sizes.abs_dz_xhat / given.invstd
    return error + t.eta * (sizes.m + size)
