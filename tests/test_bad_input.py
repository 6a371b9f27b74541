"""Wrong calls: which argument, what was expected, what came, in that order; and nothing written.

One problem, of shape (4, 3, 5) with three channels, and one change at a time (calls.py). A message
begins with the argument's name; kinds and dtypes are TypeErrors, shapes and ranges are ValueErrors.
What is fused with batch normalisation has its own file, test_bad_fused.py.
"""

import re
import sys

import ml_dtypes
import numpy as np
import pytest
from accuracy import assert_same_bits
from calls import (
    ARRAYS,
    FUSED,
    OF_CHANNELS,
    REQUIRED,
    SHAPE,
    TAKES,
    WITH_OUT,
    arguments,
    assert_refused,
    takers,
)
from cases import HALVES

import bncpu


class OnGPU:
    """An array of another device, as far as it lets the CPU see."""

    shape = SHAPE
    dtype = np.dtype(np.float32)
    ndim = 3

    def __dlpack__(self, **how):
        raise BufferError("this memory is on a GPU")

    def __dlpack_device__(self):
        return 2, 0


@pytest.mark.parametrize("function", TAKES)
def test_the_call_itself_is_right(function):
    """What is changed below is the only thing wrong."""
    given = arguments(function)
    getattr(bncpu, function)(**given)
    getattr(bncpu, function)(**{name: given[name] for name in REQUIRED[function]})


@pytest.mark.parametrize(
    "value",
    [1.5, "x", [[1.0, 2.0], [3.0, 4.0]], (1.0, 2.0), object()],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize(("function", "name"), takers(*ARRAYS))
def test_not_an_array(function, name, value):
    given = arguments(function)
    given[name] = value
    assert_refused(function, given, TypeError, rf"^{name}: expected .*array")


@pytest.mark.parametrize("function", TAKES)
def test_none_is_not_an_array(function):
    """Nor is it the default of what must be given."""
    for name in REQUIRED[function]:
        given = arguments(function) | {name: None}
        assert_refused(function, given, TypeError, rf"^{name}: expected .*array")


@pytest.fixture
def no_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)


@pytest.mark.parametrize(("function", "name"), takers(*ARRAYS))
@pytest.mark.usefixtures("no_cupy")
def test_an_array_that_is_not_on_the_cpu(function, name):
    """What x is decides where it is computed, and the others must be there."""
    given = arguments(function) | {name: OnGPU()}
    if name == "x":
        assert_refused(function, given, ImportError, r'CuPy.*pip install "bncpu\[cuda\]"')
    else:
        assert_refused(function, given, TypeError, rf"^{name}: .*CPU.*as x is")


def test_bfloat16_of_another_library():
    """NumPy cannot view it without help; which help, says the message."""

    class Tensor(OnGPU):
        dtype = "torch.bfloat16"

        def __dlpack_device__(self):
            return 1, 0

    for function in TAKES:
        given = arguments(function) | {"x": Tensor()}
        assert_refused(function, given, TypeError, r"^x: .*uint16.*ml_dtypes\.bfloat16")


@pytest.mark.parametrize("function", WITH_OUT)
@pytest.mark.usefixtures("no_cupy")
def test_an_output_in_the_memory_of_another_device(function):
    """NumPy arrays for the results of arrays that are not."""
    given = arguments(function)
    read = [name for name in ("dy", "x", *OF_CHANNELS) if name in given and "running" not in name]
    given |= {name: OnGPU() for name in read}
    assert_refused(function, given, ImportError, r'pip install "bncpu\[cuda\]"')


DTYPES = ["int64", "uint8", "bool", "longdouble", "complex64", "object", "S4", "U3"]
DTYPES += ["uint16", "V2"]  # of the size of bfloat16


@pytest.mark.parametrize("dtype", [*DTYPES, ml_dtypes.float8_e5m2, ml_dtypes.int4], ids=str)
@pytest.mark.parametrize(("function", "name"), takers("x", "dy", *OF_CHANNELS))
def test_dtypes_without_arithmetic_here(function, name, dtype):
    """The message names the dtype that came, and what to cast to."""
    given = arguments(function)
    with np.errstate(invalid="ignore"):
        given[name] = given[name].astype(dtype)
    came = re.escape(str(given[name].dtype))
    assert_refused(function, given, TypeError, rf"^{name}: (?=.*{came})(?=.*float(32|64))")


@pytest.mark.parametrize(("function", "name"), takers("x", "dy", "out", *OF_CHANNELS))
def test_foreign_byte_order(function, name):
    given = arguments(function)
    given[name] = given[name].astype(given[name].dtype.newbyteorder())
    assert_refused(function, given, TypeError, rf"^{name}: ")


@pytest.mark.parametrize(("function", "name"), takers("gamma", "beta"))
def test_parameters_have_the_dtype_of_x(function, name):
    given = arguments(function)
    given[name] = given[name].astype(np.float64)
    assert_refused(function, given, TypeError, rf"^{name}: (?=.*float64)(?=.*float32)")

    wide = {"x", "dy", "residual", "out", "gamma", "beta"} & given.keys()
    given |= {n: given[n].astype(np.float64) for n in wide}
    given[name] = given[name].astype(np.float32)
    assert_refused(function, given, TypeError, rf"^{name}: (?=.*float64)(?=.*float32)")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("function", "name"), takers(*OF_CHANNELS))
def test_half_types_are_for_data_alone(function, name, dtype):
    """Parameters and statistics of half a float32's digits would cost more than they save."""
    given = arguments(function)
    given[name] = given[name].astype(dtype)
    assert_refused(function, given, TypeError, rf"^{name}: expected .*float32.*got {dtype}")
    like_x = {"x", "dy", "residual", "out"} & given.keys()
    given |= {n: given[n].astype(dtype) for n in like_x}
    assert_refused(function, given, TypeError, rf"^{name}: expected .*float32.*got {dtype}")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("function", WITH_OUT)
def test_parameters_of_float64_for_half_types(function, dtype):
    given = arguments(function)
    given |= {n: given[n].astype(dtype) for n in {"x", "dy", "residual", "out"} & given.keys()}
    getattr(bncpu, function)(**given)
    given["gamma"] = given["gamma"].astype(np.float64)
    assert_refused(function, given, TypeError, r"^gamma: expected dtype float32 .*got float64")


@pytest.mark.parametrize("dtype", [*HALVES, np.dtype(np.float64)], ids=str)
@pytest.mark.parametrize(("function", "name"), takers("dy", "residual", "out"))
def test_arrays_have_the_dtype_of_x(function, name, dtype):
    given = arguments(function)
    given[name] = given[name].astype(dtype)
    assert_refused(function, given, TypeError, rf"^{name}: expected dtype float32.*got {dtype}")
    for half in HALVES:
        given = arguments(function)
        given |= {n: given[n].astype(half) for n in {"x", "dy", "residual", "out"} & given.keys()}
        given[name] = given[name].astype(np.float32)
        match = rf"^{name}: expected dtype {half}.*got float32"
        assert_refused(function, given, TypeError, match)


@pytest.mark.parametrize(
    "shape", [(), (1,), (2,), (4,), (5,), (3, 1), (1, 3), (0,), SHAPE], ids=str
)
@pytest.mark.parametrize(("function", "name"), takers(*OF_CHANNELS))
def test_one_value_per_channel(function, name, shape):
    given = arguments(function)
    given[name] = np.ones(shape, given[name].dtype)
    match = rf"^{name}: expected shape \(3,\).*got {re.escape(str(shape))}"
    assert_refused(function, given, ValueError, match)


def test_the_whole_message():
    """As the design has it, word for word."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole text is compared)
        bncpu.batch_norm_train(np.ones((32, 64, 7, 7), np.float32), np.ones(32, np.float32))
    assert str(caught.value).startswith(
        "gamma: expected shape (64,), one value per channel of x (32, 64, 7, 7) on axis 1; "
        "got (32,)"
    )


def test_per_activation_parameters_have_the_shape_of_the_axes():
    x = np.ones((5, 3, 4, 2), np.float32)
    with pytest.raises(ValueError, match=r"^gamma: expected shape \(3, 4, 2\).*got \(24,\)"):
        bncpu.batch_norm_train(x, np.ones(24, np.float32), axis=(1, 2, 3))


@pytest.mark.parametrize("function", TAKES)
@pytest.mark.parametrize("shape", [(), (4,)], ids=str)
def test_no_channel_axis(function, shape):
    given = {name: a for name, a in arguments(function).items() if name in REQUIRED[function]}
    for name in {"x", "dy"} & given.keys():
        given[name] = np.ones(shape, np.float32)
    assert_refused(function, given, ValueError, r"^(x|axis): ")


@pytest.mark.parametrize("function", TAKES)
@pytest.mark.parametrize("axis", [3, -4, 10**20, (0, 3), (-4,), (1, 1), (1, -2), ()], ids=str)
def test_axis_out_of_range_or_repeated(function, axis):
    assert_refused(function, arguments(function) | {"axis": axis}, ValueError, r"^axis: ")


@pytest.mark.parametrize("function", TAKES)
@pytest.mark.parametrize("axis", [None, 1.0, "1", [1], (1, 2.0), np.array([1, 2]), {1}], ids=repr)
def test_axis_of_another_kind(function, axis):
    assert_refused(function, arguments(function) | {"axis": axis}, TypeError, r"^axis: ")


@pytest.mark.parametrize(("function", "name"), takers("eps"))
def test_eps(function, name):
    for value in (-1e-5, -1.0, np.nan, np.inf, -np.inf, 10**400):
        assert_refused(function, arguments(function) | {name: value}, ValueError, r"^eps: ")
    for value in (None, "1e-5", 1j, np.ones(3)):
        assert_refused(function, arguments(function) | {name: value}, TypeError, r"^eps: ")


def test_momentum():
    given = arguments("batch_norm_train")
    for value in (np.nan, -0.1, 1.1, np.inf, 10**400):
        changed = given | {"momentum": value}
        assert_refused("batch_norm_train", changed, ValueError, r"^momentum: ")
    for value in (None, "0.1", 1j):
        assert_refused("batch_norm_train", given | {"momentum": value}, TypeError, r"^momentum: ")


@pytest.mark.parametrize("function", TAKES)
def test_num_threads(function):
    given = arguments(function)
    for value in (0, -1, -(10**20), 1025, 10**6, 2**31):
        changed = given | {"num_threads": value}
        match = rf"^num_threads: expected 1 to 1024; got {value}"
        assert_refused(function, changed, ValueError, match)
    for value in (1.5, "2", 2.0, [2]):
        changed = given | {"num_threads": value}
        assert_refused(function, changed, TypeError, r"^num_threads: ")


@pytest.mark.parametrize(("function", "name"), takers("var"))
@pytest.mark.parametrize("value", [-1.0, -1e-300, -np.inf])
def test_negative_variance(function, name, value):
    given = arguments(function)
    given[name][1] = value
    assert_refused(function, given, ValueError, r"^var: ")


@pytest.mark.parametrize("missing", ["mean", "var"])
def test_running_statistics_come_in_pairs(missing):
    given = arguments("batch_norm_train")
    del given[f"running_{missing}"]
    assert_refused("batch_norm_train", given, ValueError, rf"^running_{missing}: expected an array")


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_running_statistics_that_cannot_be_written(name):
    given = arguments("batch_norm_train")
    given[name].flags.writeable = False
    assert_refused("batch_norm_train", given, ValueError, rf"^{name}: .*(read-only|writeable)")


@pytest.mark.parametrize("shape", [(1, 3, 1), (1, 3)], ids=str)
def test_one_value_per_channel_in_training(shape):
    """There is no variance to speak of; the message says what to do."""
    given = {
        "x": np.ones(shape, np.float32),
        "running_mean": np.zeros(3, np.float32),
        "running_var": np.ones(3, np.float32),
        "out": np.full(shape, 7.0, np.float32),
    }
    match = r"^x: (?=.*batch_norm_infer)(?=.*larger batch)"
    assert_refused("batch_norm_train", given, ValueError, match)


def test_one_value_per_activation_in_training():
    given = {"x": np.ones((1, 3, 2), np.float32), "axis": (1, 2)}
    assert_refused("batch_norm_train", given, ValueError, r"^x: .*batch_norm_infer")


@pytest.mark.parametrize("function", ["batch_norm_backward", "batch_norm_infer_backward"])
class TestDy:
    @pytest.mark.parametrize("shape", [(4, 3), (4, 3, 6), (4, 1, 5), (5, 3, 4), ()], ids=str)
    def test_shape(self, function, shape):
        given = arguments(function) | {"dy": np.ones(shape, np.float32)}
        assert_refused(function, given, ValueError, r"^dy: expected shape \(4, 3, 5\).*got ")

    def test_dtype(self, function):
        given = arguments(function) | {"dy": np.ones(SHAPE, np.float64)}
        assert_refused(function, given, TypeError, r"^dy: (?=.*float64)(?=.*float32)")


@pytest.mark.parametrize(("function", "name"), takers("x", "dy", functions=WITH_OUT))
@pytest.mark.parametrize("shift", [1, -1, 5, 15, 59])
def test_overlap(function, name, shift):
    """An output over a part of an input would change it before it is read."""
    given = arguments(function)
    size = int(np.prod(SHAPE))
    memory = np.zeros(3 * size, np.float32)
    new = memory[size : 2 * size].reshape(SHAPE)
    new[...] = given[name]
    out = memory[size + shift : 2 * size + shift].reshape(SHAPE)
    given |= {name: new, "out": out}
    assert_refused(function, given, ValueError, rf"^out: .*{name}")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("function", "name"), takers(*OF_CHANNELS, functions=WITH_OUT))
def test_overlap_with_values_of_channels(function, name, dtype):
    """Refused, unless the call has its own copy; then the result is right."""
    given = arguments(function)
    for wide in {"x", "dy", "out", "residual", *OF_CHANNELS} & given.keys():
        given[wide] = given[wide].astype(dtype)
    expected = getattr(bncpu, function)(**{**given, "out": None})
    inside = given["out"].reshape(-1)[30:33]
    inside[...] = given[name]
    given[name] = inside
    before = given["out"].copy()
    try:
        got = getattr(bncpu, function)(**given)
    except ValueError as error:
        assert str(error).startswith(("out: ", f"{name}: "))  # noqa: PT017 (or no error)
        assert_same_bits(given["out"], before)
    else:
        result, expected = (r if isinstance(r, np.ndarray) else r[0] for r in (got, expected))
        assert_same_bits(result, expected)


@pytest.mark.parametrize("function", WITH_OUT)
class TestOut:
    @pytest.mark.parametrize("shape", [(4, 3), (4, 3, 6), (5, 3, 4), (1, 4, 3, 5), (60,)], ids=str)
    def test_shape(self, function, shape):
        given = arguments(function) | {"out": np.full(shape, 7.0, np.float32)}
        assert_refused(function, given, ValueError, r"^out: expected shape \(4, 3, 5\).*got ")

    @pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "object"])
    def test_dtype(self, function, dtype):
        given = arguments(function) | {"out": np.ones(SHAPE, dtype)}
        assert_refused(function, given, TypeError, rf"^out: (?=.*float32)(?=.*{dtype})")

    def test_read_only(self, function):
        given = arguments(function)
        given["out"].flags.writeable = False
        assert_refused(function, given, ValueError, r"^out: .*(read-only|writeable)")

    def test_overlap_in_another_order(self, function):
        """The very memory of the argument that may be written, but not element by element."""
        given = arguments(function)
        inplace = "dy" if "dy" in given else "x"
        square = np.ones((3, 3, 3), np.float32)
        given = {name: a for name, a in given.items() if name in OF_CHANNELS}
        given |= {
            name: np.ones((3, 3, 3), np.float32) for name in ("x", "dy") if name in TAKES[function]
        }
        for out in (square[::-1], square.transpose(2, 1, 0), square[:, ::-1]):
            given |= {inplace: square, "out": out}
            assert_refused(function, given, ValueError, rf"^out: .*{inplace}")

    def test_an_output_that_overlaps_itself(self, function):
        """Stride zero: one element stands for several."""
        row = np.full((1, 3, 5), 7.0, np.float32)
        out = np.lib.stride_tricks.as_strided(row, SHAPE, (0, *row.strides[1:]))
        given = arguments(function) | {"out": out}
        assert_refused(function, given, ValueError, r"^out: ")


@pytest.mark.parametrize("function", [f for f in WITH_OUT if f != "batch_norm_infer"])
def test_x_is_not_overwritten(function):
    """The backward needs it."""
    given = arguments(function)
    given["out"] = given["x"]
    assert_refused(function, given, ValueError, r"^out: .*x")


@pytest.mark.parametrize("other", ["x", "out", "gamma", "beta", "running_var"])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_running_statistics_in_the_memory_of_another_argument(name, other):
    """They are written last: what the backward needs, or the result, would be lost."""
    given = arguments("batch_norm_train")
    if name == other:
        other = "running_mean"
    given[name] = given[other].reshape(-1)[:3]
    assert_refused("batch_norm_train", given, ValueError, r"^(running_(mean|var)|out): ")


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_running_statistics_that_overlap_themselves(name):
    """One number cannot be the average of three channels."""
    given = arguments("batch_norm_train")
    given[name] = np.lib.stride_tricks.as_strided(np.ones(1, np.float32), (3,), (0,))
    assert_refused("batch_norm_train", given, ValueError, rf"^{name}: ")


@pytest.mark.parametrize("function", TAKES)
def test_unknown_arguments(function):
    """No argument that does nothing."""
    for name in {"training", *FUSED.split()} - set(TAKES[function]):
        given = arguments(function) | {name: None}
        assert_refused(function, given, TypeError, name)
