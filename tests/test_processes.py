"""Children, however they are started, compute the parent's bits on threads that they have.

tests/processes.py starts them, one way after the other; it is a program of its own, so that what
hangs can be ended with all that it has started.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import threadpoolctl
from processes import METHODS, WAYS

PROGRAM = Path(__file__).with_name("processes.py")
LIMIT = 120  # seconds: of a machine that is busy with other things, or of a child that hangs
# Forks of a process that has run a parallel region.
FORKS = {name for name in WAYS if "fork" in name and ("forkserver" not in name or "pre" in name)}
FORKS |= {"joblib, multiprocessing"}

pytestmark = [
    pytest.mark.skipif(
        not any(pool["user_api"] == "openmp" for pool in threadpoolctl.threadpool_info()),
        reason="a serial build",
    ),
    pytest.mark.skipif("fork" not in METHODS, reason="this system has no fork"),
]


def run_way(name):
    """Run the program for one way; kill it and its children if they take too long."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    program = subprocess.Popen(
        [sys.executable, PROGRAM, "--json", name],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        out, errors = program.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(program.pid, signal.SIGKILL)
        program.communicate()
        pytest.fail(f"{name}: a child hangs, after {LIMIT} s")
    assert program.returncode == 0, errors
    return json.loads(out)


@pytest.mark.parametrize("name", WAYS)
def test_children(name):
    """The bits are the parent's; threads are one in a fork, and elsewhere as many as were set."""
    got = run_way(name)
    threads, _, expected = got["before"]
    assert got["children"]
    for in_child, started, digest in got["children"]:
        assert digest == expected, "a child has other bits"
        if name in FORKS:
            assert in_child == 1
            assert started in (0, None)
        elif "loky" not in name:  # which gives each of its processes a share of the cores
            assert in_child == threads
    # And the parent still has its threads.
    assert (got["after"][0], got["after"][2]) == (threads, expected)
