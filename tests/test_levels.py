"""The level of the kernels: the highest that runs, or the one that BNCPU_LEVEL names."""

import os
import platform
import subprocess
import sys

import numpy as np
import pytest
from accuracy import assert_same_but_for_nan, assert_same_to_rounding
from cases import HALVES
from forms import FORMS, problem, run

import bncpu
import bncpu.cpu


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


REPORT = """
import sys
import bncpu, bncpu.cpu
import numpy as np
y = bncpu.batch_norm_train(np.arange(24.0).reshape(4, 6)).y
loaded = [name for name in sys.modules if name.startswith("bncpu.cpu.kernels_")]
print(bncpu.cpu.level, *loaded)
"""


@pytest.mark.parametrize("name", bncpu.cpu.runnable_levels())
def test_the_environment_forces_a_level(name):
    """The level named is the one loaded, and the only one."""
    run = run_python(REPORT, BNCPU_LEVEL=name)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [name, f"bncpu.cpu.kernels_{name}"]


@pytest.mark.parametrize("value", ["", None])
def test_the_highest_runnable_level_is_the_default(value):
    environment = {k: v for k, v in os.environ.items() if k != "BNCPU_LEVEL"}
    if value is not None:
        environment["BNCPU_LEVEL"] = value
    run = subprocess.run(
        [sys.executable, "-c", REPORT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[0] == bncpu.cpu.runnable_levels()[-1]


@pytest.mark.parametrize("value", ["x86_64_v9", "avx2", "X86_64_V2", "kernels"])
def test_an_unknown_level_is_an_import_error(value):
    """It says what was asked for, and what there is."""
    run = run_python("import bncpu", BNCPU_LEVEL=value)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert f"BNCPU_LEVEL={value}" in last
    for name in bncpu.cpu.compiled_levels():
        assert name in last


def test_a_level_of_another_machine_is_an_import_error():
    foreign = "x86_64_v2" if "aarch64" in bncpu.cpu.compiled_levels() else "aarch64"
    run = run_python("import bncpu", BNCPU_LEVEL=foreign)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert f"BNCPU_LEVEL={foreign}" in last
    assert all(name in last for name in bncpu.cpu.runnable_levels())


def test_levels_are_consistent():
    compiled, runnable = bncpu.cpu.compiled_levels(), bncpu.cpu.runnable_levels()
    assert len(runnable) > 0
    assert set(runnable) <= set(compiled)
    assert bncpu.cpu.level in runnable
    if platform.machine().lower() in ("x86_64", "amd64"):
        assert "x86_64_v2" in runnable


def test_use_level_swaps_the_kernels_and_puts_them_back(level):
    assert bncpu.cpu.level == level
    assert bncpu.cpu.kernels is bncpu.cpu.load_level(level)
    assert bncpu.cpu.kernels.__name__ == f"bncpu.cpu.kernels_{level}"
    with pytest.raises(RuntimeError, match="on purpose"), bncpu.cpu.use_level(level):
        raise RuntimeError("on purpose")
    assert bncpu.cpu.level == level


@pytest.mark.parametrize("form", FORMS)
def test_levels_agree(rng, dtype, form):
    """The same sums in other registers: equal to a few roundings, on every level."""
    p = problem(rng, (7, 33, 65), dtype)
    results = []
    for name in bncpu.cpu.runnable_levels():
        with bncpu.cpu.use_level(name):
            results.append(run(FORMS[form], p))
    y, mean, invstd = (results[0][f"train {name}"] for name in ("y", "mean", "invstd"))
    how = {"dtype": dtype, "m": p.x.size // 33}
    size = np.abs(y) + np.abs(p.residual) + np.abs(p.beta).max() + 1.0
    for result in results[1:]:
        assert_same_to_rounding(result["train y"], y, size=size, what="y", **how)
        assert_same_to_rounding(result["train mean"], mean, size=1.0 / invstd, what="mean", **how)
        assert_same_to_rounding(result["train invstd"], invstd, size=invstd, what="invstd", **how)


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_levels_convert_alike(rng, half):
    """float16 and bfloat16 are converted by instructions or by hand: without sums, the same bits.

    With a scale of a power of two and no shift no level rounds but at the end.
    """
    x = rng.integers(0, 2**16, (3, 5, 171), dtype=np.uint16).view(half)
    mean, var, gamma = np.zeros(5), np.ones(5), np.float32([1.0, -0.5, 2.0**-9, 4.0, 1.0])
    results = []
    for name in bncpu.cpu.runnable_levels():
        with bncpu.cpu.use_level(name):
            results.append(bncpu.batch_norm_infer(x, mean, var, gamma, eps=0.0))
    for y in results[1:]:
        assert_same_but_for_nan(y, results[0], "y")
