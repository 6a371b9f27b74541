"""Draws what is measured here: bars against peers, a roofline, scaling by thread, sweeps.

    python benchmarks/figures.py --out bench          # some minutes; --quick: about one
    python benchmarks/figures.py bars sweep-pixels

Each figure is a PNG beside a JSON file of its measurements.
"""

import argparse
import functools
import statistics
import time
from pathlib import Path

import numpy as np
import sweeps
from setting import PEERS, QUICK_SHAPES, RESNET, peer_names, setting

from bncpu import bench
from bncpu.atomic import atomic_write, check_writable
from bncpu.bench import figure, report, with_progress
from bncpu.bench.figure import COLORS, new_figure
from bncpu.bench.operations import OPERATIONS
from bncpu.bench.rows import Part, measure_part, measure_parts
from bncpu.cli.numbers import positive

BARS = ("train", "train_relu", "infer", "backward")
ROOFLINE = ("moments", "train", "train_add_relu", "infer", "backward", "backward_add_relu")
# Floating-point operations of bncpu's formulas for each element; ReLU counts as one.
OPERATIONS_PER_ELEMENT = {"moments": 4, "infer": 3, "train": 7, "backward": 10}
MATRIX = 2048  # rows of the product that tells the processor's peak
FEW_CHANNELS = (32, 3, 224, 224)
SECONDS, QUICK_SECONDS = 2.0, 1.0


def bars(options, title):
    """Draw bytes per second by shape, beside the peers and the memory."""
    rows = []
    for shape in with_progress(options.shapes):
        problem = options.problem(shape, names=BARS)
        of = functools.partial(options.others, problem, layouts=("nhwc", "nChw16c"))
        part = Part(problem, [OPERATIONS[name] for name in BARS], options.threads, of)
        rows += measure_part(part, options.seconds)
        del problem, of, part
    return rows, figure.bars(rows, title)


def roofline(options, title):
    """Draw what is computed per second against what is computed per byte, under the roof."""
    rows = []
    for shape in with_progress(options.shapes):
        problem = options.problem(shape, names=ROOFLINE)
        part = Part(problem, [OPERATIONS[name] for name in ROOFLINE], options.threads)
        rows += measure_part(part, options.seconds)
        del problem, part
    drawn, ((axes,),) = new_figure(1, 1, 7.5, 4.6)
    memory = statistics.median(figure.speed(row, "stream") for row in rows)
    peak = matrix_speed() / 1e9
    intensity = np.geomspace(0.2, max(20.0, 4 * peak / memory), 200)
    axes.loglog(intensity, np.minimum(memory * intensity, peak), color="black", linewidth=1.2)
    axes.text(0.5 * peak / memory, 0.6 * peak, f"streaming, {memory:.0f} GB/s", ha="right")
    axes.text(intensity[-1], peak * 1.08, f"matrix product, {peak:.0f} Gflop/s", ha="right")
    axes.set_ylim(top=peak * 1.6)
    for place, name in enumerate(ROOFLINE):
        of = [row for row in rows if row.operation == name]
        points = [(flops(row) / row.bytes, flops(row) / row.seconds["bncpu"] / 1e9) for row in of]
        color = list(COLORS.values())[1 + place]
        axes.scatter(*zip(*points, strict=True), s=16, label=name, color=color, zorder=3)
    axes.set(xlabel="flop per byte of the fewest bytes", ylabel="Gflop/s", title=title)
    axes.title.set_fontsize("small")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small", loc="lower right")
    return rows, drawn


def flops(row):
    """Return the floating-point operations of a row, as bncpu's formulas have them."""
    operation = OPERATIONS[row.operation]
    per_element = OPERATIONS_PER_ELEMENT[operation.function] + operation.relu
    per_element += operation.add and operation.forward
    return per_element * np.prod(row.shape)


def matrix_speed():
    """Return the flop/s of NumPy's matrix product in float32, the highest that BLAS gets here."""
    a = np.ones((MATRIX, MATRIX), np.float32)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        np.matmul(a, a)
        seconds.append(time.perf_counter() - begin)
    return 2 * MATRIX**3 / min(seconds)


def scaling(options, title):
    """Draw the speed by number of threads, of bncpu and of the streaming kernels."""
    names = ("train", "infer", "backward")
    forms = [OPERATIONS[name] for name in names]
    most = options.threads
    numbers = sorted({*range(1, min(most, 8) + 1), *range(8, most + 1, max(1, most // 8)), most})
    shapes = [*QUICK_SHAPES, FEW_CHANNELS]
    drawn, panels = new_figure(1, len(names), 4.0, 3.6)
    drawn.suptitle(title, fontsize="small")
    every = []
    for place, shape in enumerate(with_progress(shapes)):
        problem = options.problem(shape, names=names)
        numbers = [n for n in numbers if n <= most]
        measured = measure_parts(
            {f"{n}": Part(problem, forms, n) for n in numbers}, options.seconds
        )
        del problem
        for i, axes in enumerate(panels[0]):
            rows = [measured[f"{n}"][i] for n in numbers]
            color = list(COLORS.values())[1 + place]
            ours = [figure.speed(row, "bncpu") for row in rows]
            axes.plot(numbers, ours, marker="o", label=f"{shape}", color=color)
            stream = [figure.speed(row, "stream") for row in rows]
            axes.plot(numbers, stream, linestyle=":", color=color)
            axes.set(title=f"{names[i]} (dotted: {rows[0].stream})", xlabel="threads")
            every += rows
    for axes in panels[0]:
        axes.set_ylim(bottom=0)
        axes.set_xticks(numbers)
        axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel("GB/s")
    panels[0, -1].legend(fontsize="x-small")
    return every, drawn


def sweep(options, title, curves, label, value):
    """Draw fractions of the streaming speed along curves of shapes."""
    if options.quick:
        curves = {name: shapes[::4] for name, shapes in curves.items()}
    measured = sweeps.measured(curves, options)
    drawn, panels = new_figure(len(sweeps.NAMES) + 1, 1, 9.0, 2.3)
    drawn.suptitle(title, fontsize="small")
    for i, axes in enumerate(panels[:-1, 0]):
        for name, points in measured.items():
            x = [value(shape) for shape in curves[name]]
            axes.plot(x, [rows[i].fraction for rows in points], marker=".", label=name)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(ylim=(0, 1.15), ylabel=f"of the {points[0][i].stream}")
        axes.set_xscale("log", base=2)
        axes.set_title(sweeps.NAMES[i], loc="left", fontsize="medium")
        axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize="small")
    below = panels[-1, 0]  # what the machine did on the way
    for name, points in measured.items():
        x = [value(shape) for shape in curves[name]]
        below.plot(x, [figure.speed(rows[0], "stream") for rows in points], marker=".", label=name)
    below.set(ylabel="copy, GB/s", xlabel=label)
    below.set_xscale("log", base=2)
    below.set_ylim(bottom=0)
    below.grid(alpha=0.3)
    return [row for points in measured.values() for rows in points for row in rows], drawn


def sweep_pixels(options, title):
    """Draw the sweep over S, from 1 to 4096, at 32 MB of float32."""
    curves = sweeps.shapes_by_pixels()
    return sweep(options, title, curves, "S, pixels of an image", lambda shape: shape[2])


def sweep_batch(options, title):
    """Draw the sweep over N."""
    curves = sweeps.shapes_by_batch()
    return sweep(options, title, curves, "N, images of a batch", lambda shape: shape[0])


FIGURES = {
    "bars": bars,
    "roofline": roofline,
    "scaling": scaling,
    "sweep-pixels": sweep_pixels,
    "sweep-batch": sweep_batch,
}


def main(argv=None):
    """Measure and draw the figures that are asked for, all by default."""
    made = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    made.add_argument("figures", nargs="*", metavar="FIGURE", help=", ".join(FIGURES))
    made.add_argument("--out", type=Path, default=Path("bench"), metavar="FOLDER")
    made.add_argument("--threads", type=positive, metavar="N", help="default: as `bncpu info` says")
    made.add_argument("--against", type=peer_names, default=list(PEERS), metavar="NAME,...")
    made.add_argument("--quick", action="store_true", help="fewer shapes and points")
    args = made.parse_args(argv)
    if unknown := set(args.figures) - set(FIGURES):
        made.error(f"expected figures out of {', '.join(FIGURES)}; got {', '.join(unknown)}")
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = args.figures or list(FIGURES)
    for name in chosen:
        check_writable(args.out / f"{name}.png")
    with setting(
        args.against,
        args.threads or bench.get_num_threads(),
        seconds=QUICK_SECONDS if args.quick else SECONDS,
        shapes=QUICK_SHAPES if args.quick else RESNET,
        in_cache=False,
        quick=args.quick,
    ) as (options, facts):
        threads = f"threads: {options.threads}"
        title = f"{facts['machine']}, {facts['level']}, {threads}, float32"
        for name in chosen:
            rows, drawn = FIGURES[name](options, title)
            with atomic_write(args.out / f"{name}.json") as file:
                file.write(report.document(facts, rows))
            with atomic_write(args.out / f"{name}.png") as file:
                drawn.savefig(file, format="png")
            print(f"{args.out / name}.png", flush=True)


if __name__ == "__main__":
    main()
