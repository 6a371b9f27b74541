"""bncpu and the streaming kernels as contenders.

The arguments of every call are put together before the clock runs: on small arrays that would be
much of what is timed.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from bncpu import cpu
from bncpu.bench.operations import EPS, STREAMS
from bncpu.functional import (
    batch_moments,
    batch_norm_backward,
    batch_norm_infer,
    batch_norm_infer_backward,
    batch_norm_train,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from bncpu.bench.measure import Contender
    from bncpu.bench.operations import Array, Arrays, Call, Operation, Problem


def ours(problem: Problem, operation: Operation, threads: int, *, allocate: bool = False) -> Call:
    """Return bncpu's call of an operation on the next set of arrays.

    It writes into a given array, or, with `allocate`, into a new one each time.
    """
    gamma, beta, mean, invstd = problem.gamma, problem.beta, problem.mean, problem.invstd
    given: dict[str, Any] = {"axis": problem.axis, "num_threads": threads}
    if operation.relu:
        given["activation"] = "relu"
        if operation.backward and not operation.mask:
            given["beta"] = beta

    def bind(arrays: Arrays) -> Call:
        x, dy, out, dresidual, mask = arrays
        of_set: dict[str, Any] = {} if allocate else {"out": out}
        if operation.mask:
            of_set["mask"] = mask
        if operation.add:
            of_set["residual"] = dy if operation.forward else True if allocate else dresidual
        calls: dict[str, Callable[..., object]] = {
            "train": partial(batch_norm_train, x, gamma, beta, eps=EPS),
            "infer": partial(batch_norm_infer, x, mean, problem.var, gamma, beta, eps=EPS),
            "backward": partial(batch_norm_backward, dy, x, mean, invstd, gamma),
            "infer_backward": partial(
                batch_norm_infer_backward, dy, x, mean, problem.var, gamma, eps=EPS
            ),
        }
        return partial(calls[operation.function], **given, **of_set)

    if operation.function == "moments":
        return problem.rotating([partial(batch_moments, a.x, **given) for a in problem.sets])
    return problem.rotating([bind(arrays) for arrays in problem.sets])


def streams(problem: Problem, kind: str, threads: int) -> dict[str, Contender]:
    """Return the streaming kernels of a kind: with plain and with non-temporal stores, by name.

    On a GPU there is one, its own copy.
    """
    if problem.device == "cuda":
        from bncpu.bench import gpu

        return {kind: gpu.copy(problem)}
    kernels = cpu.kernels

    def bind(arrays: Arrays, non_temporal: bool) -> Call:
        x, dy, out = (as_real(array) for array in arrays[:3])
        if kind == "read":
            return partial(kernels.stream_read, x, threads)
        if kind == "copy":
            return partial(kernels.stream_copy, x, out, threads, non_temporal=non_temporal)
        return partial(kernels.stream_triad, x, dy, out, threads, non_temporal=non_temporal)

    stores = {kind: False} if kind == "read" else {kind: False, f"{kind}, non-temporal": True}
    return {
        name: problem.timed(
            problem.rotating([bind(arrays, non_temporal) for arrays in problem.sets])
        )
        for name, non_temporal in stores.items()
    }


def stream_bytes(problem: Problem, kind: str) -> int:
    """Return the bytes that a streaming kernel of a kind moves."""
    return STREAMS[kind] * as_real(problem.sets[0].x).nbytes


def as_real(array: Array) -> Array:
    """Return memory as a row of float32 or float64; an odd half number at the end falls off."""
    flat = array.reshape(-1)
    return flat if flat.itemsize > 2 else flat[: flat.size // 2 * 2].view("float32")
