"""Other users of OpenMP in the process: other libraries' runtimes, regions within regions, limits.

Whether calls are as fast beside them is measured by benchmarks/beside.py.
"""

import concurrent.futures
import functools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import threadpoolctl
from accuracy import assert_same_bits
from cases import normal

import bncpu
from bncpu.threads import share_out

pytestmark = pytest.mark.skipif(
    not any(pool["user_api"] == "openmp" for pool in threadpoolctl.threadpool_info()),
    reason="a serial build",
)


@functools.cache
def beside(name, order):
    """Return what tests/beside_openmp.py prints."""
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("beside_openmp.py"), name, order],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("order", ["first", "last"])
@pytest.mark.parametrize("name", ["torch", "sklearn"])
def test_another_library_beside_us(name, order):
    pytest.importorskip(name, reason="PyTorch is not installed" if name == "torch" else None)
    got, alone = beside(name, order), beside("none", "last")
    assert set(got["digests"]) == set(alone["digests"])
    assert len(set(alone["digests"])) == 1
    # scikit-learn's wheels bring a runtime of their own; PyTorch's has the name of the system's,
    # and the first that is loaded serves both. Ours is limited whichever it is.
    assert got["threads"] == alone["threads"]
    assert (got["threads"]["1"], got["threads"]["3"]) == (1, 3)


def test_a_limit_in_a_worker_limits_that_worker():
    """Threadpoolctl's limits are a thread's own, and so is the number of threads of its calls."""
    entered, seen = threading.Barrier(2), {}

    def limited():
        with threadpoolctl.threadpool_limits(1, user_api="openmp"):
            entered.wait(60)
            seen["limited"] = bncpu.get_num_threads()
            entered.wait(60)

    def free():
        entered.wait(60)
        seen["free"] = bncpu.get_num_threads()
        entered.wait(60)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(limited), pool.submit(free)]:
            future.result(120)
        after = pool.submit(bncpu.get_num_threads).result(120)
    assert seen["limited"] == 1
    assert seen["free"] == after == bncpu.get_num_threads()


@pytest.mark.usefixtures("default_threads")
def test_the_order_of_wishes():
    """A call's own number, then the lower of set_num_threads and a later limit, then OpenMP's."""
    with threadpoolctl.threadpool_limits(4, user_api="openmp"):
        assert bncpu.get_num_threads() == 4
        bncpu.set_num_threads(3)
        assert bncpu.get_num_threads() == 3
        with threadpoolctl.threadpool_limits(2, user_api="openmp"):
            assert bncpu.get_num_threads() == 2
            bncpu.set_num_threads(5)  # a wish after the limit
            assert bncpu.get_num_threads() == 5
            assert bncpu.threads.threads_for_call(7) == 7
        bncpu.set_num_threads(None)
        assert bncpu.get_num_threads() == 4


def test_calls_within_a_region(rng):
    """Calls from within a parallel region of the same runtime take one thread, and its bits."""
    x = normal(rng, (8, 64, 28, 28), np.float32)
    expected = bncpu.batch_norm_train(x, num_threads=1)
    results = [None] * 3

    def work(i):
        results[i] = bncpu.batch_norm_train(x, num_threads=2)
        share_out(lambda _: None, 2)

    share_out(work, 3)
    for result in results:
        for got, wanted in zip(result, expected, strict=True):
            assert_same_bits(got, wanted)
