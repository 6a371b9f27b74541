"""Any folding, merging of moments and use of a layer: as the truth has it, or refused whole.

The functions that make no pass over a batch, and the layer through any order of its calls. The long
run of these is `make fuzz`, with those of test_wild.py.
"""

import hypothesis.strategies as st
import numpy as np
import pytest
from accuracy import (
    EPS64,
    assert_backward,
    assert_close,
    assert_infer,
    assert_running,
    assert_same_bits,
    assert_train,
)
from cases import FLOATS
from hypothesis import given
from wild import STATISTICS, WRONG_DTYPES, placed

import bncpu
from bncpu import reference

SEEDS = st.integers(0, 2**32 - 1)
FOLDED = {"linear_map": None, "fold_into_linear": 2, "fold_into_conv": 4}


@given(st.sampled_from(list(FOLDED)), SEEDS, st.integers(0, 7), st.data())
def test_any_folding(function, seed, channels, data):
    random, dtype = np.random.default_rng(seed), data.draw(st.sampled_from(FLOATS))
    given = {}
    for name in ("mean", "var", "gamma", "beta"):
        if name in ("mean", "var") or data.draw(st.booleans()):
            given[name] = data.draw(placed((channels,), dtype))
            given[name][...] = random.random(channels) + 0.1
    if (rank := FOLDED[function]) is not None:
        shape = [int(n) for n in random.integers(0, 4, rank)]
        given["axis"] = data.draw(st.integers(-rank, rank - 1))
        shape[given["axis"]] = channels
        given["weight"] = data.draw(placed(tuple(shape), dtype))
        given["weight"][...] = random.standard_normal(shape)
        given["bias"] = random.standard_normal(channels) if data.draw(st.booleans()) else None
    refusal = data.draw(st.sampled_from([None, None, "dtype", "shape", "list", "negative", "eps"]))
    name = data.draw(st.sampled_from([n for n in given if n not in ("axis", "bias")]))
    if refusal == "dtype":
        given[name] = np.zeros(
            given[name].shape, data.draw(st.sampled_from(["i4", "O", "c8", "S2"]))
        )
    elif refusal == "shape":
        given[name] = np.zeros((2, channels + 1, 1, 1, 1)[: 1 + (name != "weight") * 4])
    elif refusal == "list":
        given[name] = [1.0]
    elif refusal == "negative":
        given["var"] = given["var"] - 9 * (np.arange(channels) == channels - 1)
    elif refusal == "eps":
        given["eps"] = -1.0
    arrays = {n: a for n, a in given.items() if isinstance(a, np.ndarray)}
    before = {n: a.copy() for n, a in arrays.items()}
    call = getattr(bncpu, function)
    if refusal and not (refusal == "negative" and channels == 0):
        with pytest.raises((TypeError, ValueError), match=r"^\w+: "):
            call(**given)
    else:
        compare_folding(call(**given), given, channels)
    for n, a in arrays.items():
        assert np.array_equal(a, before[n]), f"{n} has changed"


def compare_folding(got, given, channels):
    mean, var = given["mean"].astype(float), given["var"].astype(float)
    scale = given.get("gamma", np.ones(channels)).astype(float) / np.sqrt(var + 1e-5)
    shift = given.get("beta", np.zeros(channels)).astype(float) - scale * mean
    size = np.abs(scale * mean) + np.abs(given.get("beta", np.zeros(channels)).astype(float))
    if "weight" not in given:
        assert_close(got.scale, scale, limit=8 * EPS64 * np.abs(scale), what="scale")
        assert_close(got.shift, shift, limit=8 * EPS64 * size, what="shift")
        return
    weight, bias = got
    assert weight.dtype == bias.dtype == given["weight"].dtype
    eps = 8 * np.finfo(weight.dtype).eps
    if given["bias"] is not None:
        shift = shift + scale * given["bias"]
        size = size + np.abs(scale * given["bias"])
    columns = np.moveaxis(given["weight"].astype(float), given["axis"], -1) * scale
    limit = eps * np.abs(columns)
    assert_close(np.moveaxis(weight, given["axis"], -1), columns, limit=limit, what="weight")
    assert_close(bias, shift, limit=eps * size, what="bias")


@given(SEEDS, st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 5), st.data())
def test_any_merging(seed, sizes, channels, data):
    random = np.random.default_rng(seed)
    scale = data.draw(st.sampled_from([1.0, 1e-30, 1e30]))
    parts = [
        (random.standard_normal((n, channels)) + random.choice([0.0, 1e3])) * scale for n in sizes
    ]
    moments = [bncpu.batch_moments(part) for part in parts]
    before = [(m.mean.copy(), m.m2.copy()) for m in moments]
    odd = data.draw(st.sampled_from([None, "channels", "ddof", "inf"]))
    if odd == "channels":
        with pytest.raises(ValueError, match=r"^merge: expected moments of the same channels"):
            moments[0].merge(*moments[1:], bncpu.batch_moments(np.ones((2, channels + 1))))
    elif odd == "inf" and channels:
        spoiled = np.ones((2, channels))
        spoiled[0, 0] = np.inf
        merged = moments[0].merge(*moments[1:], bncpu.batch_moments(spoiled))
        clean = moments[0].merge(*moments[1:], bncpu.batch_moments(np.ones((2, channels))))
        assert not np.isfinite(merged.m2[0])
        assert_same_bits(merged.mean[1:], clean.mean[1:])
        assert_same_bits(merged.m2[1:], clean.m2[1:])
    else:
        whole = moments[0].merge(*moments[1:])
        truth = reference.batch_moments(np.concatenate(parts))
        assert whole.count == truth.count == sum(sizes)
        spread = np.sqrt(truth.m2 / max(truth.count, 1)) + np.abs(truth.mean)
        assert_close(whole.mean, truth.mean, limit=32 * EPS64 * spread, what="mean")
        limit = 64 * EPS64 * max(truth.count, 1) * spread**2
        assert_close(whole.m2, truth.m2, limit=limit, what="m2")
        for name in ("mean", "m2"):
            assert_same_bits(getattr(sum(moments), name), getattr(whole, name), name)
        ddof = data.draw(st.integers(0, 9))
        if whole.count > ddof:
            assert_same_bits(whole.var(ddof), whole.m2 / (whole.count - ddof))
        else:
            with pytest.raises(ValueError, match=r"^var: needs more than"):
                whole.var(ddof)
    for m, (mean, m2) in zip(moments, before, strict=True):
        assert_same_bits(m.mean, mean)
        assert_same_bits(m.m2, m2)


STEPS = ["train", "train", "evaluate", "backward", "wrong x", "wrong state", "state"]


@given(SEEDS, st.sampled_from(FLOATS), st.lists(st.sampled_from(STEPS), max_size=7), st.data())
def test_any_use_of_a_layer(seed, dtype, steps, data):
    random = np.random.default_rng(seed)
    channels = data.draw(st.integers(1, 9))
    affine, tracks = data.draw(st.booleans()), data.draw(st.booleans())
    relu = data.draw(st.sampled_from([None, "relu"]))
    how = {"affine": affine, "track_running_stats": tracks, "activation": relu, "dtype": dtype}
    layer = bncpu.BatchNorm(channels, **how)
    last = None
    for step in steps:
        before = layer.state_dict()
        if step in ("train", "evaluate"):
            layer.train(step == "train")
            x = random.standard_normal((int(random.integers(2, 7)), channels, 3)).astype(dtype)
            y = layer(x)
            check_forward(layer, x, y, before, uses_batch=step == "train" or not tracks)
            last = x, y
        elif step == "backward" and last is None:
            with pytest.raises(RuntimeError, match=r"^backward: call forward first"):
                layer.backward(np.ones((2, channels, 3), dtype))
        elif step == "backward":
            dy = random.standard_normal(last[0].shape).astype(dtype)
            assert layer.backward(dy).shape == dy.shape
            if layer.training and not relu:
                truth = reference.batch_norm_train(last[0])
                gamma = None if layer.gamma is None else layer.gamma
                got = bncpu.batch_norm_backward(dy, last[0], truth.mean, truth.invstd, gamma)
                assert_backward(got, dy, last[0], truth.mean, truth.invstd, gamma)
        elif step == "wrong x":
            wrong = [np.zeros((4, channels + 1), dtype), np.zeros((4, channels), "i4"), [1.0]]
            wrong += [np.zeros((1, channels), dtype)] if layer.training else []
            with pytest.raises((TypeError, ValueError), match=r"^x: "):
                layer(data.draw(st.sampled_from(wrong)))
        elif step == "wrong state":
            refuse_state(layer, before, data)
        else:
            other = bncpu.BatchNorm(channels, **how)
            other.load_state_dict(before)
            assert_same_state(other.state_dict(), before)
        if step not in ("train",):
            assert_same_state(layer.state_dict(), before)


def check_forward(layer, x, y, before, uses_batch):
    gamma, beta = layer.gamma, layer.beta
    if uses_batch:
        batch = bncpu.batch_norm_train(x, gamma, beta, activation=layer.activation)
        assert_same_bits(y, batch.y)
        assert_train(batch, x, gamma, beta, activation=layer.activation)
    else:
        mean, var = before["running_mean"], before["running_var"]
        assert_infer(y, x, mean, var, gamma, beta, activation=layer.activation)
    if layer.training and layer.running_mean is not None:
        old = {"mean": before["running_mean"], "var": before["running_var"]}
        assert_running(layer.running_mean, layer.running_var, x, **old)
        assert layer.num_batches_tracked == before["num_batches_tracked"] + 1


def refuse_state(layer, state, data):
    """Load a state of which one entry is wrong, or has a name that the layer does not know."""
    wrong = dict(state)
    name = data.draw(st.sampled_from([*state, "unknown"]))
    array = wrong.get(name, np.zeros(1))
    changes = [np.zeros((*array.shape, 2)), [1.0], array.astype(complex), array.astype("S8")]
    changes += [None, "x", np.zeros(array.shape, data.draw(st.sampled_from(WRONG_DTYPES[5:-2])))]
    changes += [array - 1e3] if name in ("running_var", "num_batches_tracked") else []
    wrong[name] = data.draw(st.sampled_from(changes))
    for other in state:  # what comes before it may not have been taken over
        if other != name and other not in STATISTICS and other != "num_batches_tracked":
            wrong[other] = state[other] + 1
    with pytest.raises((TypeError, ValueError), match=r"^\w+: "):
        layer.load_state_dict(wrong)


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for name, array in a.items():
        assert_same_bits(array, b[name], name)
