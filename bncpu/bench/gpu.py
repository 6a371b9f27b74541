"""What the benchmark does in another way on a GPU: the clock, the speed of memory, the machine.

Imports CuPy; imported where arrays of a GPU are measured. A call there returns before it has run,
so the clock is the GPU's own: an event before and after each call. Where calls are shorter than
putting them together takes, that is what the events are apart.
"""

from __future__ import annotations

import time
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import cupy
import numpy as np

if TYPE_CHECKING:
    from bncpu.bench.operations import Arrays, Call, Problem

# Calls that are under way before anybody waits: enough that waiting does not show, and few enough
# for a turn to end in time.
CALLS_AT_ONCE = 16


class Timed:
    """A contender whose calls run on the current GPU and stream.

    Parameters
    ----------
    call : callable
        What is timed.
    """

    def __init__(self, call: Call) -> None:
        self.call = call

    def turn(self, seconds: float) -> list[float]:
        """Call until the time is over; the first call is for warming up, if others follow."""
        taken = self._run(1)
        if seconds <= 0:
            return taken
        taken, end = [], time.perf_counter() + seconds
        while not taken or time.perf_counter() < end:
            taken += self._run(CALLS_AT_ONCE)
        return taken

    def _run(self, calls: int) -> list[float]:
        events = [cupy.cuda.Event() for _ in range(calls + 1)]
        events[0].record()
        for event in events[1:]:
            self.call()
            event.record()
        events[-1].synchronize()
        return [
            cupy.cuda.get_elapsed_time(before, after) / 1e3 for before, after in pairwise(events)
        ]


def copy(problem: Problem) -> Timed:
    """Return the copy from device memory to device memory that everything is measured against."""

    def bind(arrays: Arrays) -> Call:
        x, out = cast("Any", arrays.x), cast("Any", arrays.out)  # CuPy's, which bring no types
        return partial(out.data.copy_from_device_async, x.data, x.nbytes)

    return Timed(problem.rotating([bind(arrays) for arrays in problem.sets]))


def cache_bytes() -> int:
    """Return the size of the L2 cache."""
    return int(_attributes()["L2CacheSize"])


def free_memory() -> int:
    """Return the bytes of device memory that nobody has taken, kept ones included."""
    free, _ = cupy.cuda.runtime.memGetInfo()
    return int(free) + int(cupy.get_default_memory_pool().free_bytes())


def level() -> str:
    """Return the current GPU's architecture, as sm_90."""
    return f"sm_{cupy.cuda.Device().compute_capability}"


def name() -> str:
    """Return the current GPU's name."""
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    return str(properties["name"].decode())


def facts() -> dict[str, object]:
    """Return what the GPU and its software are, by name."""
    runtime = cupy.cuda.runtime
    return {
        "gpu": f"{name()}, {level()}, {_attributes()['MultiProcessorCount']} processors",
        "L2": f"{cache_bytes() >> 20} MB",
        "CUDA": f"runtime {_dotted(runtime.runtimeGetVersion())}, driver "
        f"{_dotted(runtime.driverGetVersion())}",
        "cupy": cupy.__version__,
    }


def normal(random: np.random.Generator, shape: tuple[int, ...], kind: np.dtype[Any]) -> Any:
    """Return normal numbers of a dtype, a million of them again and again, on the GPU."""
    sample = random.standard_normal(1 << 20, np.float32).astype(kind)
    if kind.itemsize > 2:
        return cupy.resize(cupy.asarray(sample), shape)
    # CuPy has not all of its functions for bfloat16.
    return cupy.resize(cupy.asarray(sample.view(np.uint16)), shape).view(kind)


def _attributes() -> dict[str, int]:
    attributes: dict[str, int] = cupy.cuda.Device().attributes
    return attributes


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
