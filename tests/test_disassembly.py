"""What the compiler made of the hot loops: whole vectors, and nothing done one value at a time.

benchmarks/hot_loops.py finds the loops; what must stand in them is said here.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bncpu.cpu

LEVELS = [level for level in bncpu.cpu.compiled_levels() if level.startswith("x86_64")]

# Loops that go once round for a run of some thousand values at most, or for a channel of it, have
# so many loops inside them, and sums in double beside.
OUTER = {"row_moments": 2, "row_gradients": 2, "column_moments": 3, "column_gradients": 3}
# Arithmetic that the shortest main loop has: two sums of four vectors, or one result.
LEAST = dict.fromkeys(OUTER, 8) | {"map_item_rows": 1}


@pytest.fixture
def hot_loops(benchmark_script):
    return benchmark_script("hot_loops")


def faults_of(hot_loops, function, level):
    """Return what is wrong with the loops of a function, in words."""
    register = hot_loops.REGISTERS[level]
    storage, loops = function.storage, function.loops
    results = function.name == "map_item_rows" or "beside" in function.form

    # careful_*, in double, is slow on purpose.
    loops = [loop for loop in loops if not loop.having(r"call.*careful_")]
    working = [loop for loop in loops if loop.packed(register) and loop.loads(register)]
    most = max((len(loop.packed(register)) for loop in working), default=0)
    if most < LEAST[function.name]:
        yield f"no main loop on whole vectors ({register}), at most {most} operations"

    for loop in loops:
        outer = loop.height >= OUTER.get(function.name, 99)
        for line in loop.having(hot_loops.SCALAR):
            # Whole vectors of sums become double where a run ends, beside results or not.
            flush = outer and re.match(r"v?cvtps2pd\b", line)
            if not outer or re.match(r"v?\w+ss\b", line) or (loop.having("v?movnt") and not flush):
                yield f"in the loop at {loop.address:x}: {line}"
        if loop in working and loop.height == 1:
            for line in loop.having(hot_loops.ARITHMETIC):
                if f"%{register}" not in line:
                    yield f"in the loop at {loop.address:x}, not a whole vector: {line}"

    def somewhere(pattern):
        return any(loop.having(pattern) for loop in working)

    only_scaled = function.name == "map_item_rows" and "fixed" in function.form
    only_scaled = only_scaled and "sign" not in function.form
    fuses = level != "x86_64_v2" and not only_scaled
    if fuses and not somewhere(rf"vfn?m(?:add|sub)\w+\s.*%{register}"):
        yield "no fused multiply-add"
    if results and not any(loop.streams(register, storage) for loop in working):
        yield "no whole vector stored past the caches"
    if storage == "BFloat16" and not somewhere(rf"v?pslld\s.*%{register}"):
        yield "no packed shift"
    if storage == "Half":
        yield from half_faults(loops, somewhere, register, results)


def half_faults(loops, somewhere, register, results):
    if register == "xmm":
        for pattern in (r"pslld\s", r"pcmp(?:eq|gt)d\s", *([r"psrld\s"] if results else [])):
            if not somewhere(pattern):
                yield f"no packed integer arithmetic ({pattern[:-2]})"
        return
    for pattern in ("vcvtph2ps", *(["vcvtps2ph"] if results else [])):
        if not somewhere(rf"{pattern}\s.*%{register}"):
            yield f"no {pattern}"
    for loop in loops:
        for line in loop.having("vcvtp[hs]2p[hs]"):
            if f"%{register}" not in line:
                yield f"in the loop at {loop.address:x}, not a whole vector: {line}"


@pytest.mark.parametrize("level", LEVELS)
def test_hot_loops_are_vector_loops(hot_loops, level):
    if reason := hot_loops.why_not(level):
        pytest.skip(reason)
    functions = hot_loops.functions_of(hot_loops.module_of(level))
    if not functions and not (Path(bncpu.cpu.__file__).parents[2] / "CMakeLists.txt").is_file():
        pytest.skip("the modules are stripped, as wheels have them")
    assert functions, "a module built in place has no symbols: [tool.scikit-build] strips it"
    names = {(f.name, f.storage) for f in functions}
    assert names == {(n, s) for n in LEAST for s in ("double", "float", "Half", "BFloat16")}
    faults = [f"{f}: {fault}" for f in functions for fault in faults_of(hot_loops, f, level)]
    assert not faults, "\n".join([f"{len(faults)} faults at {level}:", *faults])


# A loop as row_moments has it, of four vectors at a time, with one thing or another wrong.
LOOP = """
namespace bncpu { namespace {
typedef float V __attribute__((vector_size(BYTES)));
typedef double W __attribute__((vector_size(BYTES)));
template <class S> __attribute__((noinline)) V row_moments(const V* x, const S* y, long n) {
    V s[4] = {}, q[4] = {};
    float t = 0;
    for (long i = 0; i < n; i += 4) {
        for (int j = 0; j < 4; ++j) {
            const V d = x[i + j] - s[3];
            BODY
        }
    }
    return s[0] + s[1] + s[2] + s[3] + q[0] + q[1] + q[2] + q[3] + t;
}
} }
extern "C" void use(float* x, long n) {
    *(bncpu::V*)x = bncpu::row_moments<float>((const bncpu::V*)x, x, n);
}
"""
GOOD = "s[j] += d; q[j] += d * d;"
V3 = ("-march=x86-64-v3", "-ffp-contract=fast")


@pytest.mark.parametrize(
    ("level", "bytes_", "body", "flags", "fault"),
    [
        ("x86_64_v3", 32, GOOD, V3, None),
        ("x86_64_v2", 16, GOOD, ("-march=x86-64-v2",), None),
        ("x86_64_v4", 64, GOOD, ("-march=x86-64-v4", "-ffp-contract=fast"), None),
        ("x86_64_v3", 16, GOOD, V3, "no main loop on whole vectors (ymm), at most 0"),
        ("x86_64_v4", 32, GOOD, V3, "no main loop on whole vectors (zmm), at most 0"),
        ("x86_64_v3", 32, GOOD, ("-march=x86-64-v3", "-ffp-contract=off"), "no fused multiply-add"),
        ("x86_64_v2", 16, "t += y[i + j];", ("-march=x86-64-v2",), "addss"),
        ("x86_64_v3", 32, f"{GOOD} t += y[i + j];", V3, "vaddss"),
        ("x86_64_v3", 32, f"{GOOD} t += (double)y[i] * y[j];", V3, "vcvtss2sd"),
        (
            "x86_64_v3",
            32,
            f"{GOOD} typedef float H __attribute__((vector_size(BYTES / 2))); H h;"
            "__builtin_memcpy(&h, y + i, sizeof h);"
            "W w = __builtin_convertvector(h, W); t += w[0] > w[1];",
            V3,
            "vcvtps2pd",
        ),
    ],
)
def test_the_checker_sees(hot_loops, tmp_path, level, bytes_, body, flags, fault):
    """A good loop has no fault, and every other one has the fault that was put in."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or platform.machine() != "x86_64" or sys.platform != "linux":
        pytest.skip("needs a C++ compiler for x86-64 Linux")
    if shutil.which("objdump") is None:
        pytest.skip("there is no objdump (binutils)")
    source, module = tmp_path / "loop.cpp", tmp_path / "loop.so"
    source.write_text(LOOP.replace("BODY", body).replace("BYTES", str(bytes_)))
    options = ("-O3", "-fno-tree-vectorize", "-Wno-psabi", "-shared", "-fPIC", *flags)
    subprocess.run([compiler, *options, "-o", module, source], check=True, timeout=60)
    (function,) = hot_loops.functions_of(module)
    assert str(function) == "row_moments float"
    faults = list(faults_of(hot_loops, function, level))
    if fault is None:
        assert faults == []
    else:
        assert any(fault in found for found in faults), faults
