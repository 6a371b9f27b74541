"""`bncpu moments`: population statistics of files, which bncpu.population computes."""

import argparse
import math
from pathlib import Path

import numpy as np

from bncpu import distributed, population
from bncpu.atomic import atomic_write, check_writable
from bncpu.cli.numbers import axes, positive
from bncpu.cli.ranks import Ranks

SUMMARY = "compute each channel's mean and variance over .npy files, larger than memory if need be"
EXAMPLES = """\
  bncpu moments images.npy
  bncpu moments part0.npy part1.npy --axis -1 --out population.npz
  mpiexec -n 4 bncpu moments --distributed part*.npy"""
TABLE_ROWS = 20


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Add the arguments to the command's parser."""
    sub.add_argument("files", nargs="+", metavar="FILE", help="arrays with the same channels")
    sub.add_argument("--axis", type=axes, default=1, metavar="N,...", help="channels (default: 1)")
    sub.add_argument(
        "--out",
        type=Path,
        default=Path("moments.npz"),
        metavar="FILE",
        help="gets count, mean, var and m2 (default: moments.npz)",
    )
    sub.add_argument(
        "--distributed",
        action="store_true",
        help="under mpiexec: the ranks share the files, or if they are given different ones, each "
        "reads its own",
    )
    sub.add_argument("--threads", type=positive, metavar="N", help="default: as bncpu info says")
    sub.add_argument("--no-progress", action="store_true", help="show no progress bar")


def run(args: argparse.Namespace, ranks: Ranks) -> None:
    """Compute population statistics of files, print them, and write them."""
    files = population.open_files(args.files, args.axis)
    shape = files[0].channels.shape
    part, parts = 0, 1
    if ranks.comm:
        lists, shapes = zip(*ranks.comm.allgather((args.files, shape)), strict=True)
        if len(set(shapes)) > 1:
            raise ValueError(f"FILE: expected the same channels on every rank; got {shapes}")
        if all(each == lists[0] for each in lists):
            part, parts = ranks.rank, ranks.size
    if ranks.rank == 0:
        check_writable(args.out)
    total = population.file_moments(
        files,
        part=part,
        parts=parts,
        num_threads=args.threads,
        progress=not args.no_progress and ranks.rank == 0,
    )
    if ranks.comm:
        total = distributed.merge_moments(total, comm=ranks.comm)
    if total.count == 0:
        raise ValueError("FILE: expected at least one value per channel; got none")
    if ranks.rank == 0:
        with atomic_write(args.out) as file:
            np.savez(file, count=total.count, mean=total.mean, var=total.var(), m2=total.m2)
    ranks.say(f"{total.count} values in each of {total.mean.size} channels")
    ranks.say(f"{'channel':>8}  {'mean':>12}  {'std':>12}")
    for c, (mean, var) in enumerate(zip(total.mean.flat, total.var().flat, strict=True)):
        if c == TABLE_ROWS:
            ranks.say(f"{'...':>8}")
            break
        ranks.say(f"{c:8d}  {mean:12.6g}  {math.sqrt(var):12.6g}")
    ranks.say(f"Moments: {args.out}")
