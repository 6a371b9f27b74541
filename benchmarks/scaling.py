"""What it costs to share a batch: the exchange, a layer, a training step, in Markdown.

    mpiexec -n 4 python benchmarks/scaling.py
    mpiexec -n 4 python benchmarks/scaling.py --quick

Ranks start each measurement together, and a time is that of the slowest rank. With more ranks than
cores, or other work on them, it holds the wait for a core as well: of the rounds, the median and
the fastest tenth are told. Contenders take turns in every round. docs/scaling.md has the lessons.
"""

import argparse
import time

import numpy as np
from mpi4py import MPI

import bncpu
from bncpu import distributed, nn
from bncpu.nn.parallel import Ranks

COMM = MPI.COMM_WORLD
CHANNELS = (16, 64, 256, 1024, 2048)
LAYERS = ((8, 64, 56, 56), (8, 256, 28, 28), (8, 2048, 7, 7))  # per rank
HIDDEN = (100, 1000)
BATCH = 64  # per rank
INPUTS, CLASSES = 784, 10
ROUNDS = 1000  # of the exchange, and a tenth of the rest


def medians(rounds, *contenders):
    """Return each one's median time and that of the fastest tenth, of the slowest rank a round."""
    times = np.empty((rounds, len(contenders)))
    for row in range(-2, rounds):  # the first two warm up
        for i, contender in enumerate(contenders):
            COMM.Barrier()
            start = time.perf_counter()
            contender()
            times[max(row, 0), i] = time.perf_counter() - start
    COMM.Allreduce(MPI.IN_PLACE, times, MPI.MAX)
    return [
        " / ".join(f"{1e6 * each:.0f}" if each > 1e-5 else f"{1e6 * each:.1f}" for each in pair)
        for pair in np.quantile(times, (0.5, 0.1), axis=0).T
    ]


def table(title, *columns):
    if COMM.rank == 0:
        print(f"\n### {title}, {COMM.size} ranks, microseconds (median / fastest tenth)\n")
        print("|", " | ".join(columns), "|")
        print("|" + "---|" * len(columns), flush=True)


def row(*cells):
    if COMM.rank == 0:
        print("|", " | ".join(map(str, cells)), "|", flush=True)


def exchange(rounds):
    """Measure the message of a forward, and what else could carry 2C + 1 numbers."""
    table("Exchange", "C", "Allgather", "with merging", "Allreduce of 2C + 1")
    for c in CHANNELS:
        part = np.random.default_rng(COMM.rank).random(2 * c + 1)
        part[0] = 1000.0
        rows, total = np.empty((COMM.size, 2 * c + 1)), np.empty(2 * c + 1)

        def gather(part=part, rows=rows):
            COMM.Allgather(part, rows)

        moments = bncpu.Moments(1000, part[1 : c + 1], part[c + 1 :])

        def merge(moments=moments):
            distributed.merge_moments(moments, comm=COMM)

        def reduce(part=part, total=total):
            COMM.Allreduce(part, total)

        row(c, *medians(rounds, gather, merge, reduce))


def layers(rounds):
    """Measure a layer against one that normalises by its own rank's batch."""
    columns = ("N, C, H, W of a rank", "forward", "alone", "backward", "alone")
    table("SyncBatchNorm, float32", *columns)
    for shape in LAYERS:
        rng = np.random.default_rng(COMM.rank)
        x, dy = rng.standard_normal((2, *shape), np.float32)
        y, dx = np.empty((2, *shape), np.float32)
        shared = distributed.SyncBatchNorm(shape[1], comm=COMM)
        alone = bncpu.BatchNorm(shape[1])
        calls = [
            lambda layer=layer, method=method, given=given, out=out: getattr(layer, method)(
                given, out=out
            )
            for method, given, out in (("forward", x, y), ("backward", dy, dx))
            for layer in (shared, alone)
        ]
        row(shape, *medians(rounds, *calls))


def steps(rounds):
    """Measure gradients in one message after backward, and layer by layer while it goes on."""
    columns = ("hidden", "MB of gradients", "no exchange", "one message", "a message per array")
    table("Training step, float32", *columns, "each as soon as it is there")
    for hidden in HIDDEN:
        rng = np.random.default_rng(0)
        sizes = [INPUTS, hidden, hidden, hidden, CLASSES]
        model = nn.fully_connected(sizes, rng=rng, comm=COMM)
        x = rng.standard_normal((BATCH, INPUTS), np.float32)
        dlogits = rng.standard_normal((BATCH, CLASSES), np.float32)
        ranks = Ranks(COMM, BATCH)

        def alone(model=model, x=x, dlogits=dlogits):
            model.forward(x)
            model.backward(dlogits)

        def one_message(model=model, alone=alone, ranks=ranks):
            alone()
            ranks.add_up(model.gradients())

        def each_array(model=model, alone=alone):
            alone()
            for gradient in model.gradients().values():
                COMM.Allreduce(MPI.IN_PLACE, gradient)

        def layer_by_layer(model=model, x=x, dlogits=dlogits):
            model.forward(x)
            dy, requests = dlogits, []
            for layer in reversed(model.layers):
                dy = layer.backward(dy)
                requests += [
                    COMM.Iallreduce(MPI.IN_PLACE, gradient)
                    for gradient in nn.base.gradients_of(layer).values()
                ]
            MPI.Request.Waitall(requests)

        contenders = (alone, one_message, each_array, layer_by_layer)
        alone()
        size = sum(gradient.nbytes for gradient in model.gradients().values())
        row(hidden, f"{size / 1e6:.2f}", *medians(rounds, *contenders))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds")
    rounds = ROUNDS // 10 if parser.parse_args(argv).quick else ROUNDS
    exchange(rounds)
    layers(max(1, rounds // 10))
    steps(max(1, rounds // 10))


if __name__ == "__main__":
    main()
