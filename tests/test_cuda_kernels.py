"""The CUDA kernels, run by the emulator over the cases of the CPU's, against the reference.

The arrays end where memory that none may touch begins, and shared memory is NaN before it is
written. Speed, memory as several processors see it, and the compiler of the device are not seen
here.
"""

import cuda_calls
import cuda_emulator
import numpy as np
import pytest
from accuracy import assert_moments, assert_running, assert_same_bits
from cases import FLOATS, HALVES, LAYOUTS, lay, new_mask, normal, of_size, parameters
from cuda_calls import DEVICES, INSTANCES, Call, far_apart
from forms import (
    EVERYTHING,
    FORMS,
    PLAIN,
    RELU,
    SOME_FORMS,
    Form,
    Problem,
    assert_same_results,
    check,
    problem,
)

import bncpu
from bncpu.cuda import plan as planning

# (N, C, S) around the lengths of vectors, bytes of a mask, warps, blocks and chunks of sums.
SIZES = [
    (2, 1, 1),
    (2, 3, 1),
    (127, 5, 1),
    (33, 64, 1),
    (65, 40, 1),
    (3, 1030, 1),
    (1, 1, 2),
    (1, 5, 3),
    (2, 3, 7),
    (40, 5, 7),
    (3, 2, 8),
    (5, 24, 17),
    (9, 3, 32),
    (4, 9, 49),
    (2, 5, 63),
    (3, 4, 64),
    (3, 6, 65),
    (4, 3, 196),
    (2, 3, 513),
    (1, 2, 2056),
    (5, 1, 5000),
    (1, 1, 40_001),
    (130, 1, 264),
]
ROWS_OF_CHANNELS = [(2, 1), (3, 3), (65, 8), (33, 15), (97, 17), (31, 33), (700, 16), (5000, 3)]
DTYPES = [*FLOATS, *HALVES]

# Layouts that the kernels walk as they are; others are copied before they come here.
WALKED = [
    "c",
    "fortran",
    "channels_last",
    "channels_first",
    "samples_innermost",
    "channels_cut",
    "channels_strided",
    "samples_strided",
    "reversed_samples",
    "reversed_channels",
    "off_by_an_item",
]


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Compile the instances side by side."""
    cuda_emulator.load_all(INSTANCES)


@pytest.fixture(params=DTYPES, ids=lambda dtype: dtype.name)
def dtype(request):
    return request.param


@pytest.fixture(params=DEVICES)
def device(request):
    return DEVICES[request.param]


def run_and_check(form, p, call, **options):
    got = cuda_calls.run(form, p, call, **options)
    check(form, p, got)
    return got


def test_the_parameters_are_laid_out_as_c_has_them():
    expected = []
    for names, structure in (
        (planning.PARAMETERS.names, planning.PARAMETERS),
        (("data", "row", "channel"), planning.PARAMETERS["x"]),
        (("data", "step", "wide"), planning.PARAMETERS["mean"]),
    ):
        assert structure.names == names
        expected += [structure.fields[name][1] for name in names] + [structure.itemsize]
    assert cuda_emulator.load(INSTANCES[0]).layout() == expected


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(rng, device, dtype, size):
    for form in SOME_FORMS[dtype.name]:
        run_and_check(form, problem(rng, of_size(size), dtype), Call(device))


@pytest.mark.parametrize("size", ROWS_OF_CHANNELS, ids=str)
def test_channels_innermost(rng, device, dtype, size):
    for form in SOME_FORMS[dtype.name]:
        run_and_check(form, problem(rng, size, dtype, axis=-1), Call(device))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("size", [(3, 5, 16), (7, 16, 9), (4, 3, 28)], ids=str)
def test_forms(rng, device, dtype, size, form):
    p = problem(rng, size, dtype)
    run_and_check(form, p, Call(device))
    run_and_check(form, p._replace(gamma=None, beta=None), Call(device))


def test_one_value_per_channel(rng, dtype):
    for size in ((1, 5), (1, 130)):
        run_and_check(EVERYTHING, problem(rng, size, dtype), Call(), train=False)


@pytest.mark.parametrize("layout", WALKED)
def test_layouts(rng, device, dtype, layout):
    assert layout in LAYOUTS
    # Without masks: where memory has another order than the walk, the caller orders their bits.
    for shape in ((3, 5, 4, 6), (6, 8, 2, 33)):
        for form in (RELU, FORMS["residual"]):
            call = Call(device, layout=lambda values: lay(layout, values))
            run_and_check(form, problem(rng, shape, dtype), call)


def test_any_alignment(rng, device, dtype):
    vectors = set()
    for items in range(8):
        call = Call(device, shift=items * dtype.itemsize)
        run_and_check(SOME_FORMS[dtype.name][-1], problem(rng, (3, 4, 16 * 5), dtype), call)
        vectors |= {plan.vector for plan in call.plans}
    assert vectors == set(planning.widths(dtype.itemsize, tiled=False))


def test_offsets_of_more_than_32_bits(rng, device):
    for shape in ((3, 5, 40), (3, 24)):
        p = problem(rng, shape, np.dtype(np.float16))
        got = run_and_check(EVERYTHING, p, Call(device, layout=far_apart))
        assert max(abs(s) for s in got["train y"].strides) > 1 << 32


def test_channels_on_several_axes(rng, device):
    p = problem(rng, (5, 3, 4), np.dtype(np.float32), axis=(1, 2))
    channels = p.mean.shape
    got = run_and_check(RELU, p, Call(device))
    assert got["train mean"].shape == channels


def test_schedules_give_the_same_bits(rng, device, dtype):
    for size in ((9, 5, 40), (130, 24), (2, 2, 4104)):
        p = problem(rng, size, dtype)
        expected = cuda_calls.run(EVERYTHING, p, Call(device))
        for seed in range(1, 6):
            got = cuda_calls.run(EVERYTHING, p, Call(device, seed))
            assert_same_results(got, expected, f"of schedule {seed}, {size}")


def test_results_in_place(rng, device, dtype):
    for form in (PLAIN, RELU, EVERYTHING, FORMS["residual"]):
        p = problem(rng, (9, 5, 40), dtype)
        expected = run_and_check(form, p, Call(device))
        got = cuda_calls.run(form, p, Call(device), in_place=True)
        assert_same_results(got, expected, "in place")


def test_a_grid_smaller_than_the_problem(rng, device, dtype, monkeypatch):
    p = problem(rng, (9, 21, 40), dtype)
    expected = cuda_calls.run(EVERYTHING, p, Call(device))
    planning.plan.cache_clear()
    monkeypatch.setattr(planning, "GRID_LIMIT", 4)
    try:
        call = Call(device)
        got = run_and_check(EVERYTHING, p, call)
    finally:
        planning.plan.cache_clear()
    grids = [
        launch.grid for p in call.plans for launch in p.launches if launch.entry != "pack_mask"
    ]
    assert max(grids) == 4
    assert_same_results(got, expected)


def test_more_parts_than_threads_merge(rng, monkeypatch):
    planning.plan.cache_clear()
    monkeypatch.setattr(planning, "VECTORS_PER_THREAD", 1)
    try:
        call = Call(DEVICES["parts"])
        run_and_check(PLAIN, problem(rng, (300, 1, 1024), np.dtype(np.float32)), call)
    finally:
        planning.plan.cache_clear()
    fields = dict(call.plans[0].fields)
    assert fields["row_parts"] * fields["column_parts"] > planning.THREADS


def test_running_statistics(rng, device, dtype):
    p = problem(rng, (9, 5, 40), dtype)
    call = Call(device)
    got = cuda_calls.run(PLAIN, p, call, momentum=0.3)
    assert_running(got["running_mean"], got["running_var"], p.x, momentum=0.3)


@pytest.mark.parametrize("mean", [1e3, 1e6])
@pytest.mark.parametrize("shape", [(9, 5, 40), (700, 16), (5, 1, 5000), (300, 3, 7)], ids=str)
def test_large_means(rng, device, shape, mean):
    for dtype in FLOATS:
        p = problem(rng, shape, dtype)
        x = normal(rng, shape, dtype, mean=mean, std=1.0)
        run_and_check(RELU, p._replace(x=x, mean=p.mean + mean), Call(device))


def test_an_outlier_first_or_anywhere(rng, device, dtype):
    for shape in ((9, 5, 40), (130, 16), (2, 2, 4104)):
        for value in (1e3, -3e4):
            x = normal(rng, shape, dtype)
            x[0] = value
            x[..., -1] = value
            x.reshape(-1)[rng.integers(x.size)] = value
            run_and_check(PLAIN, problem(rng, shape, dtype)._replace(x=x), Call(device))
            x = normal(rng, shape, dtype)
            x.reshape(-1)[0] = value
            run_and_check(PLAIN, problem(rng, shape, dtype)._replace(x=x), Call(device))


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e18, 1e30])
def test_values_whose_squares_float32_does_not_hold(rng, device, size):
    for shape in ((9, 5, 40), (130, 16)):
        x = (rng.standard_normal(shape) * size).astype(np.float32)
        mean, m2 = _moments(x, Call(device))
        assert_moments(bncpu.Moments(x.size // shape[1], mean, m2), x)


def _moments(x, call):
    channels = x.shape[1]
    mean, m2 = call.memory(np.zeros(channels)), call.memory(np.zeros(channels))
    call("moments", 1, {"x": call.array(x)}, {"mean": mean, "m2": m2})
    return mean, m2


def test_a_constant_channel_gives_beta(rng, device, dtype):
    for shape in ((9, 5, 40), (130, 16)):
        p = problem(rng, shape, dtype)
        p.x[...] = np.arange(shape[1]).reshape(-1, *[1] * (len(shape) - 2)) / 3
        got = run_and_check(PLAIN, p, Call(device))
        beta = np.broadcast_to(
            p.beta.astype(dtype).reshape(-1, *[1] * (len(shape) - 2)), got["train y"].shape
        )
        assert_same_bits(got["train y"], beta)
        assert not got["moments m2"].any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_channel(rng, device, dtype, value):
    for shape in ((9, 5, 40), (130, 16), (7, 9, 9)):
        for form in (PLAIN, RELU, EVERYTHING):
            p = problem(rng, shape, dtype)
            clean = cuda_calls.run(form, p, Call(device))
            p.x.reshape(*shape[:2], -1)[2, 3, 0] = value
            got = cuda_calls.run(form, p, Call(device))
            if np.isnan(value):
                check(form, p, got)
            assert np.isnan(got["train y"][:, 3]).all()
            assert not np.isfinite(got["train mean"][3])
            assert not got["train invstd"][3] > 0.0  # NaN, or 1 / sqrt(inf)
            others = np.arange(shape[1]) != 3
            for name, a in got.items():
                if a is None or "mask" in name:
                    continue
                of_channels = 0 if a.ndim == 1 else 1
                mine, before = (b.compress(others, of_channels) for b in (a, clean[name]))
                assert_same_bits(mine, before, name)


def test_gradients_that_float32_does_not_hold(rng, device):
    for shape in ((9, 5, 40), (130, 16)):
        p = problem(rng, shape, np.dtype(np.float32))
        p = p._replace(gamma=p.gamma / 16)
        p.dy[...] *= np.float32(1e35)
        p.dy[0], p.dy[1] = np.float32(1e38), np.float32(-1e38)
        for form in (PLAIN, RELU):
            run_and_check(form, p, Call(device))
            got = cuda_calls.run(form, p, Call(device), in_place=True)
            if form is PLAIN:
                assert np.isfinite(got["infer dbeta"]).all()
            check(form, p, got)


def test_signs_are_computed_again_to_the_bit(rng, device, dtype):
    """Zeros of z, many and on either side, pass backward exactly where the mask says."""
    for shape in ((9, 5, 40), (130, 16), (8, 7, 9)):
        p = problem(rng, shape, dtype)
        p.x[...] = np.round(p.x.astype(np.float64) * 4) / 4
        p = p._replace(mean=np.round(p.mean * 4) / 4, beta=p.beta * 0)
        without = cuda_calls.run(RELU, p, Call(device))
        masked = cuda_calls.run(Form(relu=True, residual=False, mask=True), p, Call(device))
        for name in ("infer y", "infer dx", "infer dgamma", "train y", "train dx", "train dgamma"):
            assert_same_bits(without[name], masked[name], name)


def test_subnormal_results(rng, dtype):
    """What is stored as zero has no bit in the mask, and passes no gradient."""
    shape = (9, 5, 40)
    least = 2.0**-24 if dtype.name == "float16" else 2.0**-133 if dtype.name == "bfloat16" else 0
    if not least:
        least = float(np.finfo(dtype).smallest_subnormal)
    ones = np.ones(5)
    p = Problem(
        normal(rng, shape, dtype),
        (rng.integers(-8, 9, shape) * (least / 4)).astype(np.float64).astype(dtype),
        normal(rng, shape, dtype),
        ones * 0,
        ones,
        None,
        None,
        1,
    )
    call = Call()
    for residual in (None, np.zeros_like(p.x)):
        x, y, mask = call.array(p.x), call.array(np.zeros_like(p.x)), call.memory(new_mask(p.x))
        gamma = call.memory(np.full(5, 0.25, np.float64))
        arrays = {"x": x, "residual": call.memory(residual), "out": y}
        values = {"mean": call.memory(p.mean), "var": call.memory(p.var), "gamma": gamma}
        how = {"relu": True, "eps": 0.0}
        call("infer", 1, arrays, values, mask=mask, fills_mask=True, **how)
        assert np.array_equal(mask, np.packbits(y.reshape(-1) != 0, bitorder="little"))
        dx = [call.array(np.zeros_like(x)) for _ in range(2)]
        dgamma, dbeta = (call.memory(np.zeros(5)) for _ in range(2))
        values |= {"dgamma": dgamma, "dbeta": dbeta}
        dy = call.array(np.ones_like(x))
        for out, bits in zip(dx, (mask, None), strict=True):
            call("infer_backward", 1, {"x": x, "dy": dy, "out": out}, values, mask=bits, **how)
        assert_same_bits(*dx)


def test_statistics_in_float32(rng, device):
    p = problem(rng, (9, 5, 40), np.dtype(np.float32))
    p = p._replace(mean=p.mean.astype(np.float32), var=p.var.astype(np.float32))
    run_and_check(RELU, p, Call(device))
    gamma, beta = parameters(rng, (5,), np.dtype(np.float32))
    run_and_check(PLAIN, p._replace(gamma=gamma[::-1], beta=beta), Call(device))
