"""The door: what a user passes becomes checked arguments, or an error that says what was wrong.

Every TypeError and ValueError of the public functions is raised here (or in backends, for the kind
and the device of an array, and threads, for num_threads), before anything is written. One
implementation serves NumPy's arrays and CuPy's, and looks at no value of the latter. Messages name
the argument, what was expected, what came, and the remedy where it is known.
"""

from __future__ import annotations

import math
import operator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bncpu.backends import as_array, empty_like, is_bfloat16, on_gpu
from bncpu.memory import address, aligned, overlap, overlaps_itself, same, writeable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Array = NDArray[Any]

FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)
UINT8 = np.dtype(np.uint8)


class Channels(NamedTuple):
    """The channel axes of x, their sizes, the number of channels, and the values m of each."""

    axes: tuple[int, ...]
    shape: tuple[int, ...]
    number: int
    values: int


def taken(name: str, array: Any, x: Array | None = None, leader: str = "x") -> Array:
    """Return an argument as an array of NumPy or CuPy, of the kind and the device of x."""
    values = as_array(name, array, x, leader)
    # NumPy copies misaligned elements, no GPU can read them.
    if on_gpu(values) and not aligned(values):
        raise ValueError(
            f"{name}: expected elements of {values.itemsize} bytes at multiples of that on a GPU; "
            f"got address {address(values):#x}, strides {values.strides}"
        )
    return values


def data(name: str, array: Any) -> Array:
    """Return x as an array of floats of 16, 32 or 64 bits with at least one dimension."""
    x = taken(name, array)
    if x.dtype not in (FLOAT32, FLOAT64, FLOAT16) and not is_bfloat16(x.dtype):
        raise TypeError(
            f"{name}: expected dtype float32, float64, float16 or bfloat16; got {x.dtype}; "
            f"{_cast(name, x)}"
        )
    if x.ndim == 0:
        raise ValueError(f"{name}: expected at least one dimension, the channels; got a 0-d array")
    return x


def channels(x: Array, axis: Any) -> Channels:
    """Return the channel axes of x that `axis` (an int or a tuple of ints) names."""
    # The common case first: this is a good part of what a call on a small array takes.
    return _channels(x.shape, (axis,) if type(axis) is int else axis_numbers(axis))


def axis_numbers(axis: Any) -> tuple[int, ...]:
    """Return an axis, or the axes of a tuple, as ints; whether x has them is not asked here."""
    try:
        numbers = tuple(map(operator.index, axis if isinstance(axis, tuple) else (axis,)))
    except TypeError:
        raise TypeError(f"axis: expected an int or a tuple of ints; got {axis!r}") from None
    if not numbers:
        raise ValueError("axis: expected at least one channel axis; got ()")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"axis: {axis} names an axis of x twice")
    return numbers


@lru_cache(maxsize=256)
def _channels(shape: tuple[int, ...], numbers: tuple[int, ...]) -> Channels:
    ndim = len(shape)
    for a in numbers:
        if not -ndim <= a < ndim:
            raise ValueError(
                f"axis: {a} is out of range for x of shape {shape}, which has {ndim} "
                f"dimension{'s' if ndim > 1 else ''}"
            )
    axes = tuple(a % ndim for a in numbers)
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis: {numbers} names an axis of x twice")
    sizes = tuple(shape[a] for a in axes)
    values = math.prod(n for a, n in enumerate(shape) if a not in axes)
    return Channels(axes, sizes, math.prod(sizes), values)


def parameter(
    name: str, array: Any, x: Array, over: Channels, dtypes: tuple[np.dtype[Any], ...]
) -> Array:
    """Return one value per channel, a view of the user's array, shape and dtype checked."""
    values = taken(name, array, x)
    if values.dtype not in dtypes:
        expected = " or ".join(dtype.name for dtype in dtypes)
        why = f" (x is {x.dtype})" if len(dtypes) == 1 else ""
        raise TypeError(
            f"{name}: expected dtype {expected}{why}; got {values.dtype}; "
            f"cast it with {name}.astype(numpy.{dtypes[0].name})"
        )
    if values.shape != over.shape:
        axis = over.axes[0] if len(over.axes) == 1 else over.axes
        raise ValueError(
            f"{name}: expected shape {over.shape}, one value per channel of x {x.shape} "
            f"on axis {axis}; got {values.shape}"
        )
    return values


def parameter_dtype(x: Array) -> np.dtype[Any]:
    """Return the dtype of gamma, beta and their gradients: what x is computed in."""
    return FLOAT64 if x.dtype == FLOAT64 else FLOAT32


def affine(name: str, array: Any, x: Array, over: Channels) -> Array | None:
    """Return gamma or beta as a vector, None for None."""
    if array is None:
        return None
    return vector(parameter(name, array, x, over, (parameter_dtype(x),)))


def statistic(name: str, array: Any, x: Array, over: Channels) -> Array:
    """Return a mean, var or invstd as a vector; float32 and float64 are accepted."""
    return vector(parameter(name, array, x, over, (FLOAT64, FLOAT32)))


def vector(values: Array) -> Array:
    """Return the values as a contiguous float64 vector, the same memory where that is possible.

    On a GPU its dtype and its stride are left as they are: the kernels there read any, and a copy
    would be a launch of its own.
    """
    row = values if on_gpu(values) else values.astype(FLOAT64, order="C", copy=False)
    return row if row.ndim == 1 else row.reshape(-1)


def variance(name: str, array: Any, x: Array, over: Channels) -> Array:
    """Return a variance; NaN is let through, negative values are not."""
    var = statistic(name, array, x, over)
    no_negative(name, var)
    return var


def no_negative(name: str, var: NDArray[np.float64]) -> None:
    """Refuse a variance that is negative anywhere.

    One on a GPU is not looked at, which would wait for all that the GPU has still to do; the result
    is NaN there.
    """
    if on_gpu(var):
        return
    if np.count_nonzero(var < 0):
        at = int(np.argmax(var < 0))
        raise ValueError(
            f"{name}: expected no negative variance; got {var.flat[at]} in channel {at}"
        )


def floats(name: str, array: Any, like: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
    """Return an array of floats as a float64 copy, of the kind and shape of mean if it is given."""
    values = taken(name, array, like, "mean")
    if values.dtype.kind != "f":
        raise TypeError(
            f"{name}: expected an array of floats; got dtype {values.dtype}; "
            f"cast it with {name}.astype(numpy.float32)"
        )
    if like is not None and values.shape != like.shape:
        raise ValueError(
            f"{name}: expected shape {like.shape}, one value per channel; got {values.shape}"
        )
    return values.astype(np.float64)


def weights(
    array: Any, scale: NDArray[np.float64], axis: Any, ranks: range
) -> tuple[NDArray[np.float64], int]:
    """Return a layer's weight as float64, and the axis of its outputs, as many as scale has."""
    weight = floats("weight", taken("weight", array, scale, "mean"))
    if weight.ndim not in ranks:
        allowed = f"{ranks[0]}" if len(ranks) == 1 else f"at least {ranks[0]}"
        raise ValueError(f"weight: expected {allowed} dimensions; got shape {weight.shape}")
    try:
        number = operator.index(axis)
    except TypeError:
        raise TypeError(f"axis: expected an int; got {axis!r}") from None
    if not -weight.ndim <= number < weight.ndim:
        raise ValueError(f"axis: {number} is out of range for weight of shape {weight.shape}")
    outputs = (weight.shape[number],)
    if scale.shape != outputs:
        raise ValueError(
            f"mean: expected shape {outputs}, one value per output of weight {weight.shape} "
            f"on axis {number}; got {scale.shape}"
        )
    return weight, number


def running(
    mean: Any, var: Any, x: Array, over: Channels, others: Sequence[tuple[str, Any]]
) -> tuple[Array, Array] | None:
    """Return running_mean and running_var, writeable views of the user's arrays, or None.

    They may share memory with none of the other arrays of the call, given by name (or None).
    """
    if mean is None and var is None:
        return None
    for name, array in (("running_mean", mean), ("running_var", var)):
        if array is None:
            raise ValueError(f"{name}: expected an array, since the other running statistic is one")
    for name, array in (("running_mean", mean), ("running_var", var)):
        values = parameter(name, array, x, over, (FLOAT64, FLOAT32))
        _written(name, values)
        _apart(name, values, others)
        others = [*others, (name, values)]
    return others[-2][1], others[-1][1]


def real(name: str, value: Any) -> float:
    """Return a real number as a float."""
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return float(value)
    except TypeError:
        raise TypeError(f"{name}: expected a real number; got {type(value).__name__}") from None
    except OverflowError:
        raise ValueError(f"{name}: expected a number that a float64 can hold; got more") from None


def epsilon(value: Any) -> float:
    """Return eps, in the units of var: finite and not negative."""
    eps = real("eps", value)
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: expected a finite number >= 0, in the units of var; got {eps}")
    return eps


def momentum_weight(value: Any) -> float:
    """Return momentum: the weight of the new value, within [0, 1]."""
    momentum = real("momentum", value)
    if not 0 <= momentum <= 1:
        raise ValueError(
            f"momentum: expected 0 <= momentum <= 1, the weight of the new; got {momentum}"
        )
    return momentum


def same_as_x(name: str, array: Any, x: Array) -> Array:
    """Return an array that must have x's shape and dtype (dy, residual)."""
    values = taken(name, array, x)
    _matches(name, values, x, is_read=True)
    return values


def is_relu(activation: Any) -> bool:
    """Return whether there is an activation."""
    if activation is None:
        return False
    if not isinstance(activation, str):
        raise TypeError(f'activation: expected None or "relu"; got {type(activation).__name__}')
    if activation != "relu":
        raise ValueError(f'activation: expected None or "relu"; got "{activation}"')
    return True


def mask(array: Any, x: Array, relu: bool) -> Array | None:
    """Return a mask, of one bit per element of x, None for None."""
    if array is None:
        return None
    bits = taken("mask", array, x)
    if not relu:
        raise ValueError(
            'mask: holds where ReLU lets pass, and there is no activation; pass activation="relu", '
            "or no mask"
        )
    if bits.dtype != UINT8:
        raise TypeError(f"mask: expected dtype uint8, 8 elements of x in each; got {bits.dtype}")
    shape = ((x.size + 7) // 8,)
    if bits.shape != shape:
        raise ValueError(
            f"mask: expected shape {shape}, one bit per element of x {x.shape}; got {bits.shape}"
        )
    if not bits.flags.c_contiguous:
        raise ValueError(
            f"mask: expected a contiguous array; got strides {bits.strides}; "
            f"make one with numpy.empty({shape[0]}, numpy.uint8)"
        )
    return bits


def filled_mask(
    array: Any, x: Array, relu: bool, others: Sequence[tuple[str, Any]]
) -> Array | None:
    """Return a mask that can be written, since it shares memory with none of the others."""
    bits = mask(array, x, relu)
    if bits is not None:
        _written("mask", bits)
        _apart("mask", bits, others)
    return bits


def output(
    out: Any,
    x: Array,
    others: Sequence[tuple[str, Array | None]],
    may_be: Sequence[str] = (),
    name: str = "out",
) -> Array:
    """Return the array for a result: a new one in x's memory order, or the checked out.

    Parameters
    ----------
    others
        The arrays that are read or written besides, by name; None for one not given.
    may_be
        Those of them that out may be, element for element.
    """
    if out is None:
        return empty_like(x)
    result = taken(name, out, x)
    _matches(name, result, x, is_read=False)
    _written(name, result)
    for other, array in others:
        if array is None or (other in may_be and same(result, array)):
            continue
        if overlap(result, array):
            remedy = f"; pass {other} itself, or memory of its own" if other in may_be else ""
            raise ValueError(f"{name}: overlaps {other}, which it would overwrite{remedy}")
    return result


def residual_gradient(
    residual: Any,
    x: Array,
    dy: Array,
    dx: Array,
    relu: bool,
    mask: Array | None,
    others: Sequence[tuple[str, Array | None]],
) -> Array | None:
    """Return the array for dresidual, None if it is not wanted.

    Parameters
    ----------
    residual
        Whether it is wanted, or the array for it.
    others
        The arrays that are read, as for `output`.
    """
    if isinstance(residual, bool | np.bool_):
        if not residual:
            return None
        residual = None
    elif residual is None:
        raise TypeError("residual: expected False, True or an array for dresidual; got None")
    if relu and mask is None:
        raise ValueError(
            "mask: needed for the gradient of a residual before ReLU, whose sign x alone does not "
            "tell; pass the mask that the forward filled"
        )
    if residual is None and not relu and not overlap(dx, dy):
        return dy  # the gradient itself, unless dx takes its place
    return output(residual, x, [*others, ("out", dx)], may_be=("dy",), name="residual")


def batch_values(over: Channels, x: Array) -> int:
    """Return m, refusing the m = 1 that has no variance to train on."""
    if over.values == 1 and over.number:
        raise ValueError(
            f"x: expected more than one value per channel to train on; got shape {x.shape}; "
            "use batch_norm_infer with known statistics, or a larger batch"
        )
    return over.values


def _matches(name: str, array: Array, x: Array, is_read: bool) -> None:
    if array.dtype != x.dtype:
        raise TypeError(
            f"{name}: expected dtype {x.dtype}, as x has; got {array.dtype}"
            + (f"; cast it with {name}.astype(x.dtype)" if is_read else "")
        )
    if array.shape != x.shape:
        raise ValueError(f"{name}: expected shape {x.shape}, as x has; got {array.shape}")


def _written(name: str, array: Array) -> None:
    if not writeable(array):
        raise ValueError(f"{name}: expected a writeable array; got a read-only one")
    if overlaps_itself(array):
        raise ValueError(f"{name}: its elements overlap one another in memory")


def _apart(name: str, array: Array, others: Sequence[tuple[str, Any]]) -> None:
    for other, given in others:
        if given is not None and overlap(array, as_array(other, given, array)):
            raise ValueError(f"{name}: shares memory with {other}, which it would overwrite")


def _cast(name: str, x: Array) -> str:
    if x.dtype.newbyteorder("=") in (FLOAT32, FLOAT64):
        return f"swap its bytes with {name}.astype({name}.dtype.newbyteorder('='))"
    if x.dtype.kind == "c":
        return f"normalise {name}.real and {name}.imag, or cast one of them"
    wide = (x.dtype.kind in "iu" and x.dtype.itemsize > 2) or x.dtype == np.longdouble
    return f"cast it with {name}.astype(numpy.{'float64' if wide else 'float32'})"
