"""How fast calls are beside another library that uses OpenMP.

The threads of an OpenMP runtime wait for the next region awake, for some milliseconds, and while
they do so keep their cores from the threads of another runtime. Here each process measures one
case, and processes take turns: bncpu alone; the other library only imported, before or after bncpu;
and its parallel region just before every call. Where nothing runs before the call, one thread of
NumPy works for a while, so that bncpu's own threads have as long a pause.
"""

import argparse
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time

SIZES = {"1.6 MB": (8, 64, 28, 28), "26 MB": (32, 64, 56, 56)}
CASES = [
    ("alone", "last", "pause"),
    *(
        (name, order, before)
        for name in ("torch", "sklearn")
        for order in ("first", "last")
        for before in ("pause", "region")
    ),
]


def work_before(name, before):
    """Return what is done before every call."""
    import numpy as np

    if before == "pause":
        a, b = np.ones(1 << 20, np.float32), np.empty(1 << 20, np.float32)
        return lambda: np.add(a, 1, out=b)
    if name == "torch":
        import torch

        c, d = torch.ones(1 << 20), torch.empty(1 << 20)
        return lambda: torch.add(c, 1, out=d)
    from sklearn.metrics import pairwise_distances_argmin

    points = np.random.default_rng(1).random((8192, 4))
    return lambda: pairwise_distances_argmin(points, points[:8])


def measure(name, order, before, calls):
    """Print the median milliseconds of a training forward by size, and the runtimes loaded."""
    if order == "first":
        importlib.import_module(name)
    import numpy as np

    import bncpu

    if name != "alone":
        importlib.import_module(name)
    do_before = work_before(name, before)
    result = {}
    for label, shape in SIZES.items():
        x = np.random.default_rng(0).standard_normal(shape, np.float32)
        y, times = np.empty_like(x), []
        for _ in range(calls):
            do_before()
            begin = time.perf_counter()
            bncpu.batch_norm_train(x, out=y)
            times.append(time.perf_counter() - begin)
        result[label] = statistics.median(times[calls // 4 :]) * 1e3
    runtimes = bncpu.config()["openmp"].split(", ", 1)[-1]
    print(json.dumps({"ms": result, "runtimes": runtimes}))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="OMP_WAIT_POLICY=passive, and other variables of OpenMP, are passed on.",
    )
    parser.add_argument("--rounds", type=int, default=7, help="processes per case (default: 7)")
    parser.add_argument("--calls", type=int, default=60, help="calls per process (default: 60)")
    parser.add_argument("--library", help="torch or sklearn (default: both, where installed)")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        measure(*arguments.case, arguments.calls)
        return
    wanted = [arguments.library] if arguments.library else ["torch", "sklearn"]
    there = ["alone", *(name for name in wanted if importlib.util.find_spec(name))]
    cases = [case for case in CASES if case[0] in there]
    measured, runtimes = {case: [] for case in cases}, {}
    for _ in range(arguments.rounds):
        for case in cases:
            command = [sys.executable, __file__, "--calls", str(arguments.calls), "--case", *case]
            run = subprocess.run(
                command,
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=600,
                check=True,
            )
            told = json.loads(run.stdout)
            measured[case].append(told["ms"])
            runtimes[case] = told["runtimes"]
    print(f"{'library':<9} {'import':<7} {'before':<7}", end="")
    print("".join(f" {label:>9} {'ratio':>6}" for label in SIZES), " runtimes")
    for case, results in measured.items():
        print(f"{case[0]:<9} {case[1]:<7} {case[2]:<7}", end="")
        for label in SIZES:
            ms = statistics.median(r[label] for r in results)
            # Of processes that ran one after the other.
            ratios = (r[label] / a[label] for r, a in zip(results, measured[cases[0]], strict=True))
            print(f" {ms:>6.2f} ms {statistics.median(ratios):>6.2f}", end="")
        print(f"  {runtimes[case]}")


if __name__ == "__main__":
    main()
