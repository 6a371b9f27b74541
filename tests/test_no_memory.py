"""Where memory ends, a call raises MemoryError and has changed nothing.

A limit on the address space of a process of its own ends it, a little further on in every try, so
that every allocation of a call is once the one that fails: of parameters, results, copies and of
the kernels' partial sums. The threads are there before: OpenMP ends a process that cannot start
them.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bncpu.cpu

PROGRAM = """
import resource
import sys
import numpy as np
import bncpu

def limit(more):
    # Let the process grow by so many bytes; None: as it likes.
    own = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    soft = resource.RLIM_INFINITY if more is None else own + more
    resource.setrlimit(resource.RLIMIT_AS, (soft, resource.RLIM_INFINITY))

channels = 200_000
rng = np.random.default_rng(0)
contiguous = rng.standard_normal((4, channels), np.float32)
strided = np.repeat(contiguous, 2, axis=1)[:, ::2]
residual = rng.standard_normal((4, channels), np.float32)
mean, var = np.zeros(channels), np.ones(channels)
bncpu.batch_norm_train(rng.standard_normal((16, 64, 28, 28), np.float32), num_threads=2)
_, batch_mean, batch_invstd = bncpu.batch_norm_train(contiguous)

def new(dtype=np.float32):
    return np.full(contiguous.shape, 7, dtype)

def vectors(*values):
    return [np.full(channels, float(value)) for value in values]

def train(x):
    out, mask = new(), np.full((x.size + 7) // 8, 7, np.uint8)
    running = vectors(3, 4)
    call = lambda: bncpu.batch_norm_train(
        x, running_mean=running[0], running_var=running[1], residual=residual, activation="relu",
        mask=mask, out=out, num_threads=2)
    return call, [out, mask, *running]

def train_new(x):
    running = vectors(3, 4)
    call = lambda: bncpu.batch_norm_train(
        x, running_mean=running[0], running_var=running[1], num_threads=2)
    return call, running

def infer(x):
    out, mask = new(), np.full((x.size + 7) // 8, 7, np.uint8)
    call = lambda: bncpu.batch_norm_infer(
        x, mean, var, activation="relu", mask=mask, out=out, num_threads=2)
    return call, [out, mask]

def backward(x):
    dy, dresidual = new(), new() + 1
    call = lambda: bncpu.batch_norm_backward(
        dy, x, batch_mean, batch_invstd, residual=dresidual, out=new_dx, num_threads=2)
    new_dx = new()
    return call, [dy, new_dx, dresidual]

def layer_forward(x):
    layer, out = bncpu.BatchNorm(channels), new()
    call = lambda: layer.forward(x, out=out)
    return call, [layer.running_mean, layer.running_var, out], lambda: layer.num_batches_tracked

def layer_backward(x):
    layer = bncpu.BatchNorm(channels)
    layer.forward(x)
    dy = new()
    call = lambda: layer.backward(dy, out=dy)
    return call, [dy], lambda: (layer.dgamma, layer.dbeta)

seen = set()
for make in (train, train_new, infer, backward, layer_forward, layer_backward):
    for x in (contiguous, strided):
        failed = passed = 0
        for more in [*range(0, 36, 2), None]:
            call, arrays, *state = make(x)
            state = state[0] if state else lambda: None
            before = [array.copy() for array in arrays], state()
            limit(None if more is None else more << 20)
            try:
                call()
            except MemoryError as error:
                limit(None)
                failed += 1
                seen.add(str(error).split(" ", 1)[-1] if "bytes for" in str(error) else "NumPy")
                for array, old in zip(arrays, before[0]):
                    assert np.array_equal(array, old), (make.__name__, x.strides, more)
                assert state() == before[1], (make.__name__, x.strides, more)
            else:
                limit(None)
                passed += 1
        print(make.__name__, x.strides, failed, "times out of memory,", passed, "times not")
        assert failed and passed
print(sorted(seen))
"""


@pytest.mark.skipif(
    not Path("/proc/self/statm").is_file(), reason="the size of a process is in /proc"
)
def test_memory_that_ends_changes_nothing():
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ
        | {
            # What is freed goes back to the system, and is no reserve for the next try.
            "BNCPU_POOL_MB": "0",
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "OPENBLAS_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines()[-1] == (
        "['NumPy', 'bytes for parameters', 'bytes for partial sums']"
    )


def what_throws(module):
    """Return the names in a compiled module of what throws."""
    content = Path(importlib.util.find_spec(f"bncpu.cpu.{module}").origin).read_bytes()
    throw = rb"__cxa_(?:throw|rethrow|allocate_exception)|_Zn[wa]m|_ZSt\d+__throw\w*"
    return set(re.findall(throw, content))


@pytest.mark.parametrize(
    "module", ["team", *(f"kernels_{level}" for level in bncpu.cpu.compiled_levels())]
)
def test_nothing_is_thrown_where_there_is_no_gil(module):
    """Modules that run without the GIL cannot throw: they import nothing that does.

    Neither throw itself, nor operator new, nor the functions by which the standard library throws.
    """
    assert not what_throws(module)


def test_the_search_for_what_throws_finds_it():
    """The pool's module, which is used with the GIL alone, has operator new."""
    assert b"_Znwm" in what_throws("pool")
