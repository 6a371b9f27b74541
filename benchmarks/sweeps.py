"""Sweeps that would show a cliff: over the pixels S of an image, and over the batch N.

Small changes of a shape must not change the speed much, whatever kernel, tile and number of threads
they lead to. The speed of the copy stands beside, for a machine may change it on the way.
"""

from setting import markdown

from bncpu.bench import report, with_progress
from bncpu.bench.figure import speed
from bncpu.bench.operations import OPERATIONS, Problem
from bncpu.bench.rows import Part, measure_part

NAMES = ("train", "infer", "backward")
# Around multiples of vectors, and the squares that occur.
PIXELS = (
    *(1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 25, 31, 32, 33, 36, 48, 49, 50, 63, 64, 65, 81),
    *(96, 100, 121, 127, 128, 129, 144, 169, 196, 225, 255, 256, 257, 289, 324, 361, 400, 484, 511),
    *(512, 513, 576, 676, 784, 900, 1023, 1024, 1025, 1296, 1600, 2048, 2304, 3136, 4095, 4096),
)
BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 64, 65, 88, 96, 127, 128)
# Elements of x in the sweep of S: 32 MB of float32.
SIZE = 1 << 23
CHANNELS, BATCH = 64, 32
IMAGES = ((64, 28, 28), (512, 7, 7))


def shapes_by_pixels():
    """Return curves of (N, C, S) by their title: 64 channels and any N, N = 32 and any C."""
    return {
        f"C = {CHANNELS}": [(max(1, SIZE // (CHANNELS * s)), CHANNELS, s) for s in PIXELS],
        f"N = {BATCH}": [(BATCH, max(1, SIZE // (BATCH * s)), s) for s in PIXELS],
    }


def shapes_by_batch():
    """Return curves of (N, C, H, W) by their title."""
    return {f"{image}": [(n, *image) for n in BATCHES] for image in IMAGES}


def measured(curves, options, seconds=0.4):
    """Return rows by curve, shape by shape."""
    todo = [(title, shape) for title, shapes in curves.items() for shape in shapes]
    rows = {title: [] for title in curves}
    forms = [OPERATIONS[name] for name in NAMES]
    for title, shape in with_progress(todo):
        part = Part(Problem(shape, operations=forms), forms, options.threads)
        rows[title].append(measure_part(part, seconds))
        del part
    return rows


def sweep(options):
    """Print fractions of the streaming speed by S and by N."""
    every = []
    for what, curves in (("S", shapes_by_pixels()), ("N", shapes_by_batch())):
        values = PIXELS if what == "S" else BATCHES
        rows = measured(curves, options)
        head = [what]
        for title in curves:
            head += [*(f"{name}, {title}" for name in NAMES), "copy, GB/s"]
        lines = []
        for i, value in enumerate(values):
            line = [value]
            for title in curves:
                line += [f"{row.fraction:.2f}" for row in rows[title][i]]
                line.append(f"{speed(rows[title][i][0], 'stream'):.0f}")
            lines.append(line)
        for name, of in (("mean", report.geometric_mean), ("worst", min)):
            line = [name]
            for title in curves:
                columns = (
                    [points[j].fraction for points in rows[title]] for j in range(len(NAMES))
                )
                line += [*(f"{of(column):.2f}" for column in columns), ""]
            lines.append(line)
        markdown(head, lines)
        every += [row for points in rows.values() for group in points for row in group]
    return every
