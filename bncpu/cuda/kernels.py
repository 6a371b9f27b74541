"""The kernels of bncpu.cpu on CuPy arrays: the same functions, put together as launches.

What is checked is checked before (bncpu.arguments), and what no kernel can walk is copied
(bncpu.problem); how a call is cut is decided in plan.py, and what is computed stands in kernels.cu.
Here a call becomes one structure of parameters and a few launches on the current device and
stream. Nothing waits for the GPU. Memory comes from CuPy's current allocator, all of it before the
first launch, so that running out of it changes nothing.
"""

from __future__ import annotations

import struct
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cupy
import numpy as np

from bncpu.cuda import plan as planning

if TYPE_CHECKING:
    from bncpu.layout import Geometry

    Array = Any  # cupy.ndarray, which brings no types

SOURCE = Path(__file__).with_name("kernels.cu")

# uint16 stands for bfloat16, as for the kernels of the CPU.
_STORAGE = {
    np.dtype(np.float32): "float32",
    np.dtype(np.float64): "float64",
    np.dtype(np.float16): "float16",
    np.dtype(np.uint16): "bfloat16",
}
# An array or a vector as the parameters have it: three numbers, and where those of vectors begin.
_ABSENT = (0, 0, 0)
_NO_VECTORS = _ABSENT * len(planning.VALUES)
_PLACES = {name: 3 * at for at, name in enumerate(planning.VALUES, len(planning.ARRAYS))}


def moments(
    geometry: Geometry,
    x: Array,
    mean: Array,
    m2: Array,
    num_threads: int,  # noqa: ARG001 - of the CPU
) -> None:
    """Fill mean and the sums of squared deviations, m2."""
    _run("moments", geometry, (x, None, None, None, None), {"mean": mean, "m2": m2})


def train(
    geometry: Geometry,
    x: Array,
    residual: Array | None,
    y: Array,
    mask: Array | None,
    relu: bool,
    gamma: Array | None,
    beta: Array | None,
    eps: float,
    mean: Array,
    var: Array,
    invstd: Array,
    num_threads: int,  # noqa: ARG001
    running_mean: Array | None = None,
    running_var: Array | None = None,
    momentum: float = 0.0,
) -> None:
    """Fill y, mask, mean, var and invstd (Algorithm 1), and update running statistics if given.

    The CPU's kernels leave these to their caller. Here they would cost several launches.
    """
    values = {
        "mean": mean,
        "var": var,
        "invstd": invstd,
        "gamma": gamma,
        "beta": beta,
        "running_mean": running_mean,
        "running_var": running_var,
    }
    arrays = (x, residual, None, y, None)
    _run("train", geometry, arrays, values, mask, relu, eps, momentum, fills_mask=mask is not None)


def infer(
    geometry: Geometry,
    x: Array,
    residual: Array | None,
    y: Array,
    mask: Array | None,
    relu: bool,
    mean: Array,
    var: Array,
    gamma: Array | None,
    beta: Array | None,
    eps: float,
    num_threads: int,  # noqa: ARG001
) -> None:
    """Fill y and mask for given statistics (Algorithm 2, line 11)."""
    values = {"mean": mean, "var": var, "gamma": gamma, "beta": beta}
    arrays = (x, residual, None, y, None)
    _run("infer", geometry, arrays, values, mask, relu, eps, fills_mask=mask is not None)


def backward(
    geometry: Geometry,
    x: Array,
    dy: Array,
    dx: Array,
    dresidual: Array | None,
    mask: Array | None,
    relu: bool,
    mean: Array,
    invstd: Array,
    gamma: Array | None,
    beta: Array | None,
    dgamma: Array,
    dbeta: Array,
    num_threads: int,  # noqa: ARG001
) -> None:
    """Fill dx, dresidual, dgamma and dbeta for batch statistics (section 3, below Algorithm 1)."""
    values = {
        "mean": mean,
        "invstd": invstd,
        "gamma": gamma,
        "beta": beta,
        "dgamma": dgamma,
        "dbeta": dbeta,
    }
    _run("backward", geometry, (x, None, dy, dx, dresidual), values, mask, relu)


def infer_backward(
    geometry: Geometry,
    x: Array,
    dy: Array,
    dx: Array,
    dresidual: Array | None,
    mask: Array | None,
    relu: bool,
    mean: Array,
    var: Array,
    gamma: Array | None,
    beta: Array | None,
    eps: float,
    dgamma: Array,
    dbeta: Array,
    num_threads: int,  # noqa: ARG001
) -> None:
    """Fill dx, dresidual, dgamma and dbeta where mean and var are constants."""
    values = {
        "mean": mean,
        "var": var,
        "gamma": gamma,
        "beta": beta,
        "dgamma": dgamma,
        "dbeta": dbeta,
    }
    _run("infer_backward", geometry, (x, None, dy, dx, dresidual), values, mask, relu, eps)


def _run(
    operation: planning.Operation,
    geometry: Geometry,
    arrays: tuple[Array, ...],
    values: dict[str, Array | None],
    mask: Array | None = None,
    relu: bool = False,
    eps: float = 0.0,
    momentum: float = 0.0,
    *,
    fills_mask: bool = False,
) -> None:
    """Launch an operation on arrays in the order of plan.ARRAYS and vectors named as plan.VALUES.

    A place of the geometry belongs to each array that is given, in the same order.
    """
    x = arrays[0]
    device = x.data.device_id
    places = iter(geometry.places)
    lies = [None if array is None else _lie(array, next(places)) for array in arrays]
    given = [lie for lie in lies if lie is not None]
    sizes = (x.itemsize, geometry.rows, geometry.channels, geometry.run)
    access = planning.access(*sizes, given)
    plan, numbers = _planned(operation, sizes, access, device, fills_mask, relu)
    workspace = cupy.cuda.alloc(plan.workspace) if plan.workspace else None

    words = [word for lie in lies for word in lie or _ABSENT]
    words += _NO_VECTORS
    for name, vector in values.items():
        if vector is not None:
            at = _PLACES[name]
            words[at : at + 3] = _vector(vector)
    parameters = PACKED.pack(
        *words,
        0 if mask is None else mask.data.ptr,
        0 if workspace is None else workspace.ptr,
        eps,
        momentum,
        *numbers,
    )
    # CuPy passes an array of one element by value.
    by_value = np.frombuffer(parameters, planning.PARAMETERS)
    storage = _STORAGE[x.dtype]
    for launch in plan.launches:
        kernel = _kernel(device, storage, plan.vector, plan.tiled, launch.entry)
        kernel((launch.grid,), (launch.block,), (by_value,), shared_mem=launch.shared)


def _lie(array: Array, place: Any) -> tuple[int, int, int]:
    return array.data.ptr, place.row, place.channel


def _vector(values: Array) -> tuple[int, int, int]:
    return values.data.ptr, values.strides[0] // values.itemsize, values.itemsize == 8


def _packed(dtype: np.dtype[Any]) -> str:
    # The letters of struct for a structured dtype, in its order.
    if dtype.names is None:
        return dtype.char
    return "".join(_packed(dtype[name]) for name in dtype.names)


# plan.PARAMETERS as struct packs it, in a tenth of the time that NumPy takes to fill its fields.
PACKED = struct.Struct("@" + _packed(planning.PARAMETERS) + "0q")  # and its padding at the end
_NAMES = planning.PARAMETERS.names or ()
NUMBERS = _NAMES[_NAMES.index("momentum") + 1 :]


@lru_cache(maxsize=1024)
def _planned(
    operation: planning.Operation,
    sizes: tuple[int, int, int, int],
    access: planning.Access,
    device: int,
    fills_mask: bool,
    relu: bool,
) -> tuple[planning.Plan, tuple[int, ...]]:
    # The plan, and all that stands behind momentum in the parameters.
    plan = planning.plan(operation, *sizes, access, properties(device), fills_mask)
    numbers = dict(plan.fields) | {"relu": int(relu)}
    return plan, tuple([numbers[name] for name in NUMBERS])


@cache
def properties(device: int) -> planning.Device:
    """Return what the plan wants to know of a device, asked for once."""
    attributes = cupy.cuda.Device(device).attributes
    return planning.Device(
        attributes["MultiProcessorCount"], attributes["MaxSharedMemoryPerBlockOptin"]
    )


@cache
def _module(storage: str, vector: int, tiled: bool) -> Any:
    # Compiled when a kernel of it is first launched on a device; CuPy keeps the result on disk.
    code = SOURCE.read_text(encoding="utf-8")
    return cupy.RawModule(code=code, options=planning.instance(storage, vector, tiled))


@cache
def _kernel(device: int, storage: str, vector: int, tiled: bool, entry: str) -> Any:
    kernel = _module(storage, vector, tiled).get_function(entry)
    # A limit, not a request: what a launch really takes is up to its plan.
    shared = properties(device).shared_per_block - kernel.shared_size_bytes
    kernel.max_dynamic_shared_size_bytes = shared
    return kernel
