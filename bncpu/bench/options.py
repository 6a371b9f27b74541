"""The arguments of `bncpu bench`: what they are called, what they mean, how they are read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from bncpu import cpu
from bncpu.backends import DEVICES
from bncpu.bench.operations import DTYPES, LAYOUTS, OPERATIONS
from bncpu.bench.peers import GPU_PEERS, PEERS

if TYPE_CHECKING:
    from collections.abc import Callable

SUMMARY = "measure batch normalisation against its peers and the speed of memory"
EXAMPLES = """\
  bncpu bench --quick
  bncpu bench --shape 32,64,56,56 --shape 128,1000 --op train,backward
  bncpu bench --op train_add_relu --dtype bfloat16 --layout nhwc --against torch
  bncpu bench --device cuda --dtype float16 --layout nhwc
  bncpu bench --threads 4 --dtype float64 --json speed.json --plot speed.png
"""


def add_arguments(sub: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Add the arguments to the command's parser."""
    what = sub.add_argument_group("what is measured")
    what.add_argument(
        "--shape",
        type=shape,
        action="append",
        metavar="N,C,H,W",
        help="or N,C or N,C,L, whatever the layout; may be repeated (default: ResNet-50's, N = 32)",
    )
    what.add_argument(
        "--op",
        type=operations,
        action="extend",
        metavar="NAME,...",
        help="operations, listed below (default: train,backward)",
    )
    what.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the arrays (default: float32)"
    )
    what.add_argument(
        "--layout",
        choices=LAYOUTS,
        default="nchw",
        help="channels before the pixels or last, in memory (default: nchw)",
    )
    what.add_argument(
        "--against",
        type=names,
        metavar="NAME,...",
        help=f"peers out of {', '.join(PEERS)} (on a GPU: {', '.join(GPU_PEERS)}), or none "
        "(default: those that are installed)",
    )
    how = sub.add_argument_group("how")
    how.add_argument(
        "--device", choices=DEVICES, default="cpu", help="NumPy or CuPy arrays (default: cpu)"
    )
    how.add_argument("--quick", action="store_true", help="four shapes, a second an operation")
    how.add_argument(
        "--threads", type=positive, metavar="N", help="of all (default: as `bncpu info` says)"
    )
    how.add_argument(
        "--level",
        choices=cpu.runnable_levels(),
        help="instructions of the kernels and of the copy (default: the highest)",
    )
    how.add_argument(
        "--in-cache",
        action="store_true",
        help="use the same arrays again and again; else they are rotated past the last cache",
    )
    to = sub.add_argument_group("to where")
    to.add_argument("--json", type=Path, metavar="FILE", help="write the measurements there too")
    to.add_argument("--plot", type=Path, metavar="FILE.png", help="draw bars by shape there")
    listed = "\n".join(f"  {op.name:<20} {op.summary}" for op in OPERATIONS.values())
    sub.epilog = f"operations:\n{listed}\n\n{sub.epilog}"


def shape(text: str) -> tuple[int, ...]:
    """Read N,C or N,C,L or N,C,H,W."""
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError:
        sizes = ()
    if not 2 <= len(sizes) <= 4 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(
            f"expected N,C or N,C,L or N,C,H,W, all of them positive; got {text!r:.60}"
        )
    return sizes


def operations(text: str) -> list[str]:
    """Read names of operations."""
    return _listed(text, tuple(OPERATIONS))


def names(text: str) -> list[str]:
    """Read names of peers, or none."""
    return [] if text == "none" else _listed(text, tuple(PEERS | GPU_PEERS), " or none")


def _listed(text: str, known: tuple[str, ...], otherwise: str = "") -> list[str]:
    """Return the parts between commas, all of them known."""
    parts = text.split(",")
    for part in parts:
        if part not in known:
            raise argparse.ArgumentTypeError(
                f"expected names out of {', '.join(known)}{otherwise}; got {part!r:.60}"
            )
    return parts
