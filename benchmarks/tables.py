"""The tables of what is promised about speed, filled in for this machine, in Markdown.

    python benchmarks/tables.py              # says which tables there are
    python benchmarks/tables.py fractions small --threads 2
    python benchmarks/tables.py all --json tables.json

Whatever stands in one row ran in turn in one process; medians. A value that falls short of its goal
is bold. PyTorch, JAX and oneDNN are measured where they are installed.
"""

import argparse
import sys
import time
from pathlib import Path

import against_memory
import against_peers
import small_calls
import sweeps
from setting import PEERS, QUICK_SHAPES, RESNET, peer_names, setting

from bncpu import bench
from bncpu.atomic import atomic_write, check_writable
from bncpu.bench import options as command
from bncpu.bench import report
from bncpu.cli.numbers import positive

TABLES = {
    "fractions": against_memory.fractions,
    "peers": against_peers.against,
    "untuned": against_peers.untuned,
    "dtypes": against_memory.dtypes,
    "layouts": against_peers.layouts,
    "levels": against_memory.levels,
    "threads": against_memory.threads,
    "small": small_calls.small,
    "sweep": sweeps.sweep,
}
SECONDS = 3.0
QUICK_SECONDS = 1.0


def parser():
    listed = "\n".join(
        f"  {name:<10} {(table.__doc__ or '').splitlines()[0]}" for name, table in TABLES.items()
    )
    made = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog=f"tables:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("tables", nargs="*", metavar="TABLE")
    made.add_argument("--threads", type=positive, metavar="N", help="default: as `bncpu info` says")
    made.add_argument("--shape", type=command.shape, action="append", metavar="N,C,H,W")
    made.add_argument(
        "--quick", action="store_true", help="four shapes of ResNet-50, a second each"
    )
    made.add_argument("--seconds", type=float, help=f"at least, for a shape (default: {SECONDS})")
    made.add_argument(
        "--against",
        type=peer_names,
        default=list(PEERS),
        metavar="NAME,...",
        help=f"peers: {', '.join(PEERS)}, none",
    )
    made.add_argument("--in-cache", action="store_true", help="do not rotate the arrays")
    made.add_argument("--json", type=Path, metavar="FILE")
    return made


def main(argv=None):
    """Print the tables that are asked for."""
    made = parser()
    args = made.parse_args(argv)
    if unknown := [name for name in args.tables if name not in (*TABLES, "all")]:
        made.error(f"no such table: {', '.join(unknown)} (there are {', '.join(TABLES)}, all)")
    if not args.tables:
        made.print_help()
        return
    if args.json:
        check_writable(args.json)
    threads = args.threads or bench.get_num_threads()
    rows = []
    with setting(
        args.against,
        threads,
        seconds=args.seconds or (QUICK_SECONDS if args.quick else SECONDS),
        shapes=args.shape or (QUICK_SHAPES if args.quick else RESNET),
        in_cache=args.in_cache,
    ) as (options, facts):
        for name in TABLES if "all" in args.tables else args.tables:
            begin = time.perf_counter()
            print(f"### {name}: {TABLES[name].__doc__}\n", flush=True)
            rows += TABLES[name](options)
            print(f"({name}: {time.perf_counter() - begin:.0f} s)", file=sys.stderr, flush=True)
    if args.json:
        with atomic_write(args.json) as file:
            file.write(report.document(facts, rows))


if __name__ == "__main__":
    main()
