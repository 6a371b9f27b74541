"""What is said about measurements: on what they were taken, a table, a JSON document."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import bncpu
from bncpu import cpu
from bncpu.bench import peers
from bncpu.bench.operations import EPS, OPERATIONS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from bncpu.bench.rows import Row

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
NOTE = """
Contenders in turn; medians over the rounds, of times and of ratios. Of memory: bytes per second as
a part of those of a streaming {streams} on the same arrays and
threads; the bytes are the fewest that can cross memory. bncpu writes into a given array. Ratios say
how many times as long a peer takes: one that allocates its result against bncpu allocating, "out="
against bncpu.
"""
_STREAMS = {"copy": "copy", "triad": "triad (a + b -> c)", "read": "read"}


def facts(
    threads: int, absent: Mapping[str, str] | None = None, device: str = "cpu"
) -> dict[str, object]:
    """Return on what the figures are taken, by name.

    Parameters
    ----------
    threads : int
        Of the run.
    absent : mapping, optional
        Why a peer is not there, by its name.
    device : {"cpu", "cuda"}
        Where the arrays were.
    """
    if device == "cuda":
        from bncpu.bench import gpu

        versions = {"bncpu": bncpu.__version__, "python": platform.python_version()}
        torch = (absent or {}).get("torch") or peers.version("torch") or "not installed"
        return gpu.facts() | versions | {"torch": torch}
    l2, l3 = cpu.cache_sizes()
    return {
        "machine": f"{processor()}, {os.cpu_count()} cores, {platform.system()}",
        "caches": f"L2 {l2 // 1024} kB, L3 {l3 // 1024} kB",
        "pages": huge_pages(),
        "bncpu": bncpu.__version__,
        "level": cpu.level,
        "threads": threads,
        "python": platform.python_version(),
        "numpy": np.__version__,
    } | {
        name: (absent or {}).get(name) or peers.version(name) or "not installed"
        for name in peers.PEERS
        if name != "numpy"
    }


def processor() -> str:
    """Return the processor's own name where Linux tells it, else the architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def huge_pages() -> str:
    """Return whether Linux gives huge pages: always, to who asks as NumPy does, or never."""
    with contextlib.suppress(OSError, IndexError):
        chosen = HUGE_PAGES.read_text().partition("[")[2].partition("]")[0]
        return {"always": "huge", "madvise": "huge where asked for", "never": "small"}[chosen]
    return "unknown"


def seconds_text(seconds: float) -> str:
    """Return a time with three digits and its unit."""
    unit, value = next(
        (
            (unit, seconds * scale)
            for unit, scale in (("s", 1.0), ("ms", 1e3))
            if seconds * scale >= 1
        ),
        ("us", seconds * 1e6),
    )
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean of positive numbers."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def aligned(lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return lines of cells as columns, the first ones flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def table(rows: Sequence[Row]) -> str:
    """Return rows as a table for people, with geometric means of several shapes."""
    names = list(dict.fromkeys(name for row in rows for name in row.peers))
    lines = [["shape", "operation", "bncpu", "GB/s", "of memory", *names]]
    shape = None
    for row in rows:
        ours = row.seconds["bncpu"]
        lines.append(
            [
                str(row.shape) if row.shape != shape else "",
                row.operation,
                seconds_text(ours),
                f"{row.bytes / ours / 1e9:.1f}",
                f"{row.fraction:.0%}" + "*" * (not row.from_memory),
                *(f"{row.ratio(name):.1f}x" if name in row.seconds else "-" for name in names),
            ]
        )
        shape = row.shape
    if len({row.shape for row in rows}) > 1:
        lines += [
            _means(operation, rows, names)
            for operation in OPERATIONS
            if operation in {row.operation for row in rows}
        ]
    text = aligned(lines, left=2)
    if not all(row.from_memory for row in rows):
        text += "\n* small arrays, which stay in the cache"
    return text


def _means(operation: str, rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """Return the line of the geometric means of an operation."""
    of = [row for row in rows if row.operation == operation]
    ratios = {name: [row.ratio(name) for row in of if name in row.seconds] for name in names}
    return [
        "geometric mean",
        operation,
        "",
        "",
        f"{geometric_mean(row.fraction for row in of):.0%}",
        *(f"{geometric_mean(found):.1f}x" if found else "-" for found in ratios.values()),
    ]


def note(rows: Iterable[Row]) -> str:
    """Return what one must know to read the table."""
    kinds = dict.fromkeys(row.stream for row in rows)
    return NOTE.format(streams=" or ".join(_STREAMS[kind] for kind in kinds))


def document(known: Mapping[str, object], rows: Iterable[Row]) -> bytes:
    """Return the facts and the rows as JSON."""
    figures = [
        row._asdict()
        | {
            "seconds": row.seconds,
            "stream_seconds": row.stream_seconds,
            "fraction": row.fraction,
            "ratios": {name: row.ratio(name) for name in row.peers},
        }
        for row in rows
    ]
    text = json.dumps({**known, "eps": EPS, "rows": figures}, indent=1, allow_nan=False)
    return f"{text}\n".encode()
