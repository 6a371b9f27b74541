"""What the compiler made of the hot loops: a table of their vector and scalar instructions.

Run it: ``python benchmarks/hot_loops.py [LEVEL ...] [--only TEXT]``. It needs binutils' objdump and
x86-64 modules with their symbols, as an editable install builds them. What must be in the loops is
not said here: tests/test_disassembly.py judges what this file reads.
"""

import argparse
import re
import shutil
import subprocess
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import bncpu.cpu

REGISTERS = {"x86_64_v2": "xmm", "x86_64_v3": "ymm", "x86_64_v4": "zmm"}
HALF = {"zmm": "ymm", "ymm": "xmm", "xmm": "xmm"}  # hold as many 16-bit values

# The functions marked BNCPU_HOT, and lambdas within them that the compiler did not inline.
SYMBOL = re.compile(
    r"_ZZ?N5bncpu12_GLOBAL__N_1\d+"
    r"(?P<name>row_moments|row_gradients|column_moments|column_gradients|map_item_rows)I"
    r"(?:Lb\dE)?(?:NS0_\d+(?:Forward|Backward)RowI(?:Lb\dE)+)?(?:LNS0_4GateE\dE)?"
    r"(?P<storage>d|f|NS0_4HalfE|NS0_8BFloat16E)"
)
STORAGE = {"d": "double", "f": "float", "NS0_4HalfE": "Half", "NS0_8BFloat16E": "BFloat16"}
FORMS = {
    "forward": r"map_item_rowsILb\dENS0_\d+Forward",
    "backward": r"map_item_rowsILb\dENS0_\d+Backward",
    "sign": r"GateE1E",
    "bits": r"GateE2E",
    "residual": r"Forward(?:Row)?ILb1E",
    "mask": r"Forward(?:Row)?ILb\dELb1E",
    "fixed": r"Backward(?:Row)?ILb1E",
    "columns": r"map_item_rows\w*ColumnsOf",
    "four": r"map_item_rowsILb1E",  # rows at a time
    "beside": r"MapBeside",  # the sums with the results of the tile before beside them
}

JUMP = re.compile(r"(?:bnd )?j\w+\s+([0-9a-f]+) ")
ENDS = re.compile(r"(?:bnd |notrack |repz )?(jmp|ret|ud2)")
ARITHMETIC = re.compile(r"v?(?:add|sub|mul|div|sqrt|min|max|fn?m(?:add|sub)\d*)p[sd]\b")
# Of one number at a time, or between float and double.
SCALAR = re.compile(
    r"v?(?:(?:add|sub|mul|div|sqrt|min|max|fn?m(?:add|sub)\d*)s[sd]\b"
    r"|cvt(?:t?s[sd]2|u?si2|ps2pd|pd2ps)|u?comis[sd])"
)


@dataclass
class Loop:
    """A loop without the loops inside it."""

    address: int
    body: list[str]  # instructions as objdump writes them
    height: int  # how many loops stand within one another, this one the outermost
    blocks: set[int]  # where its blocks begin, those of the loops inside it too

    def having(self, pattern):
        return [line for line in self.body if re.match(pattern, line)]

    def packed(self, register):
        """Return the arithmetic on whole vectors."""
        return [line for line in self.having(ARITHMETIC) if f"%{register}" in line]

    def loads(self, register):
        """Return what reads vectors, or their 16-bit values, from elsewhere than the stack."""
        return self.having(rf"\S+\s+[^,(%]*\((?!%rsp)\S*%(?:{register}|{HALF[register]})")

    def streams(self, register, storage):
        """Return the stores of whole vectors, narrowed if need be, past the caches."""
        if storage in ("Half", "BFloat16"):
            register = {"zmm": "ymm", "ymm": "xmm", "xmm": "r"}[register]
        return self.having(rf"v?movnt\w+\s+%{register}")


@dataclass
class Function:
    """One instance of a hot function."""

    symbol: str
    name: str
    storage: str
    form: tuple[str, ...]
    loops: list[Loop] = field(default_factory=list)

    def __str__(self):
        return " ".join((self.name, self.storage, *self.form))

    def main_loop(self, register):
        innermost = (loop for loop in self.loops if loop.height == 1)
        return max(innermost, key=lambda loop: len(loop.packed(register)), default=None)


def module_of(level):
    """Return the file of a compiled level."""
    return next(Path(bncpu.cpu.__file__).parent.glob(f"kernels_{level}.*"))


def why_not(level):
    """Return why the loops of a compiled level cannot be looked at, or None."""
    if level not in REGISTERS:
        return f"{level} is not x86-64"
    if module_of(level).suffix != ".so":
        return f"{module_of(level).name} is not an ELF file"
    if shutil.which("objdump") is None:
        return "there is no objdump (binutils)"
    if b"clang version" in module_of(level).read_bytes():
        return f"{module_of(level).name} is Clang's, which lays out loops in other ways than GCC"
    return None


def functions_of(path):
    """Return the hot functions of a compiled module with their loops; none without symbols."""
    text = subprocess.run(
        ["objdump", "--disassemble", "--no-show-raw-insn", "-M", "att", str(path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = []
    for part in text.split("\n\n"):
        head, _, lines = part.lstrip("\n").partition("\n")
        symbol = re.split(r"[.>]", head.partition("<")[2])[0]  # without what clones add
        if match := SYMBOL.match(symbol):
            split = (line.partition(":\t") for line in lines.splitlines())
            code = [(int(at, 16), line.split("#")[0].strip()) for at, tab, line in split if tab]
            found.append((match, loops_of(code)))
    functions = {}
    for match, loops in sorted(found, key=lambda pair: pair[0].string.startswith("_ZZ")):
        symbol = match.string
        if symbol.startswith("_ZZ"):  # a lambda's loops are those of the function around it
            symbol = next((s for s in functions if symbol[3:].startswith(s[2:])), symbol)
        form = tuple(word for word, pattern in FORMS.items() if re.search(pattern, symbol))
        new = Function(symbol, match["name"], STORAGE[match["storage"]], form)
        functions.setdefault(symbol, new).loops.extend(loops)
    return sorted(functions.values(), key=str)


def loops_of(code):
    """Return the loops in a function's instructions [(address, text), ...]."""
    jumps = {address: int(jump[1], 16) for address, line in code if (jump := JUMP.match(line))}
    heads = {code[0][0], *jumps.values()}
    heads |= {code[i + 1][0] for i, (address, _) in enumerate(code[:-1]) if address in jumps}
    blocks, after, block = {}, defaultdict(set), None
    for address, line in code:
        if address in heads:
            if block is not None:
                after[block].add(address)
            block = address
            blocks[block] = []
        if block is not None:
            blocks[block].append(line)
            if address in jumps:
                after[block].add(jumps[address])
        if ENDS.match(line):
            block = None
    before = defaultdict(set)
    for block, following in list(after.items()):
        following &= blocks.keys()
        for other in following:
            before[other].add(block)
    return nested(blocks, after, before, set(blocks))


def nested(blocks, after, before, among):
    """Return the loops of some blocks: those that lead back to themselves, and those within."""
    loops, left = [], set(among)
    for start in sorted(b for a in among for b in after[a] if b <= a):  # every loop jumps back
        if start not in left:
            continue
        cycle = reached(after, start, left) & reached(before, start, left)
        if not cycle:
            continue
        left -= cycle
        entry = min((b for b in cycle if not before[b] <= cycle), default=start)
        inner = nested(blocks, after, before, cycle - {entry})
        own = cycle.difference(*(loop.blocks for loop in inner))
        height = 1 + max((loop.height for loop in inner), default=0)
        body = [line for block in sorted(own) for line in blocks[block]]
        loops += [Loop(entry, body, height, cycle), *inner]
    return loops


def reached(following, start, among):
    """Return the blocks that one comes to from `start`, itself only if there is a way back."""
    seen, new = set(), {start}
    while new:
        new = set().union(*(following[block] for block in new)) & among - seen
        seen |= new
    return seen


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("levels", nargs="*", metavar="LEVEL", default=bncpu.cpu.compiled_levels())
    parser.add_argument("--only", default="", metavar="TEXT", help='such as "row_moments float"')
    options = parser.parse_args(arguments)
    print("Each function's main loop: the innermost one with the most arithmetic on whole vectors.")
    row = "{:<10} {:<44} {:>5} {:>8} {:>5} {:>6} {:>6} {:>4} {:>5} {:>7}"
    counted = ("packed", "scalar", "fma", "loads", "streams")
    print(row.format("level", "function", "loops", "address", "width", *counted))
    for level in options.levels:
        if reason := why_not(level):
            print(f"{level:<10} {reason}")
            continue
        register = REGISTERS[level]
        for function in functions_of(module_of(level)):
            if options.only not in str(function):
                continue
            loop = function.main_loop(register)
            packed = loop.packed(register)
            fused = [line for line in packed if re.match(r"vfn?m", line)]
            counts = (len(packed), len(loop.having(SCALAR)), len(fused))
            counts += (len(loop.loads(register)), len(loop.streams(register, function.storage)))
            where = (len(function.loops), f"{loop.address:x}", register)
            print(row.format(level, str(function), *where, *counts))


if __name__ == "__main__":
    main()
