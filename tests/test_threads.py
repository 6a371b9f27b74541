"""Threads: as many as asked for, the same bits for any number, and none in anybody's way."""

import concurrent.futures
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import threadpoolctl
from accuracy import assert_mask, assert_same_bits
from cases import FLOATS, HALVES, new_mask, normal
from forms import EVERYTHING, PLAIN, RELU, SOME_FORMS, assert_same_results, run
from forms import problem as problem_of

import bncpu
from bncpu.threads import number_of_threads, share_out

NUMBERS = (1, 2, 3, 7)

# Many channels, which go to threads tile by tile; few large ones, which the threads share; and
# channels innermost, both narrow and wide. All are too large for the serial shortcut.
SHAPES = {
    "many": ((16, 64, 28, 28), 1, "c"),
    "many_short": ((32, 513, 7, 7), 1, "c"),
    "odd": ((9, 97, 33, 35), 1, "c"),
    "few": ((16, 2, 256, 256), 1, "c"),
    "one": ((1, 1, 1024, 1025), 1, "c"),
    "three": ((5, 3, 131_073), 1, "c"),
    "cropped": ((8, 17, 63, 65), 1, "cropped"),
    "columns": ((3000, 300), 1, "c"),
    "narrow_columns": ((200_001, 5), 1, "c"),
    "channels_last": ((8, 33, 56, 57), 1, "channels_last"),
    "rows_in_channel_0": ((3, 400_001), 0, "c"),
}


def problem(rng, which, dtype=np.float32):
    shape, axis, layout = SHAPES[which]
    return problem_of(rng, shape, np.dtype(dtype), axis, layout)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES], ids=str)
@pytest.mark.parametrize("which", SHAPES)
def test_any_number_gives_the_same_bits(rng, dtype, which):
    p = problem(rng, which, dtype)
    for form in SOME_FORMS[dtype.name]:
        expected = run(form, p, num_threads=NUMBERS[0])
        # For time's sake not all of them at a time.
        for number in rng.permutation(NUMBERS[1:])[: 2 if dtype == np.float32 else 1]:
            got = run(form, p, num_threads=number)
            assert_same_results(got, expected, f"on {number} threads")


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES], ids=str)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((20_001, 3, 7), 1), ((3, 20_001, 7), 1), ((9, 3, 28_001), 1), ((20_001, 33), -1)],
    ids=str,
)
def test_threads_share_the_bytes_of_a_mask(rng, dtype, shape, axis):
    """Rows that begin and end within a byte: two threads set bits of one, and none is lost."""
    x = rng.integers(-1, 2, shape).astype(dtype)
    mean, var = np.zeros(shape[axis]), np.ones(shape[axis])
    y = np.empty_like(x)
    for number in (2, 3, 7) * 3:
        mask = new_mask(x)
        fused = {"activation": "relu", "mask": mask, "axis": axis, "num_threads": number}
        bncpu.batch_norm_infer(x, mean, var, out=y, **fused)
        assert_mask(mask, x, y)
        mask[...] = 0xFF
        bncpu.batch_norm_train(x, out=y, **fused)
        assert_mask(mask, x, y)


@pytest.mark.usefixtures("default_threads")
def test_set_num_threads(rng):
    p = problem(rng, "many")
    expected = run(EVERYTHING, p)
    for number in NUMBERS:
        bncpu.set_num_threads(number)
        assert bncpu.get_num_threads() == number
        assert_same_results(run(EVERYTHING, p), expected, f"on {number} threads")
    bncpu.set_num_threads(None)
    assert bncpu.get_num_threads() >= 1


@pytest.mark.usefixtures("default_threads")
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        (1025, ValueError),
        (10**6, ValueError),
        (2**31, ValueError),
        (1.5, TypeError),
        ("2", TypeError),
    ],
)
def test_what_is_no_number_of_threads(value, error):
    """OpenMP would end the process over threads that it cannot start."""
    before = bncpu.get_num_threads()
    expected = "1 to 1024" if error is ValueError else "an integer"
    with pytest.raises(error, match=rf"^num_threads: expected {expected}; got "):
        bncpu.set_num_threads(value)
    assert bncpu.get_num_threads() == before


def test_numpy_integers_are_numbers_of_threads(rng):
    x = normal(rng, (9, 3), np.float32)
    assert_same_bits(
        bncpu.batch_norm_train(x, num_threads=np.int64(2)).y, bncpu.batch_norm_train(x).y
    )


@pytest.mark.usefixtures("default_threads")
def test_threadpoolctl_limits():
    with threadpoolctl.threadpool_limits(1, user_api="openmp"):
        assert bncpu.get_num_threads() == 1
    with threadpoolctl.threadpool_limits(3, user_api="openmp"):
        assert bncpu.get_num_threads() == 3


# Prints get_num_threads(), how many threads of this process a large call has left behind, and the
# bits of its result. Without NumPy's BLAS in the way: its threads are there before the call.
COUNT_THREADS = """
import contextlib, hashlib, os
import numpy as np
import bncpu
from bncpu.threads import number_of_threads, share_out
{setup}
x = (np.arange(16 * 64 * 784) % 1013).astype(np.float32).reshape(16, 64, 28, 28)
before = len(os.listdir("/proc/self/task"))
with {context}:
    number = bncpu.get_num_threads()
    y = bncpu.batch_norm_train(x, {arguments}).y
after = len(os.listdir("/proc/self/task"))
print(number, after - before + 1, hashlib.sha256(y.tobytes()).hexdigest())
"""


def count_threads(*, setup="", context="contextlib.nullcontext()", arguments="", environment=()):
    code = COUNT_THREADS.format(setup=setup, context=context, arguments=arguments)
    cleaned = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "BNCPU_NUM"))}
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=cleaned | dict(environment),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    number, used, digest = run.stdout.split()
    return int(number), int(used), digest


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc"
)
needs_openmp = pytest.mark.skipif(
    not any(pool["user_api"] == "openmp" for pool in threadpoolctl.threadpool_info()),
    reason="a serial build",
)


@needs_proc
@needs_openmp
def test_the_number_asked_for_is_the_number_used():
    # NumPy's BLAS is left alone: it would start threads of its own.
    limit = "__import__('threadpoolctl').threadpool_limits({}, user_api='openmp')"
    one = {"OMP_NUM_THREADS": "1"}
    results = [
        (1, count_threads(environment=one)),
        (3, count_threads(environment={"OMP_NUM_THREADS": "3"})),
        (1, count_threads(setup="bncpu.set_num_threads(1)")),
        (3, count_threads(setup="bncpu.set_num_threads(3)")),
        (2, count_threads(setup="bncpu.set_num_threads(2)", environment=one)),
        (1, count_threads(context=limit.format(1))),
        (2, count_threads(context=limit.format(2), environment=one)),
    ]
    for expected, (number, used, _) in results:
        assert number == used == expected
    # An argument of the call goes before all of them, for that call.
    calls = [
        (1, count_threads(arguments="num_threads=1")),
        (3, count_threads(arguments="num_threads=3", environment=one)),
        (1, count_threads(arguments="num_threads=1", setup="bncpu.set_num_threads(3)")),
    ]
    for expected, (_, used, _) in calls:
        assert used == expected
    assert len({digest for _, (_, _, digest) in results + calls}) == 1


@needs_proc
@needs_openmp
def test_small_problems_start_no_threads():
    setup = "bncpu.batch_norm_train(np.ones((8, 16), np.float32), num_threads=4)"
    code = f"import os, bncpu, numpy as np\n{setup}\nprint(len(os.listdir('/proc/self/task')))"
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert run.stdout.strip() == "1"


@pytest.mark.parametrize("number", [1, 2])
def test_the_gil_is_released(rng, number):
    """Another Python thread runs during a kernel.

    With a switch interval of many seconds a thread gets the interpreter only when somebody gives
    it away, which between the gate and the check nothing but the kernel does. How soon the other
    thread wakes up is the operating system's choice, so there are several tries.
    """
    x = normal(rng, (8, 3, 900, 901), np.float32)
    out = np.empty_like(x)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    try:
        seen = False
        for _ in range(20):
            gate, ran = threading.Lock(), []
            gate.acquire()

            def other(gate=gate, ran=ran):
                with gate:
                    ran.append(True)

            thread = threading.Thread(target=other)
            thread.start()
            gate.release()
            before = bool(ran)
            bncpu.batch_norm_train(x, out=out, num_threads=number)
            seen = bool(ran) and not before
            thread.join()
            if seen:
                break
    finally:
        sys.setswitchinterval(interval)
    assert seen, "no other thread ran during a kernel"


@pytest.mark.usefixtures("level")
def test_concurrent_calls(rng):
    """Calls from several Python threads, of different sizes and numbers of threads, at once."""
    names = ["many", "few", "columns", "three"]
    forms = [PLAIN, RELU, EVERYTHING]
    problems = {name: problem(rng, name) for name in names}
    expected = {
        (name, form): run(form, problems[name], num_threads=1) for name in names for form in forms
    }
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        futures = [
            ((name, form), pool.submit(run, form, problems[name], num_threads=1 + i % 3))
            for i, name in enumerate(names)
            for form in forms
        ]
        for which, future in futures:
            assert_same_results(future.result(timeout=120), expected[which], str(which))


def test_concurrent_small_calls(rng):
    x = [normal(rng, (8, 16 + i), np.float32) for i in range(8)]
    expected = [bncpu.batch_norm_train(a).y for a in x]

    def many(i):
        return [bncpu.batch_norm_train(x[i]).y for _ in range(200)]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for i, results in enumerate(pool.map(many, range(8), timeout=120)):
            for y in results:
                assert_same_bits(y, expected[i])


def _bits(results):
    return {name: a.tobytes() for name, a in results.items() if a is not None}


def _in_a_child(pipe, p):
    share_out(lambda _: None, 2)
    pipe.send((bncpu.get_num_threads(), _bits(run(EVERYTHING, p))))
    pipe.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("which", ["many", "few"])
def test_a_forked_child_computes_and_does_not_hang(rng, which):
    """Threads of OpenMP do not survive a fork; a child that waits for them waits forever."""
    p = problem(rng, which)
    expected = run(EVERYTHING, p, num_threads=2)  # the parent's team exists from here on
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_in_a_child, args=(sender, p))
    with warnings.catch_warnings():
        # What Python 3.12 warns of is what is tested here.
        warnings.simplefilter("ignore", DeprecationWarning)
        child.start()
    try:
        assert receiver.poll(60), "the child hangs"
        number, bits = receiver.recv()
        child.join(60)
        assert child.exitcode == 0
    finally:
        if child.is_alive():
            child.kill()
            child.join()
        receiver.close()
        sender.close()
    assert number == 1
    assert bits == _bits(expected)
    # And the parent still has its threads.
    assert_same_results(run(EVERYTHING, p, num_threads=2), expected)


@pytest.mark.usefixtures("default_threads")
def test_show_config(capsys):
    """One line for each fact: its name, and what is so in this process."""
    bncpu.set_num_threads(3)
    bncpu.show_config()
    lines = capsys.readouterr().out.splitlines()
    facts = bncpu.config()
    assert len(lines) == len(facts)
    shown = {}
    for name, line in zip(facts, lines, strict=True):
        assert line.startswith(f"{name} ")
        shown[name] = line.removeprefix(name).strip()
    assert shown["bncpu"] == bncpu.__version__
    assert shown["python"] == platform.python_version()
    assert shown["numpy"] == np.__version__
    assert shown["levels compiled"] == ", ".join(bncpu.cpu.compiled_levels())
    assert shown["levels runnable"] == ", ".join(bncpu.cpu.runnable_levels())
    assert shown["level chosen"] == bncpu.cpu.level
    assert shown["threads"] == "3"
    try:
        assert shown["cupy"] == __import__("cupy").__version__
    except ImportError:
        assert shown["cupy"] == "absent"
    loaded = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "openmp"]
    if not loaded:
        assert shown["openmp"] == "absent (serial build)"
    else:
        assert re.match(r"20\d{4}\b", shown["openmp"])


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_share_out(threads):
    done = []
    share_out(done.append, threads)
    assert sorted(done) == list(range(threads))


def test_share_out_raises_when_all_are_done():
    done = []

    def work(i):
        if i == 1:
            raise KeyError("one of them")
        done.append(i)

    with pytest.raises(KeyError, match="one of them"):
        share_out(work, 3)
    assert set(done) <= {0, 2}
    share_out(done.append, 2)  # and the threads serve again


@pytest.mark.usefixtures("default_threads")
def test_a_number_of_threads_for_a_while():
    bncpu.set_num_threads(None)
    before = bncpu.get_num_threads()
    with number_of_threads(before + 3):
        assert bncpu.get_num_threads() == before + 3
        with pytest.raises(ValueError, match="num_threads: expected 1 to"), number_of_threads(0):
            pass
        assert bncpu.get_num_threads() == before + 3
    with threadpoolctl.threadpool_limits(1), number_of_threads(1):
        pass
    assert bncpu.get_num_threads() == before
