"""bncpu beside its peers, operation by operation and shape by shape: ``pytest benchmarks``.

A group is an operation on a shape; its members are the contenders, so that pytest-benchmark prints
them side by side. `extra_info` carries the fewest bytes that can cross memory, the speed that
makes, and the fraction of a streaming copy, triad or read, measured just before. For contenders
that truly take turns see ``bncpu bench`` and tables.py. pytest-benchmark's own options apply, as
``--benchmark-max-time=0.2`` for a quicker run.
"""

import functools
import statistics

import onednn
import pytest

import bncpu
from bncpu.bench import peers
from bncpu.bench.contenders import ours, stream_bytes, streams
from bncpu.bench.measure import Timed, measure
from bncpu.bench.operations import BATCH, OPERATIONS, QUICK, RESNET50, Problem

MAIN = ("train", "backward")
FUSED = ("train_relu", "train_add_relu", "infer", "backward_relu", "backward_add_relu")
OTHER = ("infer_backward", "moments")
CASES = [((BATCH, *shape), name) for shape in RESNET50 for name in MAIN] + [
    ((BATCH, *shape), name) for shape in QUICK for name in FUSED + OTHER
]
# oneDNN runs in a process of its own, which says how long it took.
ON_ITS_CLOCK = pytest.mark.benchmark(timer=onednn.clock)
CONTENDERS = [
    "bncpu",
    "bncpu, allocating",
    "numpy",
    "torch",
    "torch, out=",
    "jax",
    *(pytest.param(f"onednn {layout}", marks=ON_ITS_CLOCK) for layout in onednn.LAYOUTS),
]


@functools.lru_cache(maxsize=1)
def problem_of(shape):
    """Keep one shape's arrays, which are many megabytes, until another's are needed."""
    return Problem(shape, operations=OPERATIONS.values())


@functools.cache
def streaming_speed(shape, kind):
    """Return the bytes per second of the faster streaming kernel."""
    problem = problem_of(shape)
    calls = streams(problem, kind, bncpu.get_num_threads())
    seconds = measure(calls, seconds=0.2).values()
    return stream_bytes(problem, kind) / min(map(statistics.median, seconds))


@pytest.fixture(scope="module")
def found():
    """Return the peers that are installed, their threads set to bncpu's."""
    with peers.using(peers.PEERS, bncpu.get_num_threads()) as there:
        yield there


def contender_of(name, problem, operation, found):
    """Return a contender, or skip the test with the reason for which there is none."""
    threads = bncpu.get_num_threads()
    peer = name.split(",")[0].split()[0]
    if peer == "bncpu":
        if name != "bncpu" and operation.function == "moments":
            pytest.skip("moments allocate nothing of x's size")
        return Timed(ours(problem, operation, threads, allocate=name != "bncpu"))
    if peer == "onednn":
        if reason := onednn.why_not():
            pytest.skip(f"onednn: {reason}")
        there = onednn.contenders(problem, operation, threads)
    elif peer in found.absent:
        pytest.skip(f"{peer}: {found.absent[peer]}")
    else:
        there = found.modules[peer].contenders(problem, operation)
    if name not in there:
        pytest.skip(f"{peer} has no {operation.name} of this kind")
    return there[name]


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize(("shape", "operation"), CASES, ids=str)
def test_operation(benchmark, shape, operation, name, found):
    operation = OPERATIONS[operation]
    problem = problem_of(shape)
    contender = contender_of(name, problem, operation, found)
    memory = streaming_speed(shape, operation.stream)
    bytes_ = operation.bytes(problem.size, problem.itemsize)
    benchmark.group = f"{operation.name} {shape}"
    benchmark.extra_info |= {
        "level": bncpu.cpu.level,
        "threads": bncpu.get_num_threads(),
        "bytes": bytes_,
    }
    if isinstance(contender, Timed):
        benchmark(contender.call)
    else:
        benchmark.pedantic(contender.turn, (0.0,), rounds=20, warmup_rounds=2)
    if benchmark.stats is None:  # --benchmark-disable
        return
    speed = bytes_ / benchmark.stats["median"]
    benchmark.extra_info |= {
        "GB/s": round(speed / 1e9, 2),
        "stream": operation.stream,
        "fraction of stream": round(speed / memory, 3),
    }
