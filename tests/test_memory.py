"""How much memory a call takes beside its arrays: none that grows with them.

NumPy tells tracemalloc of every array; what a kernel allocates for itself shows in the peak of the
process alone, which a process of its own measures.
"""

import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from cases import FLOATS, HALVES, Output, new_mask, normal, parameters, statistics
from forms import FORMS

import bncpu

# Vectors of one float64 per channel that a call may hold at once (parameters, statistics, running
# statistics and their new values, gradients of parameters), and what Python itself takes.
VECTORS = 24
PYTHON = 32 * 1024
SHAPES = {
    "rows": ((8, 32, 56, 57), 1, "c"),
    "columns": ((4001, 300), 1, "c"),
    "channels_last": ((8, 33, 40, 41), 1, "channels_last"),
    "samples_cut": ((16, 32, 28, 28), 1, "samples_strided"),
    "channels_cut": ((16, 32, 28, 28), 1, "channels_cut"),
}


def peak_of(function, *arguments, **options):
    """Return the most bytes held during a call beyond what was held before it."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        result = function(*arguments, **options)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    del result
    return peak - before


@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES], ids=str)
@pytest.mark.parametrize("which", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_no_array_is_made_but_the_result(rng, dtype, which, form):
    """With out= nothing of x's size; without it the result; dresidual where it is asked for."""
    shape, axis, layout = SHAPES[which]
    form = FORMS[form]
    own = PYTHON + VECTORS * 8 * shape[axis]
    x, dy, residual, out, other = (Output(layout, shape, dtype).array for _ in range(5))
    for array in (x, dy, residual):
        array[...] = normal(rng, shape, dtype)
    # What is asked for must show: an array is far larger than all that is allowed beside it.
    assert x.nbytes > 8 * own
    mean, var = statistics(rng, shape[axis])
    inputs = parameters(rng, shape[axis], dtype)
    forward = {"activation": form.activation, "mask": new_mask(x) if form.mask else None}
    backward = dict(forward)
    forward |= {"residual": residual} if form.residual else {}
    for function, arrays in [
        (bncpu.batch_norm_train, (x, *inputs)),
        (bncpu.batch_norm_infer, (x, mean, var, *inputs)),
    ]:
        function(*arrays, out=out, **forward)  # so that nothing is done for the first time
        assert peak_of(function, *arrays, out=out, **forward) < own
        peak = peak_of(function, *arrays, **forward)
        assert x.nbytes <= peak < x.nbytes + own
        if form.residual:
            assert peak_of(function, *arrays, out=residual, **forward) < own
    assert peak_of(bncpu.batch_norm_infer, x, mean, var, *inputs, out=x, **forward) < own
    assert peak_of(bncpu.batch_moments, x) < own
    if not form.has_backward:
        return
    for function in (bncpu.batch_norm_backward, bncpu.batch_norm_infer_backward):
        arrays = (dy, x, mean, var, *inputs)
        into = {"out": out, "residual": other if form.residual else False}
        function(*arrays, **into, **backward)
        assert peak_of(function, *arrays, **into, **backward) < own
        assert peak_of(function, *arrays, **(into | {"out": dy}), **backward) < own
        peak = peak_of(function, *arrays, **backward)
        assert x.nbytes <= peak < x.nbytes + own
        if form.residual:
            into = {"out": out, "residual": True}
            peak = peak_of(function, *arrays, **into, **backward)
            # Without an activation dresidual is dy itself.
            assert peak < own if not form.relu else x.nbytes <= peak < x.nbytes + own


# Prints how far the peak of the process' memory rises above what its arrays take, in bytes, and
# what the arrays take. Nothing here makes an array that it does not keep.
PEAK = """
import numpy as np
from pathlib import Path
import bncpu

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name + ":")).split()[1])

shape, threads = {shape}, {threads}
channels = shape[1]
x, dy, residual, out, other = (np.full(shape, value, np.{dtype}) for value in range(1, 6))
mask = np.zeros(x.size // 8 + 1, np.uint8)[: (x.size + 7) // 8]
x[1:] += 1
mean, var = np.zeros(channels), np.ones(channels)

def call(x, dy, residual, out, other, mean, var, mask):
    fused = dict(activation="relu", mask=mask, num_threads=threads)
    bncpu.batch_norm_train(x, residual=residual, out=out, **fused)
    bncpu.batch_norm_infer(x, mean, var, residual=residual, out=out, **fused)
    bncpu.batch_norm_backward(dy, x, mean, var, residual=other, out=out, **fused)
    bncpu.batch_norm_infer_backward(dy, x, mean, var, residual=other, out=out, **fused)
    bncpu.batch_norm_train(x, activation="relu", out=out, num_threads=threads)
    bncpu.batch_norm_backward(dy, x, mean, var, activation="relu", out=out, num_threads=threads)
    bncpu.batch_moments(x, num_threads=threads)

some = [np.ones((8, 64, 32, 32), np.{dtype}) for _ in range(5)]
# From here on there are the threads, and their stacks.
call(*some, np.zeros(64), np.ones(64), np.zeros(some[0].size // 8, np.uint8))
del some
Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
before = status("VmRSS")
call(x, dy, residual, out, other, mean, var, mask)
print(status("VmHWM") - before, x.nbytes)
"""


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="this system keeps no peak to reset"
)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("shape", "dtype"), [((16, 64, 112, 112), "float32"), ((200_001, 65), "float16")], ids=str
)
def test_kernels_allocate_next_to_nothing(threads, shape, dtype):
    """Partial sums, some hundred per channel, and no copy of any array."""
    run = subprocess.run(
        [sys.executable, "-c", PEAK.format(shape=shape, threads=threads, dtype=dtype)],
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    rise, size = map(int, run.stdout.split())
    assert size > 20e6
    parts = 128 * shape[1] * 16 * threads  # two sums of every channel in at most 128 parts
    # Beside them the first use of a path brings its code into memory.
    assert rise < 4e6 + parts < size / 4


def test_the_peak_is_seen():
    """A guard of the guard: tracemalloc knows of NumPy's arrays."""
    assert peak_of(np.ones, 10**6) >= 8e6
