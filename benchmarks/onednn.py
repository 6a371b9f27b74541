"""The peer oneDNN: onednn_bench.cpp, built on demand, as contenders that take turns with bncpu.

A process for each problem holds oneDNN's arrays and its threads, and runs when its turn comes.
Needs a C++ compiler and oneDNN's headers (Debian: libdnnl-dev).
"""

import functools
import json
import os
import shutil
import subprocess
import weakref
from pathlib import Path

from bncpu import cpu
from bncpu.bench.operations import CACHES_TO_FILL

SOURCE = Path(__file__).with_name("onednn_bench.cpp")
PROGRAM = SOURCE.parent.parent / "build" / "onednn_bench"
FLAGS = ("-std=c++17", "-O2", "-fopenmp")
LAYOUTS = ("nchw", "nhwc", "nChw16c")
DTYPES = ("float32", "bfloat16")
OPERATIONS = ("train", "train_relu", "infer", "infer_relu", "backward", "backward_relu")


class UnavailableError(Exception):
    """There is no oneDNN here, or no compiler; says what to do."""


@functools.cache
def program() -> Path:
    """Return the compiled program, built if it is not there or older than its source."""
    if PROGRAM.exists() and PROGRAM.stat().st_mtime >= SOURCE.stat().st_mtime:
        return PROGRAM
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        raise UnavailableError("no C++ compiler; install g++, or name one with CXX=")
    PROGRAM.parent.mkdir(exist_ok=True)
    command = [compiler, *FLAGS, str(SOURCE), "-ldnnl", "-o", str(PROGRAM)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        missing = "dnnl.hpp" in done.stderr or "-ldnnl" in done.stderr
        remedy = "oneDNN is not installed; Debian: apt-get install libdnnl-dev"
        first = next((line for line in done.stderr.splitlines() if "error" in line), "")
        raise UnavailableError(remedy if missing else f"does not compile: {first}")
    return PROGRAM


def why_not() -> str | None:
    """Return why oneDNN cannot be measured, None if it can."""
    try:
        program()
    except UnavailableError as reason:
        return str(reason)
    return None


class Process:
    """A running program on one shape; `total` is the seconds that oneDNN has run for, in all."""

    total = 0.0

    def __init__(self, shape, dtype, threads):
        # bncpu's arrays of (N, C) and (N, C, L) are images of one row here.
        image = (*shape, *(1,) * (4 - len(shape)))
        rotate = CACHES_TO_FILL * cpu.cache_sizes().l3
        arguments = [",".join(map(str, image)), dtype, threads, rotate]
        self.process = subprocess.Popen(
            [program(), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        self.facts = self._answer()

    def ask(self, operation, layout, seconds):
        """Return the seconds of the runs of one turn."""
        self.process.stdin.write(f"{operation} {layout} {seconds}\n")
        self.process.stdin.flush()
        taken = self._answer()["seconds"]
        Process.total += sum(taken)
        return taken

    def _answer(self):
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": "ended before it answered"}
        if "error" in answer:
            raise RuntimeError(f"onednn_bench: {answer['error']}")
        return answer

    def close(self):
        """End the process."""
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


class Turns:
    """One operation in one layout as a contender."""

    def __init__(self, process, operation, layout):
        self.process, self.operation, self.layout = process, operation, layout

    def turn(self, seconds):
        """Let the process run for so long, and return the seconds of each run."""
        return self.process.ask(self.operation, self.layout, seconds)


# A problem's process, ended with the problem.
_processes: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def contenders(problem, operation, threads, layouts=LAYOUTS):
    """Return "onednn LAYOUT" for each layout; none for what oneDNN does not have.

    Of a channels-last problem, nhwc alone.
    """
    if operation.name not in OPERATIONS or problem.dtype not in DTYPES:
        return {}
    if problem not in _processes:
        process = Process(problem.shape, problem.dtype, threads)
        _processes[problem] = process
        weakref.finalize(problem, process.close)
    process = _processes[problem]
    layouts = ("nhwc",) if problem.last else layouts
    return {f"onednn {layout}": Turns(process, operation.name, layout) for layout in layouts}


def clock():
    """Return the seconds that oneDNN has run for: a clock that stands still between its turns."""
    return Process.total


def version():
    """Return the version of the library."""
    process = Process((1, 1, 1, 1), "float32", 1)
    process.close()
    return process.facts["version"]
