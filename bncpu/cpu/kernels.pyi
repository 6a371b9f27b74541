# Every kernels_<level> module; bncpu.cpu chooses one and calls it kernels.
from typing import Any

from numpy import float32, float64, uint8
from numpy.typing import NDArray

from bncpu.layout import Geometry

# Of float32, float64, float16, or uint16, which stands for bfloat16.
_Array = NDArray[Any]
_Mask = NDArray[uint8]
_Vector = NDArray[float64]

def moments(
    geometry: Geometry, x: _Array, mean: _Vector, m2: _Vector, num_threads: int
) -> None: ...
def train(
    geometry: Geometry,
    x: _Array,
    residual: _Array | None,
    y: _Array,
    mask: _Mask | None,
    relu: bool,
    gamma: _Vector | None,
    beta: _Vector | None,
    eps: float,
    mean: _Vector,
    var: _Vector,
    invstd: _Vector,
    num_threads: int,
) -> None: ...
def infer(
    geometry: Geometry,
    x: _Array,
    residual: _Array | None,
    y: _Array,
    mask: _Mask | None,
    relu: bool,
    mean: _Vector,
    var: _Vector,
    gamma: _Vector | None,
    beta: _Vector | None,
    eps: float,
    num_threads: int,
) -> None: ...
def backward(
    geometry: Geometry,
    x: _Array,
    dy: _Array,
    dx: _Array,
    dresidual: _Array | None,
    mask: _Mask | None,
    relu: bool,
    mean: _Vector,
    invstd: _Vector,
    gamma: _Vector | None,
    beta: _Vector | None,
    dgamma: _Vector,
    dbeta: _Vector,
    num_threads: int,
) -> None: ...
def infer_backward(
    geometry: Geometry,
    x: _Array,
    dy: _Array,
    dx: _Array,
    dresidual: _Array | None,
    mask: _Mask | None,
    relu: bool,
    mean: _Vector,
    var: _Vector,
    gamma: _Vector | None,
    beta: _Vector | None,
    eps: float,
    dgamma: _Vector,
    dbeta: _Vector,
    num_threads: int,
) -> None: ...
def plain_moments(
    x: object,
    axis: object,
    threads: int,
) -> tuple[int, _Vector, _Vector] | None: ...
def plain_train(
    x: object,
    gamma: object,
    beta: object,
    running_mean: object,
    running_var: object,
    momentum: object,
    eps: object,
    axis: object,
    residual: object,
    activation: object,
    mask: object,
    out: object,
    threads: int,
) -> tuple[_Array, _Vector, _Vector] | None: ...
def plain_infer(
    x: object,
    mean: object,
    var: object,
    gamma: object,
    beta: object,
    eps: object,
    axis: object,
    residual: object,
    activation: object,
    mask: object,
    out: object,
    threads: int,
) -> _Array | None: ...
def plain_backward(
    dy: object,
    x: object,
    mean: object,
    invstd: object,
    gamma: object,
    beta: object,
    axis: object,
    residual: object,
    activation: object,
    mask: object,
    out: object,
    threads: int,
) -> tuple[_Array, _Array, _Array, _Array | None] | None: ...
def plain_infer_backward(
    dy: object,
    x: object,
    mean: object,
    var: object,
    gamma: object,
    beta: object,
    eps: object,
    axis: object,
    residual: object,
    activation: object,
    mask: object,
    out: object,
    threads: int,
) -> tuple[_Array, _Array, _Array, _Array | None] | None: ...
def tile_plan(
    columns: bool,
    rows: int,
    channels: int,
    run: int,
    *,
    itemsize: int = 4,
    inputs: int = 1,
    passes: int = 2,
    threads: int = 1,
    l2: int = ...,
    l3: int = ...,
    adjoining: bool = True,
) -> dict[str, Any]: ...
def set_cache_sizes(l2: int, l3: int) -> None: ...
def max_threads() -> int: ...
def openmp() -> int: ...
def level() -> str: ...

_Real = NDArray[float32] | NDArray[float64]

def stream_copy(src: _Real, dst: _Real, num_threads: int, *, non_temporal: bool = True) -> None: ...
def stream_triad(
    a: _Real, b: _Real, dst: _Real, num_threads: int, *, non_temporal: bool = True
) -> None: ...
def stream_read(a: _Real, num_threads: int) -> float: ...
