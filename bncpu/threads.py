"""How many threads a call uses, and show_config.

The most specific wish wins: num_threads= of a call, then set_num_threads, then OpenMP's own number
(OMP_NUM_THREADS, or a limit that threadpoolctl sets in the thread that calls). In a forked child it
is one, whatever is wished: bncpu.cpu.team says why, and one thread needs no others.
"""

from __future__ import annotations

import operator
import platform
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, SupportsIndex

import numpy as np

from bncpu import cpu
from bncpu.backends import gpus
from bncpu.cpu.team import forked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# OpenMP ends the process if it cannot start the threads it was asked for; no machine has these many
# cores to itself.
MAX_THREADS = 1024


class _Wish(NamedTuple):
    threads: int
    openmp: int  # OpenMP's number when the wish was made


_wish: _Wish | None = None


def set_num_threads(n: SupportsIndex | None) -> None:
    """Set the number of threads of every later call that does not say num_threads=.

    Parameters
    ----------
    n : int or None
        From 1 to 1024. None returns to OpenMP's own number.

    Raises
    ------
    TypeError
        If n is not an integer.
    ValueError
        If n is out of range.

    Notes
    -----
    Holds for all Python threads of the process and touches no other library's OpenMP setting. A
    lower limit that is set on OpenMP afterwards is still respected: that of threadpoolctl's
    ``threadpool_limits`` holds in the thread that enters it, so a worker of a pool of threads
    limits its own calls and nobody else's. `num_threads` of a call goes before both.

    A process can hold more than it has cores, each thread of a pool having a team of its own; limit
    the calls of P threads to a P-th of the cores. A child that was forked computes on one thread,
    as `get_num_threads` says.

    Examples
    --------
    >>> import bncpu
    >>> bncpu.set_num_threads(1)
    >>> bncpu.get_num_threads()
    1
    >>> bncpu.set_num_threads(None)
    """
    global _wish
    _wish = None if n is None else _Wish(checked(n), cpu.kernels.max_threads())


def get_num_threads() -> int:
    """Return the number of threads that a call uses if it does not say num_threads=.

    Notes
    -----
    In a child that was forked (multiprocessing's "fork", a server that forks its workers) it is 1,
    and so it is for calls that say num_threads=: the threads of OpenMP stay behind in the parent.
    Results are bitwise the same. Children that are spawned, those of a fork server that had not
    imported bncpu, and joblib's processes have all threads.

    Examples
    --------
    >>> import bncpu
    >>> bncpu.get_num_threads() >= 1
    True
    """
    if forked():
        return 1
    openmp: int = cpu.kernels.max_threads()
    wish = _wish  # once: another thread may set it meanwhile
    if wish is None:
        return openmp
    return wish.threads if openmp >= wish.openmp else min(wish.threads, openmp)


@contextmanager
def number_of_threads(n: int) -> Iterator[None]:
    """Inside a with statement, have set_num_threads(n); then have what was before."""
    global _wish
    before = _wish
    set_num_threads(n)
    try:
        yield
    finally:
        _wish = before


def checked(n: SupportsIndex, name: str = "num_threads") -> int:
    """Return n as an int from 1 to MAX_THREADS, or raise TypeError or ValueError."""
    try:
        value = operator.index(n)
    except TypeError:
        raise TypeError(f"{name}: expected an integer; got {type(n).__name__}") from None
    if not 1 <= value <= MAX_THREADS:
        raise ValueError(f"{name}: expected 1 to {MAX_THREADS}; got {value}")
    return value


def threads_for_call(num_threads: SupportsIndex | None) -> int:
    """Return the number of threads for one call."""
    if num_threads is None:
        return get_num_threads()
    value = checked(num_threads)
    return 1 if forked() else value


def share_out(work: Callable[[int], object], num_threads: int) -> None:
    """Call work(0) to work(num_threads - 1) at once, on the threads on which the kernels run.

    Python code of several threads takes turns; NumPy's on large arrays does not. An exception is
    raised when all are done.
    """
    if num_threads < 2 or forked():
        for i in range(num_threads):
            work(i)
    else:
        cpu.team.share_out(work, num_threads, num_threads)


def config() -> dict[str, object]:
    """Return what show_config prints, by name.

    Examples
    --------
    >>> import bncpu
    >>> bncpu.config()["level chosen"] in bncpu.config()["levels runnable"]
    True
    """
    from importlib import metadata  # slow to import, and nothing else needs it

    cupy = metadata.packages_distributions().get("cupy")
    return {
        "bncpu": metadata.version("bncpu"),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cupy": metadata.version(cupy[0]) if cupy else "absent",
        "gpu": gpus(),
        "machine": f"{platform.machine()} {platform.system()}",
        "levels compiled": cpu.compiled_levels(),
        "levels runnable": cpu.runnable_levels(),
        "level chosen": cpu.level,
        "caches": "L2 {} kB, L3 {} kB".format(*(size // 1024 for size in cpu.cache_sizes())),
        "pool": f"{cpu.pool.kept() >> 20} of {cpu.pool.limit() >> 20} MB kept for large results",
        "openmp": _openmp(),
        "threads": get_num_threads(),
    }


def show_config() -> None:
    """Print versions, instruction levels, OpenMP runtime and number of threads.

    Examples
    --------
    >>> import bncpu
    >>> bncpu.show_config()  # doctest: +ELLIPSIS
    bncpu            ...
    ...
    """
    for name, value in config().items():
        text = ", ".join(value) if isinstance(value, tuple) else str(value)
        print(f"{name:<16} {text}")


def _openmp() -> str:
    standard = cpu.kernels.openmp()
    if not standard:
        return "absent (serial build)"
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return f"{standard}"
    libraries = {Path(line.split()[-1]).name for line in maps.splitlines() if "/" in line}
    runtimes = sorted(
        name for name in libraries if name.startswith(("libgomp", "libomp", "libiomp"))
    )
    return f"{standard}, {', '.join(runtimes) or 'runtime unknown'}"
