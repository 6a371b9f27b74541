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
        raise TypeError(f"{name}: a {kind} that cannot be viewed by NumPy: {error}") from error
    raise TypeError(
        f"{name}: expected an array in CPU memory; got a {kind} on DLPack device type {device}; "
        "copy it to the CPU first"
    )


def kernels_for(x: NDArray[Any]) -> Any:  # noqa: ARG001 - the kind of x decides
    """Return the kernels module for arrays of x's kind."""
    return cpu.kernels
