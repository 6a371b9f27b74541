"""Wrong calls with arrays of a GPU, on a stand-in for CuPy: the same checks, and those of devices.

What is checked of any array is tested in test_bad_input.py; here is what only arrays of a GPU do
wrong, and a sample that shows that one door serves both kinds.
"""

import sys

import cupy_standin
import numpy as np
import pytest
from accuracy import assert_same_bits
from calls import ARRAYS, REQUIRED, TAKES, WITH_OUT, arguments, takers

import bncpu

pytestmark = pytest.mark.usefixtures("cupy")


def on_gpu(given, device=0):
    """Return the arguments of a call with their arrays on a device."""
    return {
        name: cupy_standin.ndarray(a.copy(), device) if isinstance(a, np.ndarray) else a
        for name, a in given.items()
    }


def memory_of(given):
    """Return the NumPy arrays in an argument list, those behind arrays of a GPU included."""
    arrays = {name: getattr(a, "_a", a) for name, a in given.items()}
    return {name: a for name, a in arrays.items() if isinstance(a, np.ndarray)}


def assert_refused(function, given, error, match):
    """Call, expect the error, find every array as it was, and nothing launched or waited for."""
    before = {name: a.copy() for name, a in memory_of(given).items()}
    with pytest.raises(error, match=match):
        getattr(bncpu, function)(**given)
    for name, a in memory_of(given).items():
        assert_same_bits(a, before[name], name)
    assert not cupy_standin.state.launches
    assert not cupy_standin.state.waits


@pytest.mark.parametrize(("function", "name"), [(f, n) for f, n in takers(*ARRAYS) if n != "x"])
def test_kinds_are_not_mixed(function, name):
    """The message says which argument is of which kind, and how to move it."""
    given = arguments(function)
    match = rf"^{name}: expected a CuPy array, as x is; got a NumPy array.*cupy\.asarray\({name}\)"
    assert_refused(function, on_gpu(given) | {name: given[name]}, TypeError, match)
    match = rf"^{name}: expected a NumPy array, as x is; got a CuPy array.*{name}\.get\(\)"
    assert_refused(function, given | {name: on_gpu(given)[name]}, TypeError, match)


@pytest.mark.parametrize(("function", "name"), [(f, n) for f, n in takers(*ARRAYS) if n != "x"])
def test_devices_are_not_mixed(function, name):
    given = arguments(function)
    given = on_gpu(given) | {name: on_gpu(given, device=1)[name]}
    match = rf"^{name}: expected an array on GPU 0, as x is; got one on GPU 1"
    assert_refused(function, given, ValueError, match)


@pytest.mark.parametrize("function", TAKES)
def test_x_is_on_the_current_device(function):
    given = on_gpu(arguments(function), device=1)
    match = r"^x: .*current GPU, which is 0; got one on GPU 1.*cupy\.cuda\.Device\(1\)"
    assert_refused(function, given, ValueError, match)


@pytest.mark.parametrize("function", TAKES)
def test_a_device_that_is_too_old(function):
    given = on_gpu(arguments(function), device=2)
    with cupy_standin.cuda.Device(2):
        match = r"GPU 2 has compute capability 7\.0.*need 7\.5"
        assert_refused(function, given, RuntimeError, match)


@pytest.mark.parametrize("dtype", ["int64", "uint8", "complex64", "uint16", ">f4"])
@pytest.mark.parametrize(("function", "name"), takers("x", "dy", "gamma", "mean", "running_var"))
def test_dtypes(function, name, dtype):
    given = arguments(function)
    given[name] = given[name].astype(dtype)
    assert_refused(function, on_gpu(given), TypeError, rf"^{name}: expected dtype")


@pytest.mark.parametrize(("function", "name"), takers("residual", "out", "gamma", "mask"))
def test_shapes(function, name):
    given = arguments(function)
    given[name] = given[name][..., :-1]
    assert_refused(function, on_gpu(given), ValueError, rf"^{name}: expected shape")


@pytest.mark.parametrize("function", WITH_OUT)
def test_outputs_that_overlap(function):
    """Other views of x's memory, and memory that has an element twice."""
    given = on_gpu(arguments(function))
    base = cupy_standin.empty((9, 3, 5), np.float32)
    assert_refused(
        function, given | {"x": base[:4], "out": base[3:7]}, ValueError, "^out: overlaps x"
    )
    twice = np.lib.stride_tricks.as_strided(base._a, (4, 3, 5), (0, 20, 4))
    given["out"] = cupy_standin.ndarray(twice)
    assert_refused(function, given, ValueError, r"^out: its elements overlap")


@pytest.mark.parametrize("name", ["x", "gamma"])
def test_elements_that_no_gpu_can_read(name):
    given = on_gpu(arguments("batch_norm_train"))
    size = given[name].nbytes
    memory = np.zeros(size + 1, np.uint8)[1:].view(np.float32).reshape(given[name].shape)
    given[name] = cupy_standin.ndarray(memory)
    match = rf"^{name}: expected elements of 4 bytes at multiples of that"
    assert_refused("batch_norm_train", given, ValueError, match)


@pytest.mark.parametrize("function", TAKES)
def test_tensors_of_a_gpu_without_cupy(function, monkeypatch):
    """The first array says what to install."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match=r'pip install "bncpu\[cuda\]"'):
        getattr(bncpu, function)(**{n: Tensor(a) for n, a in required(function).items()})


@pytest.mark.parametrize("function", TAKES)
def test_tensors_of_a_gpu_without_a_driver(function):
    cupy_standin.state.available = False
    with pytest.raises(RuntimeError, match=r'driver.*pip install "bncpu\[cuda\]"'):
        getattr(bncpu, function)(**{n: Tensor(a) for n, a in required(function).items()})


@pytest.mark.parametrize("device", ["gpu", "cuda:0", 0, None])
def test_devices_that_a_layer_cannot_be_on(device):
    error = ValueError if isinstance(device, str) else TypeError
    with pytest.raises(error, match=r'^device: expected "cpu" or "cuda"; got'):
        bncpu.BatchNorm(3, device=device)


def test_a_layer_for_a_gpu_that_is_not_there(monkeypatch):
    cupy_standin.state.available = False
    with pytest.raises(RuntimeError, match=r"bncpu\[cuda\]"):
        bncpu.BatchNorm(3, device="cuda")
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match=r"bncpu\[cuda\]"):
        bncpu.BatchNorm(3, device="cuda")


def test_layers_and_batches_of_other_devices():
    x = np.ones((4, 3), np.float32)
    with pytest.raises(TypeError, match=r'^x: .*device, cpu; got a CuPy array.*device="cuda"'):
        bncpu.BatchNorm(3)(cupy_standin.asarray(x))
    with pytest.raises(TypeError, match=r'^x: .*device, cuda; got a NumPy array.*device="cpu"'):
        bncpu.BatchNorm(3, device="cuda")(x)


def test_parts_of_other_kinds_do_not_merge():
    here, there = np.ones(3), cupy_standin.ones(3)
    with pytest.raises(TypeError, match=r"^merge: .*NumPy and some of CuPy"):
        bncpu.Moments(2, here, here).merge(bncpu.Moments(2, there, there))


def test_folding_refuses_a_mixture():
    mean, var = cupy_standin.zeros(2), cupy_standin.ones(2)
    with pytest.raises(TypeError, match=r"^weight: expected a CuPy array, as mean is"):
        bncpu.fold_into_linear(np.ones((2, 3)), None, mean, var)
    with pytest.raises(TypeError, match=r"^var: expected a NumPy array, as mean is"):
        bncpu.linear_map(np.zeros(2), var)


class Tensor:
    """A GPU tensor of another library."""

    def __init__(self, array):
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim

    def __dlpack__(self, **how):
        raise AssertionError("nobody can take it")

    def __dlpack_device__(self):
        return 2, 0


def required(function):
    given = arguments(function)
    return {name: given[name] for name in REQUIRED[function]}
