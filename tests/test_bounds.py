"""No kernel reads or writes a byte outside its arrays: arrays that end, or begin, at a guard page.

A page that nobody may touch turns such an access into a segmentation fault, which happens in a
forked child and is seen from here as its exit code.
"""

import ctypes
import faulthandler
import itertools
import mmap
import multiprocessing
import os
import signal
import warnings

import numpy as np
import pytest
from cases import FLOATS, HALVES, new_mask, normal
from forms import FORMS, problem, run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

SIZES = [
    *((2, 3, s) for s in (1, 7, 9, 17, 33, 97, 513, 2049)),
    *((5, 2, s) for s in (8, 15, 16, 31, 32, 49, 65, 511)),
    *((9, 37), (130, 1), (7, 65), (5, 1025), (3, 8), (6, 5, 7), (8, 67, 49)),
]
NO_ACCESS = 0  # PROT_NONE
PAGE = mmap.PAGESIZE


def guarded(values, at_end):
    """Return the values in memory that ends, or begins, beside a page that may not be touched."""
    room = -(-values.nbytes // PAGE) * PAGE
    memory = mmap.mmap(-1, room + 2 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    for page in (address, address + PAGE + room):
        failed = mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), NO_ACCESS)
        assert not failed, os.strerror(ctypes.get_errno())
    offset = PAGE + (room - values.nbytes if at_end else 0)
    array = np.frombuffer(memory, values.dtype, values.size, offset).reshape(values.shape)
    array[...] = values
    return array


def call_all(seed, dtype, size, axis, at_end):
    rng = np.random.default_rng(seed)
    p = problem(rng, size, dtype, axis)
    p = p._replace(
        **{name: guarded(a, at_end) for name, a in p._asdict().items() if name != "axis"}
    )
    out, other = (guarded(normal(rng, size, dtype), at_end) for _ in range(2))
    results = itertools.cycle([out, other])  # dx and dresidual are asked for one after the other
    mask = guarded(new_mask(p.x), at_end)
    for form in FORMS.values():
        run(form, p, out=lambda: next(results), mask=lambda _: mask)


def exit_code_of(function, *arguments):
    child = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads and fork, Python 3.12
        child.start()
    child.join(120)
    if child.is_alive():
        child.kill()
        child.join()
    return child.exitcode


def call_with_every_size(seed, dtype, axis, at_end):
    for size in SIZES:
        call_all(seed, dtype, size, axis, at_end)


@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES], ids=str)
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.usefixtures("level")
def test_no_access_outside(rng, dtype, axis, at_end):
    seed = int(rng.integers(2**32))
    assert exit_code_of(call_with_every_size, seed, dtype, axis, at_end) == 0


def read_one_too_many(at_end):
    array = guarded(np.arange(3.0), at_end)
    beyond = np.lib.stride_tricks.as_strided(array, (5,), (8 if at_end else -8,))
    print(beyond.sum())


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
def test_the_guard_guards(at_end):
    # The child's death is expected; its last words need not fill the log.
    was_enabled = faulthandler.is_enabled()
    faulthandler.disable()
    try:
        assert exit_code_of(read_one_too_many, at_end) == -signal.SIGSEGV
    finally:
        if was_enabled:
            faulthandler.enable()
