"""The door: what a user passes becomes one checked problem, or an error that says what was wrong.

Every TypeError and ValueError of the public functions is raised here (or in backends, for the kind
of an array, and threads, for num_threads), before anything is written. Messages name the argument,
what was expected, what came, and the remedy where it is known.
"""

from __future__ import annotations

import math
import operator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bncpu.backends import as_numpy
from bncpu.layout import Geometry, geometry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Array = NDArray[Any]

FLOAT32 = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)
# numpy.shares_memory is exact and can take exponential time; this much work decides all but
# contrived views, and those are refused.
_OVERLAP_WORK = 10_000


class Channels(NamedTuple):
    """The channel axes of x, their sizes, the number of channels, and the values m of each."""

    axes: tuple[int, ...]
    shape: tuple[int, ...]
    number: int
    values: int


def data(name: str, array: Any) -> Array:
    """Return x as an ndarray of float32 or float64 with at least one dimension."""
    x = as_numpy(name, array)
    if x.dtype != FLOAT32 and x.dtype != FLOAT64:
        raise TypeError(
            f"{name}: expected dtype float32 or float64; got {x.dtype}; {_cast(name, x)}"
        )
    if x.ndim == 0:
        raise ValueError(f"{name}: expected at least one dimension, the channels; got a 0-d array")
    return x


def channels(x: Array, axis: Any) -> Channels:
    """Return the channel axes of x that `axis` (an int or a tuple of ints) names."""
    return _channels(x.shape, axis_numbers(axis))


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
    values = as_numpy(name, array)
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


def affine(name: str, array: Any, x: Array, over: Channels) -> NDArray[np.float64] | None:
    """Return gamma or beta as a float64 vector, None for None; its dtype must be x's."""
    if array is None:
        return None
    return vector(parameter(name, array, x, over, (x.dtype,)))


def statistic(name: str, array: Any, x: Array, over: Channels) -> NDArray[np.float64]:
    """Return a mean, var or invstd as a float64 vector; float32 and float64 are accepted."""
    return vector(parameter(name, array, x, over, (FLOAT64, FLOAT32)))


def vector(values: Array) -> NDArray[np.float64]:
    """Return the values as a contiguous float64 vector, the same memory where that is possible."""
    return np.ascontiguousarray(values, dtype=np.float64).reshape(-1)


def variance(name: str, array: Any, x: Array, over: Channels) -> NDArray[np.float64]:
    """Return a variance; NaN is let through, negative values are not."""
    var = statistic(name, array, x, over)
    no_negative(name, var)
    return var


def no_negative(name: str, var: NDArray[np.float64]) -> None:
    """Refuse a variance that is negative anywhere."""
    if (var < 0).any():
        at = int(np.argmax(var < 0))
        raise ValueError(
            f"{name}: expected no negative variance; got {var.flat[at]} in channel {at}"
        )


def floats(name: str, array: Any, like: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
    """Return an array of floats as a float64 copy, of the shape of another if one is given."""
    values = as_numpy(name, array)
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
    weight = floats("weight", array)
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
    apart = [(name, as_numpy(name, array)) for name, array in others if array is not None]
    for name, array in (("running_mean", mean), ("running_var", var)):
        values = parameter(name, array, x, over, (FLOAT64, FLOAT32))
        _writeable(name, values)
        if _overlaps_itself(values):
            raise ValueError(f"{name}: its elements overlap one another in memory")
        for other, memory in apart:
            if overlap(values, memory):
                raise ValueError(f"{name}: shares memory with {other}, which it would overwrite")
        apart.append((name, values))
    return apart[-2][1], apart[-1][1]


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
    """Return an array that must have x's shape and dtype (dy)."""
    values = as_numpy(name, array)
    _matches(name, values, x)
    return values


def output(
    out: Any, x: Array, inputs: Sequence[tuple[str, Array | None]], may_be: str | None
) -> Array:
    """Return the array for the result: a new one in x's memory order, or the checked out.

    Parameters
    ----------
    inputs
        The arrays that are read while out is written, by name; None for one not given.
    may_be
        The one of them that out may be, element for element; None for none.
    """
    if out is None:
        return np.empty_like(x, subok=False)
    result = as_numpy("out", out)
    _matches("out", result, x)
    _writeable("out", result)
    if _overlaps_itself(result):
        raise ValueError("out: its elements overlap one another in memory")
    for name, array in inputs:
        if array is None or (name == may_be and _same_memory(result, array)):
            continue
        if overlap(result, array):
            remedy = f"; pass {name} itself, or memory of its own" if name == may_be else ""
            raise ValueError(f"out: overlaps {name}, which is still to be read{remedy}")
    return result


def overlap(a: Array, b: Array) -> bool:
    """Return whether two arrays share an element's memory, or cannot be shown not to."""
    if not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=_OVERLAP_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def batch_values(over: Channels, x: Array) -> int:
    """Return m, refusing the m = 1 that has no variance to train on."""
    if over.values == 1 and over.number:
        raise ValueError(
            f"x: expected more than one value per channel to train on; got shape {x.shape}; "
            "use batch_norm_infer with known statistics, or a larger batch"
        )
    return over.values


class Problem(NamedTuple):
    """What a kernel call takes: its geometry and arrays that fit it, x first, the result last."""

    geometry: Geometry
    arrays: tuple[Array, ...]
    target: Array | None  # the user's array, if the result is computed beside it

    def finish(self) -> None:
        """Bring the result to the user's array if it was computed beside it."""
        if self.target is not None:
            np.copyto(self.target, self.arrays[-1])


def problem(over: Channels, x: Array, dy: Array | None = None, out: Array | None = None) -> Problem:
    """Return the arrays as the kernels can walk them, copying those that they cannot.

    x decides the walk. It is copied if it is misaligned or no axis of it is contiguous; dy is
    copied, and the result computed beside out, if their strides do not allow the same walk.
    """
    arrays = [array for array in (x, dy, out) if array is not None]
    walk = _walk(over, *arrays)
    if walk is not None and walk.complete and all(array.flags.aligned for array in arrays):
        return Problem(walk, tuple(arrays), None)

    if walk is None or not x.flags.aligned:
        arrays[0] = x = _walkable(over, x)
        walk = _walk(over, *arrays)
        assert walk is not None, "a copy of x has a walk"
    target = None
    for i, array in enumerate(arrays):
        if walk.places[i] is not None and array.flags.aligned:
            continue
        beside = np.empty([x.shape[a] for a in walk.order], x.dtype)
        beside = beside.transpose(np.argsort(walk.order))
        if out is not None and i == len(arrays) - 1:
            target = out
        else:
            np.copyto(beside, array)
        arrays[i] = beside
    walk = _walk(over, *arrays)
    assert walk is not None, "what is contiguous in the walk's order has a place"
    return Problem(walk, tuple(arrays), target)


def _walk(over: Channels, *arrays: Array) -> Geometry | None:
    x = arrays[0]
    return geometry(x.shape, over.axes, x.itemsize, tuple(array.strides for array in arrays))


def _walkable(over: Channels, x: Array) -> Array:
    copy = x.copy(order="K")
    if _walk(over, copy) is not None:
        return copy
    # Channel axes that are not neighbours in memory: put them last, in the order given.
    order = [a for a in range(x.ndim) if a not in over.axes] + list(over.axes)
    return np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))


def _matches(name: str, array: Array, x: Array) -> None:
    if array.dtype != x.dtype:
        raise TypeError(
            f"{name}: expected dtype {x.dtype}, as x has; got {array.dtype}"
            + ("" if name == "out" else f"; cast it with {name}.astype(x.dtype)")
        )
    if array.shape != x.shape:
        raise ValueError(f"{name}: expected shape {x.shape}, as x has; got {array.shape}")


def _writeable(name: str, array: Array) -> None:
    if not array.flags.writeable:
        raise ValueError(f"{name}: expected a writeable array; got a read-only one")


def _same_memory(a: Array, b: Array) -> bool:
    return (
        a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
        and a.strides == b.strides
    )


def _overlaps_itself(array: Array) -> bool:
    # Sorted by stride, every axis must step over all that the smaller ones reach.
    if array.flags.c_contiguous or array.size == 0:
        return False
    reach = array.itemsize
    for stride, n in sorted(
        (abs(s), n) for s, n in zip(array.strides, array.shape, strict=True) if n > 1
    ):
        if stride < reach:
            return True
        reach += stride * (n - 1)
    return False


def _cast(name: str, x: Array) -> str:
    if x.dtype.newbyteorder("=") in (FLOAT32, FLOAT64):
        return f"swap its bytes with {name}.astype({name}.dtype.newbyteorder('='))"
    if x.dtype.kind == "c":
        return f"normalise {name}.real and {name}.imag, or cast one of them"
    wide = (x.dtype.kind in "iu" and x.dtype.itemsize > 2) or x.dtype == np.longdouble
    return f"cast it with {name}.astype(numpy.{'float64' if wide else 'float32'})"
