"""Ctrl-C during a call arrives when the call returns: all of it has happened, or nothing has."""

import os
import signal
import threading

import numpy as np
import pytest
from accuracy import assert_same_bits
from cases import lay, normal

import bncpu
from bncpu import nn
from bncpu.functional import update_running
from bncpu.threads import share_out

CHANNELS = 16


@pytest.fixture(autouse=True)
def a_terminal():
    """Let SIGINT interrupt, as at a terminal: what a shell puts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt(call, after):
    """Call what does not end, and be interrupted so many seconds from now."""
    timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT))

    def run():
        try:
            timer.start()
            call()
        finally:
            timer.join()

    with pytest.raises(KeyboardInterrupt):
        run()


def call_until_interrupted(call, after=0.05):
    """Call again and again; return how many calls returned. One more may have taken place."""
    done = 0

    def calls():
        nonlocal done
        while True:
            call()
            done += 1

    interrupt(calls, after)
    return done


@pytest.mark.parametrize("layout", ["c", "inner_strided"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_training_forward(rng, layout, threads):
    """The result is whole, and both running statistics have seen the same batches."""
    x = lay(layout, normal(rng, (16, CHANNELS, 96, 97), np.float32))
    out = lay(layout, np.full_like(x, 7))
    mean, var = np.zeros(CHANNELS), np.ones(CHANNELS)

    def call(out=out, mean=mean, var=var):
        statistics = {"running_mean": mean, "running_var": var}
        return bncpu.batch_norm_train(x, out=out, num_threads=threads, **statistics).y

    done = call_until_interrupted(call)
    expected_mean, expected_var = np.zeros(CHANNELS), np.ones(CHANNELS)
    expected = np.full_like(x, 7)
    for _ in range(done):
        expected = call(None, expected_mean, expected_var)
    # Between the results and the statistics an interrupt may come; within either, it may not.
    if not np.array_equal(mean, expected_mean):
        expected = call(None, expected_mean, expected_var)
    assert_same_bits(mean, expected_mean, "running_mean")
    assert_same_bits(var, expected_var, "running_var")
    if not np.array_equal(out, expected):
        assert_same_bits(out, call(None, expected_mean, expected_var), "y")
    # And the library serves on.
    assert_same_bits(call(None), bncpu.batch_norm_train(x).y)


def test_the_update_of_running_statistics():
    """An interrupt while both are computed, which takes a while, changes none of them."""
    n = 300_000
    batch = np.full(n, 2.0), np.full(n, 3.0), 5
    mean, var = np.zeros(n), np.zeros(n)
    for after in range(20):  # milliseconds
        call_until_interrupted(lambda: update_running((mean, var), 0.5, *batch), after / 1000)
        # 2 and 3 * 5 / 4, approached by halves from 0.
        np.testing.assert_array_equal(mean / 2, var / 3.75)
        mean[...] = var[...] = 0


def test_a_backward_in_place(rng):
    """In place there is no second try: dx is whole, or dy is as it was."""
    x, dy = (normal(rng, (16, CHANNELS, 96, 97), np.float32) for _ in range(2))
    _, mean, invstd = bncpu.batch_norm_train(x)
    out = np.empty_like(dy)
    expected = bncpu.batch_norm_backward(dy, x, mean, invstd).dx

    def call():
        out[...] = dy
        bncpu.batch_norm_backward(out, x, mean, invstd, out=out)
        assert_same_bits(out, expected)

    call_until_interrupted(call)
    call()


def test_a_layer(rng):
    """Its statistics agree with each other, and its next forward and backward are right."""
    x, dy = (normal(rng, (16, CHANNELS, 96, 97), np.float32) for _ in range(2))
    layer, other = bncpu.BatchNorm(CHANNELS), bncpu.BatchNorm(CHANNELS)
    call_until_interrupted(lambda: layer.backward(layer.forward(x)))
    seen = layer.num_batches_tracked
    for _ in range(seen):
        other.forward(x)
    if not np.array_equal(layer.running_mean, other.running_mean):
        other.forward(x)  # a batch that the statistics have seen, and that is not counted yet
        assert other.num_batches_tracked == seen + 1
    assert_same_bits(layer.running_mean, other.running_mean)
    assert_same_bits(layer.running_var, other.running_var)
    assert_same_bits(layer.forward(x), other.forward(x))
    assert_same_bits(layer.backward(dy), other.backward(dy))


def test_functions_on_the_kernels_threads():
    """The interrupt is raised when all parts have ended."""
    ended = []

    def work(i):
        if i == 0:
            signal.raise_signal(signal.SIGINT)
        ended.append(i)

    with pytest.raises(KeyboardInterrupt):
        share_out(work, 2)
    assert set(ended) <= {0, 1}
    ended.clear()
    share_out(ended.append, 2)
    assert sorted(ended) == [0, 1]


def test_training(rng):
    """`fit` ends at once; model and optimizer are good to go on with."""
    x = normal(rng, (600, 20), np.float32)
    y = rng.integers(10, size=600)
    first, last = nn.Linear(20, 50, bias=False, rng=rng), nn.Linear(50, 10, rng=rng)
    model = nn.Sequential(first, nn.BatchNorm(50), last)
    optimizer = nn.SGD(0.1, momentum=0.9)
    interrupt(lambda: nn.fit(model, optimizer, x, y, steps=10**9), 0.1)
    record = nn.fit(model, optimizer, x, y, epochs=2)[-1]
    assert record.step == 20
    assert np.isfinite(record.loss)
    for array in model.state_dict().values():
        assert np.isfinite(array).all()
