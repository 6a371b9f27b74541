"""CuPy's own arrays through the public functions, without a GPU: its objects over host memory.

CuPy needs no driver to make an array of memory that somebody gives it, to say where that lies, and
to view it. So everything that bncpu asks of an array in a plain call is asked here of CuPy itself;
only what would run on the device is taken from the stand-in: the kernels and the device's facts.
Where there is a GPU, test_gpu.py does without any of this.
"""

import ctypes
import sys
import warnings

import cupy_standin
import numpy as np
import pytest
from accuracy import assert_same_bits
from cases import FLOATS, HALVES
from forms import EVERYTHING, check, problem

import bncpu
import bncpu.backends


def cupy_itself():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks for a toolkit, and there may be none
        return pytest.importorskip("cupy", reason="needs CuPy, if not the GPU that it is for")


@pytest.fixture
def cupy(monkeypatch):
    cupy = cupy_itself()
    if cupy.cuda.is_available():
        pytest.skip("there is a GPU, on which test_gpu.py tries all this")
    cupy_standin.reset()
    monkeypatch.delitem(sys.modules, "bncpu.cuda.kernels", raising=False)
    monkeypatch.setattr(cupy.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 0)
    monkeypatch.setattr(cupy.cuda, "Device", cupy_standin.Device)
    monkeypatch.setattr(cupy, "RawModule", cupy_standin.RawModule)
    bncpu.backends._cuda_kernels.cache_clear()
    bncpu.backends._check_capability.cache_clear()

    def allocate(size):
        memory = np.full(size + 512, 0xA5, np.uint8)
        unowned = cupy.cuda.UnownedMemory(memory.ctypes.data, memory.nbytes, memory, 0)
        return cupy.cuda.MemoryPointer(unowned, -memory.ctypes.data % 512)

    with cupy.cuda.using_allocator(allocate):
        yield cupy
    bncpu.backends._cuda_kernels.cache_clear()
    bncpu.backends._check_capability.cache_clear()


def moved(cupy, array):
    there = cupy.empty(array.shape, array.dtype)
    ctypes.memmove(there.data.ptr, np.ascontiguousarray(array).ctypes.data, array.nbytes)
    return there


def fetched(array):
    """Return a copy of an array of CuPy's that lies in host memory, strides and all."""
    memory = ctypes.cast(array.data.ptr, ctypes.POINTER(ctypes.c_ubyte))
    flat = np.ctypeslib.as_array(memory, (array.nbytes,))
    return np.ndarray(array.shape, array.dtype, flat, strides=array.strides).copy()


@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES], ids=str)
@pytest.mark.parametrize("axis", [1, -1])
def test_everything_once(rng, cupy, dtype, axis):
    p = problem(rng, (4, 5, 6, 7), dtype, axis=axis)
    dy, x, residual, mean, var, gamma, beta = (moved(cupy, a) for a in p[:7])
    fused = {"axis": axis, "activation": "relu"}
    masks = [cupy.empty((p.x.size + 7) // 8, np.uint8) for _ in range(2)]
    running = [moved(cupy, a) for a in (np.zeros(mean.shape), np.ones(mean.shape, np.float32))]

    moments = bncpu.batch_moments(x, axis=axis)
    y = bncpu.batch_norm_infer(x, mean, var, gamma, beta, residual=residual, mask=masks[0], **fused)
    trained = bncpu.batch_norm_train(
        *(x, gamma, beta),
        running_mean=running[0],
        running_var=running[1],
        residual=residual,
        mask=masks[1],
        **fused,
    )
    out, dresidual = cupy.empty_like(x), cupy.empty_like(x)
    frozen = bncpu.batch_norm_infer_backward(
        *(dy, x, mean, var, gamma, beta), mask=masks[0], residual=True, **fused
    )
    through = bncpu.batch_norm_backward(
        *(dy, x, trained.mean, trained.invstd, gamma, beta),
        mask=masks[1],
        residual=dresidual,
        out=out,
        **fused,
    )
    assert through.dx is out
    assert through.dresidual is dresidual
    got = {"moments mean": moments.mean, "moments m2": moments.m2}
    got |= {"infer y": y, "infer mask": masks[0], "train mask": masks[1]}
    got |= {f"train {name}": a for name, a in (trained._asdict() | through._asdict()).items()}
    got |= {f"infer {name}": a for name, a in frozen._asdict().items()}
    for a in got.values():
        assert isinstance(a, cupy.ndarray)
    check(EVERYTHING, p, {name: fetched(a) for name, a in got.items()})
    assert (fetched(running[0]) != 0).all()
    assert (fetched(running[1]) != 1).all()


def test_views(rng, cupy):
    """Channels last in memory, and an output that steps over every other sample."""
    p = problem(rng, (4, 5, 6, 7), np.float32)
    x, mean, var = (moved(cupy, a) for a in (p.x, p.mean, p.var))
    seen = x.transpose(0, 2, 3, 1)
    y = bncpu.batch_norm_infer(seen, mean, var, axis=-1)
    assert y.strides == seen.strides
    out = cupy.empty((8, 5, 6, 7), np.float32)[::2]
    assert bncpu.batch_norm_infer(x, mean, var, out=out) is out
    last = np.ascontiguousarray(fetched(y).transpose(0, 3, 1, 2))
    first = np.concatenate([fetched(out[i]) for i in range(4)]).reshape(last.shape)
    assert_same_bits(last, first)


def test_what_is_refused(rng, cupy):
    p = problem(rng, (4, 5, 6), np.float32)
    x, gamma = moved(cupy, p.x), moved(cupy, p.gamma)
    for call, error, match in [
        (lambda: bncpu.batch_norm_train(x, p.gamma), TypeError, "^gamma: expected a CuPy array"),
        (lambda: bncpu.batch_norm_train(p.x, gamma), TypeError, "^gamma: expected a NumPy array"),
        (lambda: bncpu.batch_norm_train(x, out=x[::-1]), ValueError, "^out: overlaps x"),
        (lambda: bncpu.batch_norm_train(x, out=x[:2]), ValueError, "^out: expected shape"),
        (lambda: bncpu.batch_norm_train(x.view(np.int32)), TypeError, "^x: expected dtype"),
        (lambda: bncpu.batch_norm_train(x, gamma[::2]), ValueError, "^gamma: expected shape"),
    ]:
        with pytest.raises(error, match=match):
            call()
    assert not cupy_standin.state.launches


def test_overlap_is_told_by_addresses(cupy):
    base = cupy.empty((8, 5, 6), np.float32)
    with pytest.raises(ValueError, match=r"^out: overlaps x"):
        bncpu.batch_norm_train(base[:4], out=base[3:7])
    bncpu.batch_norm_train(base[:4], out=base[4:])
    bncpu.batch_norm_train(base[::2], out=base[1::2])
