"""bncpu beside its peers, operation by operation and shape by shape: ``pytest benchmarks``.

A group is an operation on a shape; its members are the contenders, so that pytest-benchmark prints
them side by side. `extra_info` carries the bytes that cross memory at least, the speed that makes,
and the fraction of a streaming copy (train) or triad (backward), measured just before. For medians
of contenders that truly take turns, see ``bncpu bench``.
"""

import functools

import pytest

import bncpu
from bncpu import bench

PEERS = ["bncpu", "numpy", "torch"]


@functools.lru_cache(maxsize=1)
def buffers_of(shape, dtype):
    """Keep one shape's arrays, which are many megabytes, until another's are needed."""
    return bench.Buffers(shape, dtype)


@functools.cache
def streaming_seconds(shape, dtype, operation):
    """Return the median time of the faster streaming kernel."""
    calls = bench.contenders(operation, buffers_of(shape, dtype))
    streams = {name: call for name, call in calls.items() if name.startswith("stream")}
    return min(bench.measure(streams, seconds=0.2).values())


@pytest.fixture(autouse=True, scope="module")
def torch_threads():
    """Give PyTorch as many threads as bncpu has."""
    torch = bench.import_torch()
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(bncpu.get_num_threads())
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("operation", bench.OPERATIONS)
@pytest.mark.parametrize("dtype", ["float32"])
@pytest.mark.parametrize("shape", [(bench.BATCH, *shape) for shape in bench.RESNET50], ids=str)
def test_batch_norm(benchmark, shape, dtype, operation, peer):
    if peer == "torch" and bench.import_torch() is None:
        pytest.skip("PyTorch is not installed")
    buffers = buffers_of(shape, dtype)
    seconds = streaming_seconds(shape, dtype, operation)
    benchmark.group = f"{operation} {shape} {dtype}"
    benchmark.extra_info["threads"] = bncpu.get_num_threads()
    benchmark.extra_info["level"] = bncpu.cpu.level
    benchmark.extra_info["bytes"] = buffers.bytes(operation)
    benchmark(bench.contenders(operation, buffers)[peer])
    if benchmark.stats is None:  # --benchmark-disable
        return
    median = benchmark.stats["median"]
    benchmark.extra_info["GB/s"] = round(buffers.bytes(operation) / median / 1e9, 2)
    benchmark.extra_info["fraction of streaming"] = round(seconds / median, 3)
