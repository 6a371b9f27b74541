"""Importing bncpu is light, and gives the public names and nothing else."""

import importlib.metadata
import importlib.util
import inspect
import re
import subprocess
import sys

import pytest

import bncpu
from bncpu import reference

PUBLIC = {
    "BatchNorm",
    "Gradients",
    "LinearMap",
    "Moments",
    "TrainResult",
    "batch_moments",
    "batch_norm_backward",
    "batch_norm_infer",
    "batch_norm_infer_backward",
    "batch_norm_train",
    "config",
    "fold_into_conv",
    "fold_into_linear",
    "get_num_threads",
    "linear_map",
    "set_num_threads",
    "show_config",
}

SIGNATURES = {
    "batch_norm_train": "x, gamma=None, beta=None, *, running_mean=None, running_var=None, "
    "momentum=0.1, eps=1e-05, axis=1, residual=None, activation=None, mask=None, out=None, "
    "num_threads=None",
    "batch_norm_infer": "x, mean, var, gamma=None, beta=None, *, eps=1e-05, axis=1, "
    "residual=None, activation=None, mask=None, out=None, num_threads=None",
    "batch_norm_backward": "dy, x, mean, invstd, gamma=None, beta=None, *, axis=1, "
    "activation=None, mask=None, residual=False, out=None, num_threads=None",
    "batch_norm_infer_backward": "dy, x, mean, var, gamma=None, beta=None, *, eps=1e-05, axis=1, "
    "activation=None, mask=None, residual=False, out=None, num_threads=None",
    "batch_moments": "x, *, axis=1, num_threads=None",
    "linear_map": "mean, var, gamma=None, beta=None, eps=1e-05",
    "fold_into_linear": "weight, bias, mean, var, gamma=None, beta=None, *, eps=1e-05, axis=0",
    "fold_into_conv": "weight, bias, mean, var, gamma=None, beta=None, *, eps=1e-05, axis=0",
    "set_num_threads": "n",
    "get_num_threads": "",
    "BatchNorm": "num_features, *, eps=1e-05, momentum=0.1, affine=True, "
    "track_running_stats=True, axis=1, activation=None, dtype=<class 'numpy.float32'>, "
    "device='cpu'",
}

HEAVY = {
    "cupy",
    "hypothesis",
    "ml_dtypes",
    "matplotlib",
    "mpi4py",
    "pytest",
    "safetensors",
    "scipy",
    "sklearn",
    "torch",
    "tqdm",
}


def modules_after(statement):
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    return set(run.stdout.split())


def test_import_is_light():
    modules = modules_after("import bncpu")
    assert not HEAVY & {name.partition(".")[0] for name in modules}
    of_bncpu = {name for name in modules if name.startswith("bncpu.")}
    above = ("nn", "data", "experiments", "cli", "bench", "torch", "distributed", "population")
    above = tuple(f"bncpu.{name}" for name in above)
    assert not {name for name in of_bncpu if name.startswith(above)}
    assert not {"bncpu.reference", "bncpu.cuda"} & of_bncpu


def test_the_reference_imports_numpy_alone():
    spec = importlib.util.find_spec("bncpu.reference")
    code = (
        "import runpy, sys, numpy\n"
        "before = set(sys.modules)\n"
        f"runpy.run_path({spec.origin!r})\n"
        "print(*(set(sys.modules) - before))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    new = {name.partition(".")[0] for name in run.stdout.split()}
    assert new <= set(sys.stdlib_module_names) | {"numpy"}


@pytest.mark.parametrize("absent", ["torch", "ml_dtypes"])
def test_what_bncpu_torch_needs_is_named(absent):
    others = {"torch", "ml_dtypes"} - {absent}
    code = (
        "import sys, types\n"
        f"sys.modules |= {{name: types.ModuleType(name) for name in {others!r}}}\n"
        f"sys.modules[{absent!r}] = None\n"
        "import bncpu.torch"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    message = f'ImportError: bncpu.torch: needs {absent}, .*pip install "bncpu\\[torch\\]"'
    assert run.returncode == 1
    assert re.match(message, run.stderr.splitlines()[-1])


def test_public_names():
    assert set(bncpu.__all__) - {"__version__"} == PUBLIC
    assert len(bncpu.__all__) == len(set(bncpu.__all__))
    for name in bncpu.__all__:
        assert hasattr(bncpu, name)


def text_of(signature):
    """Return a signature's names, order and defaults, without its annotations."""
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(parameters))[1:-1]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    assert text_of(inspect.signature(getattr(bncpu, name))) == SIGNATURES[name]


@pytest.mark.parametrize("name", [name for name in SIGNATURES if name.startswith("batch_")])
def test_the_reference_has_the_same_signatures(name):
    """All but where the result goes and how many threads compute it."""
    signature = inspect.signature(getattr(bncpu, name))
    kept = [p for p in signature.parameters.values() if p.name not in ("out", "num_threads")]
    of_reference = inspect.signature(getattr(reference, name))
    assert text_of(of_reference) == text_of(inspect.Signature(kept))


def test_version_is_that_of_the_distribution():
    assert bncpu.__version__ == importlib.metadata.version("bncpu")
