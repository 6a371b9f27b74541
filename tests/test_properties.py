"""Properties that hold for arrays of any shape, axis, stride and content (hypothesis)."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from accuracy import (
    EPS64,
    assert_mask,
    assert_moments,
    assert_running,
    assert_same_bits,
    assert_train,
)
from cases import FLOATS, HALVES, parameter_dtype
from forms import FORMS, Problem, run, run_and_check
from hypothesis import example, given
from hypothesis.extra import numpy as hnp
from wild import axes_of, channel_shape, shapes, views

import bncpu
import bncpu.cpu
from bncpu import reference

LEVELS = st.sampled_from(bncpu.cpu.runnable_levels())
DTYPES = st.sampled_from(FLOATS)
MIB = 1 << 20


@st.composite
def problems(draw):
    """Draw dtype, axis, and arrays: large ones as views, and one value per channel of the rest.

    mean and var are those of x, nearly, whatever size it has.
    """
    dtype = draw(st.sampled_from([*FLOATS, *HALVES]))
    shape = draw(shapes())
    axis = draw(axes_of(len(shape)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([1.0, 1.0, 1e-3, 1e4]))
    offset = draw(st.sampled_from([0.0, 0.0, 3.0, 1e3, -1e5])) * scale
    dy, x, residual = (draw(views(shape, dtype)) for _ in range(3))
    values = random.standard_normal(shape) * scale + offset
    x[...] = np.clip(values, -6e4, 6e4) if dtype == np.float16 else values
    dy[...], residual[...] = random.standard_normal(shape), random.standard_normal(shape)
    moments = reference.batch_moments(x, axis=axis)
    mean, var = moments.mean, moments.m2 / max(moments.count, 1) + 0.01
    channels, kind = channel_shape(shape, axis), parameter_dtype(dtype)
    gamma = random.standard_normal(channels).astype(kind) if draw(st.booleans()) else None
    beta = random.standard_normal(channels).astype(kind) if draw(st.booleans()) else None
    return Problem(dy, x, residual, mean, var, gamma, beta, axis)


@given(LEVELS, st.sampled_from(list(FORMS.values())), problems(), st.data())
def test_all_functions(level, form, p, data):
    before = [a.copy() for a in p[:3]]
    trains = p.x.size == 0 or reference.batch_moments(p.x, axis=p.axis).count > 1

    def out():
        return data.draw(st.one_of(st.none(), views(p.x.shape, p.x.dtype)))

    with bncpu.cpu.use_level(level):
        run_and_check(form, p, out=out, train=trains)
        if not trains:
            with pytest.raises(ValueError, match=r"^x: .*batch_norm_infer"):
                bncpu.batch_norm_train(p.x, p.gamma, p.beta, axis=p.axis)
    for a, b in zip(p[:3], before, strict=True):
        assert_same_bits(a, b)


@given(LEVELS, problems(), st.integers(2, 7), st.data())
def test_signs_agree(level, p, threads, data):
    """A mask, the recomputed sign and y tell the same, through whatever strides and threads."""
    if p.x.size == 0 or reference.batch_moments(p.x, axis=p.axis).count == 1:
        return
    # Values on a grid, for results that are 0, or would be but for a rounding.
    p.x[...] = np.rint(p.x.astype(np.float64))
    with bncpu.cpu.use_level(level):
        bncpu.cpu.kernels.set_cache_sizes(*data.draw(st.sampled_from([(4096, 4096), (MIB, MIB)])))
        got = run(FORMS["relu with mask"], p, num_threads=threads)
        bncpu.cpu.load_level(level)
        expected = run(FORMS["relu"], p, num_threads=1)
    for name, a in expected.items():
        if a is not None:
            assert_same_bits(got[name], a, name)
    for which in ("train", "infer"):
        assert_mask(got[f"{which} mask"], p.x, got[f"{which} y"])


# Values whose squares float64 can hold: below, the truth has no variance to measure an error by.
finite = {
    width: st.floats(-1e6, 1e6, width=width).map(lambda v: v if abs(v) > 1e-100 else 0.0)
    for width in (32, 64)
}
SPECIAL = [0.0, -0.0, np.nan, np.inf, -np.inf, 1e-30, -1e30, 1e-45]


@given(LEVELS, DTYPES, st.data())
def test_special_values_stay_in_their_channel(level, dtype, data):
    """Whatever stands in one channel, the others have the bits that they have without it."""
    n, c, s = data.draw(st.tuples(st.integers(2, 5), st.integers(2, 40), st.integers(1, 40)))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    x = random.standard_normal((n, c, s)).astype(dtype)
    victim = data.draw(st.integers(0, c - 1))
    others = np.arange(c) != victim
    spoiled = x.copy()
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.tuples(st.integers(0, n - 1), st.integers(0, s - 1)))
        spoiled[place[0], victim, place[1]] = data.draw(st.sampled_from(SPECIAL))
    last = data.draw(st.booleans())
    axis = -1 if last else 1
    if last:
        x, spoiled = (np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in (x, spoiled))
    with bncpu.cpu.use_level(level):
        clean, got = (bncpu.batch_norm_train(a, axis=axis) for a in (x, spoiled))
    assert_same_bits(got.mean[others], clean.mean[others])
    assert_same_bits(got.invstd[others], clean.invstd[others])
    assert_same_bits(np.moveaxis(got.y, axis, 0)[others], np.moveaxis(clean.y, axis, 0)[others])
    channel = np.moveaxis(spoiled, axis, 0)[victim]
    if np.isfinite(channel).all():
        one = np.moveaxis(got.y, axis, 0)[victim]
        assert_train(
            bncpu.TrainResult(one.reshape(-1, 1), got.mean[[victim]], got.invstd[[victim]]),
            channel.reshape(-1, 1),
        )
    else:
        assert np.isnan(np.moveaxis(got.y, axis, 0)[victim]).all()


@given(
    LEVELS,
    DTYPES.flatmap(
        lambda dtype: hnp.arrays(
            dtype,
            st.tuples(st.integers(2, 9), st.integers(1, 9), st.integers(1, 20)),
            elements=finite[dtype.itemsize * 8],
        )
    ),
)
@example(bncpu.cpu.level, np.full((2, 1, 9), 0.1, np.float32))
@example(bncpu.cpu.level, np.array([[[16777216.0]], [[16777218.0]]], np.float32))
def test_any_finite_values(level, x):
    """Values of hypothesis' own choosing: constants, steps, lonely outliers."""
    with bncpu.cpu.use_level(level):
        assert_train(bncpu.batch_norm_train(x), x)
        got = bncpu.batch_moments(x)
    assert np.all(got.m2 >= 0.0)
    smallest, largest = x.min((0, 2)).astype(np.float64), x.max((0, 2)).astype(np.float64)
    slack = 4 * EPS64 * np.abs(x).max()
    assert np.all(got.mean >= smallest - slack)
    assert np.all(got.mean <= largest + slack)


@given(
    LEVELS, DTYPES, st.floats(width=32, allow_nan=False, allow_infinity=False), shapes(), st.data()
)
def test_constant_gives_exactly_beta(level, dtype, value, shape, data):
    axis = data.draw(axes_of(len(shape)))
    channels = channel_shape(shape, axis)
    if math.prod(shape) <= math.prod(channels):
        shape = (*shape, 2)
        axis = tuple(a - 1 if a < 0 else a for a in (axis if isinstance(axis, tuple) else (axis,)))
    x = data.draw(views(shape, dtype))
    x[...] = value
    beta = (np.arange(math.prod(channels)).reshape(channels) / 3 - 1).astype(dtype)
    gamma = np.full(channels, 1e3, dtype)
    with bncpu.cpu.use_level(level):
        y = bncpu.batch_norm_train(x, gamma, beta, axis=axis).y
    expected = reference.batch_norm_train(x, gamma, beta, axis=axis).y
    assert np.all(y == expected.astype(dtype))


@given(DTYPES, st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 5), st.data())
def test_moments_of_parts(dtype, sizes, channels, data):
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    offsets = random.choice([0.0, 1.0, 100.0], len(sizes))
    parts = [
        (random.standard_normal((n, channels)) + offset).astype(dtype)
        for n, offset in zip(sizes, offsets, strict=True)
    ]
    whole = sum(bncpu.batch_moments(part) for part in parts)
    assert_moments(whole, np.concatenate(parts))


@given(LEVELS, DTYPES, shapes(), st.data())
def test_running_statistics_through_any_strides(level, dtype, shape, data):
    axis = data.draw(axes_of(len(shape)))
    channels = channel_shape(shape, axis)
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    x = random.standard_normal(shape).astype(dtype)
    if reference.batch_moments(x, axis=axis).count == 1:
        return
    statistics = np.dtype(data.draw(st.sampled_from([np.float32, np.float64])))
    mean, var = data.draw(views(channels, statistics)), data.draw(views(channels, statistics))
    mean[...], var[...] = random.standard_normal(channels), random.random(channels)
    before = {"mean": mean.copy(), "var": var.copy()}
    momentum = data.draw(st.floats(0.0, 1.0))
    with bncpu.cpu.use_level(level):
        bncpu.batch_norm_train(x, running_mean=mean, running_var=var, momentum=momentum, axis=axis)
    assert_running(mean, var, x, **before, momentum=momentum, axis=axis)
