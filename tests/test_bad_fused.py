"""Wrong calls of what is fused with batch normalisation: activation, mask, residual.

As test_bad_input.py: one change at a time to a call that is right, and nothing written.
"""

import re

import numpy as np
import pytest
from accuracy import assert_same_bits
from calls import (
    BACKWARD,
    FORWARD,
    OF_CHANNELS,
    SHAPE,
    TAKES,
    WITH_OUT,
    arguments,
    assert_refused,
    takers,
)

import bncpu


@pytest.mark.parametrize("function", WITH_OUT)
class TestActivation:
    @pytest.mark.parametrize("value", ["gelu", "ReLU", "relu ", "", "None"])
    def test_another_one(self, function, value):
        given = arguments(function) | {"activation": value}
        assert_refused(function, given, ValueError, r'^activation: expected None or "relu"; got ')

    @pytest.mark.parametrize("value", [0, True, 1.0, b"relu", ("relu",), np.maximum, type])
    def test_of_another_kind(self, function, value):
        given = arguments(function) | {"activation": value}
        assert_refused(function, given, TypeError, r'^activation: expected None or "relu"; got ')


@pytest.mark.parametrize("function", WITH_OUT)
class TestMask:
    @pytest.mark.parametrize("shape", [(7,), (9,), (60,), (1, 8), (8, 1), (), (0,), SHAPE], ids=str)
    def test_shape(self, function, shape):
        given = arguments(function) | {"mask": np.zeros(shape, np.uint8)}
        match = rf"^mask: expected shape \(8,\).*\(4, 3, 5\).*got {re.escape(str(shape))}"
        assert_refused(function, given, ValueError, match)

    @pytest.mark.parametrize("dtype", ["bool", "int8", "uint16", "uint64", "float32", "object"])
    def test_dtype(self, function, dtype):
        given = arguments(function) | {"mask": np.zeros(8, dtype)}
        assert_refused(function, given, TypeError, rf"^mask: expected dtype uint8.*got {dtype}")

    @pytest.mark.parametrize("view", [slice(None, None, 2), slice(None, None, -2)])
    def test_not_contiguous(self, function, view):
        memory = np.full(16, 0x55, np.uint8)
        given = arguments(function) | {"mask": memory[view]}
        assert_refused(function, given, ValueError, r"^mask: expected a contiguous array")
        assert np.all(memory == 0x55)

    def test_without_an_activation(self, function):
        given = arguments(function) | {"activation": None}
        assert_refused(function, given, ValueError, r'^mask: .*activation="relu"')

    @pytest.mark.parametrize("other", ["out", "residual"])
    def test_in_the_memory_of_what_is_written(self, function, other):
        """Or, forward, of what is read."""
        given = arguments(function)
        given["mask"] = given[other].reshape(-1).view(np.uint8)[100:108]
        assert_refused(function, given, ValueError, rf"^(?=.*mask)({other}|mask): ")


@pytest.mark.parametrize("function", FORWARD)
def test_a_mask_that_cannot_be_written(function):
    given = arguments(function)
    given["mask"].flags.writeable = False
    assert_refused(function, given, ValueError, r"^mask: .*(read-only|writeable)")


@pytest.mark.parametrize(("function", "other"), takers("x", *OF_CHANNELS, functions=FORWARD))
def test_a_mask_in_the_memory_of_another_argument(function, other):
    given = arguments(function)
    given["mask"] = given[other].reshape(-1).view(np.uint8)[2:10]
    assert_refused(function, given, ValueError, rf"^(?=.*mask)(?=.*{other})")


@pytest.mark.parametrize("function", BACKWARD)
def test_a_mask_that_is_read_may_be_read_only(function):
    given = arguments(function)
    expected = getattr(bncpu, function)(**given)
    given["mask"].flags.writeable = False
    for got, other in zip(getattr(bncpu, function)(**given), expected, strict=True):
        assert_same_bits(got, other)


@pytest.mark.parametrize("function", WITH_OUT)
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 6), (5, 3, 4), (1, 4, 3, 5), (60,), ()], ids=str)
def test_shape_of_the_residual(function, shape):
    given = arguments(function) | {"residual": np.ones(shape, np.float32)}
    assert_refused(function, given, ValueError, r"^residual: expected shape \(4, 3, 5\).*got ")


@pytest.mark.parametrize("function", FORWARD)
@pytest.mark.parametrize("shift", [1, -1, 15, 59])
def test_an_output_that_overlaps_the_residual(function, shift):
    """It may be the residual, and nothing else of its memory."""
    given = arguments(function)
    memory = np.zeros(180, np.float32)
    given["residual"] = memory[60:120].reshape(SHAPE)
    given["out"] = memory[60 + shift : 120 + shift].reshape(SHAPE)
    assert_refused(function, given, ValueError, r"^out: overlaps residual.*pass residual itself")
    square = np.ones((3, 3, 3), np.float32)
    given |= {"x": square.copy(), "residual": square, "out": square.transpose(2, 1, 0)}
    del given["mask"]
    assert_refused(function, given, ValueError, r"^out: overlaps residual")


def test_a_residual_that_is_part_of_x():
    """Both are read, and out may be x; but then it is over the residual too."""
    given = arguments("batch_norm_infer")
    memory = np.zeros(61, np.float32)
    given |= {"x": memory[:60].reshape(SHAPE), "residual": memory[1:].reshape(SHAPE)}
    bncpu.batch_norm_infer(**given)
    given["out"] = given["x"]
    assert_refused("batch_norm_infer", given, ValueError, r"^out: overlaps residual")


@pytest.mark.parametrize("function", BACKWARD)
class TestGradientOfTheResidual:
    def test_needs_the_mask_behind_relu(self, function):
        """An x alone does not tell the sign of what a residual was added to."""
        for residual in (True, np.True_, np.full(SHAPE, 7.0, np.float32)):
            given = arguments(function) | {"mask": None, "residual": residual}
            assert_refused(function, given, ValueError, r"^mask: needed .*forward filled")
        del given["mask"]
        assert_refused(function, given, ValueError, r"^mask: needed .*forward filled")
        getattr(bncpu, function)(**given | {"residual": np.False_})
        getattr(bncpu, function)(**given | {"activation": None})

    @pytest.mark.parametrize("value", [None, 0, 1, "yes"])
    def test_neither_a_bool_nor_an_array(self, function, value):
        given = arguments(function) | {"residual": value}
        assert_refused(function, given, TypeError, r"^residual: expected .*array")

    def test_read_only(self, function):
        given = arguments(function)
        given["residual"].flags.writeable = False
        assert_refused(function, given, ValueError, r"^residual: .*(read-only|writeable)")

    def test_overlaps_itself(self, function):
        row = np.full((1, 3, 5), 7.0, np.float32)
        array = np.lib.stride_tricks.as_strided(row, SHAPE, (0, *row.strides[1:]))
        given = arguments(function) | {"residual": array}
        assert_refused(function, given, ValueError, r"^residual: its elements overlap")

    @pytest.mark.parametrize("activation", [None, "relu"])
    @pytest.mark.parametrize("other", ["x", "out"])
    def test_is_not_another_argument(self, function, other, activation):
        given = arguments(function) | {"activation": activation}
        if activation is None:
            del given["mask"]
        given["residual"] = given[other]
        assert_refused(function, given, ValueError, rf"^residual: overlaps {other}, which it")

    def test_is_dy_where_out_is_dy(self, function):
        """One of the two would be lost."""
        given = arguments(function)
        given["out"] = given["residual"] = given["dy"]
        assert_refused(function, given, ValueError, r"^residual: overlaps out, which it")

    @pytest.mark.parametrize("shift", [1, -1, 15])
    @pytest.mark.parametrize("other", ["dy", "x", "out"])
    def test_overlaps_another_argument(self, function, other, shift):
        given = arguments(function)
        memory = np.zeros(180, np.float32)
        new = memory[60:120].reshape(SHAPE)
        new[...] = given[other]
        given |= {other: new, "residual": memory[60 + shift : 120 + shift].reshape(SHAPE)}
        assert_refused(function, given, ValueError, rf"^residual: overlaps {other}")

    def test_overlaps_values_of_channels(self, function):
        """Refused, unless the call has its own copy."""
        for name in {"mean", "var", "invstd", "gamma", "beta"} & set(TAKES[function]):
            self.assert_does_not_overlap(function, name)

    def assert_does_not_overlap(self, function, name):
        given = arguments(function)
        wide = {"x", "dy", "out", "residual", *OF_CHANNELS} & given.keys()
        given |= {n: given[n].astype(np.float64) for n in wide}
        inside = given["residual"].reshape(-1)[30:33]
        inside[...] = given[name]
        given[name] = inside
        assert_refused(function, given, ValueError, rf"^residual: overlaps {name}")


@pytest.mark.parametrize("other", ["residual", "mask"])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_running_statistics_in_the_memory_of_what_is_fused(name, other):
    given = arguments("batch_norm_train")
    if other == "mask":
        memory = np.zeros(4, np.float32)
        given[name], given["mask"] = memory[:3], memory.view(np.uint8)[8:]
    else:
        given[name] = given[other].reshape(-1)[:3]
    assert_refused("batch_norm_train", given, ValueError, rf"^{name}: shares memory with {other}")
