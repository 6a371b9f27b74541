"""From the type of an array to the kernels that compute on it.

NumPy arrays, and anything on the CPU that speaks DLPack (a PyTorch or JAX array, viewed without a
copy), are computed by bncpu.cpu. This is the only file that knows which other kinds there are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bncpu import cpu

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DLPACK_CPU = 1  # kDLCPU in dlpack.h
_FLOAT16 = np.dtype(np.float16)
_UINT16 = np.dtype(np.uint16)


def as_numpy(name: str, array: Any) -> NDArray[Any]:
    """Return the array as a plain ndarray that shares its memory.

    Raises
    ------
    TypeError
        If it is not an array, hides elements behind a mask, or is not in CPU memory.
    """
    if type(array) is np.ndarray:
        return array
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            f"{name}: masked arrays are not supported, every element would count; "
            f"select the valid ones, or pass {name}.filled(value)"
        )
    if isinstance(array, np.ndarray):
        return np.asarray(array)
    if not hasattr(array, "__dlpack__"):
        raise TypeError(
            f"{name}: expected a NumPy array or a CPU array with __dlpack__; got "
            f"{type(array).__name__}; convert it with numpy.asarray({name}, dtype=numpy.float32)"
        )
    kind = f"{type(array).__module__}.{type(array).__name__}"
    try:
        device = int(array.__dlpack_device__()[0])
        if device == _DLPACK_CPU:
            return np.from_dlpack(array)
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as error:
        remedy = (
            "; view it as uint16, and the NumPy array of that as ml_dtypes.bfloat16"
            if "bfloat16" in str(getattr(array, "dtype", ""))
            else ""
        )
        raise TypeError(
            f"{name}: a {kind} that cannot be viewed by NumPy: {str(error).rstrip('.')}{remedy}"
        ) from error
    raise TypeError(
        f"{name}: expected an array in CPU memory; got a {kind} on DLPack device type {device}; "
        "copy it to the CPU first"
    )


def empty_like(x: NDArray[Any]) -> NDArray[Any]:
    """Return an uninitialised array of x's kind, shape, dtype and order of axes in memory."""
    return cpu.pool.empty_like(x)


def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Return whether a dtype is that of ml_dtypes, which is told by its name and not imported."""
    return dtype.itemsize == 2 and dtype.kind == "V" and dtype.name == "bfloat16"


def as_stored(
    arrays: tuple[NDArray[Any] | None, ...],
) -> tuple[NDArray[Any] | None, ...]:
    """Return the arrays, all of one of the dtypes of x, in the form in which kernels take them.

    NumPy exports no buffer of a dtype that is not its own: bfloat16 goes as uint16, and whatever
    the kernels get as uint16 is bfloat16.
    """
    dtype = arrays[0].dtype  # type: ignore[union-attr]  # the first is x
    if dtype.itemsize != 2 or dtype == _FLOAT16:
        return arrays
    return tuple([None if array is None else array.view(_UINT16) for array in arrays])


def kernels_for(x: NDArray[Any]) -> Any:  # noqa: ARG001 - the kind of x decides
    """Return the kernels module for arrays of x's kind."""
    return cpu.kernels
