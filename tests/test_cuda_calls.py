"""The public functions on arrays of a GPU: CuPy's stand-in before them, the emulator behind.

From the user's call to the last launch everything is the real thing but CuPy and the GPU. What the
kernels compute is tested in test_cuda_kernels.py; here it is how they are called.
"""

import ast
import inspect
import re
import sys
from pathlib import Path

import cupy_standin
import numpy as np
import pytest
from accuracy import assert_running, assert_same_bits, assert_train
from cases import FLOATS, HALVES, LAYOUTS, lay, normal, parameters
from cuda_emulator import load_all
from forms import EVERYTHING, FORMS, RELU, check, problem, run

import bncpu
import bncpu.problem
from bncpu.backends import kernels_for
from bncpu.cuda import plan

pytestmark = pytest.mark.usefixtures("cupy")

ARRAYS = ("dy", "x", "residual", "mean", "var", "gamma", "beta")


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Compile what most tests here run on at once, on all cores."""
    load_all(
        plan.instance(dtype, vector, tiled)
        for dtype, vector in (("float32", 4), ("float32", 1), ("float64", 1), ("bfloat16", 1))
        for tiled in (False, True)
    )


def moved(p):
    """Return a problem with its arrays on the stand-in's device, strides and all."""
    return p._replace(**{name: device(getattr(p, name)) for name in ARRAYS})


def device(array):
    return None if array is None else cupy_standin.ndarray(array)


def new_mask(x):
    return cupy_standin.full((x.size + 7) // 8, 0xA5, np.uint8)


def run_and_check(form, p, **options):
    """Run a form on a device, check that nobody waited and what came back; return it."""
    got = run(form, moved(p), mask=new_mask, place=device, **options)
    assert not cupy_standin.state.waits
    for name, a in got.items():
        assert a is None or isinstance(a, cupy_standin.ndarray), name
    values = {name: None if a is None else a._a for name, a in got.items()}
    check(form, p, values)
    return values


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms(rng, form):
    run_and_check(form, problem(rng, (4, 5, 6, 7), np.float32))


@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES], ids=str)
def test_dtypes(rng, dtype):
    run_and_check(EVERYTHING, problem(rng, (4, 5, 33), dtype))


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((8, 16), 1),
        ((6, 7, 5), -1),
        ((3, 5, 2, 3, 4), 1),
        ((3, 4, 5, 6), (1, 2, 3)),
        ((3, 4, 5, 6), (1, 3)),
        ((4, 5), 0),
        ((7,), 0),
    ],
    ids=str,
)
def test_shapes_and_axes(rng, shape, axis):
    trains = shape != (7,)
    form = EVERYTHING if len(shape) > 2 else RELU
    run_and_check(form, problem(rng, shape, np.float32, axis=axis), train=trains)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "misaligned"])
def test_layouts(rng, layout):
    """Strides of every kind, and a mask in the order in which x lies in memory."""
    run_and_check(EVERYTHING, problem(rng, (5, 3, 4, 6), np.float32, layout=layout))


def test_a_mask_that_is_put_into_order_in_pieces(rng, monkeypatch):
    """As one of more bits than 32 bits count is."""
    monkeypatch.setattr(bncpu.problem, "_BITS_AT_ONCE", 64)
    run_and_check(EVERYTHING, problem(rng, (3, 4, 5, 6), np.float32, axis=(1, 3)))


@pytest.mark.parametrize("layout", ["c", "channels_last", "cropped", "reversed"])
def test_outputs_in_memory_of_other_strides(rng, layout):
    p = problem(rng, (5, 3, 4, 6), np.float32, layout="channels_last")
    out = lambda: device(lay(layout, np.empty(p.x.shape, np.float32)))  # noqa: E731
    run_and_check(EVERYTHING, p, out=out)


def test_every_kind_of_parameter_vector(rng):
    """Statistics of float32 and float64, strided, reversed and of several axes, as they are."""
    shape = (6, 4, 5)
    x, dy = normal(rng, shape, np.float32), normal(rng, shape, np.float32)
    gamma, beta = parameters(rng, (8,), np.float32)
    mean, var = rng.standard_normal(8).astype(np.float32), rng.random(8) + 0.1
    vectors = [(a[::2], a[7::-2]) for a in (mean, var, gamma, beta)]
    for chosen in zip(*vectors, strict=True):
        y = bncpu.batch_norm_infer(device(x), *map(device, chosen))
        assert_close_to(y, bncpu.batch_norm_infer(x, *chosen))
        got = bncpu.batch_norm_infer_backward(device(dy), device(x), *map(device, chosen))
        expected = bncpu.batch_norm_infer_backward(dy, x, *chosen)
        for a, b in zip(got[:3], expected[:3], strict=True):
            assert_close_to(a, b)


def assert_close_to(got, expected):
    np.testing.assert_allclose(got._a, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("step", [1, -2])
@pytest.mark.parametrize("axis", [1, (1, 2)], ids=str)
def test_running_statistics(rng, dtype, step, axis):
    """Updated on the device, whatever their dtype, strides and axes."""
    shape = (6, 4, 5)
    channels = shape[1:] if axis == (1, 2) else shape[1:2]
    memory = [np.zeros((*channels[:-1], 12), dtype), np.ones((*channels[:-1], 12), dtype)]
    running = [a[..., ::step][..., : channels[-1]] for a in memory]
    batches = [normal(rng, shape, np.float32) for _ in range(2)]
    for x in batches:
        bncpu.batch_norm_train(
            device(x),
            running_mean=device(running[0]),
            running_var=device(running[1]),
            momentum=0.3,
            axis=axis,
        )
    assert_running(*running, *batches, momentum=0.3, axis=axis)
    used = [np.zeros_like(a, bool) for a in memory]
    for mark, a, start in zip(used, memory, (0, 1), strict=True):
        mark[..., ::step][..., : channels[-1]] = True
        assert (a[~mark] == start).all()


@pytest.mark.parametrize("function", ["train", "infer", "backward"])
def test_in_place(rng, function):
    p = problem(rng, (4, 5, 6), np.float32)
    x, dy, residual, mean, var = map(device, (p.x, p.dy, p.residual, p.mean, p.var))
    if function == "train":
        expected = bncpu.batch_norm_train(x, residual=residual).y.copy()
        y = bncpu.batch_norm_train(x, residual=residual, out=residual).y
        assert y is residual
    elif function == "infer":
        expected = bncpu.batch_norm_infer(x, mean, var).copy()
        y = bncpu.batch_norm_infer(x, mean, var, out=x)
        assert y is x
    else:
        invstd = 1 / np.sqrt(var + 1e-5)
        expected = bncpu.batch_norm_backward(dy, x, mean, invstd).dx.copy()
        y = bncpu.batch_norm_backward(dy, x, mean, invstd, out=dy).dx
        assert y is dy
    assert_same_bits(y._a, expected._a)


def test_an_output_between_the_elements_of_x(rng):
    """Interleaved in one allocation without an element in common: no overlap."""
    x = normal(rng, (4, 3, 5), np.float32)
    base = cupy_standin.empty((8, 3, 5), np.float32)
    base[::2] = device(x)
    got = bncpu.batch_norm_train(base[::2], out=base[1::2])
    assert_train(bncpu.TrainResult(*(a._a for a in got)), x)


def test_empty_batches():
    x = cupy_standin.empty((0, 3, 4), np.float32)
    y, mean, invstd = bncpu.batch_norm_train(x)
    assert y.shape == x.shape
    assert (mean._a == 0).all()
    assert_same_bits(invstd._a, np.full(3, 1 / np.sqrt(1e-5)))
    gradients = bncpu.batch_norm_backward(x, x, mean, invstd)
    assert (gradients.dgamma._a == 0).all()
    assert gradients.dgamma.dtype == np.float32
    assert bncpu.batch_moments(x).count == 0
    assert not cupy_standin.state.launches


def test_a_negative_variance_is_told_by_nan(rng):
    """To look at it would be to wait."""
    x = normal(rng, (4, 3, 5), np.float32)
    y = bncpu.batch_norm_infer(device(x), device(np.zeros(3)), device(np.array([1.0, -1.0, 2.0])))
    assert np.isnan(y._a[:, 1]).all()
    assert np.isfinite(y._a[:, ::2]).all()
    assert not cupy_standin.state.waits


def test_moments_merge_on_the_device(rng):
    x = normal(rng, (9, 4, 5), np.float64)
    parts = [bncpu.batch_moments(device(x[:2])), bncpu.batch_moments(device(x[2:]))]
    whole = sum(parts)
    truth = bncpu.batch_moments(x)
    assert whole.count == truth.count
    np.testing.assert_allclose(whole.mean._a, truth.mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(whole.var()._a, truth.var(), rtol=1e-12)
    assert not cupy_standin.state.waits


def test_folding_on_the_device(rng):
    weight, bias = rng.standard_normal((4, 3)), rng.standard_normal(4)
    mean, var, gamma, beta = rng.standard_normal((4, 4)) ** 2 + 0.1
    expected = bncpu.fold_into_linear(weight, bias, mean, var, gamma, beta)
    got = bncpu.fold_into_linear(*map(device, (weight, bias, mean, var, gamma, beta)))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a._a, b, rtol=1e-14)
    assert not cupy_standin.state.waits


def test_tensors_of_other_libraries_are_viewed(rng):
    x = normal(rng, (4, 3, 5), np.float32)

    class Tensor:
        def __init__(self, array):
            self.array, self.shape, self.dtype = array, array.shape, array.dtype

        def __dlpack_device__(self):
            return 2, 0

        def __dlpack__(self, **how):
            return self.array

    out, running = Tensor(device(np.empty_like(x))), [Tensor(device(a)) for a in np.eye(2, 3)]
    got = bncpu.batch_norm_train(
        Tensor(device(x)), running_mean=running[0], running_var=running[1], out=out
    )
    assert got.y is out.array
    assert_train(bncpu.TrainResult(*(a._a for a in got)), x)
    assert_running(*(t.array._a for t in running), x, mean=np.eye(2, 3)[0], var=np.eye(2, 3)[1])


def test_another_device(rng):
    """What is made for a call is made where x is."""
    x = normal(rng, (4, 3, 5), np.float32)
    with cupy_standin.cuda.Device(1):
        got = bncpu.batch_norm_train(device(x))
        assert {a.device.id for a in got} == {1}
        assert_train(bncpu.TrainResult(*(a._a for a in got)), x)


def test_out_of_memory_changes_nothing(rng):
    """Whichever allocation fails: CuPy's error comes through, and running statistics are kept.

    A mask in another order than the kernels' takes memory even after they have run.
    """
    x = normal(rng, (4, 3, 5, 6), np.float32)
    running = [np.zeros((3, 6)), np.ones((3, 6))]
    call = {"activation": "relu", "mask": new_mask(x), "axis": (1, 3)}
    call |= dict(zip(("running_mean", "running_var"), map(device, running), strict=True))
    x_there, failed = device(x), 0
    for allocations in range(100):
        cupy_standin.state.allocations_left = allocations
        try:
            bncpu.batch_norm_train(x_there, **call)
        except cupy_standin.OutOfMemoryError:
            failed += 1
            assert (running[0] == 0).all()
            assert (running[1] == 1).all()
        else:
            break
    assert failed == allocations > 8
    cupy_standin.state.allocations_left = None
    assert_running(*running, x, axis=(1, 3))


def test_modules_are_made_once(rng):
    x = device(normal(rng, (4, 3, 8), np.float32))
    for _ in range(2):
        y, mean, invstd = bncpu.batch_norm_train(x)
        bncpu.batch_norm_backward(y, x, mean, invstd)
    assert len(cupy_standin.state.modules) == 1


def test_one_launch_where_a_tile_fits(rng):
    """With running statistics, parameters of two dtypes, a residual, ReLU and its mask."""
    x, residual = (device(normal(rng, (4, 8, 16), np.float32)) for _ in range(2))
    gamma, beta = map(device, parameters(rng, 8, np.float32))
    bncpu.batch_norm_train(
        x,
        gamma,
        beta,
        running_mean=device(np.zeros(8)),
        running_var=device(np.ones(8, np.float32)),
        residual=residual,
        activation="relu",
        mask=new_mask(x),
    )
    assert [entry for entry, *_ in cupy_standin.state.launches] == ["train_tile"]


@pytest.mark.parametrize("residual", [False, True])
def test_the_layer(rng, residual):
    """The same as on the CPU, through training, evaluation, backward and both states."""
    here = bncpu.BatchNorm(5, activation="relu")
    there = bncpu.BatchNorm(5, activation="relu", device="cuda")
    for step in range(4):
        x, dy, added = (normal(rng, (6, 5, 7), np.float32) for _ in range(3))
        for layer in (here, there):
            layer.train(step < 3)
        y = here(x, residual=added if residual else None)
        got = there(device(x), residual=device(added) if residual else None)
        assert_close_to(got, y)
        assert_close_to(there.backward(device(dy)), here.backward(dy))
        for name in ("dgamma", "dbeta", "running_mean", "running_var"):
            assert_close_to(getattr(there, name), getattr(here, name))
        if residual:
            assert_close_to(there.dresidual, here.dresidual)
    assert not cupy_standin.state.waits

    state = there.state_dict()
    assert all(type(a) is np.ndarray for a in state.values())
    again = bncpu.BatchNorm(5, activation="relu", device="cuda")
    again.load_state_dict({name: device(a) for name, a in state.items()})
    back = bncpu.BatchNorm(5, activation="relu")
    back.load_state_dict(state)
    for name, a in state.items():
        assert_same_bits(again.state_dict()[name], a, name)
        assert_same_bits(back.state_dict()[name], a, name)


def test_the_example_of_the_page(rng):
    text = (Path(__file__).parents[1] / "docs" / "gpu.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```py\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    names = {"bncpu": bncpu, "x": normal(rng, (3, 64, 4), np.float32)}
    exec(example, names)
    assert isinstance(names["y"], cupy_standin.ndarray)
    assert names["layer"].num_batches_tracked == 1


def test_signatures_are_those_of_the_cpu():
    """So that one call serves both; what those of a GPU take besides has defaults."""
    there = kernels_for(device(np.ones(3)))
    assert there is sys.modules["bncpu.cuda.kernels"]
    stub = ast.parse((Path(bncpu.cpu.__file__).parent / "kernels.pyi").read_text())
    here = {node.name: node.args for node in stub.body if isinstance(node, ast.FunctionDef)}
    for name in ("moments", "train", "infer", "backward", "infer_backward"):
        found = inspect.signature(getattr(there, name)).parameters.values()
        required = [parameter.name for parameter in found if parameter.default is parameter.empty]
        assert required == [argument.arg for argument in here[name].args]


def test_parameters_are_packed_as_the_kernels_read_them():
    """The letters of struct and NumPy's layout of the structure agree, field by field."""
    from bncpu.cuda.kernels import NUMBERS, PACKED

    words = range(1, 1 + len(PACKED.unpack(bytes(PACKED.size))))
    assert PACKED.size == plan.PARAMETERS.itemsize
    packed = np.frombuffer(PACKED.pack(*words), plan.PARAMETERS)[0]
    flat = []
    for name in plan.PARAMETERS.names:
        flat += list(packed[name]) if plan.PARAMETERS[name].names else [packed[name]]
    assert flat == list(words)
    assert plan.PARAMETERS.names[-len(NUMBERS) :] == NUMBERS
