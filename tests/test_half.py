"""float16 and bfloat16 as storage, on every level: every pattern in, every rounding out.

What is computed in between is float32's, and is tested as float32 is; here is what the conversions
may get wrong, alone and at every place of a vector and a tail, and that every operation and layout
takes them.
"""

from functools import lru_cache

import ml_dtypes
import numpy as np
import pytest
from accuracy import assert_moments, assert_same_bits, assert_train
from cases import HALVES, ROWS_OF_CHANNELS, SIZES, new_mask, normal, of_size, parameters
from forms import EVERYTHING, FORMS, PLAIN, RELU, problem, run, run_and_check

import bncpu
import bncpu.cpu

pytestmark = pytest.mark.usefixtures("level")

PATTERNS = np.arange(2**16, dtype=np.uint16)
LANES = 16  # of the widest vector of float32 that anybody has


@pytest.fixture(params=HALVES, ids=str)
def half(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["cached", "streamed"])
def stores(request, level):
    """Write results into the caches, or past them as on a machine that has hardly any."""
    if request.param:
        bncpu.cpu.kernels.set_cache_sizes(4096, 4096)
    yield
    bncpu.cpu.load_level(level)


def identity(x, axis=1, **options):
    """Infer with mean 0 and variance 1: a conversion to float32, and back."""
    channels = x.shape[axis]
    zeros, ones = np.zeros(channels), np.ones(channels)
    return bncpu.batch_norm_infer(x, zeros, ones, eps=0.0, axis=axis, **options)


@np.errstate(invalid="ignore")  # NaN that signal
def assert_unchanged(got, x):
    """Check that every value is itself, which a NaN may be with another payload."""
    nan = np.isnan(x)
    np.testing.assert_array_equal(np.isnan(got), nan)
    keep = ~nan & (x != 0)
    assert_same_bits(got[keep], x[keep], "value")
    assert not np.any(got[x == 0] != 0)


@pytest.mark.usefixtures("stores")
@pytest.mark.parametrize("form", ["row", "rows", "columns", "one column"])
def test_every_pattern_in_every_lane(half, form):
    """Each of 65536 patterns comes back from each place of a vector."""
    for shift in range(LANES) if form == "row" else (0, 1, 5, 8):
        x = np.roll(PATTERNS, shift).view(half)
        shape, axis = {
            "row": ((1, 1, -1), 1),
            "rows": ((2, 4, -1), 1),
            "columns": ((64, -1), 1),
            "one column": ((-1, 1), 1),
        }[form]
        assert_unchanged(identity(x.reshape(shape), axis), x.reshape(shape))


@pytest.mark.usefixtures("stores")
@pytest.mark.parametrize("length", [1, 2, 3, 5, 7, 8, 9, 15, 17, 23, 31, 33, 47, 63])
def test_every_pattern_in_every_tail(rng, half, length):
    """Rows that end within a vector, in both forms, at every distance from an aligned address."""
    room = -(-PATTERNS.size // length) * length
    for shift in range(0, min(length, LANES), 1 if length < 8 else 3):
        memory = np.zeros(room + 32, np.uint16)
        offset = int(rng.integers(32))
        memory[offset : offset + PATTERNS.size] = np.roll(PATTERNS, shift)
        x = memory[offset : offset + room].view(half)
        rows = x.reshape(1, -1, length)  # too few rows to be summed down
        assert_unchanged(identity(rows), rows)
        columns = x.reshape(-1, length)
        assert_unchanged(identity(columns), columns)


@lru_cache
@np.errstate(all="ignore")  # NaN among the patterns, and what is past the end of float32
def roundings(half):
    """Return float32 values at, and one float32 beside, every number of the type and every middle.

    The middles round to even, the largest of them to infinity; one beside decides the other way.
    """
    finite = PATTERNS.view(half).astype(np.float64)
    finite = np.unique(finite[np.isfinite(finite)])
    largest = finite[-1] + (finite[-1] - finite[-2])  # where the next number would be
    finite = np.concatenate([[-largest], finite, [largest]])
    middles = (finite[1:] + finite[:-1]) / 2
    values = np.concatenate([finite, middles]).astype(np.float32)
    infinity = np.float32(np.inf)
    beside = [np.nextafter(values, end) for end in (infinity, -infinity)]
    return np.concatenate([values, *beside, np.float32([np.inf, -np.inf, 3.4e38, 1e-45, -1e-45])])


def nearest_even(values, half):
    """Round float32 to a half type by the bits, which no library does for us here."""
    bits, fraction = ml_dtypes.finfo(half).bits, ml_dtypes.finfo(half).nmant
    assert bits == 16
    smallest = float(ml_dtypes.finfo(half).smallest_subnormal)
    largest = float(ml_dtypes.finfo(half).max)
    a = np.abs(values.astype(np.float64))
    _, exponent = np.frexp(a)
    unit = np.maximum(np.ldexp(1.0, exponent - 1 - fraction), smallest)
    rounded = np.rint(np.where(np.isfinite(a), a, 0.0) / unit) * unit  # rint: halves to even
    rounded = np.where(rounded > largest, np.inf, np.where(np.isfinite(a), rounded, a))
    return np.copysign(rounded, values).astype(np.float32)


@pytest.mark.parametrize("form", ["rows", "long rows", "columns"])
def test_rounding_is_to_nearest_even(half, form):
    """With x = 1 and mean 0 the result is gamma: any float32 can be had, one per channel."""
    values = roundings(half)
    expected = nearest_even(values, half)
    with np.errstate(over="ignore"):  # what is past the end is infinite
        np.testing.assert_array_equal(values.astype(half).astype(np.float32), expected)
    shape = {"rows": (1, -1, 3), "long rows": (1, -1, 37), "columns": (2, -1)}[form]
    ones = np.ones([len(values) if n < 0 else n for n in shape], half)
    zeros, var = np.zeros(len(values)), np.ones(len(values))
    got = bncpu.batch_norm_infer(ones, zeros, var, values, eps=0.0)
    everywhere = np.broadcast_to(expected.reshape(1, -1, *[1] * (ones.ndim - 2)), ones.shape)
    np.testing.assert_array_equal(got.astype(np.float32), everywhere)

    # And so behind ReLU, where what rounds to zero does not pass.
    mask = new_mask(ones)
    got = bncpu.batch_norm_infer(ones, zeros, var, values, eps=0.0, activation="relu", mask=mask)
    positive = np.maximum(everywhere, 0)
    np.testing.assert_array_equal(got.astype(np.float32), positive)
    bits = np.packbits(positive.reshape(-1) != 0, bitorder="little")
    assert_same_bits(mask, bits, "mask")


def test_gradients_are_rounded_to_nearest_even(half):
    """Where the statistics are constants, dx = gamma * dy."""
    values = roundings(half)
    finite = np.isfinite(values)
    ones = np.ones((3, len(values)), half)
    zeros, var = np.zeros(len(values)), np.ones(len(values))
    got = bncpu.batch_norm_infer_backward(ones, ones, zeros, var, values, eps=0.0)
    expected = np.broadcast_to(nearest_even(values, half), ones.shape)
    np.testing.assert_array_equal(got.dx.astype(np.float32)[:, finite], expected[:, finite])
    assert got.dgamma.dtype == got.dbeta.dtype == np.float32
    np.testing.assert_array_equal(got.dbeta, np.full(len(values), 3.0))


@pytest.mark.parametrize("size", SIZES[::2], ids=str)
def test_sizes(rng, half, size):
    run_and_check(PLAIN, problem(rng, of_size(size), half))


@pytest.mark.parametrize("size", ROWS_OF_CHANNELS[::2], ids=str)
def test_channels_innermost(rng, half, size):
    run_and_check(PLAIN, problem(rng, size, half, -1))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_inference_is_float32_inference_rounded(rng, half, size):
    """No sums in it, so that nothing but the rounding of the result may differ, to the bit."""
    p = problem(rng, of_size(size), half)
    wide = p._replace(x=p.x.astype(np.float32), residual=p.residual.astype(np.float32))
    inputs = (p.mean, p.var, p.gamma, p.beta)
    for fused in ({}, {"residual": True}, {"residual": True, "activation": "relu"}):
        got, expected = (
            bncpu.batch_norm_infer(
                q.x, *inputs, **(fused | {"residual": q.residual if fused else None})
            )
            for q in (p, wide)
        )
        assert_same_bits(got, expected.astype(half), "y")


@pytest.mark.parametrize("ratio", [1.0, 100.0, 1e4])
@pytest.mark.parametrize("shape", [(8, 4, 5000), (16, 3, 49), (5000, 5)], ids=str)
def test_large_mean(rng, half, shape, ratio):
    """The input's few digits are what they are; nothing of them is lost on the way."""
    x = normal(rng, shape, half, mean=ratio, std=1.0)
    assert_moments(bncpu.batch_moments(x), x)
    p = problem(rng, shape, half)._replace(x=x)
    run_and_check(EVERYTHING, p)


@pytest.mark.parametrize("shape", [(3, 5, 7), (300, 5), (2, 3, 2049)], ids=str)
def test_sums_past_the_end_of_the_type(rng, half, shape):
    """Values whose sum, and whose squares, float16 could not hold: nothing is summed in it."""
    x = (rng.uniform(0.5, 1.0, shape) * 6e4).astype(half)
    dy = (rng.uniform(-1.0, 1.0, shape) * 6e4).astype(half)
    p = problem(rng, shape, half)._replace(x=x, dy=dy)
    for form in (PLAIN, RELU):
        got = run_and_check(form, p)
        assert all(np.isfinite(got[f"train {name}"]).all() for name in ("y", "dgamma", "dbeta"))


@pytest.mark.parametrize("shape", [(3, 5, 7), (300, 5), (2, 3, 2049)], ids=str)
def test_results_past_the_end_of_the_type(rng, half, shape):
    """Overflow to infinity, as IEEE rounding does it, in the channels where it is due."""
    p = problem(rng, shape, half)
    largest = float(ml_dtypes.finfo(half).max)
    p.gamma[1], p.var[1] = largest, 1.0  # gamma * invstd itself is a float32
    for form in (PLAIN, EVERYTHING):
        got = run_and_check(form, p)
        infinite = np.moveaxis(np.isinf(got["train y"]), 1, 0)
        assert infinite[1].any() or form is EVERYTHING  # where ReLU may have taken them all
        assert not infinite[[0, 2]].any()


@pytest.mark.parametrize("value", [0.0, 0.1, -0.3, 1e4, 6e-8])
@pytest.mark.parametrize("shape", [(3, 5, 7), (129, 5), (7, 5, 513)], ids=str)
def test_constant_channel_is_exactly_beta(rng, half, shape, value):
    x = normal(rng, shape, half)
    np.moveaxis(x, 1, 0)[2] = value
    gamma, beta = parameters(rng, 5, half)
    got = bncpu.batch_norm_train(x, gamma, beta)
    assert_train(got, x, gamma, beta)
    assert np.all(np.moveaxis(got.y, 1, 0)[2] == beta[2].astype(half))
    assert got.mean[2] == float(np.asarray(value, half))


@pytest.mark.parametrize("statistics_dtype", [np.float32, np.float64])
def test_statistics_stay_wide(rng, half, statistics_dtype):
    """In float64 mean and invstd come back; running statistics are float32 or float64."""
    x = normal(rng, (9, 4, 5), half)
    running_mean, running_var = np.zeros(4, statistics_dtype), np.ones(4, statistics_dtype)
    got = bncpu.batch_norm_train(x, running_mean=running_mean, running_var=running_var)
    assert got.y.dtype == half
    assert got.mean.dtype == got.invstd.dtype == np.float64
    moments = bncpu.batch_moments(x)
    assert moments.mean.dtype == moments.m2.dtype == np.float64
    assert_same_bits(got.mean, moments.mean)
    assert np.all(running_mean == (0.1 * moments.mean).astype(statistics_dtype))


@pytest.mark.parametrize("axis", [0, 2, -1, (1, 2), (0, 3)])
@pytest.mark.parametrize("layout", ["c", "fortran", "channels_last", "cropped", "misaligned"])
def test_axes_and_layouts(rng, half, layout, axis):
    p = problem(rng, (5, 3, 6, 9), half, axis, layout)
    for form in FORMS.values():
        run_and_check(form, p)


@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0), (4, 0)])
def test_empty(half, shape):
    x = np.empty(shape, half)
    p = problem(np.random.default_rng(), shape, half)
    assert bncpu.batch_norm_train(x).y.dtype == half
    got = run(EVERYTHING, p)
    assert got["train y"].shape == got["train dx"].shape == shape
    assert got["train y"].dtype == got["train dx"].dtype == half
    assert got["train dgamma"].dtype == np.float32
