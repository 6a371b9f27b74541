"""Every instance of the CUDA kernels compiles, and spills no register.

NVRTC is what CuPy compiles with; it needs no GPU. As it will run, every instance is compiled once,
for one of the architectures in turn. Quickly, all are for the oldest, which has the fewest
instructions, and for the newest; all for all would take a minute more and has found nothing else.
"""

import itertools
import os
import re
import sys

import pytest
from cuda_calls import DTYPES, INSTANCES

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
QUICK, AS_RUN = ("--Ofast-compile=max",), ("-ftz=true", "--ptxas-options=-v")
AT_ONCE = 65536  # registers of a multiprocessor of each of them
BLOCK = 256

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="NVRTC, the compiler of GPU code, comes in this form on Linux"
)


def _jobs():
    as_run = dict(zip(INSTANCES, itertools.cycle(ARCHITECTURES), strict=False))
    quick = (ARCHITECTURES[0], ARCHITECTURES[-1])
    return [
        (*given, f"--gpu-architecture=sm_{number}", *(AS_RUN if number == as_run[given] else QUICK))
        for number in ARCHITECTURES
        for given in INSTANCES
        if number in quick or number == as_run[given]
    ]


@pytest.fixture(scope="module")
def compiled():
    """Return (log, bytes, instructions that reach global memory) by options."""
    import nvrtc  # there is none elsewhere than on Linux

    jobs = _jobs()
    return dict(zip(jobs, nvrtc.compile_all(jobs, os.cpu_count() or 1), strict=True))


@pytest.mark.parametrize("number", ARCHITECTURES)
def test_instances_compile(compiled, number):
    of_it = {
        options: result
        for options, result in compiled.items()
        if f"--gpu-architecture=sm_{number}" in options
    }
    assert of_it
    for options, (log, size, _) in of_it.items():
        assert size > 0, f"{' '.join(options)}:\n{log}"


def test_no_register_is_spilled(compiled):
    reports = {options: log for options, (log, *_) in compiled.items() if AS_RUN[-1] in options}
    assert len(reports) == len(INSTANCES)
    for options, log in reports.items():
        names = re.findall(r"Compiling entry function '(\w+)'", log)
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
        assert len(names) == len(spills) == len(registers) == 10, log
        for name, spilled, number in zip(names, spills, registers, strict=True):
            what = f"{name}, {' '.join(options)}"
            assert spilled == ("0", "0"), f"{what}: bytes spilled {spilled}"
            assert number * BLOCK * 2 <= AT_ONCE, f"{what}: no room for two blocks"


def test_a_vector_is_loaded_and_stored_at_once(compiled):
    words = {16: "v4.u32", 8: "v2.u32", 4: "u32", 2: "u16"}
    for options, (_, _, instructions) in compiled.items():
        if AS_RUN[-1] not in options:
            continue
        defined = dict(option[2:].split("=") for option in options if option.startswith("-D"))
        size = DTYPES[defined["BNCPU_STORAGE"]] * int(defined["BNCPU_VECTOR"])
        assert f"ld.global.{words[size]}" in instructions, options
        stores = [name for name in instructions if name.startswith("st.global.wb")]
        assert stores == [f"st.global.wb.{words[size]}"], options
