"""`bncpu bench`: the measuring is bncpu.bench's."""

import argparse

from bncpu import bench as measuring
from bncpu.atomic import check_writable
from bncpu.bench import options
from bncpu.cli.numbers import positive
from bncpu.cli.ranks import Ranks

SUMMARY = options.SUMMARY
EXAMPLES = options.EXAMPLES


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Add the arguments to the command's parser."""
    options.add_arguments(sub, positive)


def run(args: argparse.Namespace, _: Ranks) -> None:
    """Run the benchmark."""
    for path in (args.json, args.plot):
        if path:
            check_writable(path)
    measuring.run(
        shapes=args.shape,
        operations=args.op,
        dtype=args.dtype,
        layout=args.layout,
        num_threads=args.threads,
        level=args.level,
        device=args.device,
        against=args.against,
        quick=args.quick,
        in_cache=args.in_cache,
        json_path=args.json,
        plot_path=args.plot,
    )
