"""How close is close: the one tolerance of the tests, and the comparisons that use it.

The truth is bncpu.reference in float64. An error is measured against the size of the terms that
make up the result (its scale), never against the result itself, which may cancel to nothing. The
scales come from the truth here, the tolerance from dtype and m in one place, and no test has its
own.

float16 and bfloat16 are storage: what is computed has float32's tolerance, and what is stored is
one rounding of that. Rounding is monotonic, so a stored result is right if it lies between the
roundings of truth - tolerance and truth + tolerance; this holds for subnormals and for what rounds
to infinity, and allows nothing else. The same holds for ReLU, which brings no error of its own.

Whether z passes ReLU is for z within tolerance of 0 a matter of rounding, and gradients do not
forgive another answer. So a forward is compared with the truth by its y alone, whose zeros and
whose mask must agree to the bit, and a backward with the truth for those elements that the forward
has let through.
"""

import numpy as np
from cases import memory_order, parameter_dtype

from bncpu import reference

EPS64 = np.finfo(np.float64).eps
STORAGE = {"float16": 2.0**-10, "bfloat16": 2.0**-7}  # and their eps


def arithmetic(dtype):
    """Return the dtype that is computed in for arrays of a dtype: float32 for storage types."""
    return np.dtype(np.float32) if np.dtype(dtype).name in STORAGE else np.dtype(dtype)


def tolerance(dtype, m, ratio=0.0):
    """Allow an error, in units of a result's scale, for sums over m values of a dtype.

    A handful of roundings in the dtype for the arithmetic of one element, and log2(m) of them for
    a sum, blocked or pairwise: one long chain of float32 additions does not pass. Parts merge in
    float64, whose roundings may add up like a random walk. A channel with ratio = |mean| / std
    also loses the few last digits of a float64 mean, and no others: what the input's own precision
    cost is already in the input, and the truth is computed from it too.
    """
    in_dtype = np.finfo(arithmetic(dtype)).eps * (8.0 + np.log2(m + 1.0))
    return in_dtype + EPS64 * (np.sqrt(m) + 4.0 * np.asarray(ratio))


@np.errstate(all="ignore")
def assert_close(got, truth, *, limit, what):
    """Compare with the truth; NaN and Inf must stand exactly where the truth has them."""
    got, truth = np.asarray(got), np.asarray(truth)
    assert got.shape == truth.shape, f"{what}: shape {got.shape}, expected {truth.shape}"
    special = ~np.isfinite(truth)
    value = got.astype(np.float64)
    np.testing.assert_array_equal(value[special], truth[special], err_msg=what)
    error = np.abs(value - truth)
    limit = np.broadcast_to(limit, truth.shape)
    if got.dtype.name in STORAGE:
        low, high = ((truth + end).astype(got.dtype).astype(float) for end in (-limit, limit))
        wrong = ~special & ~((low <= value) & (value <= high))
    else:
        wrong = ~special & ~(error <= limit)
    if wrong.any():
        excess = np.where(wrong, error / np.maximum(limit, 1e-300), 0.0)
        worst = np.unravel_index(np.argmax(excess), wrong.shape)
        raise AssertionError(
            f"{what}: {np.count_nonzero(wrong)} of {wrong.size} values are off; worst at {worst}: "
            f"got {got[worst]!r}, truth {truth[worst]!r}, error {error[worst]:.3g}, "
            f"allowed {limit[worst]:.3g}"
        )


def assert_same_to_rounding(got, other, *, dtype, m, size, what="result"):
    """Compare two computations of one thing, neither of them the truth.

    Each may be off by its tolerance, for sums over m values and terms of that size, so the two may
    differ by twice that. Where the other is stored in half a type, its rounding comes on top.
    """
    stored = np.asarray(other)
    other = stored.astype(np.float64)
    limit = 2.0 * tolerance(dtype, m) * np.asarray(size)
    limit = limit + STORAGE.get(stored.dtype.name, 0.0) / 2 * np.abs(other)
    assert_close(got, other, limit=limit, what=what)


def assert_gradient(got, loss, array, *, step=2e-4, what="gradient"):
    """Compare a float64 gradient with central differences of loss(), which reads the array.

    Its elements are moved one at a time, in place. Differences of fourth order,
    (-f(2h) + 8 f(h) - 8 f(-h) + f(-2h)) / 12h, are wrong by h^4 times a fifth derivative, and by
    the rounding of f over h; at this step the two are alike where the fifth derivative is some
    hundred times the first. Batch norm does not see the scale of weights before it, so for weights
    of norm w derivatives grow by a factor of 1/w each: small random weights need the small step.
    """
    differences = np.empty_like(array)
    for index in np.ndindex(array.shape):
        kept, values = array[index], []
        for steps in (-2, -1, 1, 2):
            array[index] = kept + steps * step
            values.append(loss())
        array[index] = kept
        differences[index] = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * step)
    limit = 1e3 * (step**4 + EPS64 / step) * (1.0 + np.abs(differences).max(initial=0.0))
    assert_close(got, differences, limit=limit, what=what)


def assert_same_bits(got, expected, what="result"):
    """Compare bit by bit: NaN equals itself, +0 differs from -0; None is no array."""
    if got is None or expected is None:
        assert got is expected, f"{what}: one of them is None"
        return
    got, expected = np.ascontiguousarray(got), np.ascontiguousarray(expected)
    assert got.shape == expected.shape, f"{what}: {got.shape} against {expected.shape}"
    assert got.dtype == expected.dtype, f"{what}: {got.dtype} against {expected.dtype}"
    unsigned = np.dtype(f"u{got.itemsize}")
    differ = np.count_nonzero(got.view(unsigned) != expected.view(unsigned))
    assert differ == 0, f"{what}: {differ} of {got.size} values differ in their bits"


@np.errstate(invalid="ignore")  # NaN that signal
def assert_same_but_for_nan(got, expected, what="result"):
    """Compare bit by bit, except which of many NaN a NaN is."""
    canonical = (np.where(np.isnan(a), np.asarray(np.nan, a.dtype), a) for a in (got, expected))
    assert_same_bits(*canonical, what)


@np.errstate(all="ignore")
def assert_relu_of(y, z):
    """Check that y is relu(z) to the bit, where z is what came out without ReLU.

    What is stored as -0 was less than 0 before a storage type rounded it, and ReLU made it +0.
    """
    expected = np.where(z < 0, np.zeros((), z.dtype), z)
    if z.dtype.name in STORAGE:
        expected = np.where((z == 0) & (y == 0), y, expected)
    assert_same_but_for_nan(y, expected, "relu")


@np.errstate(all="ignore")
def assert_moments(got, x, *, axis=1):
    """Compare count, mean and m2 with the truth; return the truth."""
    truth = reference.batch_moments(x, axis=axis)
    assert got.count == truth.count
    _assert_float64(got.mean, got.m2)
    assert not np.any(got.m2 < 0.0), "m2 is negative"
    allowed = tolerance(x.dtype, truth.count)
    _assert_mean(got.mean, truth, allowed)
    assert_close(got.m2, truth.m2, limit=_m2_limit(truth, allowed), what="m2")
    return truth


@np.errstate(all="ignore")
def assert_train(
    got, x, gamma=None, beta=None, *, eps=1e-5, axis=1, residual=None, activation=None, mask=None
):
    """Compare a training forward, and the mask that it filled, with the truth; return the truth."""
    assert got.y.dtype == x.dtype
    _assert_float64(got.mean, got.invstd)
    if mask is not None:
        assert_mask(mask, x, got.y)
    y, x, residual, axis = _channels_last(axis, got.y, x, residual)
    truth = reference.batch_norm_train(
        x, gamma, beta, eps=eps, axis=axis, residual=residual, activation=activation
    )
    moments = reference.batch_moments(x, axis=axis)
    _assert_mean(got.mean, moments, tolerance(x.dtype, moments.count))
    ratio = np.abs(truth.mean) * truth.invstd
    allowed = tolerance(x.dtype, moments.count, ratio)
    assert_close(got.invstd, truth.invstd, limit=allowed * truth.invstd, what="invstd")

    xhat = np.abs(reference.batch_norm_train(x, eps=eps, axis=axis).y)
    size = _size(gamma, 1.0) * (xhat + 1.0) + _size(beta, 0.0) + _size(residual, 0.0)
    assert_close(y, truth.y, limit=allowed * size, what="y")
    _assert_activated(y, activation)
    return truth


@np.errstate(all="ignore")
def assert_running(running_mean, running_var, *batches, mean=0.0, var=1.0, momentum=0.1, axis=1):
    """Compare running statistics, which began as mean and var, with the truth after the batches.

    A batch brings the error of its statistics, by its weight, and every update one rounding to the
    dtype of the running statistics. Errors of earlier batches fade as the batches do.
    """
    own, keep = tolerance(running_mean.dtype, 1), 1.0 - momentum
    truth_mean, truth_var = (
        np.array(np.broadcast_to(a, running_mean.shape), np.float64) for a in (mean, var)
    )
    mean_limit = var_limit = 0.0
    for x in batches:
        moments = reference.batch_moments(x, axis=axis)
        m = moments.count
        if m == 0:
            continue
        allowed = tolerance(x.dtype, m)
        size = keep * np.abs(truth_mean) + momentum * np.abs(moments.mean)
        reference.batch_norm_train(
            x, running_mean=truth_mean, running_var=truth_var, momentum=momentum, axis=axis
        )
        mean_limit = keep * mean_limit + momentum * _mean_limit(moments, allowed) + own * size
        unbiased_limit = _m2_limit(moments, allowed) / (m - 1)
        var_limit = keep * var_limit + momentum * unbiased_limit + own * np.abs(truth_var)
    truth_mean = _held_in(running_mean.dtype, truth_mean)
    truth_var = _held_in(running_var.dtype, truth_var)
    least = np.finfo(running_mean.dtype).smallest_subnormal  # where its own digits end
    assert_close(running_mean, truth_mean, limit=mean_limit + least, what="running_mean")
    assert_close(running_var, truth_var, limit=var_limit + least, what="running_var")


@np.errstate(all="ignore")
def assert_infer(
    got,
    x,
    mean,
    var,
    gamma=None,
    beta=None,
    *,
    eps=1e-5,
    axis=1,
    residual=None,
    activation=None,
    mask=None,
):
    """Compare inference, and the mask that it filled, with the truth; return the truth."""
    assert got.dtype == x.dtype
    if mask is not None:
        assert_mask(mask, x, got)
    y, x, residual, axis = _channels_last(axis, got, x, residual)
    truth = reference.batch_norm_infer(
        x, mean, var, gamma, beta, eps=eps, axis=axis, residual=residual, activation=activation
    )
    xhat = np.abs(reference.batch_norm_infer(x, mean, var, eps=eps, axis=axis))
    scale = _size(gamma, 1.0) * xhat + _size(beta, 0.0) + _size(residual, 0.0)
    assert_close(y, truth, limit=tolerance(x.dtype, 1) * scale, what="y")
    _assert_activated(y, activation)
    return truth


@np.errstate(all="ignore")
def assert_backward(got, dy, x, mean, invstd, gamma=None, *, axis=1, passes=None):
    """Compare the gradients of a training forward with the truth; return the truth.

    passes says of every element whether the forward's ReLU let it through; None for no ReLU.
    """
    dy = _assert_through(got, dy, x, passes)
    dx, dy, x, axis = _channels_last(axis, got.dx, dy, x)
    truth = reference.batch_norm_backward(dy, x, mean, invstd, gamma, axis=axis)
    m = reference.batch_moments(x, axis=axis).count
    xhat, sum_dy, sum_dy_xhat = _gradient_sizes(dy, x, mean, invstd, axis)
    ratio = np.abs(mean) * invstd
    terms = np.abs(dy.astype(np.float64)) + (sum_dy + xhat * sum_dy_xhat) / max(m, 1)
    limit = tolerance(x.dtype, m, ratio) * _size(gamma, 1.0) * invstd * terms
    assert_close(dx, truth.dx, limit=limit, what="dx")
    _assert_parameter_gradients(got, truth, x.dtype, m, ratio, sum_dy, sum_dy_xhat)
    return truth


@np.errstate(all="ignore")
def assert_infer_backward(got, dy, x, mean, var, gamma=None, *, eps=1e-5, axis=1, passes=None):
    """Compare the gradients of inference with the truth; return the truth."""
    dy = _assert_through(got, dy, x, passes)
    dx, dy, x, axis = _channels_last(axis, got.dx, dy, x)
    truth = reference.batch_norm_infer_backward(dy, x, mean, var, gamma, eps=eps, axis=axis)
    m = reference.batch_moments(x, axis=axis).count
    invstd = 1.0 / np.sqrt(np.asarray(var, dtype=np.float64) + eps)
    _, sum_dy, sum_dy_xhat = _gradient_sizes(dy, x, mean, invstd, axis)
    ratio = np.abs(mean) * invstd
    assert_close(dx, truth.dx, limit=tolerance(x.dtype, 1) * np.abs(truth.dx), what="dx")
    _assert_parameter_gradients(got, truth, x.dtype, m, ratio, sum_dy, sum_dy_xhat)
    return truth


def assert_mask(mask, x, y):
    """Check that the bits of a mask are those of y != 0, in the order in which x lies in memory.

    Where x is reversed or repeats itself that order is the package's own; how many there are of
    each bit is not.
    """
    assert mask.dtype == np.uint8
    assert mask.shape == ((x.size + 7) // 8,)
    order = memory_order(x)
    if order is None:
        bits = np.unpackbits(mask, bitorder="little")
        assert np.count_nonzero(bits) == np.count_nonzero(y != 0), "mask: another number of bits"
        assert not bits[x.size :].any(), "mask: unused bits are set"
    else:
        expected = np.packbits((y != 0).transpose(order).reshape(-1), bitorder="little")
        np.testing.assert_array_equal(mask, expected, "mask")


def _assert_activated(y, activation):
    if activation == "relu":
        assert not np.any(y < 0), "y is negative behind ReLU"


def _assert_through(got, dy, x, passes):
    """Check dresidual, which is dz, to the bit; return dz."""
    dz = dy if passes is None else np.where(passes, dy, np.zeros((), dy.dtype))
    assert got.dx.dtype == x.dtype
    if got.dresidual is not None:
        assert_same_bits(got.dresidual, dz, "dresidual")
    return dz


def _assert_float64(*statistics):
    for a in statistics:
        assert a.dtype == np.float64


def _assert_mean(mean, moments, allowed):
    assert_close(mean, moments.mean, limit=_mean_limit(moments, allowed), what="mean")


def _mean_limit(moments, allowed):
    """Allow an error that is a part of the standard deviation, or float64's own rounding."""
    std = np.sqrt(moments.m2 / max(moments.count, 1))
    return allowed * std + 4.0 * EPS64 * np.abs(moments.mean)


def _m2_limit(moments, allowed):
    # Parts merge by the difference of their means, and a mean is what float64 holds of it.
    rounding = 4.0 * EPS64 * np.abs(moments.mean) * np.sqrt(moments.count)
    return allowed * moments.m2 + rounding * np.sqrt(moments.m2) + rounding**2


def _assert_parameter_gradients(got, truth, dtype, m, ratio, sum_dy, sum_dy_xhat):
    held = parameter_dtype(dtype)
    assert got.dgamma.dtype == got.dbeta.dtype == held
    dgamma, dbeta = _held_in(held, truth.dgamma), _held_in(held, truth.dbeta)
    limit = tolerance(dtype, m, ratio) * sum_dy_xhat
    assert_close(got.dgamma, dgamma, limit=limit, what="dgamma")
    assert_close(got.dbeta, dbeta, limit=tolerance(dtype, m) * sum_dy, what="dbeta")


def _held_in(dtype, truth):
    """Return the truth with infinity where it is past the end of the dtype."""
    past = np.abs(truth) > np.finfo(dtype).max
    return np.where(past, np.copysign(np.inf, truth), truth)


def _channels_last(axis, *arrays):
    """Move the channel axes last, where parameters broadcast; return the arrays and those axes."""
    axes = axis if isinstance(axis, tuple) else (axis,)
    last = tuple(range(-len(axes), 0))
    return *(None if a is None else np.moveaxis(a, axes, last) for a in arrays), last


def _size(parameter, default):
    return default if parameter is None else np.abs(np.asarray(parameter, dtype=np.float64))


def _gradient_sizes(dy, x, mean, invstd, axis):
    """Return |xhat| + 1, the sum of |dy| and the sum of |dy| * (|xhat| + 1), channels last."""
    over = tuple(range(x.ndim - len(axis)))
    xhat = np.abs((x.astype(np.float64) - mean) * invstd) + 1.0
    absolute = np.abs(dy.astype(np.float64))
    return xhat, absolute.sum(over), (absolute * xhat).sum(over)
