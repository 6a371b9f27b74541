"""Plain calls take a way of their own, compiled; nobody can tell by the result.

A plain call names its axis by an int, so a tuple leads the same arrays through the checks and the
kernels of every other call.
"""

from functools import partial

import numpy as np
import pytest
from accuracy import assert_same_bits
from cases import normal, parameters
from forms import FORMS, PLAIN, assert_same_results, problem, run

import bncpu
import bncpu.cpu
from bncpu.cpu import pool

pytestmark = pytest.mark.usefixtures("level")

# Both forms of the walk and what stands between them: one row, one channel, short and long runs.
SHAPES = [
    (8, 16),
    (2, 1),
    (2, 3),
    (3, 5, 1, 1),
    (1, 5, 3),
    (1, 1, 7),
    (3, 4, 6),
    (4, 4, 6),
    (4, 3, 511),
    (4, 3, 512),
    (5, 600),
    (2, 3, 4, 5, 6),
    (9, 1, 33),
]
AXES = [1, -1]


@pytest.fixture
def calls(monkeypatch):
    """Tell of every plain call that was tried whether it was taken."""
    kernels, taken = bncpu.cpu.kernels, []

    class Counting:
        def __getattr__(self, name):
            function = getattr(kernels, name)
            if not name.startswith("plain_"):
                return function

            def call(*arguments):
                result = function(*arguments)
                taken.append(result is not None)
                return result

            return call

    monkeypatch.setattr(bncpu.cpu, "kernels", Counting())
    return taken


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits(rng, calls, shape, axis, form, dtype):
    p = problem(rng, shape, np.dtype(dtype), axis)
    train = p.x.size > p.x.shape[axis]
    for gamma, beta in [(p.gamma, p.beta), (None, None), (p.gamma, None), (None, p.beta)]:
        p = p._replace(gamma=gamma, beta=beta)
        for options in ({}, {"out": partial(np.empty_like, p.x)}, {"num_threads": 2}):
            calls.clear()
            plain = run(form, p, train=train, **options)
            assert all(calls) or (form.residual and not form.relu)  # dresidual is dy, or its copy
            for array in plain.values():
                if array is not None:
                    assert type(array) is np.ndarray
                    assert array.flags.c_contiguous
                    assert array.flags.writeable
            calls.clear()
            other = run(form, p._replace(axis=(axis,)), train=train, **options)
            assert not any(calls)
            assert_same_results(plain, other)


def test_large_results_come_from_the_pool(rng, calls):
    x = normal(rng, (1 << 11, 1 << 9), np.dtype(np.float32))
    limit = pool.limit()
    for axis in (1, (1,)):
        pool.set_limit(0)  # which forgets what earlier tests have left
        pool.set_limit(limit)
        y = bncpu.batch_norm_train(x, axis=axis).y
        assert pool.kept() == 0
        del y
        assert pool.kept() >= x.nbytes
    assert calls == [True, False]


@pytest.mark.parametrize("running", [np.float32, np.float64])
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_running_statistics(rng, dtype, calls, running, momentum):
    x = normal(rng, (7, 5, 3), dtype)
    statistics = []
    for axis in (1, (1,)):
        mean, var = np.linspace(-1, 1, 5).astype(running), np.linspace(1, 2, 5).astype(running)
        bncpu.batch_norm_train(x, running_mean=mean, running_var=var, momentum=momentum, axis=axis)
        statistics.append((mean, var))
    for a, b in zip(*statistics, strict=True):
        assert_same_bits(a, b)
    assert calls == [True, False]


def test_in_place(rng, dtype, calls):
    """Where a result may replace an input, it does."""
    p = problem(rng, (6, 5, 9), dtype)
    for form, name, function in [
        (PLAIN, "x", bncpu.batch_norm_infer),
        (PLAIN, "residual", bncpu.batch_norm_infer),
        (PLAIN, "residual", bncpu.batch_norm_train),
        (PLAIN, "dy", bncpu.batch_norm_backward),
        (PLAIN, "dy", bncpu.batch_norm_infer_backward),
    ]:
        results = []
        for axis in (1, (1,)):
            given = {"x": p.x.copy()}
            if function is not bncpu.batch_norm_train:
                given["mean"] = p.mean
                given["invstd" if function is bncpu.batch_norm_backward else "var"] = p.var
            if name != "x":
                given[name] = getattr(p, name).copy()
            result = function(**given, out=given[name], axis=axis, activation=form.activation)
            result = result if isinstance(result, tuple) else (result,)
            assert result[0] is given[name]
            results.append(result[0])
        assert_same_bits(*results)
    assert calls == [True, False] * 5


def test_what_is_not_plain_goes_the_other_way(rng, dtype, calls):
    """Other kinds of arguments, right ones and wrong ones, get what they always get."""
    x = normal(rng, (8, 6), dtype)
    gamma, beta = parameters(rng, 6, dtype)
    wide = normal(rng, (8, 12), dtype)[:, ::2]
    shared = np.zeros(12, dtype)
    half = normal(rng, (9, 6), dtype)
    read_only = np.zeros(6, dtype)
    read_only.flags.writeable = False
    relu = {"activation": "relu"}
    for arrays, options, error in [
        ((wide,), {}, None),
        ((x.T.copy().T,), {}, None),
        ((x, gamma[::-1]), {}, None),
        ((x,), {"axis": 0}, None),
        ((x,), {"axis": (1,)}, None),
        ((x,), {"eps": 1}, None),
        ((x,), {"out": wide}, None),
        ((x,), {"residual": wide}, None),
        ((x[:0],), {}, None),
        ((x.astype(x.dtype.newbyteorder()),), {}, TypeError),
        ((x.astype(np.int32),), {}, TypeError),
        ((x.tolist(),), {}, TypeError),
        ((x, gamma.astype(np.longdouble)), {}, TypeError),
        ((x, gamma[:3]), {}, ValueError),
        ((x[:1],), {}, ValueError),
        ((x,), {"axis": 2}, ValueError),
        ((x,), {"axis": -3}, ValueError),
        ((x,), {"axis": 1 << 80}, ValueError),
        ((x,), {"axis": True}, None),
        ((x,), {"eps": -1.0}, ValueError),
        ((x,), {"eps": float("nan")}, ValueError),
        ((x,), {"activation": "tanh"}, ValueError),
        ((x,), {"mask": np.zeros(6, np.uint8)}, ValueError),
        ((x,), {"mask": np.zeros(7, np.uint8), **relu}, ValueError),
        ((x,), {"mask": np.zeros(6, np.int8), **relu}, TypeError),
        ((x,), {"mask": x.reshape(-1).view(np.uint8)[:6], **relu}, ValueError),
        ((x,), {"residual": x[:4]}, ValueError),
        ((x,), {"out": x}, ValueError),
        ((half[:8],), {"out": half[1:]}, ValueError),
        ((x,), {"residual": half[:8], "out": half[1:]}, ValueError),
        ((x,), {"residual": x, "out": x}, ValueError),
        ((x,), {"running_mean": np.zeros(6, dtype)}, ValueError),
        ((x,), {"running_mean": read_only, "running_var": np.ones(6, dtype)}, ValueError),
        ((x,), {"running_mean": shared[:6], "running_var": shared[3:9]}, ValueError),
        ((x,), {"running_mean": x[0], "running_var": np.ones(6, dtype)}, ValueError),
    ]:
        kept = [np.array(a) for a in arrays]
        if error is None:
            bncpu.batch_norm_train(*arrays, **options)
        else:
            with pytest.raises(error):
                bncpu.batch_norm_train(*arrays, **options)
        for array, before in zip(arrays, kept, strict=True):
            np.testing.assert_array_equal(array, before)
    with pytest.raises(ValueError, match="var"):
        bncpu.batch_norm_infer(x, gamma, -np.abs(beta) - dtype.type(1))
    with pytest.raises(ValueError, match="dy"):
        bncpu.batch_norm_backward(x[:4], x, gamma, beta)
    with pytest.raises(ValueError, match="overlaps x"):
        bncpu.batch_norm_backward(x, x, gamma, beta, out=x)
    with pytest.raises(TypeError, match="residual"):
        bncpu.batch_norm_backward(x, x, gamma, beta, residual=None)
    assert not any(calls)
