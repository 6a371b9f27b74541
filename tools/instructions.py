"""Which instructions the compiled modules of a wheel hold, and whether each may be there.

Every object is disassembled, whole. A kernels module may use the instructions of its level; all
others, the bundled runtime too, those of the oldest processor that its architecture has. What is
not an instruction is a fault as well: nothing passes because it could not be read. ELF alone
(Linux); what other systems link is not looked at here.

Run it: ``python tools/instructions.py dist/*.whl`` (or folders, or single objects).
"""

import argparse
import io
import re
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from elftools.elf.constants import SH_FLAGS
from elftools.elf.elffile import ELFFile

# The names are iced's, one for each bit of CPUID, and Capstone's, one for each extension of ARM.
# ENDBR64, the multi-byte NOP and PAUSE do nothing on a processor that does not know them.
X86_64 = {
    "INTEL8086", "INTEL186", "INTEL286", "INTEL386", "INTEL486", "CPUID", "CMOV", "FPU", "FPU287",
    "FPU387", "MMX", "SSE", "SSE2", "FXSR", "CX8", "TSC", "SYSCALL", "X64", "CET_IBT",
    "MULTIBYTENOP", "PAUSE",
}  # fmt: skip
X86_64_V2 = X86_64 | {"SSE3", "SSSE3", "SSE4_1", "SSE4_2", "POPCNT", "CMPXCHG16B"}
X86_64_V3 = X86_64_V2 | {"AVX", "AVX2", "FMA", "F16C", "BMI1", "BMI2", "LZCNT", "MOVBE"}
X86_64_V4 = X86_64_V3 | {"AVX512F", "AVX512BW", "AVX512CD", "AVX512DQ", "AVX512VL"}
AARCH64 = {"neon", "fparmv8"}

LEVELS = {
    "x86_64_v2": X86_64_V2,
    "x86_64_v3": X86_64_V3,
    "x86_64_v4": X86_64_V4,
    "aarch64": AARCH64,
}
# Capstone has no groups for these; the architecture's own table of encodings (mask, value) has.
AARCH64_ENCODINGS = {
    "sve": [(0x1E000000, 0x04000000)],
    "sme": [(0x9E000000, 0x80000000)],
    "lse": [(0x3B200C00, 0x38200000), (0x3FA07C00, 0x08A07C00), (0xBFA07C00, 0x08207C00)],
}

BASELINES = {"EM_X86_64": X86_64, "EM_AARCH64": AARCH64}

# Beyond the baseline, and why it may be there all the same.
EXCEPTIONS = {
    ("detect", "XSAVE"): "XGETBV, where CPUID says that it may be executed",
    ("kernels_aarch64", "lse"): "outline atomics, where the system says that there are such",
    ("libgomp", "lse"): "outline atomics, where the system says that there are such",
}

BAD = "(bad)"  # bytes that are no instruction


class Found(NamedTuple):
    """The instructions of one object: how many need each extension, and where the first one is."""

    machine: str
    instructions: int
    needs: Counter[str]
    first: dict[str, str]


def x86_64_code(code, address):
    """Yield (address, text, extensions) for every instruction of x86-64 code."""
    import iced_x86  # there is none for other machines

    names = {
        number: name
        for name, number in vars(iced_x86.CpuidFeature).items()
        if isinstance(number, int)
    }
    for instruction in iced_x86.Decoder(64, code, ip=address):
        if instruction.is_invalid:
            yield instruction.ip, BAD, (BAD,)
        else:
            needs = [names[feature] for feature in instruction.cpuid_features()]
            yield instruction.ip, instruction, needs


def aarch64_code(code, address):
    """Yield (address, text, extensions) for every instruction of AArch64 code."""
    import capstone

    reader = capstone.Cs(capstone.CS_ARCH_ARM64, capstone.CS_MODE_LITTLE_ENDIAN)
    reader.detail = True
    reader.skipdata = True
    # Groups below 128 say what an instruction does, such as "jump".
    for instruction in reader.disasm(bytes(code), address):
        text = f"{instruction.mnemonic} {instruction.op_str}"
        if instruction.id == 0:
            yield instruction.address, BAD, (BAD,)
        else:
            groups = {reader.group_name(g) for g in instruction.groups if g >= 128}
            word = int.from_bytes(instruction.bytes, "little")
            for name, encodings in AARCH64_ENCODINGS.items():
                if any(word & mask == value for mask, value in encodings):
                    groups.add(name)
            yield instruction.address, text, groups


READERS = {"EM_X86_64": x86_64_code, "EM_AARCH64": aarch64_code}


def read_object(data):
    """Return what is Found in the bytes of an ELF object."""
    elf = ELFFile(io.BytesIO(data))
    machine = elf["e_machine"]
    if machine not in READERS:
        raise ValueError(f"machine: expected one of {', '.join(READERS)}; got {machine}")
    found = Found(machine, 0, Counter(), {})
    count = 0
    for section in elf.iter_sections():
        if not section["sh_flags"] & SH_FLAGS.SHF_EXECINSTR:
            continue
        for address, text, needs in READERS[machine](section.data(), section["sh_addr"]):
            count += 1
            for name in needs:
                found.needs[name] += 1
                found.first.setdefault(name, f"{address:#x} {text}")
    if count == 0:
        raise ValueError("code: expected an object with instructions; got none")
    return found._replace(instructions=count)


def allowed_in(stem, machine):
    """Return the extensions that an object may use, by its name and machine."""
    for level, names in LEVELS.items():
        if stem == f"kernels_{level}":
            return names
    return BASELINES[machine]


def judge(name, found):
    """Return (uses, faults): what is beyond the baseline of the machine, and what may not be."""
    stem = re.split(r"[.-]", Path(name).name)[0]
    allowed = allowed_in(stem, found.machine)
    uses, faults = [], []
    for need, count in sorted(found.needs.items()):
        if need in BASELINES[found.machine]:
            continue
        uses.append(f"{need} {count}")
        if need not in allowed and (stem, need) not in EXCEPTIONS:
            faults.append(f"{name}: {count} instructions of {need}, the first: {found.first[need]}")
    return uses, faults


def objects_in(path):
    """Yield (name, bytes) of the shared objects of a wheel or folder, or of the object itself."""
    if path.is_dir():
        for file in sorted(path.rglob("*.so*")):
            yield file.name, file.read_bytes()
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as wheel:
            for name in sorted(wheel.namelist()):
                if re.search(r"\.so(\.\d+)*$", name):
                    yield name, wheel.read(name)
    else:
        yield path.name, path.read_bytes()


def check(path, out=sys.stdout):
    """Print a line for each object in a wheel, folder or file, and return the faults."""
    faults, count = [], 0
    for name, data in objects_in(path):
        count += 1
        found = read_object(data)
        uses, faulty = judge(name, found)
        faults += faulty
        print(
            f"{name}: {found.instructions} instructions; "
            f"beyond the baseline: {', '.join(uses) or 'none'}",
            file=out,
        )
    if count == 0:
        faults.append(f"{path}: expected compiled modules (.so); found none")
    return faults


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0],
        epilog="Exits with 1 if an instruction stands where it may not.",
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="WHEEL", help="wheel, folder or .so")
    options = parser.parse_args(arguments)
    faults = [fault for path in options.paths for fault in check(path)]
    for fault in faults:
        print(f"not allowed: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
