"""`bncpu reproduce`: experiments of the paper, which bncpu.experiments runs and reports."""

import argparse
import inspect
from collections.abc import Sequence
from pathlib import Path

from bncpu import data, experiments
from bncpu.cli.numbers import natural, positive
from bncpu.cli.ranks import Ranks

SUMMARY = "measure the paper's claims: a page with figures, and a table of what held"
EXAMPLES = """\
  bncpu reproduce --list
  bncpu reproduce mnist --quick
  bncpu reproduce mnist naive --data-dir ~/data --out claims --seed 3
  bncpu reproduce all --dataset digits --jobs 4
Interrupted, the same command goes on with what is not finished."""
ALL = "all"


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Add the arguments to the command's parser."""
    sub.add_argument(
        "names",
        nargs="*",
        type=name,
        metavar="NAME",
        help=f"experiments as --list shows them, or {ALL}",
    )
    sub.add_argument("--list", action="store_true", help="show the experiments, and do nothing")
    size = sub.add_mutually_exclusive_group()
    size.add_argument(
        "--quick",
        dest="size",
        action="store_const",
        const="quick",
        help="under a minute each, to see how it looks; claims may need more than that to hold",
    )
    size.add_argument(
        "--full",
        dest="size",
        action="store_const",
        const="full",
        help="as long as in the paper, where that is feasible; hours, not minutes",
    )
    sub.set_defaults(size="default")
    sub.add_argument(
        "--dataset",
        choices=data.NAMES,
        help="on which to measure (default: the best for the experiment that is found; bncpu data "
        "lists them)",
    )
    sub.add_argument(
        "--data-dir", type=Path, metavar="FOLDER", help="holds the datasets (default: $BNCPU_DATA)"
    )
    sub.add_argument(
        "--seed", type=natural, default=0, metavar="N", help="the first one (default: 0)"
    )
    sub.add_argument(
        "--jobs",
        type=positive,
        metavar="N",
        help="processes that measure beside each other (default: as many as there are CPUs for)",
    )
    sub.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="gets results, figures and pages (default: bncpu-NAME, bncpu-reproduce for several)",
    )
    sub.add_argument("--no-progress", action="store_true", help="show no progress bar")


def run(args: argparse.Namespace, _: Ranks) -> None:
    """Run the experiments, or list them."""
    if args.list:
        print_experiments()
        return
    if not args.names:
        raise ValueError(f"NAME: expected an experiment or more, or {ALL}; --list shows them")
    names = list(experiments.EXPERIMENTS if ALL in args.names else dict.fromkeys(args.names))
    experiments.reproduce(
        names,
        args.out or default_folder(args.names, names),
        size=args.size,
        dataset=args.dataset,
        data_dir=args.data_dir,
        seed=args.seed,
        jobs=args.jobs,
        progress=not args.no_progress,
    )


def name(text: str) -> str:
    """Read the name of an experiment, or "all"."""
    if text != ALL and text not in experiments.EXPERIMENTS:
        known = ", ".join(experiments.EXPERIMENTS)
        raise argparse.ArgumentTypeError(f"expected {known} or {ALL}; got {text!r:.60}")
    return text


def default_folder(given: Sequence[str], names: Sequence[str]) -> Path:
    """Return where results go that are told no place."""
    return Path("bncpu-reproduce" if ALL in given or len(names) > 1 else f"bncpu-{names[0]}")


def print_experiments() -> None:
    """Print a table of the experiments."""
    rows = [
        (name, experiment.SECTION, (inspect.getdoc(experiment) or "").partition("\n")[0])
        for name, experiment in experiments.EXPERIMENTS.items()
    ]
    head = ("name", "in the paper", "what is measured")
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
