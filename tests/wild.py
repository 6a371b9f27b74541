"""Calls of the public functions as nobody would write them, drawn by hypothesis, and their outcome.

Most of a call is right; then some of it is changed: another dtype, a shape, a stride of 0, memory
that is shared. Every change says what the call must answer. No tests here, and no tolerances.
"""

import math
from fractions import Fraction
from typing import Any, NamedTuple

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
from accuracy import assert_same_bits, tolerance
from calls import BACKWARD, FORWARD, TAKES, WITH_OUT
from cases import FLOATS, HALVES, parameter_dtype
from hypothesis import assume

import bncpu
from bncpu import reference

STATISTICS = ("mean", "var", "invstd", "running_mean", "running_var")
WRONG_DTYPES = [
    *("int8", "uint16", "int64", "bool", "longdouble", "complex64", "object", "S3", "V2"),
    *(ml_dtypes.float8_e5m2, ml_dtypes.int4),
]
# What is no array, whatever it holds.
NO_ARRAYS = [1.5, "x", [1.0, 2.0], (), b"", object(), np.float32(1.0)]
REALS = (TypeError, ["x", None, 1j, [0.1], object()])


class Refusal(NamedTuple):
    """An error that a call may answer with, and the argument that it names."""

    error: type[Exception]
    name: str


class Call(NamedTuple):
    """A function, its arguments, and what must come of it.

    refusals: the errors of which one must come; none for a call that must succeed.
    unsure: whether it may succeed or be refused, as where overlap is too hard to decide.
    """

    function: str
    given: dict[str, Any]
    refusals: list[Refusal]
    unsure: bool = False


@st.composite
def axes_of(draw, ndim):
    """Draw an axis, or a tuple of some, counted from either end."""
    some = draw(st.permutations(range(ndim)))[: draw(st.integers(1, ndim))]
    some = [a - ndim * draw(st.booleans()) for a in some]
    return some[0] if len(some) == 1 and draw(st.booleans()) else tuple(some)


@st.composite
def shapes(draw, most=5000):
    """Draw a shape whose sizes like to stand beside vector widths, of a few thousand elements."""
    size = st.one_of(
        st.integers(0, 6), st.sampled_from([7, 8, 9, 15, 16, 17, 31, 32, 33, 49, 65, 97])
    )
    shape = draw(st.lists(size, min_size=1, max_size=5))
    # Views are of arrays with margins, where a size of 0 hides none of the others.
    while math.prod(n for n in shape if n) > most:
        shape[shape.index(max(shape))] //= 4
    return tuple(shape)


@st.composite
def views(draw, shape, dtype):
    """Draw an array of that shape that looks at a larger one in any order, direction and step."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 1, 2, -1, -2, 3])) for _ in shape]
    margins = [draw(st.integers(0, 2)) for _ in shape]
    sizes = [n * abs(s) + 2 * m for n, s, m in zip(shape, steps, margins, strict=True)]
    base = np.full([sizes[a] for a in order], 77.0, dtype).transpose(np.argsort(order))
    return base[
        tuple(
            slice(m, m + n * abs(s), abs(s)) for n, s, m in zip(shape, steps, margins, strict=True)
        )
    ][tuple(slice(None, None, -1 if s < 0 else 1) for s in steps)]


def channel_shape(shape, axis):
    return tuple(shape[a] for a in (axis if isinstance(axis, tuple) else (axis,)))


@st.composite
def placed(draw, shape, dtype):
    """Draw memory for an array: plain, a view, or one that begins at an odd byte."""
    how = draw(st.sampled_from(["plain", "plain", "view", "odd byte"]))
    if how == "plain":
        return np.full(shape, 77.0, dtype)
    if how == "view":
        return draw(views(shape, dtype))
    dtype = np.dtype(dtype)
    memory = np.zeros(math.prod(shape) * dtype.itemsize + 9, np.uint8)
    return np.ndarray(shape, dtype, memory, offset=draw(st.integers(0, 8)))


@st.composite
def beside(draw, array):
    """Draw an array of the shape and dtype of another one that lies in its memory, or near it.

    Shifted by some bytes, or the same elements in another order.
    """
    shape, dtype = array.shape, array.dtype
    nbytes = array.size * dtype.itemsize
    if draw(st.booleans()) and array.flags.writeable:
        turned = array[tuple(slice(None, None, draw(st.sampled_from([1, -1]))) for _ in shape)]
        order = draw(st.permutations(range(array.ndim)))
        if turned.transpose(order).shape == shape:
            return array, turned.transpose(order)
        return array, turned
    shift = draw(st.integers(-nbytes - 8, nbytes + 8))
    if draw(st.booleans()):
        shift = shift // dtype.itemsize * dtype.itemsize
    memory = np.zeros(3 * nbytes + 32, np.uint8)
    first = nbytes + 8
    one = np.ndarray(shape, dtype, memory, offset=first)
    other = np.ndarray(shape, dtype, memory, offset=first + shift)
    one[...] = array
    return one, other


def root(array):
    """Return the array that owns an array's memory, or the oldest view of it that there is."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _address(array):
    return array.__array_interface__["data"][0]


def addresses(array):
    """Return the address of every byte of an array, once for each element that it is in."""
    at = np.array(_address(array), np.int64)
    for stride, n in zip(array.strides, array.shape, strict=True):
        at = np.add.outer(at, np.arange(n, dtype=np.int64) * stride)
    return np.add.outer(at.reshape(-1), np.arange(array.itemsize)).reshape(-1)


def share(a, b):
    """Return whether two arrays have a byte in common."""
    if not np.may_share_memory(a, b):  # their ends decide
        return False
    first, second = addresses(a), addresses(b)
    low = min(first.min(), second.min())
    of_first = np.zeros(max(first.max(), second.max()) - low + 1, bool)
    of_first[first - low] = True
    return bool(of_first[second - low].any())


def too_hard(a, b):
    """Return whether that two arrays share nothing takes longer to show than the library tries."""
    try:
        np.shares_memory(a, b, max_work=10_000)
    except np.exceptions.TooHardError:
        return True
    return False


def is_the_same(a, b):
    """Return whether two arrays of one shape and dtype are one, element by element."""
    return _address(a) == _address(b) and a.strides == b.strides


def set_values(random, name, array, draw):
    """Fill an array with values of some kind."""
    kind = draw(
        st.sampled_from(["normal", "normal", "offset", "grid", "constant", "tiny", "huge", "odd"])
    )
    values = random.standard_normal(array.shape)
    info = ml_dtypes.finfo(array.dtype)
    if kind == "offset":
        values = values + draw(st.sampled_from([3.0, 1e3, -1e5, 2.0**20]))
    elif kind == "grid":
        values = np.rint(values * 2)
    elif kind == "constant":
        values = np.full(array.shape, draw(st.sampled_from([0.0, -0.0, 0.1, -3.0, 1e4])))
    elif kind == "tiny":  # down to numbers without leading digits, where that is float32's end
        least = max(float(info.smallest_normal), float(np.finfo(np.float32).smallest_normal))
        values = values * (least if name == "x" else 2.0**-14)
    elif kind == "huge":
        values = values * draw(st.sampled_from([1e4, 1e9, 1e15]))
    most = 6e4 if array.dtype == np.float16 else 1e30
    array[...] = np.clip(values, -most, most)
    if kind == "odd":
        odd = [0.0, -0.0, np.nan, np.inf, -np.inf, float(info.smallest_subnormal), 1e-30, 1e30]
        for _ in range(draw(st.integers(1, 4))):
            if array.size:
                at = tuple(draw(st.integers(0, n - 1)) for n in array.shape)
                with np.errstate(all="ignore"):
                    array[at] = draw(st.sampled_from(odd))


@st.composite
def right_calls(draw, functions=tuple(TAKES)):
    """Draw a call that must succeed, unless m = 1."""
    function = draw(st.sampled_from(functions))
    takes = TAKES[function]
    dtype = draw(st.sampled_from([*FLOATS, *FLOATS, *HALVES]))
    shape = draw(shapes(2000))
    axis = draw(axes_of(len(shape)))
    channels, kind = channel_shape(shape, axis), parameter_dtype(dtype)
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    given = {"axis": axis}

    for name in ("x", "dy"):
        if name in takes:
            given[name] = draw(placed(shape, dtype))
            set_values(random, name, given[name], draw)
    x = given["x"]
    with np.errstate(all="ignore"):
        moments = reference.batch_moments(x, axis=axis)
        mean = np.nan_to_num(moments.mean, posinf=1.0, neginf=-1.0)
        var = np.nan_to_num(moments.m2 / max(moments.count, 1) + 0.01, posinf=1.0)
    near = {"mean": mean, "var": var, "invstd": 1 / np.sqrt(var + 1e-5)}
    near |= {"running_mean": mean * 0.5, "running_var": var * 2.0}
    tracks = draw(st.booleans())
    for name in STATISTICS:
        if name in takes and (tracks or not name.startswith("running")):
            # A float32 mean is another than the batch's, of which the gradient is no gradient.
            exact = function == "batch_norm_backward" and name == "mean"
            if name != "running_var":
                held = draw(st.sampled_from(FLOATS[exact:]))
            given[name] = draw(placed(channels, held))
            with np.errstate(all="ignore"):
                given[name][...] = near[name]
    for name in ("gamma", "beta"):
        if name in takes and draw(st.booleans()):
            given[name] = draw(placed(channels, kind))
            given[name][...] = random.standard_normal(channels)
    if "activation" in takes and draw(st.booleans()):
        given["activation"] = "relu"
    if "activation" in given and draw(st.booleans()):
        given["mask"] = random.integers(0, 256, (x.size + 7) // 8, np.uint8)
    if "residual" in takes and draw(st.booleans()):
        if function in FORWARD:
            given["residual"] = draw(placed(shape, dtype))
            set_values(random, "residual", given["residual"], draw)
        elif "activation" not in given or "mask" in given:
            given["residual"] = draw(
                st.sampled_from([True, np.True_, np.full(shape, 77.0, dtype), given["dy"]])
            )
    if function in WITH_OUT and draw(st.booleans()):
        given["out"] = draw(placed(shape, dtype))
    if "momentum" in takes and draw(st.booleans()):
        given["momentum"] = draw(st.sampled_from([0, 1, 0.1, 0.9, Fraction(1, 3), np.float32(0.5)]))
    if "eps" in takes and draw(st.booleans()):
        given["eps"] = draw(st.sampled_from([1e-5, 1e-3, 1, np.float32(0.25), Fraction(1, 7)]))
    given["num_threads"] = draw(st.sampled_from([1] * 8 + [None, 2, 3, 4, np.int64(2), True]))
    if function in BACKWARD and "activation" in given and "mask" not in given:
        given["dy"][doubtful(given)] = 0
    for name in ("x", "dy", "gamma", "beta", "mean", "var", "invstd", "residual"):
        written = given.get("residual") if function in BACKWARD else None
        if isinstance(given.get(name), np.ndarray) and given[name] is not written:
            given[name].flags.writeable = draw(st.booleans())
    refusals = []
    if function == "batch_norm_train" and moments.count == 1 and math.prod(channels):
        refusals.append(Refusal(ValueError, "x"))
    return Call(function, given, refusals)


@np.errstate(all="ignore")
def z_of(given):
    """Return what ReLU is applied to, without a residual, and the size of its terms."""
    axes = given["axis"] if isinstance(given["axis"], tuple) else (given["axis"],)
    last = tuple(range(-len(axes), 0))
    x = np.moveaxis(given["x"].astype(np.float64), axes, last)
    mean, gamma, beta = (
        np.asarray(given.get(name, default), np.float64)
        for name, default in (("mean", 0.0), ("gamma", 1.0), ("beta", 0.0))
    )
    if "invstd" in given:
        invstd = given["invstd"].astype(np.float64)
    else:
        invstd = 1 / np.sqrt(given["var"].astype(np.float64) + float(given.get("eps", 1e-5)))
    xhat = (x - mean) * invstd
    z = gamma * xhat + beta
    size = np.abs(gamma) * (np.abs(xhat) + 1) + np.abs(beta)
    return np.moveaxis(z, last, axes), np.moveaxis(size, last, axes)


def doubtful(given):
    """Return where z is so near 0 that rounding decides whether ReLU lets it pass."""
    z, size = z_of(given)
    return np.abs(z) <= 4 * tolerance(given["x"].dtype, 1) * size


def passes(given):
    """Return where a mask lets pass, in the order of bits that is documented."""
    x, mask = given["x"], given["mask"]
    order = sorted(range(x.ndim), key=lambda a: -abs(x.strides[a]) if x.shape[a] > 1 else 0)
    bits = np.unpackbits(mask, bitorder="little")[: x.size].reshape([x.shape[a] for a in order])
    return bits.transpose(np.argsort(order)).astype(bool)


@st.composite
def aliased_calls(draw):
    """Draw a call in which something that is written lies in or beside the memory of another."""
    call = draw(right_calls(tuple(WITH_OUT)))
    function, given = call.function, dict(call.given)
    x = given["x"]
    written = draw(st.sampled_from(["out", "residual" if function in BACKWARD else "out"]))
    if written == "residual" and "activation" in given and "mask" not in given:
        given["mask"] = np.zeros((x.size + 7) // 8, np.uint8)
    others = [n for n in ("x", "dy", "residual", "out") if isinstance(given.get(n), np.ndarray)]
    other = draw(st.sampled_from([name for name in others if name != written]))
    if draw(st.booleans()):
        given[written] = given[other]
        given[written].flags.writeable = True
    else:
        one, near = draw(beside(given[other]))
        for name in others:  # an array may be there twice
            if name != other and given[name] is given[other]:
                given[name] = one
        given[other], given[written] = one, near
        near.flags.writeable = True
    return outcome_of_aliases(Call(function, given, call.refusals))


def outcome_of_aliases(call):
    """Return the call with the refusals that its shared memory asks for, told byte by byte."""
    function, given, refusals = call.function, call.given, list(call.refusals)
    read = ["x", "dy", "gamma", "beta", "mean", "var", "invstd", "mask"]
    read += ["residual"] if function in FORWARD else []
    arrays = {name: a for name, a in given.items() if isinstance(a, np.ndarray) and a.size}
    may_be = {"batch_norm_train": ["residual"], "batch_norm_infer": ["x", "residual"]}
    may_be |= {backward: ["dy"] for backward in BACKWARD}
    writes = ["out"] + (["residual"] if function in BACKWARD else [])
    unsure = False
    for name in writes:
        if name not in arrays:
            continue
        among = read + (["out"] if name == "residual" else [])
        for other in among:
            if other not in arrays or other == name:
                continue
            if other in may_be[function] and is_the_same(arrays[name], arrays[other]):
                continue
            if share(arrays[name], arrays[other]):
                refusals.append(Refusal(ValueError, name))
            else:
                unsure |= too_hard(arrays[name], arrays[other])
    return Call(function, given, refusals, unsure)


@st.composite
def wrong_calls(draw):
    """Draw a call with one to three mistakes, each in another argument."""
    call = draw(right_calls())
    given, refusals = dict(call.given), list(call.refusals)
    for name in draw(st.permutations(TAKES[call.function]))[: draw(st.integers(1, 3))]:
        refusals += draw(mistakes(call.function, name, given))
    assume(refusals)
    return Call(call.function, given, refusals)


@st.composite
def mistakes(draw, function, name, given):
    """Change one argument of a call in place; return the refusals, none if nothing was changed."""
    if name == "axis":
        given[name], error = draw(
            st.sampled_from(
                [
                    (5, ValueError),
                    (-6, ValueError),
                    (2**70, ValueError),
                    ((), ValueError),
                    ((0, 0), ValueError),
                    ((0, -given["x"].ndim if isinstance(given["x"], np.ndarray) else 0), None),
                    (1.0, TypeError),
                    ("1", TypeError),
                    (None, TypeError),
                    ([0], TypeError),
                    ((0, 0.5), TypeError),
                ]
            )
        )
        return [Refusal(error or ValueError, name)]
    if name == "num_threads":
        wrong = [(0, ValueError), (-1, ValueError), (1025, ValueError), (2**70, ValueError)]
        wrong += [(1.0, TypeError), ("2", TypeError), ([1], TypeError)]
        given[name], error = draw(st.sampled_from(wrong))
        return [Refusal(error, name)]
    if name in ("eps", "momentum"):
        wrong = [(v, ValueError) for v in (-1e-9, math.nan, math.inf, -math.inf, 10**400)]
        wrong += [(v, TypeError) for v in ("0.1", None, 1j, [0.1], object(), b"1")]
        wrong += [(1.5, ValueError)] if name == "momentum" else []
        given[name], error = draw(st.sampled_from(wrong))
        return [Refusal(error, name)]
    if name == "activation":
        given[name], error = draw(st.sampled_from([("gelu", ValueError), (3, TypeError)]))
        return [Refusal(error, name)]
    if name == "mask":
        return draw(_mistakes_of_mask(function, given))
    return draw(_mistakes_of_array(function, name, given))


@st.composite
def _mistakes_of_mask(draw, function, given):
    x = given["x"]
    n = (x.size + 7) // 8 if isinstance(x, np.ndarray) else 1
    wrong = [
        (np.zeros(n, np.int8), TypeError),
        (np.zeros(n, bool), TypeError),
        (np.zeros(n + 1, np.uint8), ValueError),
        (np.zeros((n, 1), np.uint8), ValueError),
        ([0] * n, TypeError),
    ]
    if n > 1:
        wrong.append((np.zeros(2 * n, np.uint8)[::2], ValueError))
    if function in FORWARD:
        frozen = np.zeros(n, np.uint8)
        frozen.flags.writeable = False
        wrong.append((frozen, ValueError))
        has_bytes = type(x) is np.ndarray and not x.dtype.hasobject  # it may be wrong itself by now
        if n > 0 and has_bytes and x.flags.c_contiguous and x.nbytes >= n:
            wrong.append((x.reshape(-1).view(np.uint8)[:n], ValueError))
    given["mask"], error = draw(st.sampled_from(wrong))
    refusals = [Refusal(error, "mask")]
    if "activation" not in given:
        refusals.append(Refusal(ValueError, "mask"))
    return refusals


@st.composite
def _mistakes_of_array(draw, function, name, given):
    """Give another array, or none, in the place of one; several may be wrong with it then."""
    if name == "residual" and function in BACKWARD:
        if "activation" in given and "mask" not in given:
            given[name] = True
            return [Refusal(ValueError, "mask")]
        given[name] = None
        return [Refusal(TypeError, name)]
    if name not in given:
        if not name.startswith("running"):
            return []
        given.pop("running_var" if name == "running_mean" else "running_mean", None)
        given[name] = np.zeros(1, np.float32)
        other = "running_var" if name == "running_mean" else "running_mean"
        return [Refusal(ValueError, other), Refusal(ValueError, name)]
    array = given[name]
    written = name in ("out", "running_mean", "running_var")
    kinds = ["no array", "dtype", "bytes", "masked"]
    kinds += ["shape", "shape"] if name != "x" else ["number"]
    kinds += ["read-only", "repeated"] if written else []
    kinds += ["negative"] if name == "var" else []
    kinds += ["alone"] if name.startswith("running") else []
    kind = draw(st.sampled_from(kinds))
    if kind == "no array":
        given[name] = draw(st.sampled_from(NO_ARRAYS))
        return [Refusal(TypeError, name)]
    if kind == "dtype":
        with np.errstate(all="ignore"):
            given[name] = np.zeros(array.shape, draw(st.sampled_from(WRONG_DTYPES)))
        return [Refusal(TypeError, name)]
    if kind == "bytes":
        if array.dtype.kind != "f":
            return []
        given[name] = array.astype(array.dtype.newbyteorder())
        return [Refusal(TypeError, name)]
    if kind == "masked":
        given[name] = np.ma.masked_array(array.astype(float), False)
        return [Refusal(TypeError, name)]
    if kind == "number":
        given[name] = np.zeros((), array.dtype)
        return [Refusal(ValueError, name)]
    if kind == "shape":
        other = draw(
            st.sampled_from([(), (1, *array.shape), array.shape[1:], (array.size + 1,), (0, 0)])
        )
        assume(other != array.shape)
        given[name] = np.zeros(other, array.dtype)
        return [Refusal(ValueError, name)]
    if kind == "read-only":
        given[name] = array.copy()
        given[name].flags.writeable = False
        return [Refusal(ValueError, name)]
    if kind == "repeated":
        axes = [a for a, n in enumerate(array.shape) if n > 1]
        assume(array.size and axes)
        strides = list(array.copy().strides)
        strides[draw(st.sampled_from(axes))] = 0
        given[name] = np.ndarray(array.shape, array.dtype, np.zeros(array.nbytes, np.uint8), 0)
        given[name] = np.lib.stride_tricks.as_strided(given[name], strides=strides, writeable=True)
        return [Refusal(ValueError, name)]
    if kind == "alone":
        del given[name]
        return [Refusal(ValueError, name)]
    assume(array.size)
    given[name] = array.copy()
    given[name].flat[draw(st.integers(0, array.size - 1))] = -1e-3
    return [Refusal(ValueError, name)]


def answer(call):
    """Make a call; return its result, or None if it was refused as it had to be.

    Either way nothing else has changed than what is documented to: of a refused call not a bit of
    any array and of the memory around it, of another one only the elements of what is written.
    """
    arrays = {name: a for name, a in call.given.items() if isinstance(a, np.ndarray)}
    roots = {id(root(a)): root(a) for a in arrays.values()}
    before = {key: _bytes(a) for key, a in roots.items()}
    written = [n for n in ("out", "running_mean", "running_var") if n in arrays]
    if call.function in FORWARD:
        written += ["mask"] if "mask" in arrays else []
    elif "residual" in arrays:
        written.append("residual")
    old = {name: arrays[name].copy() for name in written if not call.refusals}
    error = None
    try:
        got = getattr(bncpu, call.function)(**call.given)
    except (TypeError, ValueError) as refused:
        error = refused
    if error is not None:
        for key, a in roots.items():
            assert _bytes(a) == before[key], f"changed by a call that was refused: {error}"
        assert call.refusals or call.unsure, f"refused: {error}"
        expected = [r for r in call.refusals if type(error) is r.error]
        expected += [Refusal(ValueError, name) for name in ("out", "residual")] * call.unsure
        assert any(str(error).startswith(f"{r.name}: ") for r in expected), (
            f"{type(error).__name__}: {error}; expected {call.refusals}"
        )
        return None
    assert not call.refusals, f"not refused: {call.refusals}"
    new = {name: arrays[name].copy() for name in written}
    for name in written:
        arrays[name][...] = old[name]
    for key, a in roots.items():
        assert _bytes(a) == before[key], "written outside the results"
    for name in written:
        arrays[name][...] = new[name]
    return got


def _bytes(array):
    return repr(array).encode() if array.dtype.hasobject else array.tobytes(order="A")


def cloned(call):
    """Return the call on other memory, laid out, aligned and shared as the call's own is."""
    blocks: dict[int, tuple[int, np.ndarray]] = {}
    given = {}
    for name, a in call.given.items():
        if not isinstance(a, np.ndarray) or a.dtype.hasobject:
            given[name] = a
            continue
        if not a.size:  # and no memory: where its first element would be is nobody's matter
            given[name] = np.empty(a.shape, a.dtype)
            given[name].flags.writeable = a.flags.writeable
            continue
        owner = root(a)
        first = _address(owner)
        if id(owner) not in blocks:
            block = np.zeros(owner.nbytes + 128, np.uint8)
            skipped = (first - _address(block)) % 64
            content = np.frombuffer(owner.tobytes(order="A"), np.uint8)
            block[skipped : skipped + content.size] = content
            blocks[id(owner)] = skipped, block
        skipped, block = blocks[id(owner)]
        offset = skipped + _address(a) - first
        given[name] = np.ndarray(a.shape, a.dtype, block, offset, a.strides)
        given[name].flags.writeable = a.flags.writeable
    for name, a in call.given.items():  # what was one array stays one
        for other, b in call.given.items():
            if a is b and isinstance(a, np.ndarray):
                given[name] = given[other]
    return call._replace(given=given)


def assert_same_answer(got, other):
    """Compare what a function returned twice, bit by bit."""
    for a, b in zip(_parts(got), _parts(other), strict=True):
        if isinstance(a, np.ndarray):
            assert_same_bits(a, b)
        else:
            assert a == b


def _parts(got):
    return got if isinstance(got, tuple) else (got,)
