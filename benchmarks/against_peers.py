"""Tables that set bncpu against NumPy, PyTorch, JAX and oneDNN."""

import functools
from dataclasses import replace

from setting import PLAIN, UNTUNED, best_ratio, fraction_lines, markdown, marked

from bncpu.bench import peers, report, with_progress
from bncpu.bench.measure import ratio
from bncpu.bench.operations import OPERATIONS
from bncpu.bench.rows import Part, measure_part, measure_parts

# Of the peers' table: a column's title, the operation, the peer, and the goals of the geometric
# mean. "onednn" is the best of its layouts.
AGAINST = [
    ("train / PyTorch", "train", "torch", 7),
    ("out=", "train", "torch, out=", 5),
    ("BN, ReLU / PyTorch", "train_relu", "torch", 9),
    ("train / oneDNN", "train", "onednn", 1.5),
    ("JAX", "train", "jax", 8),
    ("NumPy", "train", "numpy", 20),
    ("backward / PyTorch", "backward", "torch", 4),
    ("oneDNN", "backward", "onednn", 1.3),
    ("JAX", "backward", "jax", 8),
    ("NumPy", "backward", "numpy", 8),
]


def against(options):
    """Print how many times as long peers take, on the layers of ResNet-50."""
    names = ("train", "train_relu", "backward")
    measured = []
    for shape in with_progress(options.shapes):
        problem = options.problem(shape, names=names)
        of = functools.partial(options.others, problem)
        part = Part(problem, [OPERATIONS[name] for name in names], options.threads, of)
        measured.append({row.operation: row for row in measure_part(part, options.seconds)})
        del problem, part, of
    columns = [c for c in AGAINST if best_ratio(measured[0][c[1]], c[2]) is not None]
    lines, all_ratios = [], [[] for _ in columns]
    for rows in measured:
        line = [str(rows["train"].shape)]
        for (_, operation, peer, _), ratios in zip(columns, all_ratios, strict=True):
            ratio, layout = best_ratio(rows[operation], peer)
            ratios.append((ratio, rows["train"].shape))
            line.append(marked(ratio, 1, f"{ratio:.1f} {layout}".strip()))
        lines.append(line)
    means = [report.geometric_mean(ratio for ratio, _ in ratios) for ratios in all_ratios]
    goals = [goal for *_, goal in columns]
    cells = [marked(m, goal, f"{m:.1f}") for m, goal in zip(means, goals, strict=True)]
    lines.append(["geometric mean", *cells])
    lines.append(["goal", *map(str, goals)])
    worst = [min(ratios) for ratios in all_ratios]
    lines.append(["worst", *(f"{ratio:.1f} {shape}" for ratio, shape in worst)])
    markdown(["shape", *(title for title, *_ in columns)], lines)
    return [row for rows in measured for row in rows.values()]


def untuned(options):
    """Print fractions, and ratios to PyTorch and oneDNN, for shapes that nobody tuned for."""
    names = ("train", "infer", "backward", "moments")
    pairs = [
        (operation, peer)
        for operation in ("train", "infer", "backward")
        for peer in ("torch", "torch, out=", "onednn")
    ]
    measured = []
    modules = {name: m for name, m in options.found.modules.items() if name == "torch"}
    few = replace(options, found=peers.Found(modules, {}))
    for shape in with_progress(UNTUNED):
        problem = options.problem(shape, names=names)
        of = functools.partial(few.others, problem)
        part = Part(problem, [OPERATIONS[name] for name in names], options.threads, of)
        measured.append(measure_part(part, options.seconds))
        del problem, part, of
    by_name = [{row.operation: row for row in rows} for rows in measured]
    pairs = [(o, p) for o, p in pairs if best_ratio(by_name[0][o], p) is not None]
    lines = fraction_lines(measured, names)
    for line, rows in zip(lines, by_name, strict=False):
        for operation, peer in pairs:
            ratio, layout = best_ratio(rows[operation], peer)
            line.append(marked(ratio, 1, f"{ratio:.1f} {layout}".strip()))
    lines = [line + [""] * (3 + len(names) + len(pairs) - len(line)) for line in lines]
    head = ["shape", "> 24 MB", "memory, GB/s", *names, *(f"{o} / {p}" for o, p in pairs)]
    markdown(head, lines)
    return [row for rows in measured for row in rows]


def layouts(options):
    """Set channels-last beside NCHW and the peers' channels-last; and plain (N, C)."""
    names = ("train", "infer", "backward")
    forms = [OPERATIONS[name] for name in names]
    lines, every = [], []
    for shape in with_progress(options.shapes):
        last = options.problem(shape, layout="nhwc", names=names)
        of = functools.partial(options.others, last)
        parts = {
            "nchw": Part(options.problem(shape, names=names), forms, options.threads),
            "nhwc": Part(last, forms, options.threads, of),
        }
        measured = measure_parts(parts, options.seconds)
        del last, parts, of
        line = [str(shape)]
        for first, row in zip(measured["nchw"], measured["nhwc"], strict=True):
            relative = ratio(row.turns["bncpu"], first.turns["bncpu"])
            line += [f"{row.fraction:.2f}", f"{relative:.2f}x"]
            line += [peer_text(row, peer) for peer in ("onednn", "torch")]
        lines.append(line)
        every += measured["nhwc"]
    what = ("fraction", "time of NCHW's", "oneDNN nhwc takes", "PyTorch takes")
    markdown(["shape, nhwc", *(f"{name}: {text}" for name in names for text in what)], lines)
    lines = []
    for shape in with_progress(PLAIN):
        problem = options.problem(shape, names=names)
        of = functools.partial(options.others, problem, layouts=("nchw", "nChw16c"))
        rows = measure_part(Part(problem, forms, options.threads, of), options.seconds)
        del problem, of
        lines += [
            [shape, row.operation, f"{row.fraction:.2f}"]
            + [peer_text(row, peer) for peer in ("torch", "torch, out=", "jax", "numpy", "onednn")]
            for row in rows
        ]
        every += rows
    head = ["shape", "", "fraction", "PyTorch takes", "out=", "JAX", "NumPy", "oneDNN"]
    markdown(head, lines)
    return every


def peer_text(row, peer):
    """Return the ratio to a peer, bold if it is faster."""
    found = best_ratio(row, peer)
    return "-" if found is None else marked(found[0], 1, f"{found[0]:.1f}x")
