"""Fixtures of the whole suite: fresh random numbers that can be had again, and kernel levels."""

import importlib.util
import os
import secrets
import sys
import zlib
from pathlib import Path

import cupy_standin
import numpy as np
import pytest
from hypothesis import settings

import bncpu.backends
import bncpu.cpu

# The seed is fresh at every run, so that the suite sees more than one sample of the world;
# BNCPU_TEST_SEED=... brings a failure back.
SEED = int(os.environ.get("BNCPU_TEST_SEED") or secrets.randbits(32))

# Kernels of a shared machine may pause for as long as its other users like.
settings.register_profile("bncpu", deadline=None, max_examples=60, print_blob=True)
settings.load_profile("bncpu")


def pytest_report_header():
    return (
        f"bncpu: BNCPU_TEST_SEED={SEED}, levels {', '.join(bncpu.cpu.runnable_levels())}, "
        f"chosen {bncpu.cpu.level}"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    report = yield
    if report.failed:
        report.sections.append(("random numbers", f"BNCPU_TEST_SEED={SEED} repeats this run"))
    return report


@pytest.fixture
def rng(request):
    """Random numbers of this run and this test, whichever other tests run."""
    return np.random.default_rng([SEED, zlib.crc32(request.node.nodeid.encode())])


@pytest.fixture(params=bncpu.cpu.runnable_levels())
def level(request):
    """Run a test once on every compiled level that this machine can run."""
    with bncpu.cpu.use_level(request.param):
        yield request.param


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def dtype(request):
    return np.dtype(request.param)


@pytest.fixture
def benchmark_script(monkeypatch):
    """Return a function that imports a script of benchmarks/ by its name."""
    folder = Path(__file__).parents[1] / "benchmarks"
    if not folder.is_dir():
        pytest.skip("only a checkout has benchmarks/")

    def load(name):
        spec = importlib.util.spec_from_file_location(f"{name}_script", folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def default_threads():
    """Undo what a test does with set_num_threads."""
    bncpu.set_num_threads(None)
    yield
    bncpu.set_num_threads(None)


@pytest.fixture
def cupy(monkeypatch):
    """Put a stand-in in the place of CuPy, whether or not that is installed."""
    monkeypatch.setitem(sys.modules, "cupy", cupy_standin)
    monkeypatch.delitem(sys.modules, "bncpu.cuda.kernels", raising=False)
    cupy_standin.reset()
    bncpu.backends._cuda_kernels.cache_clear()
    bncpu.backends._check_capability.cache_clear()
    yield cupy_standin
    bncpu.backends._cuda_kernels.cache_clear()
    bncpu.backends._check_capability.cache_clear()


@pytest.fixture
def torch_threads():
    """Undo what a test does with PyTorch's threads: bncpu's, where both have one OpenMP."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def seeded_torch(rng, torch_threads):  # noqa: ARG001
    """Let PyTorch draw this test's random numbers, on one thread."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(int(rng.integers(2**31)))
    torch.set_num_threads(1)
