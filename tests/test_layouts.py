"""Every memory layout, of inputs and of outputs, gives the numbers of its copy and nothing else.

A result is compared with the truth, which has no layout; that no byte between and around an
output's elements changed is checked on the memory itself. The plain form stands for the smaller
ones: what is fused with it is walked in the same way, and is tried with everything at once.
"""

import numpy as np
import pytest
from accuracy import assert_infer, assert_moments, assert_running, assert_same_bits, assert_train
from cases import FLOATS, HALVES, LAYOUTS, Output, lay, new_mask, normal, parameter_dtype
from forms import EVERYTHING, FORMS, PLAIN, assert_same_results, problem, run, run_and_check

import bncpu

pytestmark = pytest.mark.usefixtures("level")

SHAPES = [(5, 3, 6, 9), (3, 17, 33), (19, 8)]


@pytest.fixture(params=[*FLOATS, *HALVES], ids=str)
def dtype(request):
    return request.param


def run_all(p, **options):
    """Run and check all functions, with nothing and with everything fused."""
    for form in (PLAIN, EVERYTHING):
        run_and_check(form, p, **options)


def laid(layout, p):
    """Return a problem with its three large arrays in a layout."""
    return p._replace(**{name: lay(layout, getattr(p, name)) for name in ("dy", "x", "residual")})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs(rng, dtype, layout, shape):
    p = problem(rng, shape, dtype)
    q = laid(layout, p)
    q.x.flags.writeable = False
    run_all(q)
    run_and_check(EVERYTHING, q._replace(dy=p.dy, residual=p.residual))
    run_and_check(EVERYTHING, q._replace(x=p.x))
    assert_same_bits(q.x, p.x, "x")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs(rng, dtype, layout, shape):
    """Results, and gradients of a residual, with the memory around them watched."""
    outputs = []

    def new():
        outputs.append(Output(layout, shape, dtype))
        return outputs[-1].array

    p = problem(rng, shape, dtype)
    run_and_check(PLAIN, p, out=new)
    assert len(outputs) == 4
    run_and_check(EVERYTHING, p, out=new)
    assert len(outputs) == 4 + 6
    for output in outputs:
        output.assert_only_inside()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_output_is_returned(rng, layout):
    dy, x, _, mean, var, gamma, beta, _ = problem(rng, (5, 3, 6, 9), np.dtype(np.float32))
    out = Output(layout, x.shape, x.dtype).array
    assert bncpu.batch_norm_train(x, gamma, beta, out=out).y is out
    assert bncpu.batch_norm_infer(x, mean, var, out=out) is out
    assert bncpu.batch_norm_backward(dy, x, mean, 1.0 / var, out=out).dx is out
    assert bncpu.batch_norm_infer_backward(dy, x, mean, var, out=out).dx is out


@pytest.mark.parametrize("axis", [0, 2, -1])
@pytest.mark.parametrize("layout", ["c", "fortran", "channels_last", "cropped", "reversed_strided"])
def test_other_channel_axes(rng, dtype, layout, axis):
    p = problem(rng, (5, 3, 6, 9), dtype, axis, layout)
    run_all(p, out=lambda: Output(layout, p.x.shape, dtype).array)


@pytest.mark.parametrize("axis", [(1, 2), (0, 3), (2, 1), (1, 2, 3)])
@pytest.mark.parametrize("layout", ["c", "fortran", "channels_last", "cropped", "reversed_strided"])
def test_per_activation(rng, dtype, layout, axis):
    run_all(problem(rng, (5, 3, 6, 9), dtype, axis, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_place_through_strides(rng, dtype, layout):
    dy, x, _, mean, var, gamma, beta, _ = problem(rng, (5, 3, 6, 9), dtype)
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
    p = problem(rng, shape, dtype)
    for a in range(len(shape)):
        dy, x, residual = (np.broadcast_to(v.take([0], a), shape) for v in p[:3])
        assert x.strides[a] == 0
        run_all(p._replace(x=x))
        run_all(p._replace(dy=dy))
        run_and_check(EVERYTHING, p._replace(residual=residual))
    run_all(p._replace(dy=np.broadcast_to(dtype.type(0.5), shape)))


@pytest.mark.parametrize("a", [0, 1, 2])
def test_axes_of_size_one_may_have_any_stride(rng, dtype, a):
    shape = [4, 3, 5]
    shape[a] = 1
    p = problem(rng, shape, dtype)
    strides = list(p.x.strides)
    strides[a] = 123_456_789 * dtype.itemsize
    p = p._replace(x=np.lib.stride_tricks.as_strided(p.x, shape, strides))
    run_all(p)
    strides[a] = -8
    dy, residual = (np.lib.stride_tricks.as_strided(v, shape, strides) for v in (p.dy, p.residual))
    run_all(p._replace(dy=dy, residual=residual))


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
    p = problem(rng, x.shape, dtype)._replace(x=x)
    run_all(p)
    run_all(p._replace(x=x.copy()))


@pytest.mark.parametrize("shape", [*SHAPES, (7, 5, 40, 60)], ids=str)
@pytest.mark.parametrize("layout", ["c", "channels_cut", "samples_strided", "reversed_samples"])
def test_slices_of_samples_and_channels_give_the_bits_of_their_copies(rng, dtype, layout, shape):
    """The axes behind the channels are as contiguous as the copy's; so the sums are the same."""
    p = problem(rng, shape, dtype)
    for form in FORMS.values():
        from_slice, from_copy = run(form, laid(layout, p)), run(form, p)
        if layout == "reversed_samples":  # the mask has the order of the memory
            for name in ("train mask", "infer mask"):
                del from_slice[name], from_copy[name]
        assert_same_results(from_slice, from_copy)


@pytest.mark.parametrize("layout", ["c", "fortran", "channels_last", "samples_innermost"])
@pytest.mark.parametrize("shape", [(4, 3, 5, 7), (6, 5)], ids=str)
def test_new_results_keep_the_memory_order(rng, dtype, layout, shape):
    p = problem(rng, shape, dtype, layout=layout)
    expected = np.empty_like(p.x).strides
    for form in (PLAIN, EVERYTHING):
        got = run(form, p)
        for name in ("train y", "infer y", "train dx", "infer dx"):
            assert got[name].strides == expected
        for name in ("train dresidual", "infer dresidual"):
            assert got[name] is None or got[name].strides == expected


def test_parameters_of_any_stride(rng, dtype):
    p = problem(rng, (4, 6, 5), dtype)
    names = ("mean", "var", "gamma", "beta")

    def strided(a):
        return np.repeat(a[::-1], 3)[::-3]

    for name in names:
        assert_same_bits(strided(getattr(p, name)), getattr(p, name))
    run_all(p._replace(**{name: strided(getattr(p, name)) for name in names}))
    one = {name: np.asarray(0.75, getattr(p, name).dtype) for name in names}
    run_all(p._replace(**{name: np.broadcast_to(a, 6) for name, a in one.items()}))


@pytest.mark.parametrize("cut", [np.s_[::2], np.s_[::-1], np.s_[::-3], np.s_[2:8]], ids=str)
def test_running_statistics_of_any_stride(rng, dtype, cut):
    """Updated where they are, and nothing between them."""
    kind = parameter_dtype(dtype)
    mean_memory, var_memory = np.full(18, 0.25, kind), np.full(18, 0.5, kind)
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
    kind = parameter_dtype(dtype)
    mean, var = np.zeros((4, 3), kind).T, np.ones((4, 3), kind).T
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
@pytest.mark.parametrize("dtype", [*FLOATS, np.dtype(np.float16)], ids=str)  # NumPy exports these
def test_dlpack_objects(rng, dtype, layout):
    p = problem(rng, (4, 3, 5, 7), dtype, layout=layout)
    guests = p._replace(
        **{name: OnlyDLPack(a) for name, a in p._asdict().items() if name != "axis"}
    )
    forward = {"activation": "relu", "axis": p.axis}
    native, foreign = [], []
    for q, results in ((p, native), (guests, foreign)):
        mask = new_mask(p.x)
        trained = bncpu.batch_norm_train(
            q.x,
            q.gamma,
            q.beta,
            residual=q.residual,
            mask=mask if q is p else OnlyDLPack(mask),
            **forward,
        )
        results += [*trained, mask]
        results += [bncpu.batch_norm_infer(q.x, q.mean, q.var, q.gamma, q.beta)]
        results += bncpu.batch_norm_backward(
            q.dy, q.x, q.mean, q.var, q.gamma, q.beta, mask=mask, residual=True, **forward
        )
    for a, b in zip(foreign, native, strict=True):
        assert type(a) is np.ndarray
        assert_same_bits(a, b)
    assert_moments(bncpu.batch_moments(guests.x), p.x)
