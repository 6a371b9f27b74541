"""The peer JAX: the textbook's formulas, compiled by XLA for the CPU.

Imports JAX; bncpu.bench.peers imports this file where JAX is wanted and there.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

from bncpu.bench.operations import EPS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bncpu.bench.measure import Contender
    from bncpu.bench.operations import Operation, Problem

jax: Any = importlib.import_module("jax")
jnp: Any = importlib.import_module("jax.numpy")
jax.config.update("jax_enable_x64", True)


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Refuse any number but that of the cores, which XLA takes when it starts.

    Raises
    ------
    ValueError
        If it is another number.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if number != cores:
        raise ValueError(f"always computes on all {cores} cores, not on {number}")
    yield


def function(operation: Operation, axis: int, rank: int) -> Callable[..., Any]:
    """Return the operation as a compiled function of (x, dy, out, gamma, beta, mean, var, invstd).

    `dy` serves as residual too; `out` as the forward's result, whose sign the gradient of ReLU
    needs.
    """
    over = tuple(i for i in range(rank) if i != axis % rank)

    def along(vector: Any, x: Any) -> Any:
        shape = [1] * rank
        shape[axis] = x.shape[axis]
        return vector.astype(x.dtype).reshape(shape)

    def compute(x: Any, dy: Any, out: Any, *vectors: Any) -> Any:
        if operation.function == "moments":
            return x.mean(over), x.var(over)
        gamma, beta, mean, var, invstd = (along(vector, x) for vector in vectors)
        m = x.size // x.shape[axis]
        if operation.forward:
            if operation.function == "train":
                mean, var = x.mean(over, keepdims=True), x.var(over, keepdims=True)
            y = gamma * ((x - mean) * jax.lax.rsqrt(var + EPS)) + beta
            if operation.add:
                y = y + dy
            return jax.nn.relu(y) if operation.relu else y
        if operation.relu:
            dy = jnp.where(out > 0, dy, 0)
        dresidual = (dy,) if operation.add else ()
        if operation.function == "infer_backward":
            invstd = jax.lax.rsqrt(var + EPS)
        xhat = (x - mean) * invstd
        dbeta, dgamma = dy.sum(over, keepdims=True), (dy * xhat).sum(over, keepdims=True)
        if operation.function == "infer_backward":
            return gamma * invstd * dy, dgamma, dbeta, *dresidual
        return gamma * invstd * (dy - dbeta / m - xhat * (dgamma / m)), dgamma, dbeta, *dresidual

    return jax.jit(compute)  # type: ignore[no-any-return]


# A problem's arrays in JAX's memory: made once for all operations, dropped with the problem.
_sets: weakref.WeakKeyDictionary[Problem, list[list[Any]]] = weakref.WeakKeyDictionary()


def contenders(problem: Problem, operation: Operation) -> dict[str, Contender]:
    """Return "jax"; it allocates its results."""
    vectors = (problem.gamma, problem.beta, problem.mean, problem.var, problem.invstd)
    parameters = [jnp.asarray(vector.astype(problem.parameters)) for vector in vectors]
    if problem not in _sets:
        _sets[problem] = [[jnp.array(a) for a in arrays[:3]] for arrays in problem.sets]
    sets = _sets[problem]
    compiled = function(operation, problem.axis, len(problem.shape))

    def call(arrays: list[Any]) -> object:
        return jax.block_until_ready(compiled(*arrays, *parameters))

    return {"jax": problem.timed(problem.rotating([partial(call, arrays) for arrays in sets]))}
