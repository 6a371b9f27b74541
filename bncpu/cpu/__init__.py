"""Chooses one compiled kernels module at import, and reports the choice.

The same kernels.pyx is compiled once per instruction level into kernels_<level>. The highest level
that this machine runs is imported; the environment variable BNCPU_LEVEL forces one. Nothing that is
compiled for a higher level is loaded before the check. BNCPU_POOL_MB says how much memory of large
results is kept for the next ones.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bncpu.cpu.caches import cache_sizes as cache_sizes

try:
    from bncpu.cpu import detect, pool
    from bncpu.cpu import team as team
except ImportError as error:
    raise ImportError(
        f"bncpu: no compiled modules in {Path(__file__).parent}; in a checkout, build them with "
        "`make test` or `pip install --editable .`"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bncpu.cpu import kernels

# Lowest first. A machine runs every level up to its own; other architectures have one.
X86_64_LEVELS = ("x86_64_v2", "x86_64_v3", "x86_64_v4")
OTHER_LEVELS = ("aarch64", "generic")

# Megabytes of large results that are kept for the next ones: two of 100 MB, y and dx in turn.
POOL_MB = 256


def compiled_levels() -> tuple[str, ...]:
    """Return the levels that this installation holds, lowest first."""
    names = {path.name.split(".")[0] for path in Path(__file__).parent.glob("kernels_*.*")}
    return tuple(level for level in X86_64_LEVELS + OTHER_LEVELS if f"kernels_{level}" in names)


def runnable_levels() -> tuple[str, ...]:
    """Return the compiled levels that this processor and operating system run, lowest first."""
    highest = detect.x86_64_level_of(*detect.cpu_words())
    runs = X86_64_LEVELS[: highest - 1] + OTHER_LEVELS
    return tuple(level for level in compiled_levels() if level in runs)


def choose_level(compiled: Sequence[str], runnable: Sequence[str], forced: str | None) -> str:
    """Return the level to load: the forced one, else the highest runnable one.

    Raises
    ------
    ImportError
        If nothing runs here, or the forced level is unknown, not compiled or not runnable.
    """
    there_is = (
        f"compiled: {', '.join(compiled) or 'none'}; runnable here: {', '.join(runnable) or 'none'}"
    )
    if forced:
        if forced not in X86_64_LEVELS + OTHER_LEVELS:
            raise ImportError(f"BNCPU_LEVEL={forced} is not a level ({there_is})")
        if forced not in runnable:
            raise ImportError(f"BNCPU_LEVEL={forced} cannot run here ({there_is})")
        return forced
    if not runnable:
        raise ImportError(f"bncpu: no compiled level runs on this machine ({there_is})")
    return runnable[-1]


def load_level(name: str) -> Any:
    """Return the kernels module of a level, told the cache sizes of this machine."""
    module = importlib.import_module(f"bncpu.cpu.kernels_{name}")
    module.set_cache_sizes(*cache_sizes())
    return module


def pool_limit(megabytes: str | None) -> int:
    """Return the bytes to keep for later results, from a text as BNCPU_POOL_MB has it.

    Raises
    ------
    ImportError
        If it is not a whole number of megabytes.
    """
    if megabytes is None:
        return POOL_MB << 20
    if not (megabytes.isascii() and megabytes.isdecimal()):
        raise ImportError(
            f"BNCPU_POOL_MB={megabytes}: expected megabytes of large results to keep, 0 for none"
        )
    return min(int(megabytes), 1 << 40) << 20


@contextlib.contextmanager
def use_level(name: str) -> Iterator[None]:
    """Compute with the kernels of another runnable level inside a with statement (for tests)."""
    global kernels, level
    before = kernels, level
    kernels, level = load_level(name), name
    try:
        yield
    finally:
        kernels, level = before


level = choose_level(compiled_levels(), runnable_levels(), os.environ.get("BNCPU_LEVEL"))
kernels = load_level(level)
pool.set_limit(pool_limit(os.environ.get("BNCPU_POOL_MB")))
