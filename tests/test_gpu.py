"""The public functions on a real GPU, through CuPy itself; skipped where there is none.

What test_cuda_calls.py tries on a stand-in, and what only a device can show: sizes beyond 2^31
elements, other streams, PyTorch's tensors. `make gpu` runs it. The tests named small are also run
under compute-sanitizer, without CuPy's pool, whose blocks would hide where an array ends.
"""

import os
import warnings

import numpy as np
import pytest
from accuracy import assert_running, assert_same_bits
from cases import FLOATS, HALVES, LAYOUTS, ROWS_OF_CHANNELS, SIZES, normal, of_size, parameters
from forms import EVERYTHING, FORMS, RELU, SOME_FORMS, check, problem, run

import bncpu
from bncpu import nn


def cupy_with_a_gpu():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import cupy

            return cupy if cupy.cuda.is_available() else None
        except ImportError:
            return None


cupy = cupy_with_a_gpu()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cupy is None, reason="needs CuPy and an NVIDIA GPU"),
    pytest.mark.filterwarnings("default"),  # of CuPy and its compiler, whose they are
]

ARRAYS = ("dy", "x", "residual", "mean", "var", "gamma", "beta")
DTYPES = [*FLOATS, *HALVES]
# Elements of the largest test, past what 32 bits count, and the bytes of its x and y.
HUGE = 2**31 + 2**20


@pytest.fixture(scope="module", autouse=True)
def allocator():
    if cupy is not None and os.environ.get("BNCPU_GPU_POOL") == "0":
        cupy.cuda.set_allocator(None)


def place(array):
    """Return an array on the GPU with the strides and, up to 64 bytes, the alignment of another."""
    if array is None:
        return None
    array = np.asarray(array)
    if not array.size:
        return cupy.empty(array.shape, array.dtype)
    low, high = np.lib.array_utils.byte_bounds(array)
    start = array.__array_interface__["data"][0]
    memory = cupy.zeros(low % 64 + high - low, np.uint8)
    there = cupy.ndarray(
        array.shape, array.dtype, memory.data + low % 64 + start - low, array.strides
    )
    stored = array.view(np.uint16) if array.dtype in HALVES else array
    there.view(stored.dtype)[...] = cupy.asarray(np.ascontiguousarray(stored))
    return there


def fetch(array):
    if array is None:
        return None
    if array.dtype in HALVES:
        return array.view(np.uint16).get().view(array.dtype)
    return array.get()


def new_mask(x):
    return cupy.full((x.size + 7) // 8, 0xA5, np.uint8)


def moved(p):
    return p._replace(**{name: place(getattr(p, name)) for name in ARRAYS})


def run_and_check(form, p, **options):
    got = run(form, moved(p), mask=new_mask, place=place, **options)
    assert all(a is None or isinstance(a, cupy.ndarray) for a in got.values())
    got = {name: fetch(a) for name, a in got.items()}
    check(form, p, got)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_small_forms(rng, dtype, form):
    for shape, axis in [((4, 5, 6, 7), 1), ((9, 6, 33), -1), ((4, 12, 64), 1)]:
        run_and_check(form, problem(rng, shape, dtype, axis=axis))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [*SIZES, *ROWS_OF_CHANNELS], ids=str)
def test_sizes(rng, size, dtype):
    for form in SOME_FORMS[dtype.name]:
        run_and_check(form, problem(rng, of_size(size), dtype))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "misaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(rng, dtype, layout):
    run_and_check(EVERYTHING, problem(rng, (5, 3, 4, 8), dtype, layout=layout))


@pytest.mark.parametrize("axis", [(1, 2, 3), (1, 3), 0, -1], ids=str)
def test_axes(rng, axis):
    run_and_check(EVERYTHING, problem(rng, (6, 4, 5, 7), np.float32, axis=axis))


@pytest.mark.parametrize("shape", [(32, 64, 56, 56), (8, 1000), (2, 3, 512, 512), (64, 2048, 7, 7)])
def test_real_sizes_twice_with_the_same_bits(rng, shape):
    p = problem(rng, shape, np.float32)
    first = run_and_check(EVERYTHING, p)
    second = run_and_check(EVERYTHING, p)
    for name, a in first.items():
        assert_same_bits(second[name], a, name)


@pytest.mark.parametrize("ratio", [1e3, 1e6])
def test_large_means(rng, ratio):
    p = problem(rng, (16, 8, 28, 28), np.float32)
    run_and_check(RELU, p._replace(x=normal(rng, p.x.shape, np.float32, mean=ratio, std=1.0)))


def test_small_running_statistics(rng):
    batches = [normal(rng, (6, 5, 7), np.float32) for _ in range(3)]
    running = cupy.zeros(5, np.float32), cupy.ones(5)
    for x in batches:
        bncpu.batch_norm_train(place(x), running_mean=running[0], running_var=running[1])
    assert_running(*map(fetch, running), *batches)


def test_nan_stays_in_its_channel(rng):
    x = normal(rng, (6, 5, 40), np.float32)
    clean = fetch(bncpu.batch_norm_train(place(x)).y)
    x[2, 3, 11] = np.nan
    y = fetch(bncpu.batch_norm_train(place(x)).y)
    assert np.isnan(y[:, 3]).all()
    assert_same_bits(np.delete(y, 3, axis=1), np.delete(clean, 3, axis=1))


def test_empty_batches():
    y, mean, _ = bncpu.batch_norm_train(cupy.empty((0, 3, 4), np.float32))
    assert y.shape == (0, 3, 4)
    assert not fetch(mean).any()


def test_more_elements_than_32_bits_count():
    """One channel of ones past 2^31 values; and the last elements of x, which an int misses."""
    size = HUGE
    free, _ = cupy.cuda.runtime.memGetInfo()
    if free < 3 * 2 * size:
        pytest.skip(f"needs a GPU with {3 * 2 * size >> 30} GB free")
    x = cupy.zeros((1, 2, size // 2), np.float16)
    x[0, 1] = 1.0
    x[0, 1, -1] = 3.0
    moments = bncpu.batch_moments(x)
    m = size // 2
    np.testing.assert_allclose(fetch(moments.mean), [0.0, 1.0 + 2.0 / m], rtol=1e-12)
    y = bncpu.batch_norm_infer(x, cupy.zeros(2), cupy.ones(2), eps=0.0, out=x)
    assert float(y[0, 1, -1]) == 3.0
    assert float(y[0, 1, -2]) == 1.0
    del x, y, moments
    cupy.get_default_memory_pool().free_all_blocks()


def test_nothing_waits_and_other_streams_are_kept_to(rng):
    """A stream that records refuses all that would wait; what was recorded computes the same."""
    p = moved(problem(rng, (8, 6, 40), np.float32))
    running = cupy.zeros(6), cupy.ones(6)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()

    def call():
        got = bncpu.batch_norm_train(
            p.x, p.gamma, p.beta, running_mean=running[0], running_var=running[1]
        )
        return got, bncpu.batch_norm_backward(p.dy, p.x, got.mean, got.invstd, p.gamma)

    with stream:
        for _ in range(2):
            expected = call()  # compiles, and fills the stream's pool
        stream.synchronize()
        stream.begin_capture()
        got = call()
        graph = stream.end_capture()
        graph.launch()
        stream.synchronize()
        for a, b in zip(got[0][:3] + got[1][:3], expected[0][:3] + expected[1][:3], strict=True):
            assert_same_bits(fetch(a), fetch(b))


def test_out_of_memory(rng):
    x = place(normal(rng, (64, 32, 32, 32), np.float32))
    running = cupy.zeros(32), cupy.ones(32)
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    pool.set_limit(pool.used_bytes() + x.nbytes // 2)
    try:
        with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
            bncpu.batch_norm_train(x, running_mean=running[0], running_var=running[1])
    finally:
        pool.set_limit(0)
    assert not fetch(running[0]).any()
    assert (fetch(running[1]) == 1).all()


def test_mixtures_are_refused(rng):
    x = normal(rng, (4, 3, 5), np.float32)
    with pytest.raises(TypeError, match=r"^gamma: expected a CuPy array, as x is; got a NumPy"):
        bncpu.batch_norm_train(place(x), np.ones(3, np.float32))
    with pytest.raises(TypeError, match=r"^gamma: expected a NumPy array, as x is; got a CuPy"):
        bncpu.batch_norm_train(x, cupy.ones(3, np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, "bfloat16"], ids=str)
def test_tensors_of_pytorch(dtype):
    """Viewed without a copy, results written into their memory, and agreed with."""
    torch = pytest.importorskip("torch", reason="needs PyTorch, on a GPU")
    dtype = HALVES[1] if dtype == "bfloat16" else np.dtype(dtype)
    x = torch.randn(8, 6, 5, 7, device="cuda").to(getattr(torch, dtype.name))
    x = x.to(memory_format=torch.channels_last)
    out, running = torch.empty_like(x), [torch.zeros(6, device="cuda") for _ in range(2)]
    got = bncpu.batch_norm_train(x, running_mean=running[0], running_var=running[1], out=out)
    assert got.y.data.ptr == out.data_ptr()
    theirs = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
    limit = {2: 0.02, 4: 1e-5}[dtype.itemsize]
    assert float((out.double() - theirs).abs().max()) < limit
    assert float(running[0].abs().max()) > 0


def test_the_layer_and_the_trainer(rng):
    """A network learns a separable problem, and its state is that of one on the CPU."""
    x = rng.standard_normal((600, 8)).astype(np.float32)
    y = (x[:, 0] + x[:, 1] > 0).astype(np.int64)
    model = nn.fully_connected([8, 16, 2], rng=np.random.default_rng(0), device="cuda")
    there = cupy.asarray(x), cupy.asarray(y)
    nn.fit(model, nn.SGD(0.5, momentum=0.5), *there, steps=200, batch_size=50)
    assert nn.evaluate(model, *there) > 0.95
    here = nn.fully_connected([8, 16, 2], rng=np.random.default_rng(1))
    here.load_state_dict(model.state_dict())
    assert abs(nn.evaluate(here, x, y) - nn.evaluate(model, *there)) < 0.01


def test_moments_and_folding(rng):
    x = normal(rng, (9, 4, 5), np.float64)
    whole = sum(bncpu.batch_moments(place(part)) for part in (x[:2], x[2:]))
    truth = bncpu.batch_moments(x)
    np.testing.assert_allclose(fetch(whole.mean), truth.mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(fetch(whole.m2), truth.m2, rtol=1e-12)
    mean, var = rng.standard_normal(4), rng.random(4) + 0.1
    gamma, beta = parameters(rng, 4, np.float64)
    expected = bncpu.linear_map(mean, var, gamma, beta)
    got = bncpu.linear_map(*map(place, (mean, var, gamma, beta)))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(fetch(a), b, rtol=1e-14)
