"""Run the property tests of the public functions for as many examples as asked: the long profile.

Each property is run in rounds, each round with a seed of its own that follows from --seed, the
round and the property; so a round can be had again, alone, and a run that was stopped goes on with
--first. Not a test runner: properties that take fixtures are left to pytest.
"""

import argparse
import functools
import importlib
import inspect
import os
import secrets
import sys
import time
import zlib
from pathlib import Path
from traceback import format_exception

from hypothesis import HealthCheck, Phase, seed, settings

# Threads that wait for one another had better sleep: a long run shares its machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("test_properties", "test_wild", "test_wild_parts")


def properties():
    """Return the property tests without fixtures, by name."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    return {
        name: test
        for module in map(importlib.import_module, MODULES)
        for name, test in vars(module).items()
        if hasattr(test, "hypothesis") and not inspect.signature(test).parameters
    }


def counted(name, test, counts):
    """Return a property's own function, which now counts the examples that it is given."""

    @functools.wraps(test)
    def once(*args, **kwargs):
        counts[name] += 1
        return test(*args, **kwargs)

    return once


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--examples", type=int, default=100_000, help="in all (default: 100000)")
    parser.add_argument("--round", type=int, default=500, help="examples of a property in a round")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="default: a new one")
    parser.add_argument("--first", type=int, default=0, help="the round to begin with, from 0")
    parser.add_argument("--only", action="append", help="a property's name; may be repeated")
    args = parser.parse_args()
    tests = properties()
    if unknown := sorted(set(args.only or ()) - set(tests)):
        parser.error(f"--only: expected some of {', '.join(tests)}; got {unknown[0]}")
    wanted = args.only or list(tests)
    print(f"seed {args.seed}: {args.examples} examples of {len(wanted)} properties", flush=True)

    how = settings(
        max_examples=args.round,
        deadline=None,
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    counts = dict.fromkeys(wanted, 0)
    for name in wanted:
        how(tests[name]).hypothesis.inner_test = counted(
            name, tests[name].hypothesis.inner_test, counts
        )
    start, number, failed = time.monotonic(), args.first, []
    while sum(counts.values()) < args.examples and not failed:
        for name in wanted:
            try:
                seed(zlib.crc32(f"{args.seed} {number} {name}".encode()))(tests[name])()
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a finding; pytest's own failures are no Exceptions
                failed.append(name)
                print(f"\n{name} failed in round {number}:\n{''.join(format_exception(error))}")
                print(
                    f"repeat with: {Path(sys.executable).name} tools/fuzz_calls.py "
                    f"--seed {args.seed} --round {args.round} --first {number} --only {name} "
                    "--examples 1",
                    flush=True,
                )
        number += 1
        done, seconds = sum(counts.values()), time.monotonic() - start
        print(
            f"round {number}: {done} examples in {seconds:.0f} s, "
            f"{1e3 * seconds / max(done, 1):.1f} ms each",
            flush=True,
        )
    for name, count in counts.items():
        print(f"{count:9d}  {name}{'  FAILED' * (name in failed)}")
    print(
        f"seed {args.seed}: {done} examples in {number - args.first} rounds, "
        f"{len(failed)} failures, {seconds:.0f} s"
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
