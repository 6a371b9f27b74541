"""The sign of z where it hangs by a rounding: forward, mask and recomputation agree to the bit.

A backward without a mask computes z again, and a gradient of the wrong sign's element is no
rounding error. Inputs here have z at, or next to, zero in most places.
"""

import ml_dtypes
import numpy as np
import pytest
from accuracy import (
    assert_infer,
    assert_infer_backward,
    assert_mask,
    assert_relu_of,
    assert_same_bits,
    assert_same_but_for_nan,
    assert_train,
)
from cases import FLOATS, HALVES, lay, new_mask, normal, parameter_dtype

import bncpu
import bncpu.cpu
from bncpu import reference

pytestmark = pytest.mark.usefixtures("level")

SHAPES = [
    *(((2, 3, 1), 1), ((9, 5, 3), 1), ((300, 3, 7), 1), ((3, 7, 49), 1), ((2, 3, 2049), 1)),
    *(((130, 17), 1), ((5, 1, 4097), 1), ((3, 5, 513), 1), ((31, 3, 5), -1)),
]
SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0]


@pytest.fixture(params=[*FLOATS, *HALVES], ids=str)
def dtype(request):
    return request.param


def beside(values, rng, dtype, steps=2):
    """Return the values in a dtype, moved by up to so many units in their last place."""
    values = values.astype(dtype)
    for _ in range(steps):
        up = rng.integers(0, 3, values.shape)
        for towards, chosen in ((np.inf, up == 1), (-np.inf, up == 2)):
            moved = np.nextafter(values, np.asarray(towards, dtype))
            values = np.where(chosen, moved, values)
    return values


def tall(values, ndim, axis):
    shape = [1] * ndim
    shape[axis] = -1
    return np.reshape(values, shape)


def agree(dy, x, mean, var, gamma, beta, axis, residual=None, eps=1e-5):
    """Check that all ways to the sign of z are one, to the bit; return y of infer and of train."""
    zero = np.zeros((), dy.dtype)
    results = []
    options = {"axis": axis}
    for forward, backward, more in [
        (bncpu.batch_norm_infer, bncpu.batch_norm_infer_backward, {"eps": eps}),
        (bncpu.batch_norm_train, bncpu.batch_norm_backward, {"eps": eps}),
    ]:
        trains = forward is bncpu.batch_norm_train
        statistics = () if trains else (mean, var)
        mask = new_mask(x)
        fused = {"residual": residual, **options, **more}
        plain = forward(x, *statistics, gamma, beta, **fused)
        unmasked = forward(x, *statistics, gamma, beta, activation="relu", **fused)
        got = forward(x, *statistics, gamma, beta, activation="relu", mask=mask, **fused)
        y = got
        if trains:
            plain, unmasked, y = plain.y, unmasked.y, got.y
            statistics, more = (got.mean, got.invstd), {}
        assert_relu_of(y, plain)
        assert_same_but_for_nan(y, unmasked, "y without a mask")
        assert_mask(mask, x, y)
        results.append(y)

        arrays = (dy, x, *statistics, gamma, beta)
        how = {"activation": "relu", **options, **more}
        masked = backward(*arrays, mask=mask, residual=True, **how)
        assert_same_but_for_nan(masked.dresidual, np.where(y != 0, dy, zero), "dresidual")
        others = [backward(np.where(y != 0, dy, zero), *arrays[1:], **options, **more)]
        if residual is None:
            others.append(backward(*arrays, **how))
        for other in others:
            for name in ("dx", "dgamma", "dbeta"):
                assert_same_but_for_nan(getattr(masked, name), getattr(other, name), name)
    return results


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_many_zeros(rng, dtype, shape, axis, with_residual):
    """Small integers about an integer mean, and beta = 0: a third of z is 0, of either sign."""
    channels = shape[axis]
    x = rng.integers(-1, 2, shape).astype(dtype)
    dy = normal(rng, shape, dtype)
    residual = rng.integers(-1, 2, shape).astype(dtype) if with_residual else None
    gamma = rng.choice([-1.0, 1.0, -0.5, 0.0, -0.0], channels).astype(parameter_dtype(dtype))
    beta = rng.choice([0.0, -0.0, 1.0], channels).astype(gamma.dtype)
    mean, var = rng.integers(-1, 2, channels).astype(float), np.ones(channels)
    y = agree(dy, x, mean, var, gamma, beta, axis, residual, eps=0.0)[0]
    how = {"eps": 0.0, "axis": axis}
    assert_infer(y, x, mean, var, gamma, beta, residual=residual, activation="relu", **how)
    if residual is None:
        got = bncpu.batch_norm_infer_backward(
            dy, x, mean, var, gamma, beta, activation="relu", **how
        )
        # The values are so round that z is exact: the truth has the same sign everywhere.
        exact = tall(gamma, x.ndim, axis) * (x.astype(float) - tall(mean, x.ndim, axis))
        passes = exact + tall(beta, x.ndim, axis) > 0
        np.testing.assert_array_equal(y != 0, passes)
        assert_infer_backward(got, dy, x, mean, var, gamma, passes=passes, **how)


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_a_few_roundings_from_zero(rng, dtype, shape, axis, with_residual):
    """The sum scale * (x - mean) + beta cancels to its last digits, in every element."""
    channels = shape[axis]
    gamma = normal(rng, channels, parameter_dtype(dtype))
    beta = normal(rng, channels, gamma.dtype)
    mean, var = rng.standard_normal(channels), rng.random(channels) + 0.1
    scale = gamma / np.sqrt(var + 1e-5)
    dy = normal(rng, shape, dtype)
    if with_residual:
        x = normal(rng, shape, dtype)
        z = reference.batch_norm_infer(x, mean, var, gamma, beta, axis=axis)
        residual = beside(-z, rng, dtype)
    else:
        zeros = np.clip(mean - beta / scale, -1e4, 1e4)
        x = beside(np.broadcast_to(tall(zeros, len(shape), axis), shape), rng, dtype, steps=3)
        residual = None
    y = agree(dy, x, mean, var, gamma, beta, axis, residual)[0]
    assert_infer(y, x, mean, var, gamma, beta, axis=axis, residual=residual, activation="relu")


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_training_beside_zero(rng, dtype, shape, axis):
    """A beta that puts the channel's own values at zero, one after the other."""
    x = rng.integers(-3, 4, shape).astype(dtype)
    dy = normal(rng, shape, dtype)
    channels = shape[axis]
    gamma = normal(rng, channels, parameter_dtype(dtype))
    _, mean, invstd = bncpu.batch_norm_train(x, axis=axis)
    one = np.moveaxis(x, axis, 0).reshape(channels, -1)[:, 0].astype(float)
    beta = beside(-gamma * invstd * (one - mean), rng, gamma.dtype)
    y = agree(dy, x, mean, 1.0 / invstd**2, gamma, beta, axis)[1]
    got = bncpu.batch_norm_train(x, gamma, beta, axis=axis, activation="relu")
    assert_same_bits(got.y, y)
    assert_train(got, x, gamma, beta, axis=axis, activation="relu")


@pytest.mark.parametrize("shape", [(5, 3, 7), (300, 5), (2, 3, 2049)], ids=str)
def test_x_at_its_mean(rng, dtype, shape):
    """A constant channel at beta = 0 has z = 0 everywhere, and nothing passes."""
    x, dy = normal(rng, shape, dtype), normal(rng, shape, dtype)
    constant = np.moveaxis(x, 1, 0)
    constant[0] = constant[0].flat[0]
    gamma = normal(rng, shape[1], parameter_dtype(dtype))
    mean, var = np.zeros(shape[1]), np.ones(shape[1])
    mean[0] = constant[0].flat[0]
    for beta, passes in [(0.0, False), (-0.0, False), (1e-30, None), (1.0, True), (-1.0, False)]:
        shift = np.full(shape[1], beta, gamma.dtype)
        for y in agree(dy, x, mean, var, gamma, shift, 1):
            ones = np.moveaxis(y, 1, 0)[0] != 0
            if passes is None:  # float16 rounds it to zero, the others do not
                passes = dtype != np.float16
            assert np.all(ones == passes)


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_results_next_to_nothing(rng, dtype, shape, axis):
    """Among the subnormals of x's dtype what rounds to zero blocks, what does not passes."""
    least = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    least_z = least / 2 if dtype in HALVES else least  # of the arithmetic's dtype, or nearly
    x, dy = normal(rng, shape, dtype, mean=0.0), normal(rng, shape, dtype)
    channels = shape[axis]
    kind = parameter_dtype(dtype)
    gamma = (rng.integers(-9, 10, channels) * least_z).astype(kind)
    beta = (rng.integers(-2, 3, channels) * least_z).astype(kind)
    mean, var = np.zeros(channels), np.ones(channels)
    for residual in (None, (rng.integers(-2, 3, shape) * least).astype(dtype)):
        y, _ = agree(dy, x, mean, var, gamma, beta, axis, residual, eps=0.0)
        if channels > 10:
            assert 0 < np.count_nonzero(y) < y.size


@pytest.mark.parametrize("where", ["x", "dy", "residual", "gamma", "beta", "mean"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_nan_and_inf(rng, dtype, shape, axis, where):
    """Whatever stands there: NaN passes, and what is blocked is 0 and not NaN times 0."""
    channels = shape[axis]
    arrays = {name: normal(rng, shape, dtype) for name in ("dy", "x", "residual")}
    arrays |= {name: normal(rng, channels, parameter_dtype(dtype)) for name in ("gamma", "beta")}
    arrays |= {"mean": rng.standard_normal(channels)}
    victim = arrays[where]
    chosen = rng.random(victim.shape) < 0.2
    victim[chosen] = rng.choice(SPECIAL, np.count_nonzero(chosen)).astype(victim.dtype)
    var = rng.random(channels) + 0.1
    residual = arrays.pop("residual")
    if where != "residual":
        agree(**arrays, var=var, axis=axis)
    agree(**arrays, var=var, axis=axis, residual=residual)


def test_nothing_of_a_blocked_gradient_is_left(rng, dtype):
    """NaN in dy where ReLU blocks is nobody's NaN."""
    x = normal(rng, (6, 5, 33), dtype)
    gamma, beta = np.ones(5, parameter_dtype(dtype)), np.zeros(5, parameter_dtype(dtype))
    y, mean, invstd = bncpu.batch_norm_train(x, gamma, beta, activation="relu")
    dy = normal(rng, x.shape, dtype)
    expected = bncpu.batch_norm_backward(dy, x, mean, invstd, gamma, beta, activation="relu")
    dy[y == 0] = np.nan
    got = bncpu.batch_norm_backward(dy, x, mean, invstd, gamma, beta, activation="relu")
    for name in ("dx", "dgamma", "dbeta"):
        assert_same_bits(getattr(got, name), getattr(expected, name), name)
        assert np.isfinite(getattr(got, name)).all()


def test_relu_of_nan_is_nan(dtype):
    x = np.array([[np.nan, 1.0], [-1.0, np.nan]], dtype)
    mask = new_mask(x)
    y = bncpu.batch_norm_infer(x, np.zeros(2), np.ones(2), eps=0, activation="relu", mask=mask)
    np.testing.assert_array_equal(y.astype(float), [[np.nan, 1.0], [0.0, np.nan]])
    assert mask == 0b1011
    dy = np.ones_like(x)
    got = bncpu.batch_norm_infer_backward(
        dy, x, np.zeros(2), np.ones(2), eps=0, activation="relu", mask=mask, residual=True
    )
    np.testing.assert_array_equal(got.dresidual.astype(float), [[1.0, 1.0], [0.0, 1.0]])


@pytest.mark.parametrize("layout", ["channels_last", "cropped", "reversed", "misaligned"])
@pytest.mark.parametrize("other", ["c", "samples_innermost", "reversed_strided"])
def test_signs_of_any_layout(rng, dtype, layout, other):
    """Where dy or the residual do not fit the walk of x and are copied, the signs are the same."""
    shape = (5, 3, 6, 9)
    x = lay(layout, rng.integers(-1, 2, shape).astype(dtype))
    dy = lay(other, normal(rng, shape, dtype))
    residual = lay(other, rng.integers(-1, 2, shape).astype(dtype))
    gamma, beta = np.ones(3, parameter_dtype(dtype)), np.zeros(3, parameter_dtype(dtype))
    agree(dy, x, np.zeros(3), np.ones(3), gamma, beta, 1)
    agree(dy, x, np.zeros(3), np.ones(3), gamma, beta, 1, residual)


@pytest.mark.parametrize("threads", [2, 7])
def test_signs_on_threads_and_other_caches(rng, level, threads):
    """The forward on one machine, the backward on another: a mask is a mask."""
    shape = (17, 33, 28, 27)
    x = rng.integers(-1, 2, shape).astype(np.float32)
    dy = normal(rng, shape, np.float32)
    gamma, beta = np.ones(33, np.float32), np.zeros(33, np.float32)
    mask = new_mask(x)
    y, mean, invstd = bncpu.batch_norm_train(
        x, gamma, beta, activation="relu", mask=mask, num_threads=1
    )
    arrays = dy, x, mean, invstd, gamma, beta
    expected = bncpu.batch_norm_backward(*arrays, activation="relu", num_threads=1)
    assert_mask(mask, x, y)
    try:
        bncpu.cpu.kernels.set_cache_sizes(4096, 4096)
        for how in ({}, {"mask": mask}):
            got = bncpu.batch_norm_backward(*arrays, activation="relu", num_threads=threads, **how)
            for name in ("dx", "dgamma", "dbeta"):
                assert_same_bits(getattr(got, name), getattr(expected, name), name)
    finally:
        bncpu.cpu.load_level(level)
