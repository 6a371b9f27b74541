"""tools/instructions.py finds what may not be there, and the compiled modules have none of it."""

import importlib.util
import io
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import bncpu.cpu

TOOL = Path(__file__).resolve().parent.parent / "tools" / "instructions.py"
MODULES = Path(bncpu.cpu.__file__).parent

if not TOOL.exists():
    pytest.skip("tools/ is not here", allow_module_level=True)


@pytest.fixture(scope="module")
def instructions():
    spec = importlib.util.spec_from_file_location("instructions", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def elf(code, machine):
    """Return a little ELF object of nothing but this code."""
    names = b"\0.text\0.names\0"
    body = code + names
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\2\1\1" + bytes(9), 3, machine, 1, 0, 0, 64 + len(body), 0, 64, 0, 0, 64, 3, 2,
    )  # fmt: skip

    def section(name, kind, flags, offset, size):
        return struct.pack("<IIQQQQIIQQ", name, kind, flags, 0, offset, size, 0, 0, 1, 0)

    text = section(1, 1, 6, 64, len(code))
    strings = section(7, 3, 0, 64 + len(code), len(names))
    return header + body + bytes(64) + text + strings


X86_64, AARCH64 = 62, 183
ADDPS = bytes.fromhex("0f58c1")
VADDPS_YMM = bytes.fromhex("c5f458c2")
VADDPS_ZMM = bytes.fromhex("62f1744858c2")
VPMULLQ_XMM = bytes.fromhex("62f2f50840c2")
TZCNT = bytes.fromhex("f30fbcc1")
XGETBV = bytes.fromhex("0f01d0")
BAD = bytes.fromhex("06")  # pushed a segment once; no instruction in 64-bit code
FADD_NEON = bytes.fromhex("00d4214e")
PTRUE_SVE = bytes.fromhex("e0e31825")
ADD_SVE = bytes.fromhex("2000a004")
CASAL_LSE = bytes.fromhex("20fce088")
LDADD_LSE = bytes.fromhex("200020b8")


@pytest.mark.parametrize(
    ("name", "code", "fault"),
    [
        ("detect.so", ADDPS, None),
        ("detect.so", VADDPS_YMM, "AVX"),
        ("detect.so", XGETBV, None),
        ("pool.so", XGETBV, "XSAVE"),
        ("pool.so", TZCNT, "BMI1"),
        ("libgomp-0123.so.1", VADDPS_YMM, "AVX"),
        ("kernels_x86_64_v2.so", VADDPS_YMM, "AVX"),
        ("kernels_x86_64_v3.so", VADDPS_YMM, None),
        ("kernels_x86_64_v3.so", VADDPS_ZMM, "AVX512F"),
        ("kernels_x86_64_v4.so", VADDPS_ZMM + VPMULLQ_XMM + TZCNT, None),
        ("kernels_x86_64_v4.so", ADDPS + BAD, "(bad)"),
    ],
)
def test_x86_64(instructions, name, code, fault):
    pytest.importorskip("iced_x86")
    _, faults = instructions.judge(name, instructions.read_object(elf(code, X86_64)))
    assert len(faults) == (fault is not None)
    assert fault is None or f"of {fault}, the first: 0x" in faults[0]


@pytest.mark.parametrize(
    ("name", "code", "fault"),
    [
        ("kernels_aarch64.so", FADD_NEON, None),
        ("kernels_aarch64.so", PTRUE_SVE, "sve"),
        ("kernels_aarch64.so", ADD_SVE, "sve"),
        ("kernels_aarch64.so", CASAL_LSE + LDADD_LSE, None),  # outline atomics
        ("detect.so", CASAL_LSE, "lse"),
        ("detect.so", LDADD_LSE, "lse"),
        ("detect.so", b"\xff\xff\xff\xff", "(bad)"),
    ],
)
def test_aarch64(instructions, name, code, fault):
    _, faults = instructions.judge(name, instructions.read_object(elf(code, AARCH64)))
    assert bool(faults) == (fault is not None)
    assert fault is None or any(fault in text for text in faults)


def test_the_compiled_modules(instructions):
    """Those of this installation hold what they may."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the modules are no ELF objects")
    out = io.StringIO()
    assert instructions.check(MODULES, out) == []
    assert out.getvalue().count("\n") == len(bncpu.cpu.compiled_levels()) + 3


def test_a_planted_object(instructions, tmp_path, capsys):
    """A wheel whose detector was compiled for AVX2 is refused, by name and instruction."""
    compiler = shutil.which("c++")
    if (
        compiler is None
        or not sys.platform.startswith("linux")
        or "x86_64" not in str(bncpu.cpu.compiled_levels())
    ):
        pytest.skip("needs a C++ compiler for x86-64 Linux")
    source, module = tmp_path / "planted.cpp", tmp_path / "planted.so"
    source.write_text("void f(float* x) { for (int i = 0; i < 64; ++i) x[i] += 1; }")
    flags = ("-O3", "-mavx2", "-shared", "-fPIC")
    subprocess.run([compiler, *flags, "-o", module, source], check=True, timeout=60)
    wheel = tmp_path / "planted.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(module, "bncpu/cpu/detect.cpython-311-x86_64-linux-gnu.so")
    assert instructions.main([str(wheel)]) == 1
    assert "not allowed: bncpu/cpu/detect.cpython-311" in capsys.readouterr().err


def test_nothing_to_read_is_a_fault(instructions, tmp_path):
    assert "found none" in instructions.check(tmp_path, io.StringIO())[0]
    with pytest.raises(ValueError, match="with instructions"):
        instructions.read_object(elf(b"", X86_64))
    with pytest.raises(ValueError, match="EM_X86_64"):
        instructions.read_object(elf(ADDPS, 8))
