"""What is promised about speed on a GPU, table by table: run it where there is one.

Fractions of a device-to-device copy, ratios to PyTorch on ResNet-50's shapes and on few channels,
small shapes beside one elementwise kernel, and what a call costs the processor. Nothing else may
run on the GPU meanwhile. `make gpu` runs it last.
"""

import argparse
import itertools
import statistics
import time
from functools import partial
from pathlib import Path

from bncpu import backends
from bncpu.bench import peers, report
from bncpu.bench.contenders import ours
from bncpu.bench.measure import measure
from bncpu.bench.operations import OPERATIONS, RESNET50, Problem
from bncpu.bench.rows import Part, measure_part

# What an operation is to reach of a copy's speed, for arrays of 100 MB and more.
FRACTIONS = {
    "infer": 0.90,
    "train": 0.80,
    "train_add_relu": 0.75,
    "backward": 0.75,
    "moments": 0.85,
}
LARGE = [
    ((128, 64, 112, 112), "float32", "nchw"),
    ((64, 256, 56, 56), "float32", "nhwc"),
    ((128, 64, 112, 112), "float16", "nchw"),
    ((128, 256, 56, 56), "bfloat16", "nhwc"),
]
AGAINST_PYTORCH = 1.5
FEW_CHANNELS = [(4, 3, 1024, 1024), (20, 6, 65536), (4, 128, 1024, 1024)]
AGAINST_PYTORCH_FEW = 3.0
SMALL = [(8, 64, 32, 32), (4, 256, 28, 28)]
OF_ONE_KERNEL = 1.2
CALL_MICROSECONDS = 15.0
ROUNDS = 3
CALLS = 300


class Report:
    """The lines of the summary, each with its promise, and every row behind them."""

    def __init__(self, seconds):
        self.end = time.monotonic() + seconds
        self.lines = [["what", "measured", "promised", "kept"]]
        self.rows = []

    def time_is_left(self):
        return time.monotonic() < self.end

    def add(self, what, measured, promised, kept):
        self.lines.append([what, measured, promised, "yes" if kept else "NO"])
        print(f"  {what}: {measured} ({promised})", flush=True)

    def left_out(self, what):
        self.lines.append([what, "-", "", "no time left"])


def rows_of(found, shape, dtype, layout, names):
    operations = [OPERATIONS[name] for name in names]
    problem = Problem(shape, dtype, layout, operations, device="cuda")
    part = Part(problem, operations, 1, partial(found.contenders, problem))
    return measure_part(part, 0.0, ROUNDS)


def fractions(result, _):
    nobody = peers.Found({}, {})
    rows = []
    for shape, dtype, layout in LARGE:
        rows += rows_of(nobody, shape, dtype, layout, FRACTIONS)
    result.rows += rows
    for name, promised in FRACTIONS.items():
        least = min((row for row in rows if row.operation == name), key=lambda row: row.fraction)
        what = f"{name}, of a copy, the least: {least.shape} {least.dtype} {least.layout}"
        result.add(what, f"{least.fraction:.0%}", f">= {promised:.0%}", least.fraction >= promised)


def against_pytorch(result, found):
    if "torch" not in found.modules:
        result.left_out(f"PyTorch: {found.absent.get('torch')}")
        return
    cases = itertools.product((32, 256), ("float32", "float16", "bfloat16"), ("nchw", "nhwc"))
    for n, dtype, layout in cases:
        what = f"ResNet-50, N = {n}, {dtype}, {layout}, against PyTorch"
        if not result.time_is_left():
            result.left_out(what)
            continue
        rows = []
        for shape in RESNET50:
            rows += rows_of(found, (n, *shape), dtype, layout, ("train", "backward"))
        compare(result, what, rows, AGAINST_PYTORCH, never_slower=True)
    for shape in FEW_CHANNELS:
        what = f"{shape} float32, against PyTorch"
        if not result.time_is_left():
            result.left_out(what)
            continue
        rows = rows_of(found, shape, "float32", "nchw", ("train", "backward"))
        compare(result, what, rows, AGAINST_PYTORCH_FEW)


def compare(result, what, rows, promised, never_slower=False):
    result.rows += rows
    for name in ("train", "backward"):
        ratios = [row.ratio("torch") for row in rows if row.operation == name]
        mean, least = report.geometric_mean(ratios), min(ratios)
        kept = mean >= promised and (least >= 1 or not never_slower)
        measured = f"{mean:.2f}x" + (f", least {least:.2f}x" if len(ratios) > 1 else "")
        result.add(f"{name}: {what}", measured, f">= {promised}x", kept)


def small(result, _):
    cupy = backends.cupy()
    for shape in SMALL:
        operation = OPERATIONS["train"]
        problem = Problem(shape, "float16", "nchw", [operation], device="cuda")
        kernels = [partial(cupy.multiply, a.x, a.dy, out=a.out) for a in problem.sets]
        turns = measure(
            {
                "bncpu": problem.timed(ours(problem, operation, 1)),
                "one kernel": problem.timed(problem.rotating(kernels)),
            },
            0.5,
        )
        times = {name: statistics.median(taken) for name, taken in turns.items()}
        ratio = times["bncpu"] / times["one kernel"]
        measured = f"{ratio:.2f}x of {times['one kernel'] * 1e6:.1f} us"
        what = f"train, {shape} float16, of one elementwise kernel"
        result.add(what, measured, f"<= {OF_ONE_KERNEL}x", ratio <= OF_ONE_KERNEL)


def host(result, _):
    """Measure what the processor does for a call, while nobody waits for the GPU."""
    cupy = backends.cupy()
    for name in ("train", "infer", "backward", "moments"):
        operation = OPERATIONS[name]
        problem = Problem((8, 64, 8, 8), "float16", "nchw", [operation], device="cuda")
        call = ours(problem, operation, 1)
        taken = []
        for _ in range(5):
            cupy.cuda.Device().synchronize()
            begin = time.perf_counter()
            for _ in range(CALLS):
                call()
            taken.append((time.perf_counter() - begin) / CALLS * 1e6)
        cost = statistics.median(taken)
        what = f"{name}, the processor's part of a call"
        result.add(
            what, f"{cost:.1f} us", f"< {CALL_MICROSECONDS:.0f} us", cost < CALL_MICROSECONDS
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder for speed.json")
    parser.add_argument("--seconds", type=float, default=200, help="begin nothing after that")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    result = Report(options.seconds)
    with peers.using(peers.GPU_PEERS, 1, "cuda") as found:
        facts = report.facts(1, found.absent, "cuda")
        print("\n".join(f"{name:<8} {value}" for name, value in facts.items()), flush=True)
        for table in (host, small, fractions, against_pytorch):
            table(result, found)
    names = ("what", "measured", "promised", "kept")
    promises = [dict(zip(names, line, strict=True)) for line in result.lines[1:]]
    document = report.document(facts | {"promises": promises}, result.rows)
    (options.out / "speed.json").write_bytes(document)
    print(f"\n{report.aligned(result.lines)}", flush=True)


if __name__ == "__main__":
    main()
