"""A stand-in for the module cupy, on machines without a GPU: what bncpu uses of it, and no more.

Arrays wrap NumPy memory but are none: like CuPy's they refuse to become NumPy arrays unasked, have
no flags but contiguity, and belong to a device. Kernels run in the emulator (cuda_emulator.py).
What CuPy would refuse is refused, and what makes a real program wait for its GPU is written down in
`state.waits`. test_gpu.py runs the same calls on CuPy itself.
"""

import ctypes
import operator
import time
from types import SimpleNamespace

import numpy as np

__version__ = "14.0.0"

# What the tests look at and turn.
state = SimpleNamespace()


def reset():
    """Forget what has happened: one modern device with plenty of memory, and an old one."""
    state.available = True
    state.device = 0
    state.capabilities = {0: "90", 1: "90", 2: "70"}
    state.processors = 4
    state.shared = 227 << 10
    state.allocations_left = None
    state.waits = []
    state.launches = []
    state.modules = []


reset()


class OutOfMemoryError(MemoryError):
    """As CuPy's."""


def _allocate(size):
    if state.allocations_left is not None:
        if state.allocations_left == 0:
            raise OutOfMemoryError(f"Out of memory allocating {size} bytes")
        state.allocations_left -= 1
    # Aligned as CuPy's pool does it, and full of what nobody has written.
    memory = np.full(size + 512, 0xA5, np.uint8)
    start = -memory.ctypes.data % 512
    return memory[start : start + size]


def _wait(what):
    state.waits.append(what)


class MemoryPointer:
    """Where something is, and on which device."""

    def __init__(self, ptr, device_id, memory):
        self.ptr, self.device_id, self.mem = ptr, device_id, memory

    def copy_from_device_async(self, src, size):
        ctypes.memmove(self.ptr, src.ptr, size)


class Flags:
    """All the flags that CuPy has."""

    def __init__(self, flags):
        self.c_contiguous, self.f_contiguous = flags.c_contiguous, flags.f_contiguous
        self.owndata = flags.owndata


class ndarray:  # noqa: N801 - CuPy's name
    """An array of a device, made by the functions below."""

    __array_priority__ = 100

    def __init__(self, memory, device=None):
        self._a = memory
        self._device = state.device if device is None else device

    shape = property(lambda self: self._a.shape)
    strides = property(lambda self: self._a.strides)
    dtype = property(lambda self: self._a.dtype)
    ndim = property(lambda self: self._a.ndim)
    size = property(lambda self: self._a.size)
    itemsize = property(lambda self: self._a.itemsize)
    nbytes = property(lambda self: self._a.nbytes)
    flags = property(lambda self: Flags(self._a.flags))
    T = property(lambda self: self._like(self._a.T))
    device = property(lambda self: Device(self._device))

    @property
    def data(self):
        return MemoryPointer(self._a.__array_interface__["data"][0], self._device, self._a)

    def _like(self, memory):
        return ndarray(memory, self._device)

    def __len__(self):
        return len(self._a)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __repr__(self):
        _wait("repr")
        return repr(self._a)

    def __array__(self, *args, **kwargs):
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    def get(self, **how):
        assert not how, how
        _wait("get")
        return np.array(self._a, order="K")

    def __bool__(self):
        _wait("bool")
        return bool(self._a)

    def __int__(self):
        _wait("int")
        return int(self._a)

    def __float__(self):
        _wait("float")
        return float(self._a)

    def item(self):
        _wait("item")
        return self._a.item()

    # Views.
    def view(self, dtype):
        return self._like(self._a.view(dtype))

    def transpose(self, *axes):
        return self._like(self._a.transpose(*axes))

    def __getitem__(self, index):
        index = _indices(index)
        found = self._a[index]
        return self._like(found if isinstance(found, np.ndarray) else _new(found))

    def __setitem__(self, index, value):
        self._a[_indices(index)] = _memory(value)

    # Copies, which take memory.
    def reshape(self, *shape):
        reshaped = self._a.reshape(*shape)
        if self._a.size and not np.shares_memory(reshaped, self._a):
            reshaped = _new(reshaped)
        return self._like(reshaped)

    def ravel(self):
        return self.reshape(-1)

    def astype(self, dtype, order="K", copy=True):
        if not copy and self.dtype == dtype and (order == "K" or self._a.flags.c_contiguous):
            return self
        return self._like(_new(self._a.astype(dtype, order=order)))

    def copy(self, order="C"):
        return self._like(_new(self._a.copy(order=order)))

    def fill(self, value):
        self._a.fill(value)

    def __dlpack__(self, **how):
        raise BufferError("this memory is on a GPU")

    def __dlpack_device__(self):
        return 2, self._device

    def __array_ufunc__(self, function, method, *inputs, **how):
        if method != "__call__" or any(isinstance(i, np.ndarray) for i in inputs):
            return NotImplemented
        return _compute(function, *inputs, **how)

    def __array_function__(self, function, types, args, kwargs):
        here = globals().get(function.__name__)
        if here is None:
            return NotImplemented
        return here(*args, **kwargs)


def _indices(index):
    if isinstance(index, tuple):
        return tuple(_indices(i) for i in index)
    return index._a if isinstance(index, ndarray) else index


def _memory(value):
    # CuPy takes its own arrays, numbers, and NumPy's arrays of one element.
    if isinstance(value, ndarray):
        return value._a
    if isinstance(value, np.ndarray) and value.size != 1:
        raise TypeError(f"Unsupported type {type(value)}")
    return value


def _new(values):
    values = np.asarray(values)
    order = sorted(range(values.ndim), key=lambda a: (-abs(values.strides[a]), a))
    memory = _allocate(values.nbytes).view(values.dtype)
    new = memory.reshape([values.shape[a] for a in order]).transpose(np.argsort(order))
    new[...] = values
    return new


def _compute(function, *inputs, out=None, **how):
    assert out is None, "bncpu writes nowhere through out="
    with np.errstate(all="ignore"):  # a GPU tells of nothing
        result = function(*map(_memory, inputs), **how)
    return ndarray(_new(result))


def _operator(name, function):
    def method(self, other):
        if isinstance(other, np.ndarray):
            return NotImplemented
        return _compute(function, self, other)

    def reflected(self, other):
        return _compute(function, other, self)

    def in_place(self, other):
        with np.errstate(all="ignore"):
            function(self._a, _memory(other), out=self._a, casting="same_kind")
        return self

    setattr(ndarray, f"__{name}__", method)
    setattr(ndarray, f"__r{name}__", reflected)
    setattr(ndarray, f"__i{name}__", in_place)


for _name, _function in {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "truediv": np.true_divide,
    "matmul": np.matmul,
    "pow": np.power,
}.items():
    _operator(_name, _function)


def _comparison(name):
    compare = getattr(operator, name)
    setattr(ndarray, f"__{name}__", lambda self, other: _compute(compare, self, other))


for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    _comparison(_name)
ndarray.__neg__ = lambda self: _compute(np.negative, self)
ndarray.__hash__ = None


def _of_axes(name):
    function = getattr(np, name)

    def here(a, axis=None, *, keepdims=False, **how):
        return _compute(function, a, axis=axis, keepdims=keepdims, **how)

    return here


for _name in ("max", "min", "sum", "mean", "var", "argmax"):
    globals()[_name] = _of_axes(_name)
    setattr(ndarray, _name, globals()[_name])


def _function_of(name):
    function = getattr(np, name)
    return lambda *inputs, **how: _compute(function, *inputs, **how)


exp, log, sqrt, tanh, maximum, isfinite, where = map(
    _function_of, ("exp", "log", "sqrt", "tanh", "maximum", "isfinite", "where")
)


def count_nonzero(a, axis=None):
    return _compute(np.count_nonzero, a, axis=axis)


def empty(shape, dtype=float, order="C"):
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return ndarray(_allocate(size).view(dtype).reshape(shape, order=order))


def full(shape, value, dtype=None):
    new = empty(shape, np.asarray(value).dtype if dtype is None else dtype)
    new._a[...] = value
    return new


def zeros(shape, dtype=float):
    return full(shape, 0, dtype)


def ones(shape, dtype=float):
    return full(shape, 1, dtype)


def empty_like(a, dtype=None):
    new = _new(a._a if dtype is None else a._a.astype(dtype))
    new[...] = np.frombuffer(b"\xa5" * new.itemsize, new.dtype)[0]
    return ndarray(new)


def zeros_like(a, dtype=None):
    new = empty_like(a, dtype)
    new._a[...] = 0
    return new


def ones_like(a, dtype=None):
    new = empty_like(a, dtype)
    new._a[...] = 1
    return new


def array(a, dtype=None, order="K"):
    source = a._a if isinstance(a, ndarray) else np.asarray(a)
    return ndarray(_new(np.array(source, dtype, order=order)))


def asarray(a, dtype=None):
    if isinstance(a, ndarray) and dtype in (None, a.dtype):
        return a
    return array(a, dtype)


def ascontiguousarray(a):
    return a if a._a.flags.c_contiguous else ndarray(_new(np.ascontiguousarray(a._a)))


def concatenate(arrays):
    return ndarray(_new(np.concatenate([a._a for a in arrays])))


def resize(a, new_shape):
    return _compute(np.resize, a, new_shape=new_shape)


def get_default_memory_pool():
    return SimpleNamespace(free_bytes=lambda: 0)


def arange(*args, dtype=None):
    return ndarray(_new(np.arange(*args, dtype=dtype)))


def packbits(a, axis=None, bitorder="big"):
    assert axis is None
    return _compute(np.packbits, a, bitorder=bitorder)


def unpackbits(a, axis=None, bitorder="big"):
    assert axis is None
    return _compute(np.unpackbits, a, bitorder=bitorder)


def from_dlpack(array):
    """View an array that pretends to be another library's."""
    return array.__dlpack__(stream=0)


class Device:
    """As cupy.cuda.Device; __enter__ makes it the current one."""

    def __init__(self, device=None):
        self.id = state.device if device is None else device

    @property
    def compute_capability(self):
        return state.capabilities[self.id]

    @property
    def attributes(self):
        return {
            "MultiProcessorCount": state.processors,
            "MaxSharedMemoryPerBlockOptin": state.shared,
            "L2CacheSize": 1 << 20,
        }

    def __enter__(self):
        self._before, state.device = state.device, self.id

    def __exit__(self, *exception):
        state.device = self._before

    def synchronize(self):
        _wait("synchronize")


def _alloc(size):
    memory = _allocate(size)
    return MemoryPointer(memory.ctypes.data, state.device, memory)


class Event:
    """As cupy.cuda.Event, on the processor's clock."""

    def record(self):
        self.seconds = time.perf_counter()

    def synchronize(self):
        _wait("event")


cuda = SimpleNamespace(
    Event=Event,
    get_elapsed_time=lambda start, end: (end.seconds - start.seconds) * 1e3,
    Device=Device,
    alloc=_alloc,
    is_available=lambda: state.available,
    runtime=SimpleNamespace(
        getDevice=lambda: state.device,
        getDeviceCount=lambda: len(state.capabilities),
        getDeviceProperties=lambda _: {"name": b"a stand-in"},
        memGetInfo=lambda: (1 << 34, 1 << 35),
        runtimeGetVersion=lambda: 13000,
        driverGetVersion=lambda: 13010,
    ),
    memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
)


class RawKernel:
    """A kernel of the emulator, called as CuPy's are."""

    shared_size_bytes = 0

    def __init__(self, module, name):
        self.module, self.name = module, name
        self.max_dynamic_shared_size_bytes = 48 << 10

    def __call__(self, grid, block, args, *, shared_mem=0):
        assert all(type(n) is int and n > 0 for n in (*grid, *block)), (grid, block)
        assert len(grid) == len(block) == 1
        assert block[0] <= 1024
        assert grid[0] < 2**31
        assert 0 <= shared_mem <= self.max_dynamic_shared_size_bytes <= state.shared
        (parameters,) = args
        assert type(parameters) is np.ndarray
        assert parameters.size == 1
        state.launches.append((self.name, grid[0], block[0], shared_mem))
        self.module.emulated().launch(self.name, grid[0], block[0], shared_mem, parameters)


class RawModule:
    """The source, compiled for the emulator when a kernel of it first runs."""

    def __init__(self, *, code, options=()):
        assert "__global__" in code
        assert type(options) is tuple
        self.options = options
        state.modules.append(options)

    def get_function(self, name):
        return RawKernel(self, name)

    def emulated(self):
        from cuda_emulator import load  # a C++ compiler, only if a kernel runs

        return load(self.options)
