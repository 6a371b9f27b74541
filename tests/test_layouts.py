"""Every memory layout, of inputs and of outputs, gives the numbers of its copy and nothing else.

A result is compared with the truth, which has no layout; that no byte between and around an
output's elements changed is checked on the memory itself.
"""

import numpy as np
import pytest
from accuracy import (
    assert_backward,
    assert_infer,
    assert_infer_backward,
    assert_moments,
    assert_running,
    assert_same_bits,
    assert_train,
)
from cases import LAYOUTS, Output, lay, normal, parameters, statistics

import bncpu

pytestmark = pytest.mark.usefixtures("level")

SHAPES = [(5, 3, 6, 9), (3, 17, 33), (19, 8)]


def run_all(dy, x, mean, var, gamma, beta, axis=1, out=None):
    """Run and check all five functions, each into memory from out() where that is given."""
    new = (lambda: None) if out is None else out
    got = bncpu.batch_norm_train(x, gamma, beta, axis=axis, out=new())
    truth = assert_train(got, x, gamma, beta, axis=axis)
    y = bncpu.batch_norm_infer(x, mean, var, gamma, beta, axis=axis, out=new())
    assert_infer(y, x, mean, var, gamma, beta, axis=axis)
    batch = truth.mean, truth.invstd
    gradients = bncpu.batch_norm_backward(dy, x, *batch, gamma, axis=axis, out=new())
    assert_backward(gradients, dy, x, *batch, gamma, axis=axis)
    gradients = bncpu.batch_norm_infer_backward(dy, x, mean, var, gamma, axis=axis, out=new())
    assert_infer_backward(gradients, dy, x, mean, var, gamma, axis=axis)
    assert_moments(bncpu.batch_moments(x, axis=axis), x, axis=axis)


def problem(rng, shape, dtype, axis=1):
    x, dy = normal(rng, shape, dtype), normal(rng, shape, dtype)
    return dy, x, *statistics(rng, shape[axis]), *parameters(rng, shape[axis], dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs(rng, dtype, layout, shape):
    dy, x, *rest = problem(rng, shape, dtype)
    laid = lay(layout, x)
    laid.flags.writeable = False
    run_all(dy, laid, *rest)
    run_all(lay(layout, dy), laid, *rest)
    run_all(lay(layout, dy), x, *rest)
    assert_same_bits(laid, x, "x")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs(rng, dtype, layout, shape):
    outputs = []

    def new():
        outputs.append(Output(layout, shape, dtype))
        return outputs[-1].array

    run_all(*problem(rng, shape, dtype), out=new)
    assert len(outputs) == 4
    for output in outputs:
        output.assert_only_inside()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_output_is_returned(rng, layout):
    dy, x, mean, var, gamma, beta = problem(rng, (5, 3, 6, 9), np.dtype(np.float32))
    out = Output(layout, x.shape, x.dtype).array
    assert bncpu.batch_norm_train(x, gamma, beta, out=out).y is out
    assert bncpu.batch_norm_infer(x, mean, var, out=out) is out
    assert bncpu.batch_norm_backward(dy, x, mean, 1.0 / var, out=out).dx is out
    assert bncpu.batch_norm_infer_backward(dy, x, mean, var, out=out).dx is out


@pytest.mark.parametrize("axis", [0, 2, -1])
@pytest.mark.parametrize("layout", ["c", "fortran", "channels_last", "cropped", "reversed_strided"])
def test_other_channel_axes(rng, dtype, layout, axis):
    dy, x, *rest = problem(rng, (5, 3, 6, 9), dtype, axis)
    run_all(
        lay(layout, dy),
        lay(layout, x),
        *rest,
        axis=axis,
        out=lambda: Output(layout, x.shape, dtype).array,
    )


@pytest.mark.parametrize("axis", [(1, 2), (0, 3), (2, 1), (1, 2, 3)])
@pytest.mark.parametrize("layout", ["c", "fortran", "channels_last", "cropped", "reversed_strided"])
def test_per_activation(rng, dtype, layout, axis):
    shape = (5, 3, 6, 9)
    channels = [shape[a] for a in axis]
    x, dy = normal(rng, shape, dtype), normal(rng, shape, dtype)
    rest = *statistics(rng, channels), *parameters(rng, channels, dtype)
    run_all(lay(layout, dy), lay(layout, x), *rest, axis=axis)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_place_through_strides(rng, dtype, layout):
    dy, x, mean, var, gamma, beta = problem(rng, (5, 3, 6, 9), dtype)
    output = Output(layout, x.shape, dtype)
    output.array[...] = x
    bncpu.batch_norm_infer(output.array, mean, var, gamma, beta, out=output.array)
    assert_infer(output.array, x, mean, var, gamma, beta)
    output.assert_only_inside()

    invstd = 1.0 / np.sqrt(var)
    for backward, spread in [
        (bncpu.batch_norm_backward, invstd),
        (bncpu.batch_norm_infer_backward, var),
    ]:
        output.array[...] = dy
        got = backward(output.array, x, mean, spread, gamma, out=output.array)
        expected = backward(lay(layout, dy), x, mean, spread, gamma)
        for a, b in zip(got, expected, strict=True):
            assert_same_bits(a, b)
        output.assert_only_inside()


@pytest.mark.parametrize("shape", [(4, 3, 5, 7), (6, 17)], ids=str)
def test_broadcast_inputs(rng, dtype, shape):
    """A stride of zero on any axis, as numpy.broadcast_to makes it; read-only by nature."""
    dy, x, *rest = problem(rng, shape, dtype)
    for a in range(len(shape)):
        flat = np.broadcast_to(x.take([0], a), shape)
        assert flat.strides[a] == 0
        run_all(dy, flat, *rest)
        run_all(np.broadcast_to(dy.take([0], a), shape), x, *rest)
    run_all(np.broadcast_to(dtype.type(0.5), shape), x, *rest)


@pytest.mark.parametrize("a", [0, 1, 2])
def test_axes_of_size_one_may_have_any_stride(rng, dtype, a):
    shape = [4, 3, 5]
    shape[a] = 1
    dy, x, *rest = problem(rng, shape, dtype)
    strides = list(x.strides)
    strides[a] = 123_456_789 * dtype.itemsize
    odd = np.lib.stride_tricks.as_strided(x, shape, strides)
    run_all(dy, odd, *rest)
    strides[a] = -8
    run_all(np.lib.stride_tricks.as_strided(dy, shape, strides), odd, *rest)


@pytest.mark.parametrize(
    "cut",
    [
        np.s_[::2],
        np.s_[::-1],
        np.s_[1:],
        np.s_[:, 1:-1],
        np.s_[:, ::2],
        np.s_[..., 1:-1, 2:-2],
        np.s_[..., ::-1],
        np.s_[..., ::3],
        np.s_[:, :, 0],
        np.s_[:, :, None, 2],
    ],
    ids=str,
)
def test_slices_give_the_numbers_of_their_copies(rng, dtype, cut):
    """To rounding, both being near the truth: a crop's rows are shorter runs than its copy's."""
    whole = normal(rng, (7, 9, 8, 11), dtype)
    x = whole[cut]
    assert x.base is whole
    dy = normal(rng, x.shape, dtype)
    rest = *statistics(rng, x.shape[1]), *parameters(rng, x.shape[1], dtype)
    run_all(dy, x, *rest)
    run_all(dy, x.copy(), *rest)


@pytest.mark.parametrize("shape", [*SHAPES, (7, 5, 40, 60)], ids=str)
@pytest.mark.parametrize("layout", ["c", "channels_cut", "samples_strided", "reversed_samples"])
def test_slices_of_samples_and_channels_give_the_bits_of_their_copies(rng, dtype, layout, shape):
    """The axes behind the channels are as contiguous as the copy's; so the sums are the same."""
    dy, x, mean, var, gamma, beta = problem(rng, shape, dtype)
    results = []
    for dy_, x_ in [(lay(layout, dy), lay(layout, x)), (dy, x)]:
        moments = bncpu.batch_moments(x_)
        results.append(
            [
                *bncpu.batch_norm_train(x_, gamma, beta),
                bncpu.batch_norm_infer(x_, mean, var, gamma, beta),
                *bncpu.batch_norm_backward(dy_, x_, mean, 1.0 / var, gamma),
                *bncpu.batch_norm_infer_backward(dy_, x_, mean, var, gamma),
                moments.mean,
                moments.m2,
            ]
        )
    for from_slice, from_copy in zip(*results, strict=True):
        assert_same_bits(from_slice, from_copy)


@pytest.mark.parametrize("layout", ["c", "fortran", "channels_last", "samples_innermost"])
@pytest.mark.parametrize("shape", [(4, 3, 5, 7), (6, 5)], ids=str)
def test_new_results_keep_the_memory_order(rng, dtype, layout, shape):
    dy, x, mean, var, gamma, beta = problem(rng, shape, dtype)
    x, dy = lay(layout, x), lay(layout, dy)
    expected = np.empty_like(x).strides
    for y in [
        bncpu.batch_norm_train(x, gamma, beta).y,
        bncpu.batch_norm_infer(x, mean, var),
        bncpu.batch_norm_backward(dy, x, mean, var).dx,
        bncpu.batch_norm_infer_backward(dy, x, mean, var).dx,
    ]:
        assert y.strides == expected


def test_parameters_of_any_stride(rng, dtype):
    dy, x, mean, var, gamma, beta = problem(rng, (4, 6, 5), dtype)

    def strided(a):
        return np.repeat(a[::-1], 3)[::-3]

    for a in (mean, var, gamma, beta):
        assert_same_bits(strided(a), a)
    run_all(dy, x, *(strided(a) for a in (mean, var, gamma, beta)))
    one = dtype.type(0.75)
    run_all(dy, x, *(np.broadcast_to(one.astype(a.dtype), 6) for a in (mean, var, gamma, beta)))


@pytest.mark.parametrize("cut", [np.s_[::2], np.s_[::-1], np.s_[::-3], np.s_[2:8]], ids=str)
def test_running_statistics_of_any_stride(rng, dtype, cut):
    """Updated where they are, and nothing between them."""
    mean_memory, var_memory = np.full(18, 0.25, dtype), np.full(18, 0.5, dtype)
    running_mean, running_var = mean_memory[cut], var_memory[cut]
    x = normal(rng, (9, len(running_mean), 3), dtype)
    plain_mean, plain_var = running_mean.copy(), running_var.copy()
    bncpu.batch_norm_train(x, running_mean=plain_mean, running_var=plain_var)
    bncpu.batch_norm_train(x, running_mean=running_mean, running_var=running_var)
    assert_same_bits(running_mean, plain_mean)
    assert_same_bits(running_var, plain_var)
    running_mean[...], running_var[...] = 0.25, 0.5
    assert np.all(mean_memory == 0.25)
    assert np.all(var_memory == 0.5)


def test_running_statistics_of_activations(rng, dtype):
    x = normal(rng, (9, 3, 4), dtype)
    mean, var = np.zeros((4, 3), dtype).T, np.ones((4, 3), dtype).T
    bncpu.batch_norm_train(x, running_mean=mean, running_var=var, axis=(1, 2))
    assert_running(mean, var, x, axis=(1, 2))


def test_interleaved_output(rng, dtype):
    """Memory that interleaves without a common element is no overlap."""
    both = normal(rng, (4, 6, 5), dtype)
    x, out = both[:, ::2], both[:, 1::2]
    before = x.copy()
    got = bncpu.batch_norm_train(x, out=out)
    assert got.y is out
    assert_train(got, before)
    assert_same_bits(x, before, "x")


class OnlyDLPack:
    """A CPU array of another library, as far as NumPy can see."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **how):
        return self._array.__dlpack__(**how)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


@pytest.mark.parametrize("layout", ["c", "channels_last", "cropped", "reversed"])
def test_dlpack_objects(rng, dtype, layout):
    dy, x, mean, var, gamma, beta = problem(rng, (4, 3, 5, 7), dtype)
    x, dy = lay(layout, x), lay(layout, dy)
    foreign_dy, foreign_x, foreign_mean, foreign_var, foreign_gamma, foreign_beta = map(
        OnlyDLPack, (dy, x, mean, var, gamma, beta)
    )
    pairs = [
        (
            bncpu.batch_norm_train(foreign_x, foreign_gamma, foreign_beta),
            bncpu.batch_norm_train(x, gamma, beta),
        ),
        (
            [bncpu.batch_norm_infer(foreign_x, foreign_mean, foreign_var)],
            [bncpu.batch_norm_infer(x, mean, var)],
        ),
        (
            bncpu.batch_norm_backward(foreign_dy, foreign_x, foreign_mean, foreign_var),
            bncpu.batch_norm_backward(dy, x, mean, var),
        ),
    ]
    for foreign, native in pairs:
        for a, b in zip(foreign, native, strict=True):
            assert type(a) is np.ndarray
            assert_same_bits(a, b)
    assert_moments(bncpu.batch_moments(foreign_x), x)
