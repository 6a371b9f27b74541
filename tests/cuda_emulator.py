"""The CUDA kernels on the processor: compiled by the C++ compiler, launched on host memory.

A module is compiled for its options once a session, into a directory that goes with the session.
"""

import ctypes
import functools
import mmap
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bncpu
from bncpu.cuda.plan import PARAMETERS

HERE = Path(__file__).with_name("emulated_cuda")
KERNELS = Path(bncpu.__file__).parent / "cuda" / "kernels.cu"
# What changes the numbers must be as on the device: products are fused where the kernels say so.
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-fPIC", "-shared")


class Module:
    """The kernels for one set of options."""

    def __init__(self, library):
        self._library = ctypes.CDLL(str(library))
        self._emulate = self._library.emulate
        self._emulate.restype = ctypes.c_char_p
        self._emulate.argtypes = [
            ctypes.c_char_p,
            ctypes.c_void_p,
            ctypes.c_uint,
            ctypes.c_uint,
            ctypes.c_size_t,
            ctypes.c_uint,
            ctypes.c_void_p,
        ]
        self._library.stack_bytes.restype = ctypes.c_size_t
        self._stacks = _stacks(self._library.stack_bytes())

    def launch(self, entry, grid, block, shared, parameters, seed=0):
        """Run an entry point; the parameters are an array of one element of PARAMETERS.

        A seed other than 0 chooses another order of threads, warps and blocks.

        Raises
        ------
        RuntimeError
            If threads part at a barrier, memory is touched past an end, or a vector not aligned.
        """
        assert parameters.dtype == PARAMETERS
        assert parameters.size == 1
        fault = self._emulate(
            entry.encode(),
            parameters.ctypes.data,
            int(grid),
            int(block),
            int(shared),
            int(seed),
            ctypes.addressof(self._stacks),
        )
        if fault is not None:
            raise RuntimeError(f"{entry}: {fault.decode()}")

    def layout(self):
        """Return the offsets and sizes of the parameters' C structures, as host.cpp lists them."""
        self._library.layout.restype = ctypes.POINTER(ctypes.c_long)
        offsets = self._library.layout()
        numbers = []
        while offsets[len(numbers)] >= 0:
            numbers.append(offsets[len(numbers)])
        return numbers


@functools.cache
def _stacks(size):
    """Return memory for the stacks of a launch; one is enough, since one launch runs at a time."""
    return (ctypes.c_char * size).from_buffer(mmap.mmap(-1, size))


_directory = None
_modules = {}
_locks = {}
_guard = threading.Lock()


def load(options, source=KERNELS):
    """Return the module for options as `bncpu.cuda.plan.options` gives them."""
    global _directory
    key = (tuple(options), str(source))
    with _guard:
        if _directory is None:
            _directory = tempfile.TemporaryDirectory(prefix="bncpu-emulator-")
        number = len(_locks)
        lock = _locks.setdefault(key, threading.Lock())
    with lock:
        if key not in _modules:
            library = Path(_directory.name) / f"kernels{number}.so"
            _compile(options, source, library)
            _modules[key] = Module(library)
        return _modules[key]


def load_all(many_options):
    """Compile modules side by side, so that later loads find them."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(load, many_options))


def _compile(options, source, library):
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or "g++"]
    defined = [option for option in options if option.startswith("-D")]
    command = [*compiler, *FLAGS, *defined, f'-DBNCPU_KERNELS="{source}"', "-x", "c++"]
    done = subprocess.run(
        [*command, HERE / "host.cpp", "-o", library], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the emulator does not compile:\n{done.stderr}")
