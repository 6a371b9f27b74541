"""Compiles the kernels with NVRTC, which needs neither driver nor GPU; run as a program.

Its compilations do not run side by side in one process. A program reads from standard input, as
JSON, a list of option lists, and writes of each the log, the bytes of what was built, and which
instructions that reach global memory the PTX has.
"""

import ctypes
import json
import re
import subprocess
import sys
from pathlib import Path

import nvidia.cu13

LIBRARIES = Path(next(iter(nvidia.cu13.__path__))) / "lib"
KERNELS = Path(__file__).parents[1] / "bncpu" / "cuda" / "kernels.cu"


def compile_all(many_options, processes):
    """Return (log, bytes, instructions) for each list; no bytes where it does not compile."""
    shares = [many_options[i::processes] for i in range(processes)]
    workers = [
        subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in shares
    ]
    for worker, share in zip(workers, shares, strict=True):
        worker.stdin.write(json.dumps(share))
        worker.stdin.close()
    results = [None] * len(many_options)
    for i, worker in enumerate(workers):
        with worker:
            results[i::processes] = json.loads(worker.stdout.read())
    return results


def _compile(library, source, options):
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    create = library.nvrtcCreateProgram
    create.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int]
    create.argtypes += [ctypes.c_void_p, ctypes.c_void_p]
    assert create(ctypes.byref(program), source, b"kernels.cu", 0, None, None) == 0
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    failed = library.nvrtcCompileProgram(program, len(options), given)
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    instructions = []
    size.value = 0
    if not failed:
        library.nvrtcGetPTXSize(program, ctypes.byref(size))
        ptx = ctypes.create_string_buffer(size.value)
        library.nvrtcGetPTX(program, ptx)
        instructions = sorted(set(re.findall(r"\b(?:ld|st)\.global[\w.]*", ptx.value.decode())))
        library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return log.value.decode(), size.value, instructions


def _main():
    # The second library is looked for by name only, unless it is there already.
    ctypes.CDLL(str(next(LIBRARIES.glob("libnvrtc-builtins.so.[0-9]*"))))
    library = ctypes.CDLL(str(next(LIBRARIES.glob("libnvrtc.so.[0-9]*"))))
    source = KERNELS.read_bytes()
    json.dump([_compile(library, source, given) for given in json.load(sys.stdin)], sys.stdout)


if __name__ == "__main__":
    _main()
