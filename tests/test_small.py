"""Small plain calls take a way of their own; nobody can tell by the result.

num_threads=1 is what a plain call never says, so it leads the same arrays through the checks and
the kernels of every other call.
"""

import numpy as np
import pytest
from accuracy import assert_same_bits
from cases import normal, parameters

import bncpu
import bncpu.cpu

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
    (5, 512),
    (2, 3, 4, 5, 6),
    (9, 1, 33),
]
FORMS = [{}, {"activation": "relu"}, {"eps": 0.25}]


def both(function, *arrays, **options):
    """Return the results of a plain call and of the same call by the other way, as lists."""
    results = []
    for more in ({}, {"num_threads": 1}):
        result = function(*arrays, **options, **more)
        results.append(list(result) if isinstance(result, tuple) else [result])
    return results


def assert_same(function, *arrays, **options):
    plain, other = both(function, *arrays, **options)
    assert len(plain) == len(other)
    for a, b in zip(plain, other, strict=True):
        if a is None or b is None:
            assert a is b
        else:
            assert_same_bits(a, b)
            assert type(a) is np.ndarray
            assert a.flags.c_contiguous
            assert a.flags.writeable


@pytest.fixture
def calls(monkeypatch):
    """Count the small calls that are taken."""
    kernels, taken = bncpu.cpu.kernels, []

    class Counting:
        def __getattr__(self, name):
            function = getattr(kernels, name)
            if not name.startswith("small_"):
                return function

            def call(*arguments):
                result = function(*arguments)
                taken.append(result is not None)
                return result

            return call

    monkeypatch.setattr(bncpu.cpu, "kernels", Counting())
    return taken


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits(rng, dtype, calls, shape, options):
    x, dy = normal(rng, shape, dtype), normal(rng, shape, dtype)
    gamma, beta = parameters(rng, shape[1], dtype)
    for scale, shift in [(gamma, beta), (None, None), (gamma, None), (None, beta)]:
        assert_same(bncpu.batch_norm_train, x, scale, shift, **options)
        mean, spread = x.reshape(len(x), shape[1], -1).mean((0, 2)), np.abs(gamma) + dtype.type(0.5)
        for statistics in [(mean, spread), (mean.astype(np.float64), spread.astype(np.float32))]:
            assert_same(bncpu.batch_norm_infer, x, *statistics, scale, shift, **options)
            kept = {name: value for name, value in options.items() if name != "eps"}
            assert_same(bncpu.batch_norm_backward, dy, x, *statistics, scale, shift, **kept)
    assert all(calls)


@pytest.mark.parametrize("running", [np.float32, np.float64])
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_running_statistics(rng, dtype, calls, running, momentum):
    x = normal(rng, (7, 5, 3), dtype)
    statistics = []
    for more in ({}, {"num_threads": 1}):
        mean, var = np.linspace(-1, 1, 5).astype(running), np.linspace(1, 2, 5).astype(running)
        bncpu.batch_norm_train(x, running_mean=mean, running_var=var, momentum=momentum, **more)
        statistics.append((mean, var))
    for a, b in zip(*statistics, strict=True):
        assert_same_bits(a, b)
    assert calls == [True]


def test_what_is_not_plain_goes_the_other_way(rng, dtype, calls):
    """Other kinds of arguments, right ones and wrong ones, get what they always get."""
    x = normal(rng, (8, 6), dtype)
    gamma, beta = parameters(rng, 6, dtype)
    wide = normal(rng, (8, 12), dtype)[:, ::2]
    large = normal(rng, (300, 513), dtype)
    shared = np.zeros(12, dtype)
    read_only = np.zeros(6, dtype)
    read_only.flags.writeable = False
    for arrays, options, error in [
        ((wide,), {}, None),
        ((x.T.copy().T,), {}, None),
        ((large,), {}, None),
        ((x.astype(np.float16),), {}, None),
        ((x, gamma[::-1]), {}, None),
        ((x,), {"axis": 0}, None),
        ((x,), {"axis": (1,)}, None),
        ((x,), {"eps": 1}, None),
        ((x.astype(x.dtype.newbyteorder()),), {}, TypeError),
        ((x.astype(np.int32),), {}, TypeError),
        ((x, gamma.astype(np.longdouble)), {}, TypeError),
        ((x, gamma[:3]), {}, ValueError),
        ((x[:1],), {}, ValueError),
        ((x,), {"axis": 2}, ValueError),
        ((x,), {"eps": -1.0}, ValueError),
        ((x,), {"eps": float("nan")}, ValueError),
        ((x,), {"activation": "tanh"}, ValueError),
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
    assert not any(calls)
    with pytest.raises(ValueError, match="var"):
        bncpu.batch_norm_infer(x, gamma, -np.abs(beta) - dtype.type(1))
    with pytest.raises(ValueError, match="dy"):
        bncpu.batch_norm_backward(x[:4], x, gamma, beta)
    assert not any(calls)
