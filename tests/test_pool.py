"""Memory of large results is kept for the next ones, up to a limit, and belongs to nobody else."""

import gc
import os
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pytest

import bncpu
from bncpu import cpu
from bncpu.cpu import pool

LARGE = (8, 64, 64, 64)  # 8 MB of float32
MB = 1 << 20


@pytest.fixture(autouse=True)
def empty_pool():
    limit = pool.limit()
    pool.set_limit(0)
    pool.set_limit(64 * MB)
    yield
    pool.set_limit(0)
    pool.set_limit(limit)


@pytest.fixture
def x(rng):
    return rng.normal(size=LARGE).astype(np.float32)


def test_the_next_result_begins_where_the_last_one_was(x):
    y = bncpu.batch_norm_train(x).y
    address, expected = y.ctypes.data, y.copy()
    assert y.flags.owndata
    assert y.flags.writeable
    assert pool.kept() == 0
    del y
    assert pool.kept() == x.nbytes
    again = bncpu.batch_norm_train(x).y
    assert again.ctypes.data == address
    assert pool.kept() == 0
    np.testing.assert_array_equal(again, expected)


def test_two_live_results_do_not_share_memory(x):
    first = bncpu.batch_norm_train(x)
    del first
    results = [bncpu.batch_norm_train(x * k).y for k in (1.0, np.float32(2))]
    assert not np.shares_memory(*results)


def test_a_view_keeps_its_memory(x):
    view = bncpu.batch_norm_train(x).y[1:, ::2]
    expected = view.copy()
    gc.collect()
    assert pool.kept() == 0
    bncpu.batch_norm_train(x + 1)
    np.testing.assert_array_equal(view, expected)


def test_gradients_too(x):
    _, mean, invstd = bncpu.batch_norm_train(x)
    dx = bncpu.batch_norm_backward(x, x, mean, invstd).dx
    address = dx.ctypes.data
    del dx
    assert bncpu.batch_norm_backward(x, x, mean, invstd).dx.ctypes.data == address


def test_another_size_gets_memory_of_its_own(x):
    bncpu.batch_norm_train(x)
    kept = pool.kept()
    y = bncpu.batch_norm_train(x[:5]).y
    assert pool.kept() == kept
    assert y.nbytes == x[:5].nbytes


def test_small_results_are_not_kept(x):
    bncpu.batch_norm_train(x[:1])
    assert pool.kept() == 0


def test_no_more_than_the_limit_is_kept(x):
    results = [bncpu.batch_norm_train(x).y for _ in range(12)]
    while results:
        results.pop()
        assert pool.kept() <= pool.limit()
    assert pool.kept() == 64 * MB
    pool.set_limit(20 * MB)
    assert pool.kept() == 16 * MB
    pool.set_limit(0)
    assert pool.kept() == 0
    bncpu.batch_norm_train(x)
    assert pool.kept() == 0


def test_the_oldest_goes_first(x):
    pool.set_limit(3 * x[:5].nbytes)
    results = [bncpu.batch_norm_train(x[:n]).y for n in (4, 5, 5, 5)]
    while results:
        results.pop(0)
    assert pool.kept() == 3 * x[:5].nbytes


def test_a_result_larger_than_the_limit_is_freed(x):
    pool.set_limit(6 * MB)
    bncpu.batch_norm_train(x)
    assert pool.kept() == 0


def test_results_can_be_resized(x):
    y = bncpu.batch_norm_train(x).y
    head = y.ravel()[:10].copy()
    y.resize((2 * y.size,), refcheck=False)
    np.testing.assert_array_equal(y[:10], head)
    del y
    assert pool.kept() == 2 * x.nbytes


def test_tracemalloc_sees_them(x):
    bncpu.batch_norm_train(x)
    tracemalloc.start()
    try:
        y = bncpu.batch_norm_train(x).y
        held, _ = tracemalloc.get_traced_memory()
        assert held >= y.nbytes
        del y
        held, _ = tracemalloc.get_traced_memory()
        assert held < x.nbytes
    finally:
        tracemalloc.stop()


def test_other_arrays_are_allocated_as_before(x):
    bncpu.batch_norm_train(x)
    kept = pool.kept()
    array = np.empty(LARGE, np.float32)
    assert pool.kept() == kept
    del array
    assert pool.kept() == kept


def test_from_many_threads(x):
    expected = bncpu.batch_norm_train(x).y
    wrong = []

    def work():
        for _ in range(5):
            y = bncpu.batch_norm_train(x, num_threads=1).y
            if not np.array_equal(y, expected):
                wrong.append(y)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pool.kept() <= pool.limit()


@pytest.mark.parametrize(("text", "limit"), [(None, cpu.POOL_MB << 20), ("0", 0), ("12", 12 << 20)])
def test_limits(text, limit):
    assert cpu.pool_limit(text) == limit


@pytest.mark.parametrize("text", ["", "-1", "1.5", "many", "²"])
def test_bad_limits(text):
    with pytest.raises(ImportError, match=r"BNCPU_POOL_MB=.*: expected megabytes"):
        cpu.pool_limit(text)


def test_environment():
    code = "import bncpu.cpu.pool as p, bncpu; print(p.limit()); print(bncpu.config()['pool'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"BNCPU_POOL_MB": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{7 << 20}\n0 of 7 MB kept for large results\n"
