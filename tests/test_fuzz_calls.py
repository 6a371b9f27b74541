"""The program behind `make fuzz`: it counts, it says how a round is had again, and it can fail."""

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parent.parent / "tools" / "fuzz_calls.py"
# The program, with a property that 7 spoils.
BROKEN = """
import runpy, sys
sys.path[:0] = {path!r}
import pytest, test_wild_parts
from hypothesis import given, strategies as st

@given(st.integers(0, 9))
def test_broken(n):
    if n == 7:
        pytest.fail("seven")

test_wild_parts.test_broken = test_broken
sys.argv[0] = {tool!r}
runpy.run_path({tool!r}, run_name="__main__")
"""


def run(*command):
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=300, check=False
    )


def test_a_round():
    options = ["--seed", "5", "--round", "7", "--first", "3", "--examples", "8"]
    done = run(TOOL, *options, "--only", "test_any_merging")
    assert done.returncode == 0, done.stderr
    assert "seed 5: 14 examples in 2 rounds, 0 failures" in done.stdout
    done = run(TOOL, "--only", "nothing")
    assert done.returncode == 2
    assert "--only: expected some of test_" in done.stderr


def test_a_failure_says_how_it_is_repeated():
    code = BROKEN.format(
        path=[str(TOOL.parent.parent), str(TOOL.parent.parent / "tests")], tool=str(TOOL)
    )
    done = run("-c", code, "--seed", "1", "--round", "50", "--only", "test_broken")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "test_broken failed in round 0" in done.stdout
    assert "n=7" in done.stdout
    assert "--seed 1 --round 50 --first 0 --only test_broken" in done.stdout
