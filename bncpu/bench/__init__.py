"""How fast bncpu is: beside textbook NumPy, PyTorch, JAX, and the speed of the memory itself.

Not a profiler, and no source of absolute times: machines drift, so only what ran in turn in one
process is compared.

operations.py   operations, shapes, and the arrays they run on
measure.py      contenders in turn, medians             rows.py     what was measured, by operation
contenders.py   bncpu and the streaming kernels
peers.py        the peers by name: textbook.py (NumPy), pytorch.py, xla.py (JAX)
gpu.py          clock, copy and facts of a GPU
report.py       machine, table, JSON        figure.py   bars        options.py   the command line

Importing it imports no peer and no plotting.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from typing import TYPE_CHECKING, TypeVar

from bncpu import cpu
from bncpu.atomic import atomic_write
from bncpu.backends import module_on
from bncpu.bench import figure, peers, report
from bncpu.bench.operations import BATCH, OPERATIONS, QUICK, RESNET50, Problem, check_shape
from bncpu.bench.rows import Part, Row, measure_part
from bncpu.threads import checked, get_num_threads

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence

    from bncpu.bench.operations import Shape

    Item = TypeVar("Item")

# How long an operation on a shape is measured at least, in full and with `quick`.
SECONDS = 4.0
QUICK_SECONDS = 1.0
DEFAULT_OPERATIONS = ("train", "backward")


def run(
    *,
    shapes: Sequence[Shape] | None = None,
    operations: Sequence[str] | None = None,
    dtype: str = "float32",
    layout: str = "nchw",
    num_threads: int | None = None,
    level: str | None = None,
    device: str = "cpu",
    against: Sequence[str] | None = None,
    quick: bool = False,
    in_cache: bool = False,
    json_path: str | os.PathLike[str] | None = None,
    plot_path: str | os.PathLike[str] | None = None,
) -> list[Row]:
    """Measure operations on shapes, and print a table.

    Parameters
    ----------
    shapes : sequence of tuples of ints, optional
        (N, C), (N, C, L) or (N, C, H, W); the batch norms of ResNet-50 if not given.
    operations : sequence of str, optional
        Out of OPERATIONS; training and its gradient if not given.
    dtype : {"float32", "float64", "float16", "bfloat16"}
        Of the arrays.
    layout : {"nchw", "nhwc"}
        Channels before the pixels or last, in memory.
    num_threads : int, optional
        Threads of all contenders; otherwise what get_num_threads says.
    level : str, optional
        Instruction level of the kernels; otherwise the one in use.
    device : {"cpu", "cuda"}
        Where the arrays are: NumPy's or CuPy's.
    against : sequence of str, optional
        Peers out of those of the device; those that are installed if not given.
    quick : bool, default False
        Four shapes instead of nine, a second each.
    in_cache : bool, default False
        Use the same arrays again and again instead of rotating them past the last cache.
    json_path, plot_path : path, optional
        Where to write the figures as JSON, and bars as PNG. A file appears when it is complete, or
        not at all.

    Returns
    -------
    list of Row
        The measurements.

    Raises
    ------
    ImportError
        If the dtype, the device or the plot needs a package that is not installed.
    NoGPUError
        If the device is "cuda" and there is none.
    OSError
        If a file cannot be written; before anything is measured.
    ValueError
        If the operations cannot be measured on a shape, a peer is none of the device, or threads
        or a level of the processor are asked of a GPU; likewise.
    """
    module_on(device)
    if device == "cuda" and (num_threads, level) != (None, None):
        raise ValueError("--threads, --level: are of the processor; leave them out on a GPU")
    known_peers = peers.known(device)
    for name in against or ():
        if name not in known_peers:
            raise ValueError(
                f"--against: expected names out of {', '.join(known_peers)} on {device}; got {name}"
            )
    threads = get_num_threads() if num_threads is None else checked(num_threads)
    chosen = [OPERATIONS[name] for name in dict.fromkeys(operations or DEFAULT_OPERATIONS)]
    if shapes is None:
        shapes = [(BATCH, *shape) for shape in (QUICK if quick else RESNET50)]
    shapes = list(dict.fromkeys(shapes))
    for shape in shapes:
        check_shape(shape, dtype, chosen, device)
    if plot_path is not None:
        figure.require()
    if against is None:
        against = [name for name in known_peers if importlib.util.find_spec(name) is not None]
    seconds = QUICK_SECONDS if quick else SECONDS
    with contextlib.ExitStack() as stack:
        if level is not None:
            stack.enter_context(cpu.use_level(level))
        json_file, plot_file = (
            None if path is None else stack.enter_context(atomic_write(path))
            for path in (json_path, plot_path)
        )
        found = stack.enter_context(peers.using(against, threads, device))
        known = report.facts(threads, found.absent, device) | {"dtype": dtype, "layout": layout}
        print("\n".join(f"{name:<8} {value}" for name, value in known.items()), end="\n\n")
        rows = []
        for shape in with_progress(shapes):
            problem = Problem(shape, dtype, layout, chosen, device=device, rotate=not in_cache)
            part = Part(problem, chosen, threads, functools.partial(found.contenders, problem))
            rows += measure_part(part, seconds * len(chosen))
            del problem, part  # before the next one's arrays are made
        print(report.table(rows))
        print(report.note(rows), end="")
        if json_file is not None:
            json_file.write(report.document(known, rows))
        if plot_file is not None:
            if device == "cuda":
                where = known["gpu"]
            else:
                where = f"{known['machine']}, {cpu.level}, threads: {threads}"
            title = f"{where}, {dtype}, {layout}"
            figure.bars(rows, title).savefig(plot_file, format="png")
    return rows


def with_progress(todo: Sequence[Item]) -> Iterable[Item]:
    """Return the same items, with a progress bar on a terminal's stderr if tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return todo
    bar: Iterable[Item] = tqdm(
        todo, desc="bench", unit="shape", file=sys.stderr, disable=None, leave=False
    )
    return bar
