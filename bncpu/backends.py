"""From the type of an array to the kernels that compute on it.

NumPy arrays, and anything on the CPU that speaks DLPack (a PyTorch or JAX array, viewed without a
copy), are computed by bncpu.cpu. CuPy arrays, and anything on an NVIDIA GPU that speaks DLPack, are
computed by bncpu.cuda. This is the only file that knows which kinds there are, and that CuPy may be
absent: it is imported when an array of a GPU comes, or when somebody asks for one.
"""

from __future__ import annotations

import importlib
import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from bncpu import cpu

if TYPE_CHECKING:
    from types import ModuleType

    from numpy.typing import NDArray

    Array = NDArray[Any]

DEVICES = ("cpu", "cuda")

_DLPACK_CPU = 1  # kDLCPU in dlpack.h
_DLPACK_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged
# What libraries raise that will not export an array.
_UNVIEWABLE = (AttributeError, BufferError, RuntimeError, TypeError, ValueError)
_FLOAT16 = np.dtype(np.float16)
_UINT16 = np.dtype(np.uint16)
# Turing; what kernels.cu is compiled for and tested with begins there.
_LEAST_CAPABILITY = 75
_INSTALL = 'pip install "bncpu[cuda]" for CUDA 13, or "bncpu[cuda12]" for CUDA 12'


class NoGPUError(RuntimeError):
    """CuPy is there, but no GPU that it can use, or none that the kernels run on."""


def as_array(name: str, array: Any, x: Array | None = None, leader: str = "x") -> Array:
    """Return the array as a plain ndarray of NumPy or CuPy that shares its memory.

    Parameters
    ----------
    x : array, optional
        What it must be of one kind with, and on one device.
    leader : str
        What x is called in the call.

    Raises
    ------
    TypeError
        If it is not an array, hides elements behind a mask, is in memory of another kind, or of
        another kind than x.
    ValueError
        If it is on another GPU than x, or x's own is not the current one.
    ImportError
        If it is on a GPU, and CuPy is not installed.
    NoGPUError
        If CuPy finds no driver or no GPU, or the GPU is too old.
    """
    viewed = array if type(array) is np.ndarray else _viewed(name, array, x, leader)
    if x is None:
        if on_gpu(viewed):
            _check_current(name, viewed)
    elif type(viewed) is not np.ndarray or type(x) is not np.ndarray:
        _check_alike(name, viewed, x, leader)
    return viewed


def on_gpu(array: Any) -> bool:
    """Return whether it is a CuPy array. Who has one has imported CuPy; this does not."""
    kind: Any = type(array)
    return kind is not np.ndarray and _is_cupy(kind)


def cupy() -> Any:
    """Return CuPy, imported now if it was not.

    Raises
    ------
    ImportError
        If it is not installed.
    NoGPUError
        If it finds no GPU.
    """
    try:
        module = importlib.import_module("cupy")
    except ImportError as error:
        raise ImportError(f"arrays on a GPU need CuPy, which is not installed; {_INSTALL}") from (
            error
        )
    if not module.cuda.is_available():
        raise NoGPUError(
            "CuPy finds no GPU; it needs an NVIDIA GPU and a driver for the CUDA that it was "
            f"installed for; {_INSTALL}"
        )
    return module


def gpus() -> str:
    """Return the names and architectures of the GPUs that CuPy can use, or why there are none."""
    try:
        cuda = cupy().cuda
    except ImportError:
        return "none, CuPy is not installed"
    except NoGPUError:
        return "none that CuPy can use"
    return ", ".join(
        f"{cuda.runtime.getDeviceProperties(device)['name'].decode()} "
        f"(sm_{cuda.Device(device).compute_capability})"
        for device in range(cuda.runtime.getDeviceCount())
    )


def module_on(device: Any) -> Any:
    """Return the module whose arrays are on a device, "cpu" or "cuda": numpy or cupy.

    Raises
    ------
    TypeError, ValueError
        If it is neither.
    ImportError, NoGPUError
        As `cupy`.
    """
    if not isinstance(device, str):
        raise TypeError(f'device: expected "cpu" or "cuda"; got {type(device).__name__}')
    if device not in DEVICES:
        raise ValueError(f'device: expected "cpu" or "cuda"; got "{device}"')
    return cupy() if device == "cuda" else np


def array_module(array: Any) -> Any:
    """Return the module of an array, numpy or cupy, to make others like it."""
    return sys.modules["cupy"] if on_gpu(array) else np


def to_numpy(array: Array) -> Array:
    """Return an array in CPU memory: itself, or what waits for the GPU and copies."""
    copy: Array = array.get() if on_gpu(array) else array  # type: ignore[attr-defined]
    return copy


def empty_like(x: Array) -> Array:
    """Return an uninitialised array of x's kind, shape, dtype and order of axes in memory."""
    if on_gpu(x):
        like: Array = array_module(x).empty_like(x)
        return like
    return cpu.pool.empty_like(x)


def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Return whether a dtype is that of ml_dtypes, which is told by its name and not imported."""
    return dtype.itemsize == 2 and dtype.kind == "V" and dtype.name == "bfloat16"


def as_stored(
    arrays: tuple[Array | None, ...],
) -> tuple[Array | None, ...]:
    """Return the arrays, all of one of the dtypes of x, in the form in which kernels take them.

    NumPy exports no buffer of a dtype that is not its own: bfloat16 goes as uint16, and whatever
    the kernels get as uint16 is bfloat16.
    """
    dtype = arrays[0].dtype  # type: ignore[union-attr]  # the first is x
    if dtype.itemsize != 2 or dtype == _FLOAT16:
        return arrays
    return tuple([None if array is None else array.view(_UINT16) for array in arrays])


def plain_kernels() -> Any:
    """Return the compiled short cuts: None is their answer to all but plain NumPy arrays."""
    return cpu.kernels


def kernels_for(x: Array) -> Any:
    """Return the kernels module for arrays of x's kind."""
    if on_gpu(x):
        return _cuda_kernels()
    return cpu.kernels


@lru_cache(maxsize=1)
def _cuda_kernels() -> ModuleType:
    return importlib.import_module("bncpu.cuda.kernels")  # which imports CuPy


@lru_cache(maxsize=256)
def _is_cupy(kind: Any) -> bool:
    # Asked many times in a call. No type is CuPy's while CuPy is not there, and none becomes so.
    return issubclass(kind, getattr(sys.modules.get("cupy"), "ndarray", ()))


def _viewed(name: str, array: Any, x: Array | None, leader: str) -> Array:
    # What is not a plain NumPy array.
    if on_gpu(array):
        return array  # type: ignore[no-any-return]
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            f"{name}: masked arrays are not supported, every element would count; "
            f"select the valid ones, or pass {name}.filled(value)"
        )
    if isinstance(array, np.ndarray):
        return np.asarray(array)
    if not hasattr(array, "__dlpack__"):
        raise TypeError(
            f"{name}: expected a NumPy or CuPy array or one with __dlpack__; got "
            f"{type(array).__name__}; convert it with numpy.asarray({name}, dtype=numpy.float32)"
        )
    kind = f"{type(array).__module__}.{type(array).__name__}"
    try:
        device = int(array.__dlpack_device__()[0])
    except _UNVIEWABLE as error:
        raise TypeError(_unviewable(name, array, kind, error)) from error
    if device == _DLPACK_CPU:
        module: Any = np
    elif device in _DLPACK_CUDA and (x is None or on_gpu(x)):
        module = cupy()
    else:
        raise TypeError(
            f"{name}: expected an array in CPU memory{'' if x is None else f', as {leader} is'}; "
            f"got a {kind} on DLPack device type {device}; copy it to the CPU first"
        )
    try:
        viewed: Array = module.from_dlpack(array)
    except _UNVIEWABLE as error:
        raise TypeError(_unviewable(name, array, kind, error)) from error
    return viewed


def _unviewable(name: str, array: Any, kind: str, error: Exception) -> str:
    remedy = (
        "; view it as uint16, and the NumPy array of that as ml_dtypes.bfloat16"
        if "bfloat16" in str(getattr(array, "dtype", ""))
        else ""
    )
    return f"{name}: a {kind} that cannot be viewed by NumPy: {str(error).rstrip('.')}{remedy}"


def _check_alike(name: str, array: Array, x: Array, leader: str) -> None:
    # At least one of the two is not a plain NumPy array.
    if on_gpu(array) != on_gpu(x):
        kinds = ("a NumPy array", "a CuPy array")
        moved = f"cupy.asarray({name})" if on_gpu(x) else f"{name}.get()"
        raise TypeError(
            f"{name}: expected {kinds[on_gpu(x)]}, as {leader} is; got {kinds[on_gpu(array)]}; "
            f"move it with {moved}"
        )
    if on_gpu(x) and _device(array) != _device(x):
        here, there = _device(array), _device(x)
        raise ValueError(
            f"{name}: expected an array on GPU {there}, as {leader} is; got one on GPU {here}; "
            f"copy it inside `with cupy.cuda.Device({there}):`"
        )


def _check_current(name: str, x: Array) -> None:
    device, current = _device(x), sys.modules["cupy"].cuda.runtime.getDevice()
    if device != current:
        raise ValueError(
            f"{name}: expected an array on the current GPU, which is {current}; got one on GPU "
            f"{device}; call inside `with cupy.cuda.Device({device}):`"
        )
    _check_capability(device)


@lru_cache
def _check_capability(device: int) -> None:
    # Asked once for each device: errors are not kept.
    capability = int(sys.modules["cupy"].cuda.Device(device).compute_capability)
    if capability < _LEAST_CAPABILITY:
        raise NoGPUError(
            f"GPU {device} has compute capability {capability / 10}; bncpu's kernels need "
            f"{_LEAST_CAPABILITY / 10} (Turing) or newer; copy the arrays to the CPU with .get()"
        )


def _device(array: Any) -> int:
    return int(array.data.device_id)
