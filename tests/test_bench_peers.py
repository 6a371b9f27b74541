"""The peers of the benchmark compute what bncpu computes, or else they would be no peers."""

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accuracy import assert_same_to_rounding

import bncpu
from bncpu.bench import operations, peers
from bncpu.bench.operations import OPERATIONS, Problem

SHAPE = (4, 8, 6, 5)
SHAPES = [SHAPE, (7, 5), (3, 4, 9)]


def computed(problem, operation):
    """Return y, dx or mean as bncpu computes it from the problem's arrays."""
    x, dy, out, _, _ = problem.sets[0]
    given = {"axis": problem.axis}
    affine = problem.gamma, problem.beta
    activation = {"activation": "relu"} if operation.relu else {}
    if operation.backward:  # the forward's result, whose sign the peers read
        forward = OPERATIONS["train_relu" if operation.function == "backward" else "infer_relu"]
        if operation.add:
            forward = forward._replace(add=True)
        mask = {"mask": np.zeros_like(problem.sets[0].mask)} if operation.add else {}
        out[...] = computed(problem, forward)
    residual = {"residual": dy} if operation.add and not operation.backward else {}
    if operation.function == "moments":
        return bncpu.batch_moments(x, **given).mean
    if operation.function == "train":
        return bncpu.batch_norm_train(x, *affine, **given, **activation, **residual).y
    statistics = problem.mean, problem.var
    if operation.function == "infer":
        return bncpu.batch_norm_infer(x, *statistics, *affine, **given, **activation, **residual)
    if operation.add:
        flat = (out != 0).reshape(-1)
        mask["mask"][...] = np.packbits(flat, bitorder="little")
        given |= {"residual": True, **mask}
    if operation.function == "backward":
        statistics = problem.mean, problem.invstd
        return bncpu.batch_norm_backward(dy, x, *statistics, *affine, **given, **activation).dx
    return bncpu.batch_norm_infer_backward(dy, x, *statistics, *affine, **given, **activation).dx


def result_of(contender, problem):
    """Return y, dx or the mean that a peer's call returns, with the axes of bncpu's."""
    result = contender.call()
    if isinstance(result, tuple | list):
        # PyTorch says variance, mean.
        result = (
            result[1] if len(result) == 2 and "torch" in type(result[0]).__module__ else result[0]
        )
    if hasattr(result, "detach"):
        result = result.float().numpy() if problem.dtype == "bfloat16" else result.numpy()
        if problem.last and result.ndim > 1:
            result = np.moveaxis(result, 1, -1)
    return np.asarray(result)


def check_peer(name, shape, dtype, layout):
    """Compare every operation of a peer with bncpu's."""
    module = importlib.import_module(peers.PEERS[name].module)
    for operation in OPERATIONS.values():
        problem = Problem(shape, dtype, layout, [operation], rotate=False)
        expected = computed(problem, operation)
        for contender in module.contenders(problem, operation).values():
            got = result_of(contender, problem)
            assert got.shape == expected.shape
            m = problem.size // shape[1]
            size = 20 * (1 + np.abs(expected.astype(np.float64)).max())
            # Halves: the peers' own arithmetic is not held to float32's tolerance.
            if dtype in ("float32", "float64"):
                assert_same_to_rounding(
                    got, expected, dtype=np.dtype(dtype), m=m, size=size, what=operation.name
                )


@pytest.mark.parametrize("layout", operations.LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_peers_compute_the_same(name, shape, layout, dtype):
    pytest.importorskip(name)
    check_peer(name, shape, dtype.name, layout)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_peers_take_half_types(name, dtype):
    pytest.importorskip(name)
    check_peer(name, SHAPE, dtype, "nhwc")


def test_jax_computes_the_same():
    """In a process of its own: JAX makes every later fork a warning."""
    if importlib.util.find_spec("jax") is None:
        pytest.skip("JAX is not installed")
    code = (
        "import test_bench_peers as test\n"
        "for layout in ('nchw', 'nhwc'):\n"
        "    test.check_peer('jax', test.SHAPE, 'float32', layout)\n"
        "test.check_peer('jax', (7, 5), 'float64', 'nchw')\n"
    )
    command = [sys.executable, "-c", code]
    folder = Path(__file__).parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
