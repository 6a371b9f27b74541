"""Tables that set bncpu against the streaming kernels, and against itself."""

import statistics

from setting import FORMS, fraction_lines, fraction_text, markdown, marked, past_cache

from bncpu import cpu
from bncpu.bench import operations, with_progress
from bncpu.bench.contenders import ours
from bncpu.bench.measure import Timed, measure, ratio
from bncpu.bench.operations import OPERATIONS
from bncpu.bench.rows import Part, measure_part, measure_parts


def fractions(options):
    """Print fractions of the streaming speed: all operations on the layers of ResNet-50."""
    measured = []
    for shape in with_progress(options.shapes):
        problem = options.problem(shape, names=FORMS)
        part = Part(problem, [OPERATIONS[name] for name in FORMS], options.threads)
        measured.append(measure_part(part, options.seconds))
        del problem, part
    markdown(["shape", "> 24 MB", "memory, GB/s", *FORMS], fraction_lines(measured, FORMS))
    slower = [ratio(rows[1].turns["bncpu"], rows[0].turns["bncpu"]) - 1 for rows in measured]
    past = [s for s, rows in zip(slower, measured, strict=True) if past_cache(rows[0])]
    if past:
        print(f"train_relu takes {max(past):+.1%} at most of train past the cache, ", end="")
        print(f"{statistics.mean(past):+.1%} on average\n")
    return [row for rows in measured for row in rows]


def dtypes(options):
    """Set other types beside float32, and against their own streaming speed."""
    names = ("train", "infer", "backward")
    forms = [OPERATIONS[name] for name in names]
    lines, every = [], []
    for shape in with_progress(options.shapes):
        parts = {
            dtype: Part(options.problem(shape, dtype, names=names), forms, options.threads)
            for dtype in operations.DTYPES
        }
        measured = measure_parts(parts, options.seconds * 2)
        del parts
        line = [str(shape)]
        for i in range(len(names)):
            plain = measured["float32"][i].turns["bncpu"]
            for dtype in operations.DTYPES:
                row = measured[dtype][i]
                relative = ratio(row.turns["bncpu"], plain)
                text = f"{relative:.2f}x"
                if dtype == "float32":
                    text = fraction_text(row)
                elif dtype == "float64":
                    text = f"{fraction_text(row)} {text}"
                else:
                    most = 0.6 if past_cache(measured["float32"][i]) else 1.0
                    text = marked(-relative, -most, text)
                line.append(text)
        lines.append(line)
        every += [row for rows in measured.values() for row in rows]
    markdown(["shape", *(f"{n} {d}" for n in names for d in operations.DTYPES)], lines)
    print("float32, float64: fraction of the own streaming speed; x: time beside float32's\n")
    return every


def levels(options):
    """Print the speed of lower instruction levels as a part of the highest one's."""
    names = ("train", "train_relu", "infer", "backward", "moments")
    runnable = cpu.runnable_levels()
    lines = []
    for shape in with_progress(options.shapes):
        problem = options.problem(shape, names=names)
        taken = measure(
            {
                (name, level): Timed(ours(problem, OPERATIONS[name], options.threads), level)
                for name in names
                for level in runnable
            },
            options.seconds,
        )
        highest = {name: taken[name, runnable[-1]] for name in names}
        values = [
            ratio(highest[name], taken[name, level])
            for name in names
            for level in reversed(runnable[:-1])
        ]
        lines.append([shape, *(f"{value:.2f}" for value in values)])
        del problem
    head = [f"{name} {level}" for name in names for level in reversed(runnable[:-1])]
    markdown(["shape", *head], lines)
    return []


def threads(options):
    """Set what more threads gain beside what the streaming kernels gain."""
    names = ("train", "infer", "backward", "moments")
    forms = [OPERATIONS[name] for name in names]
    powers = {2**i for i in range(options.threads.bit_length())}
    numbers = sorted(powers | {options.threads})
    lines, every = [], []
    for shape in with_progress([*options.shapes, (32, 3, 224, 224)]):
        problem = options.problem(shape, names=names)
        parts = {f"{n}": Part(problem, forms, n) for n in numbers}
        measured = measure_parts(parts, options.seconds)
        del problem, parts
        for n in numbers[1:]:
            line = [shape, n]
            for one, many in zip(measured["1"], measured[f"{n}"], strict=True):
                gain = ratio(one.turns["bncpu"], many.turns["bncpu"])
                streams = ratio(one.stream_turns, many.stream_turns)
                line.append(marked(gain, 0.9 * streams, f"{gain:.2f} ({streams:.2f})"))
            lines.append(line)
        every += [row for rows in measured.values() for row in rows]
    markdown(["shape", "threads", *names], lines)
    print("In brackets: what the copy, triad or read gains.\n")
    return every
