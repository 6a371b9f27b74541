"""Any call of a public function agrees with the truth, or is refused with nothing written.

What calls there are is in wild.py; here is what each must do. The long run of these properties and
of those in test_properties.py is `make fuzz`.
"""

import math

import hypothesis.strategies as st
import numpy as np
from accuracy import (
    arithmetic,
    assert_backward,
    assert_infer,
    assert_infer_backward,
    assert_mask,
    assert_moments,
    assert_running,
    assert_same_bits,
    assert_train,
)
from calls import BACKWARD
from hypothesis import given
from wild import (
    STATISTICS,
    aliased_calls,
    answer,
    assert_same_answer,
    cloned,
    passes,
    right_calls,
    wrong_calls,
    z_of,
)

import bncpu
import bncpu.cpu

LEVELS = st.sampled_from(bncpu.cpu.runnable_levels())
# As they are, or so small that threads share a few thousand elements.
CACHES = st.sampled_from([None, None, (4096, 4096)])


@given(LEVELS, CACHES, right_calls())
def test_a_right_call(level, caches, call):
    answered(level, caches, call)


@given(LEVELS, CACHES, aliased_calls())
def test_shared_memory(level, caches, call):
    """Out may be what is documented, to the element; every other byte in common is refused."""
    answered(level, caches, call)


@given(wrong_calls())
def test_a_wrong_call(call):
    answer(call)


def answered(level, caches, call):
    first, alone = cloned(call), cloned(call)
    alone.given["num_threads"] = 1
    with bncpu.cpu.use_level(level):
        own = bncpu.cpu.cache_sizes()
        bncpu.cpu.kernels.set_cache_sizes(*(caches or own))
        try:
            got = answer(call)
            other = answer(alone)
        finally:
            bncpu.cpu.kernels.set_cache_sizes(*own)
    if got is None:
        assert other is None
        return
    assert_same_answer(got, other)
    for name in ("mask", "running_mean", "running_var"):
        if name in call.given:
            assert_same_bits(call.given[name], alone.given[name], name)
    compare(first, call, got)


@np.errstate(all="ignore")
def compare(first, call, got):
    """Compare a result with the truth, by those channels whose truth float64 can tell.

    `first` has the arguments as they were before the call, `call` as they are after it.
    """
    function, given = call.function, first.given
    channels = Channels(given["x"], given["axis"])
    ordinary = ordinary_channels(function, given, channels)

    def data(a):
        return None if a is None else channels.data(a)[:, ordinary]

    def vector(a):
        return None if a is None else channels.vector(a)[ordinary]

    x, gamma, beta = data(given["x"]), vector(given.get("gamma")), vector(given.get("beta"))
    if function == "batch_moments":
        got = bncpu.Moments(got.count, vector(got.mean), vector(got.m2))
        if len(x) == got.count:
            assert_moments(got, x)
        return
    if function in BACKWARD:
        compare_gradients(function, given, got, data, vector)
        return
    y = got if function == "batch_norm_infer" else got.y
    if "mask" in given:
        assert_mask(call.given["mask"], given["x"], y)
    how = {"residual": data(given.get("residual")), "activation": given.get("activation")}
    how["eps"] = float(given.get("eps", 1e-5))
    if function == "batch_norm_infer":
        assert_infer(data(y), x, vector(given["mean"]), vector(given["var"]), gamma, beta, **how)
        return
    trained = bncpu.TrainResult(data(y), vector(got.mean), vector(got.invstd))
    assert_train(trained, x, gamma, beta, **how)
    spoiled = ~np.isfinite(channels.data(given["x"]).astype(np.float64)).all(axis=0)
    assert np.isnan(channels.data(y)[:, spoiled]).all(), "not NaN in a channel with NaN or Inf"
    if "running_mean" in given:
        momentum = float(given.get("momentum", 0.1))
        assert_running(
            vector(call.given["running_mean"]),
            vector(call.given["running_var"]),
            x,
            mean=vector(given["running_mean"]),
            var=vector(given["running_var"]),
            momentum=momentum,
        )


def compare_gradients(function, given, got, data, vector):
    how = {"passes": None}
    if "activation" in given:
        how["passes"] = data(passes(given) if "mask" in given else sign_passes(given))
    gradients = bncpu.Gradients(
        data(got.dx), vector(got.dgamma), vector(got.dbeta), data(got.dresidual)
    )
    x, dy, gamma = data(given["x"]), data(given["dy"]), vector(given.get("gamma"))
    mean = vector(given["mean"])
    wanted = given.get("residual", False)
    assert (got.dresidual is not None) == (wanted is not False)
    if function == "batch_norm_backward":
        assert_backward(gradients, dy, x, mean, vector(given["invstd"]), gamma, **how)
    else:
        how["eps"] = float(given.get("eps", 1e-5))
        assert_infer_backward(gradients, dy, x, mean, vector(given["var"]), gamma, **how)


class Channels:
    """The channels of x, wherever they are, as the columns of a matrix."""

    def __init__(self, x, axis):
        self.axes = axis if isinstance(axis, tuple) else (axis,)
        self.number = math.prod(x.shape[a] for a in self.axes)
        self.values = math.prod(np.delete(x.shape, self.axes).tolist())

    def data(self, a):
        last = tuple(range(-len(self.axes), 0))
        return np.moveaxis(a, self.axes, last).reshape(self.values, self.number)

    def vector(self, a):
        return a.reshape(self.number)


def ordinary_channels(function, given, channels):
    """Return which channels have a truth to compare with: no NaN, no Inf, no overflow of a sum.

    Nor a result that comes to lie where the digits of the arithmetic end. Inference has one value
    for one value, and so a truth also where that is NaN or Inf.
    """
    info = np.finfo(arithmetic(given["x"].dtype))
    least = 1e8 * float(info.smallest_normal)
    if function == "batch_norm_infer":
        z = np.abs(channels.data(z_of(given)[0]))
        return ~((z > 0) & (z < least)).any(axis=0)
    good = np.ones(channels.number, bool)
    for name, a in given.items():
        if name in ("x", "dy") or (name == "residual" and function not in BACKWARD):
            if a is not None:
                good &= np.isfinite(channels.data(a).astype(np.float64)).all(axis=0)
        elif name in ("gamma", "beta", *STATISTICS):
            good &= np.isfinite(channels.vector(a).astype(np.float64))
    if function in BACKWARD:
        x, dy = (np.abs(channels.data(given[n]).astype(np.float64)) for n in ("x", "dy"))
        largest = x.max(axis=0, initial=0) + np.abs(channels.vector(given["mean"]))
        if "invstd" in given:
            invstd = channels.vector(given["invstd"]).astype(np.float64)
        else:
            invstd = 1 / np.sqrt(channels.vector(given["var"]) + float(given.get("eps", 1e-5)))
        xhat = largest * invstd + 1
        gamma = np.abs(channels.vector(given["gamma"])) + 1 if "gamma" in given else 1
        terms = dy.sum(axis=0) * xhat**2 * gamma * (invstd + 1)
        good &= terms < info.max / 1e3
        smallest = np.where(dy > 0, dy, 1.0).min(axis=0, initial=1.0)
        good &= smallest * np.minimum(invstd, 1) > least
    return good


def sign_passes(given):
    """Return where z > 0; where rounding decides, dy is 0 and either answer is right."""
    return ~(z_of(given)[0] <= 0)
