"""The public functions over the grid of shapes, for a process that a sanitizer watches.

`make sanitize` (tools/sanitize.py) compiles the package for a sanitizer and runs this file, which
is no test of pytest: a finding ends the process. Cases are the suite's own, and results are
compared with the truth beside. With --plant it tells a kernel a lie, as nothing above the kernels
would: a sanitizer that lets it pass finds nothing.
"""

import argparse
import concurrent.futures
import itertools
import json
import time
from types import SimpleNamespace

import numpy as np
from cases import (
    FLOATS,
    HALVES,
    LAYOUTS,
    ROWS_OF_CHANNELS,
    SIZES,
    Output,
    new_mask,
    normal,
    of_size,
)
from forms import (
    EVERYTHING,
    FORMS,
    PLAIN,
    RELU,
    SOME_FORMS,
    assert_same_results,
    check,
    problem,
    run,
)

import bncpu
import bncpu.cpu
from bncpu.cpu import pool, team

DTYPES = [*FLOATS, *HALVES]
ALL_FORMS = list(FORMS.values())
THREADS = (1, 2, 3, 7)
# L2 and L3 in bytes: the machine's own, or so small that all results stream past them, or so large
# that none does.
CACHES = (None, (4096, 4096), (1 << 17, 1 << 17), (1 << 30, 1 << 34))
LAID_OUT = [(3, 17, 33), (5, 19), (2, 3, 4, 31), (2, 2, 2049)]
SMALL = 20_000  # values: all forms, and every run
EMPTY = [((0, 3), 1), ((0, 3, 5), 1), ((4, 0, 5), 1), ((4, 3, 0), 1), ((4, 5, 0), -1)]
OTHER_AXES = [((7, 5), 0), ((2, 5, 7, 3), -1), ((5, 3, 4, 2), (1, 2, 3)), ((129, 2, 33), (2, 1))]


class Tally:
    """Counts cases and calls, and gives each case its random numbers, caches and threads."""

    def __init__(self, seed, threads):
        self.rng, self.every_thread = np.random.default_rng(seed), threads
        self.cases = self.calls = 0

    def case(self, shape, dtype, axis=1, layout="c", forms=ALL_FORMS, **options):
        """Compute one problem in its forms, and compare: with the truth, and between threads."""
        self.cases += 1
        caches = self.one_of(CACHES)
        if caches:
            bncpu.cpu.kernels.set_cache_sizes(*caches)
        else:
            bncpu.cpu.load_level(bncpu.cpu.level)
        p = problem(self.rng, shape, dtype, axis, layout)
        axes = axis if isinstance(axis, tuple) else (axis,)
        m = p.x.size // max(1, int(np.prod([shape[a] for a in axes])))
        for form in forms:
            numbers = THREADS if self.every_thread else [self.one_of(THREADS)]
            results = [self._run(form, p, m > 1, n, **options) for n in numbers]
            if p.x.size:
                check(form, p, results[0])
            for other in results[1:]:
                assert_same_results(other, results[0])

    def one_of(self, choices):
        return choices[int(self.rng.integers(len(choices)))]

    def _run(self, form, p, train, threads, **options):
        self.calls += 2 + train + form.has_backward * (1 + train)
        return run(form, p, train=train, num_threads=threads, **options)


def sizes(tally, quick):
    """Try sizes around vectors, runs and tiles, in both forms of the walk."""
    shapes = [(of_size(size), 1) for size in SIZES] + [(size, -1) for size in ROWS_OF_CHANNELS]
    for at, (shape, axis) in enumerate(shapes):
        small = np.prod(shape) < SMALL
        if quick and small:
            # Every dtype has sizes of its own, and those two of the forms.
            tally.case(shape, DTYPES[at % 4], axis, forms=ALL_FORMS[at % 3 :: 3])
        for dtype in () if quick else DTYPES:
            tally.case(shape, dtype, axis, forms=ALL_FORMS if small else SOME_FORMS[dtype.name])
            if small:  # A tuple of axes takes the way of calls that are not plain.
                tally.case(shape, dtype, (axis,), forms=[EVERYTHING])


def layouts(tally, quick):
    """Try views of every kind as inputs and as results."""
    for layout, dtype in itertools.product(LAYOUTS, DTYPES):
        for shape in [tally.one_of(LAID_OUT)] if quick else LAID_OUT:
            outputs = []

            def new(layout=layout, shape=shape, dtype=dtype, outputs=outputs):
                outputs.append(Output(layout, shape, dtype))
                return outputs[-1].array

            tally.case(shape, dtype, 1, layout, [EVERYTHING if quick else RELU, PLAIN], out=new)
            for output in outputs:
                output.assert_only_inside()
    for (shape, axis), dtype in itertools.product(OTHER_AXES, DTYPES):
        tally.case(shape, dtype, axis, forms=[EVERYTHING])
    for (shape, axis), dtype in itertools.product(EMPTY, DTYPES):
        tally.case(shape, dtype, axis, forms=[PLAIN, EVERYTHING])


def in_place(tally, _quick):
    """Write results over x, the residual and dy."""
    for shape, dtype in itertools.product([(5, 3, 49), (2, 3, 2049), (65, 33)], DTYPES):
        for threads in THREADS:
            tally.cases += 1
            tally.calls += 8
            p = problem(tally.rng, shape, dtype)
            mask = new_mask(p.x)
            fused = {"activation": "relu", "num_threads": threads}
            statistics = p.mean, p.var
            expected = bncpu.batch_norm_infer(p.x, *statistics, residual=p.residual, **fused)
            for name in ("x", "residual"):
                given = {"x": p.x, "residual": p.residual} | {name: getattr(p, name).copy()}
                y = bncpu.batch_norm_infer(
                    given["x"], *statistics, residual=given["residual"], out=given[name], **fused
                )
                np.testing.assert_array_equal(y, expected)
            for infer in (False, True):
                if infer:
                    forward, backward = bncpu.batch_norm_infer, bncpu.batch_norm_infer_backward
                    forward(p.x, *statistics, mask=mask, **fused)
                    of = statistics
                else:
                    backward = bncpu.batch_norm_backward
                    of = bncpu.batch_norm_train(p.x, mask=mask, **fused)[1:]
                expected_dx = backward(p.dy, p.x, *of, mask=mask, **fused).dx
                dy, dresidual = p.dy.copy(), np.empty_like(p.dy)
                got = backward(dy, p.x, *of, mask=mask, out=dy, residual=dresidual, **fused)
                np.testing.assert_array_equal(got.dx, expected_dx)


def beside_kernels(tally, _quick):
    """Try the pool from several threads, Python functions on the team's, and the streams."""
    x = normal(tally.rng, (64, 16, 1025), np.dtype(np.float32))  # its results come from the pool
    expected = bncpu.batch_norm_train(x).y

    def call(_):
        np.testing.assert_array_equal(bncpu.batch_norm_train(x, num_threads=1).y, expected)

    with concurrent.futures.ThreadPoolExecutor(3) as executor:
        list(executor.map(call, range(6)))
    assert pool.kept() >= x.nbytes
    rows, zero, one = np.zeros((8, 33), np.float32), np.zeros(1), np.ones(1)

    def work(i):
        rows[i] = bncpu.batch_norm_infer(x[:1, :1, :33] + i, zero, one, num_threads=1)[0, 0]

    team.share_out(work, len(rows), 3)
    assert np.all(np.diff(rows, axis=0) > 0)
    kernels, flat = bncpu.cpu.kernels, x.reshape(-1)
    to = np.empty_like(flat)
    for threads, past in itertools.product(THREADS, (False, True)):
        kernels.stream_copy(flat, to, threads, non_temporal=past)
        np.testing.assert_array_equal(to, flat)
        kernels.stream_triad(flat, flat, to, threads, non_temporal=past)
        kernels.stream_read(flat, threads)
    tally.cases += 3
    tally.calls += 1 + 6 + 8 + 3 * 2 * len(THREADS)


GRID = (sizes, layouts, in_place, beside_kernels)


# ---- Lies, told to the kernels below the checks


LARGE = 1 << 17  # a row; twelve are cut into parts for several threads


def _lie(kernels, dtype, *, columns=False, rows=1, run=64, x=None, out=None, step=None, threads=1):
    """Infer one channel of a geometry that is not the arrays', whose results are step apart."""
    x = np.ones(rows * run, dtype) if x is None else x
    out = np.empty(rows * run, dtype) if out is None else out
    places = [(None, run, run), (None, run if step is None else step, run)]
    geometry = SimpleNamespace(
        columns=columns, rows=rows, channels=1, run=run, rows_per_plane=rows, places=places
    )
    one = np.ones(1)
    kernels.infer(geometry, x, None, out, None, False, one, one, None, None, 0.0, threads)


def read_beyond(kernels, dtype):
    _lie(kernels, dtype, x=np.ones(64 - 1, dtype))


def write_beyond(kernels, dtype):
    _lie(kernels, dtype, out=np.empty(64 - 1, dtype))


def write_beyond_in_columns(kernels, dtype):
    _lie(kernels, dtype, columns=True, rows=9, run=7, out=np.empty(9 * 7 - 1, dtype))


def overflow(kernels, _dtype):
    kernels.tile_plan(False, 1 << 62, 8, 64)


def write_twice(kernels, dtype):
    """Rows in turn on three threads, all into the memory of the first."""
    _lie(kernels, dtype, rows=12, run=LARGE, out=np.empty(LARGE, dtype), step=0, threads=3)


def read_while_written(kernels, dtype):
    """Rows on three threads, each of which writes where the next one reads at that time."""
    memory, share = np.ones(16 * LARGE, dtype), 4 * LARGE
    _lie(kernels, dtype, rows=12, run=LARGE, x=memory[:-share], out=memory[share:], threads=3)


PLANTS = {
    plant.__name__: plant
    for plant in (
        *(read_beyond, write_beyond, write_beyond_in_columns, overflow),
        *(write_twice, read_while_written),
    )
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("address", "thread"), help="the sanitizer that watches")
    parser.add_argument("level", help="the kernels to compute with")
    parser.add_argument("--quick", action="store_true", help="a smaller grid")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers")
    parser.add_argument("--plant", choices=PLANTS, help="tell this lie, in --dtype")
    parser.add_argument("--dtype", default="float32", choices=[d.name for d in DTYPES])
    options = parser.parse_args()
    with bncpu.cpu.use_level(options.level):
        if options.plant:
            dtype = next(d for d in DTYPES if d.name == options.dtype)
            # The kernels know bfloat16 by its bits.
            dtype = np.dtype(np.uint16) if dtype.name == "bfloat16" else dtype
            PLANTS[options.plant](bncpu.cpu.kernels, dtype)
            return
        start = time.monotonic()
        tally = Tally(options.seed, threads=options.kind == "thread")
        for part in GRID:
            part(tally, options.quick)
    seconds = time.monotonic() - start
    print(json.dumps({"cases": tally.cases, "calls": tally.calls, "seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main()
