"""What the tables and figures share: shapes, goals, peers, and Markdown."""

import contextlib
from argparse import ArgumentTypeError
from dataclasses import dataclass

import numpy as np
import onednn

from bncpu.bench import operations, peers, report
from bncpu.bench.operations import BATCH, OPERATIONS, QUICK, RESNET50, Problem

PAST_CACHE = 24e6  # bytes of an array that is said to be larger than the cache
# The fraction of the streaming speed to reach: past the cache, and in it.
GOALS = {
    "train": (0.85, 0.60),
    "train_add_relu": (0.80, 0.55),
    "infer": (0.92, 0.80),
    "backward": (0.85, 0.60),
    "backward_relu": (0.85, 0.60),
    "moments": (0.90, 0.75),
}
FORMS = ("train", "train_relu", "train_add_relu", "infer", "backward", "backward_relu", "moments")
RESNET = [(BATCH, *shape) for shape in RESNET50]
QUICK_SHAPES = [(BATCH, *shape) for shape in QUICK]
PEERS = (*peers.PEERS, "onednn")
# Shapes that no constant was chosen for.
UNTUNED = [
    (32, 63, 56, 56),
    (32, 97, 28, 28),
    (32, 1021, 14, 14),
    (16, 33, 149, 149),
    (16, 61, 73, 73),
    (32, 257, 17, 17),
    (64, 515, 8, 8),
    (128, 1021, 4, 4),
    (1, 64, 112, 112),
    (2, 256, 56, 56),
    (8, 256, 28, 28),
    (88, 64, 56, 56),
    (96, 256, 14, 14),
    (64, 1, 256, 256),
    (32, 3, 224, 224),
    (32, 24, 112, 112),
    (32, 4096, 7, 7),
    (1, 3, 4096, 4096),
]
PLAIN = [(4096, 1024), (128, 1000), (65536, 8)]


@dataclass(frozen=True)
class Options:
    """What is measured, how, and against which peers."""

    threads: int
    seconds: float
    shapes: list[tuple[int, ...]]
    in_cache: bool
    found: peers.Found
    onednn: bool
    quick: bool = False

    def others(self, problem, operation, layouts=onednn.LAYOUTS):
        """Return the contenders of all peers."""
        found = self.found.contenders(problem, operation)
        if self.onednn:
            found |= onednn.contenders(problem, operation, self.threads, layouts)
        return found

    def problem(self, shape, dtype="float32", layout="nchw", names=("train", "backward")):
        """Return the arrays of some operations on a shape."""
        forms = [OPERATIONS[name] for name in names]
        return Problem(shape, dtype, layout, forms, rotate=not self.in_cache)


def peer_names(text):
    """Read names of peers between commas, or none."""
    known = (*PEERS, "none")
    parts = text.split(",")
    if unknown := [part for part in parts if part not in known]:
        raise ArgumentTypeError(f"expected names out of {', '.join(known)}; got {unknown[0]!r}")
    return [part for part in parts if part != "none"]


@contextlib.contextmanager
def setting(names, threads, **rest):
    """Return the options and the facts to print, with the peers that are there, while it lasts."""
    absent = onednn.why_not() if "onednn" in names else "not asked for"
    with peers.using([name for name in names if name != "onednn"], threads) as found:
        for name in set(peers.PEERS) - set(names):
            found.absent[name] = "not asked for"
        facts = report.facts(threads, found.absent) | {"onednn": absent or onednn.version()}
        print("\n".join(f"{name:<8} {value}" for name, value in facts.items()), end="\n\n")
        yield Options(threads=threads, found=found, onednn=absent is None, **rest), facts


def markdown(head, lines):
    """Print a table."""
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for line in lines:
        print("| " + " | ".join(map(str, line)) + " |")
    print(flush=True)


def past_cache(row):
    """Tell shapes whose arrays are larger than the cache."""
    return np.prod(row.shape) * operations.dtype_of(row.dtype).itemsize >= PAST_CACHE


def marked(value, goal, text):
    """Return the text, bold where the value falls short of the goal."""
    return f"**{text}**" if goal is not None and value < goal else text


def fraction_text(row):
    """Return the fraction of the streaming speed, bold below its goal."""
    goal = GOALS.get(row.operation, (None, None))[0 if past_cache(row) else 1]
    return marked(round(row.fraction, 2), goal, f"{row.fraction:.2f}")


def memory_text(rows):
    """Return the GB/s of the streaming kernels, which may change from one second to the next."""
    speeds = {row.stream: row.stream_bytes / row.stream_seconds / 1e9 for row in rows}
    return ", ".join(f"{kind} {speed:.0f}" for kind, speed in speeds.items())


def fraction_lines(measured, names):
    """Return a line for each shape, and the worst fraction of each operation."""
    lines = [
        [f"{rows[0].shape}", "yes" if past_cache(rows[0]) else "", memory_text(rows)]
        + [fraction_text(row) for row in rows]
        for rows in measured
    ]
    for past in (True, False):
        of = [rows for rows in measured if past_cache(rows[0]) == past]
        if of:
            worst = [min(rows[i].fraction for rows in of) for i in range(len(names))]
            means = [report.geometric_mean(r[i].fraction for r in of) for i in range(len(names))]
            where = "past the cache" if past else "in cache"
            lines.append([f"geometric mean {where}", "", "", *(f"{value:.2f}" for value in means)])
            lines.append([f"worst {where}", "", "", *(f"{value:.2f}" for value in worst)])
    return lines


def best_ratio(row, peer):
    """Return the ratio to a peer, to the best of its layouts, and which; None if not measured."""
    ratios = {name: row.ratio(name) for name in row.peers if name == peer}
    if peer == "onednn":
        ratios = {name: row.ratio(name) for name in row.peers if name.startswith(peer)}
    if not ratios:
        return None
    name = min(ratios, key=ratios.__getitem__)
    return ratios[name], name.removeprefix("onednn ") if peer == "onednn" else ""
