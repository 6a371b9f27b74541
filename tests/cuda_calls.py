"""Calls of the CUDA kernels on host memory, each array with a page behind it that none may touch.

The steps of a call that bncpu.cuda takes on a device, written once more and shorter: the walk, the
plan, the parameters, the launches. What is computed has the names that forms.check knows.
"""

import ctypes
import mmap
import tempfile

import cuda_emulator
import numpy as np
from cases import new_mask, parameter_dtype

from bncpu.cuda.plan import PARAMETERS, Device, access, instance, options, plan, widths
from bncpu.layout import geometry

# Where a tile fits into shared memory, and where none does.
WHOLE = Device(processors=1, shared_per_block=227 << 10)
PARTS = Device(processors=1, shared_per_block=0)
DEVICES = {"whole": WHOLE, "parts": PARTS}
DTYPES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
INSTANCES = [
    instance(dtype, vector, tiled)
    for dtype, itemsize in DTYPES.items()
    for tiled in (False, True)
    for vector in widths(itemsize, tiled)
]


def guarded(array, shift=0):
    """Return a copy with the same order of axes that ends where a page begins that none may touch.

    shift: bytes by which it ends earlier, a multiple of its items.
    """
    page = mmap.PAGESIZE
    order = np.argsort([-s for s in array.strides], kind="stable")
    size = array.nbytes + shift
    pages = -(-size // page) * page
    memory = mmap.mmap(-1, pages + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert libc.mprotect(start + pages, page, 0) == 0
    flat = np.ndarray((array.nbytes,), np.uint8, memory, pages - size).view(array.dtype)
    copy = flat.reshape([array.shape[a] for a in order]).transpose(np.argsort(order))
    copy[...] = array
    return copy


def far_apart(values):
    """Lay samples more than 2^31 elements apart, in a file of which little is ever there."""
    stride = ((1 << 31) + 24) * values.itemsize
    size = stride * (len(values) - 1) + values[0].nbytes
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        memory = mmap.mmap(file.fileno(), size)
    of_sample = values[0].nbytes // np.array(values.shape[1:]).cumprod()
    array = np.ndarray(values.shape, values.dtype, memory, 0, (stride, *map(int, of_sample)))
    array[...] = values
    return array


class Call:
    """How calls are made: on which device, in which order of threads, with what arrays."""

    def __init__(
        self,
        device=WHOLE,
        seed=0,
        load=cuda_emulator.load,
        *,
        shift=0,
        layout=None,
        in_order=tuple,
    ):
        self.device, self.seed, self.load = device, seed, load
        self.shift, self.layout, self.in_order = shift, layout, in_order
        self.plans = []

    def memory(self, array):
        """Return a guarded copy, or None for None."""
        return None if array is None else guarded(np.asarray(array), self.shift)

    def array(self, values):
        """Return an array of x's shape, guarded or, where a layout is asked for, laid out so."""
        return self.layout(values) if self.layout else self.memory(values)

    def __call__(self, operation, axis, arrays, values, *, mask=None, fills_mask=False, **numbers):
        """Launch an operation over arrays of x's shape and vectors of channels, by name."""
        arrays = {name: a for name, a in arrays.items() if a is not None}
        values = {name: a.reshape(-1) for name, a in values.items() if a is not None}
        x = arrays["x"]
        axes = tuple(a % x.ndim for a in (axis if isinstance(axis, tuple) else (axis,)))
        strides = tuple(a.strides for a in arrays.values())
        walk = geometry(x.shape, axes, x.itemsize, strides)
        assert walk is not None
        assert walk.complete
        sizes = (x.itemsize, walk.rows, walk.channels, walk.run)
        lies = [
            (a.ctypes.data, place.row, place.channel)
            for a, place in zip(arrays.values(), walk.places, strict=True)
        ]
        chosen = plan(operation, *sizes, access(*sizes, lies), self.device, fills_mask)
        self.plans.append(chosen)
        partials = self.memory(np.full(chosen.workspace // 8, np.nan))

        parameters = np.zeros(1, PARAMETERS)
        for name, lie in zip(arrays, lies, strict=True):
            parameters[name] = lie
        for name, a in values.items():
            parameters[name] = (a.ctypes.data, a.strides[0] // a.itemsize, a.dtype == np.float64)
        parameters["mask"] = 0 if mask is None else mask.ctypes.data
        parameters["partials"] = partials.ctypes.data if partials.size else 0
        for name, value in (*chosen.fields, *numbers.items()):
            parameters[name] = value
        module = self.load(options(x.dtype.name, chosen))
        for launch in self.in_order(chosen.launches):
            module.launch(*launch, parameters, seed=self.seed)


def run(form, p, call, *, train=True, in_place=False, eps=1e-5, momentum=0.1):
    """Return all that the operations compute in a form on a problem of forms.py, by name.

    in_place: results take the place of x, residual or dy, where they may.
    """
    channels = p.mean.shape
    x, dy, residual = call.array(p.x), call.array(p.dy), call.array(p.residual)
    affine = {"gamma": call.memory(p.gamma), "beta": call.memory(p.beta)}
    fixed = {"mean": call.memory(p.mean), "var": call.memory(p.var)}
    how = {"relu": form.relu, "eps": eps, "momentum": momentum}

    def empty(dtype=np.float64):
        return call.memory(np.full(channels, 12345, dtype))

    def like_x():
        return call.array(np.full_like(x, 12345))

    def mask():
        return call.memory(new_mask(x)) if form.mask else None

    def forward(operation, values, out):
        bits, read = mask(), x
        given = residual if form.residual else None
        if in_place and form.residual:
            given = out = call.array(p.residual)
        elif in_place and operation == "infer":
            read = out = call.array(p.x)
        arrays = {"x": read, "residual": given, "out": out}
        call(operation, p.axis, arrays, values, mask=bits, fills_mask=form.mask, **how)
        return out, bits

    def backward(operation, values, bits):
        dgamma, dbeta = (empty(parameter_dtype(x.dtype)) for _ in range(2))
        values = values | {"dgamma": dgamma, "dbeta": dbeta} | affine
        given = call.array(p.dy) if in_place else dy
        out = given if in_place else like_x()
        dresidual = like_x() if form.residual else None
        arrays = {"x": x, "dy": given, "out": out, "dresidual": dresidual}
        call(operation, p.axis, arrays, values, mask=bits, **how)
        return {"dx": out, "dgamma": dgamma, "dbeta": dbeta, "dresidual": dresidual}

    got = {"moments mean": empty(), "moments m2": empty()}
    call("moments", p.axis, {"x": x}, {"mean": got["moments mean"], "m2": got["moments m2"]})
    y, bits = forward("infer", fixed | affine, like_x())
    got |= {"infer y": y, "infer mask": bits}
    if form.has_backward:
        gradients = backward("infer_backward", fixed, bits)
        got |= {f"infer {name}": a for name, a in gradients.items()}
    if not train:
        return got
    batch = {"mean": empty(), "invstd": empty()}
    running = {
        "running_mean": call.memory(np.zeros(channels, np.float32)),
        "running_var": call.memory(np.ones(2 * p.mean.size))[::2],
    }
    y, bits = forward("train", batch | running | affine, like_x())
    got |= {"train y": y, "train mask": bits} | {f"train {n}": a for n, a in batch.items()}
    got |= running
    if form.has_backward:
        gradients = backward("backward", batch, bits)
        got |= {f"train {name}": a for name, a in gradients.items()}
    return got
