"""The peer PyTorch: as its users call it, and into given memory where it can.

Imports PyTorch; bncpu.bench.peers imports this file where PyTorch is wanted and there.
"""

from __future__ import annotations

import contextlib
import importlib
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from bncpu.bench.operations import EPS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bncpu.bench.measure import Contender
    from bncpu.bench.operations import Array, Operation, Problem

torch: Any = importlib.import_module("torch")


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Let PyTorch use that many threads inside a with statement."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_gpu() -> None:
    """Raise ValueError if this PyTorch computes on no GPU."""
    if not torch.cuda.is_available():
        raise ValueError("its build or this machine has no CUDA")


def tensor(array: Array, *, last: bool = False) -> Any:
    """Return a tensor on the array's memory; (N, ..., C) becomes (N, C, ...) with its strides."""
    half = array.dtype.name == "bfloat16"
    stored = array.view("int16") if half else array
    seen = torch.from_numpy(stored) if isinstance(array, np.ndarray) else torch.from_dlpack(stored)
    if half:
        seen = seen.view(torch.bfloat16)
    return seen.movedim(-1, 1) if last else seen


def contenders(problem: Problem, operation: Operation) -> dict[str, Contender]:
    """Return "torch", which allocates its results, and, of the forward, "torch, out=".

    On a GPU the gradient is that of `torch.autograd`, which chooses between cuDNN and PyTorch's own
    kernels as the forward did, and there is no "out=".
    """
    vectors = (problem.gamma, problem.beta, problem.mean, problem.var, problem.invstd)
    weight, bias, mean, var, invstd = (tensor(v.astype(problem.parameters)) for v in vectors)
    trains = operation.function in ("train", "backward")
    running = (None, None) if trains else (mean, var)
    saved = (mean, invstd) if trains else (None, None)
    every_axis_but_channels = [axis for axis in range(len(problem.shape)) if axis != 1]
    empty = [torch.empty_like(mean if trains else mean[:0]) for _ in range(2)]

    def moments(x: Any, *_: Any) -> object:
        return torch.var_mean(x, dim=every_axis_but_channels, correction=0)

    def forward(x: Any, residual: Any, _: Any) -> object:
        function = torch.nn.functional.batch_norm
        y = function(x, *running, weight, bias, training=trains, eps=EPS)
        if operation.add:
            y = y + residual
        return torch.nn.functional.relu(y) if operation.relu else y

    def forward_out(x: Any, residual: Any, out: Any) -> object:
        torch.native_batch_norm(x, weight, bias, *running, trains, 0.1, EPS, out=(out, *empty))
        if operation.add:
            out.add_(residual)
        return out.relu_() if operation.relu else out

    def backward(x: Any, dy: Any, out: Any) -> object:
        if operation.relu:  # out stands for the forward's result
            dy = torch.ops.aten.threshold_backward(dy, out, 0)
        return torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, *running, *saved, trains, EPS, [True] * 3
        )

    def recorded(x: Any, dy: Any) -> Callable[[], object]:
        inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
        if operation.add:
            inputs.append(dy.clone().requires_grad_())
        with torch.enable_grad():
            function = torch.nn.functional.batch_norm
            y = function(inputs[0], *running, *inputs[1:3], training=trains, eps=EPS)
            y = y + inputs[3] if operation.add else y
            y = torch.nn.functional.relu(y) if operation.relu else y
        return partial(torch.autograd.grad, y, inputs, dy, retain_graph=True)

    sets = [[tensor(a, last=problem.last) for a in arrays[:3]] for arrays in problem.sets]
    if problem.device == "cuda" and operation.backward:
        gradients = [recorded(x, dy) for x, dy, _ in sets]
        return {"torch": problem.timed(problem.rotating(gradients))}

    found: dict[str, Callable[..., object]]
    if operation.function == "moments":
        found = {"torch": moments}
    elif operation.forward:
        found = {"torch": forward, "torch, out=": forward_out}
        if problem.device == "cuda" or (problem.last and len(problem.shape) == 3):
            del found["torch, out="]  # wrong values in an (N, C, L) of these strides (2.13)
    else:
        found = {"torch": backward}
    return {
        name: problem.timed(problem.rotating([partial(call, *tensors) for tensors in sets]))
        for name, call in found.items()
    }
