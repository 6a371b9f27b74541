"""Tensors to arrays and back, and the autograd Function over the public functions.

No tensor is copied: kernels read and write the memory of tensors, and results are arrays of bncpu,
whose large ones lie in memory that is kept (memory.py), seen by PyTorch as tensors. Gradients
come from the kernels; only where they shall be differentiated again (create_graph=True) are they
composed of PyTorch's operations. Which tensors get here is decided in modules.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np
import torch

from bncpu.functional import (
    batch_norm_backward,
    batch_norm_infer,
    batch_norm_infer_backward,
    batch_norm_train,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bncpu.torch.memory import Kept

    Array = NDArray[Any]

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class How(NamedTuple):
    """What a batch norm does besides its tensors.

    trains: by the batch's own statistics, or by the running ones.
    running_mean, running_var: tensors; to update if it trains, and None if there is nothing to.
    momentum: weight of the new value in them.
    eps: in the units of the variance.
    relu: whether ReLU comes last.
    kept: memory for the result and for the gradient of x.
    """

    trains: bool
    running_mean: Any
    running_var: Any
    momentum: float
    eps: float
    relu: bool
    kept: Kept


class _Ran(NamedTuple):
    # What a forward has computed: y, and what the backward needs of it.
    y: Array
    mean: Array
    spread: Array  # invstd if it trained, else the variance


def batch_norm(x: Any, weight: Any, bias: Any, residual: Any, how: How) -> Any:
    """Return y = act(batch_norm(x) + residual), recorded for autograd if anybody wants gradients.

    Parameters
    ----------
    x : tensor of float32, float64, float16 or bfloat16 on the CPU, shape (N, C, ...)
        Any strides.
    weight, bias : tensor, shape (C,), or None
    residual : tensor, shape and dtype of x, or None
        With `how.relu` alone.
    how : How
    """
    tensors = (x, weight, bias, residual)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _BatchNorm.apply(x, weight, bias, residual, how)
    return _tensor(_run(_array(x), weight, bias, residual, how).y)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, residual: Any, how: How) -> Any:
        mask = None if residual is None else torch.empty((x.numel() + 7) // 8, dtype=torch.uint8)
        array = _array(x)
        ran = _run(array, weight, bias, residual, how, mask, how.kept.take(array))
        how.kept.keep(ran.y)
        ctx.save_for_backward(x, weight, bias, mask)
        ctx.mean, ctx.spread = ran.mean, ran.spread
        if not how.trains:
            # The running statistics may have moved on when the gradients are asked for.
            ctx.mean, ctx.spread = ran.mean.astype(np.float64), ran.spread.astype(np.float64)
        ctx.how = how._replace(running_mean=None, running_var=None)
        return _tensor(ran.y)

    @staticmethod
    def backward(ctx: Any, dy: Any) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            return (*_composed(ctx, dy), None)
        x, weight, bias, mask = ctx.saved_tensors
        how = ctx.how
        given = (_array(dy), _array(x), ctx.mean, ctx.spread)
        out = how.kept.take(given[1])
        affine = (_per_channel(weight), _per_channel(bias))
        options: dict[str, Any] = {
            "activation": "relu" if how.relu else None,
            "mask": None if mask is None else mask.numpy(),
            "residual": mask is not None and ctx.needs_input_grad[3],
            "out": out,
            "num_threads": torch.get_num_threads(),
        }
        if how.trains:
            gradients = batch_norm_backward(*given, *affine, **options)
        else:
            gradients = batch_norm_infer_backward(*given, *affine, eps=how.eps, **options)
        if out is not None:
            how.kept.keep(out)
        return (
            _tensor(gradients.dx),
            None if weight is None else torch.from_numpy(gradients.dgamma).to(weight.dtype),
            None if bias is None else torch.from_numpy(gradients.dbeta).to(bias.dtype),
            None if gradients.dresidual is None else _tensor(gradients.dresidual),
            None,
        )


def _run(
    x: Array, weight: Any, bias: Any, residual: Any, how: How, mask: Any = None, out: Any = None
) -> _Ran:
    affine = (_per_channel(weight), _per_channel(bias))
    options: dict[str, Any] = {
        "eps": how.eps,
        "residual": None if residual is None else _array(residual),
        "activation": "relu" if how.relu else None,
        "mask": None if mask is None else mask.numpy(),
        "out": out,
        "num_threads": torch.get_num_threads(),
    }
    running: tuple[Any, Any] = (_per_channel(how.running_mean), _per_channel(how.running_var))
    if not how.trains:
        return _Ran(batch_norm_infer(x, *running, *affine, **options), *running)
    ran = batch_norm_train(
        x,
        *affine,
        running_mean=running[0],
        running_var=running[1],
        momentum=how.momentum,
        **options,
    )
    for tensor, values in zip((how.running_mean, how.running_var), running, strict=True):
        if tensor is not None and tensor.dtype.itemsize == 2:
            tensor.copy_(torch.from_numpy(values))
    return _Ran(*ran)


def _composed(ctx: Any, dy: Any) -> tuple[Any, ...]:
    """Return the gradients by PyTorch's operations on dy, x and weight, to be differentiated again.

    The equations of `bncpu.batch_norm_backward`, the batch's statistics written as functions of x.
    Where ReLU lets pass is a constant.
    """
    saved_x, weight, bias, mask = ctx.saved_tensors
    how, number = ctx.how, saved_x.size(1)
    wide = torch.promote_types(saved_x.dtype, torch.float32)
    x, dz = saved_x.to(wide), dy.to(wide)
    if how.relu:
        dz = dz * _passes(ctx).to(wide)
    tall = (1, number) + (1,) * (x.dim() - 2)
    axes = [a for a in range(x.dim()) if a != 1]
    if how.trains:
        centred = x - x.mean(axes, keepdim=True)
        invstd = (centred.square().mean(axes, keepdim=True) + how.eps).rsqrt()
    else:
        mean, var = (torch.from_numpy(a).view(tall) for a in (ctx.mean, ctx.spread))
        centred = (x - mean).to(wide)
        invstd = (var + how.eps).rsqrt().to(wide)
    xhat = centred * invstd
    dbeta, dgamma = dz.sum(axes), (dz * xhat).sum(axes)
    dx = dz
    if how.trains:
        m = x.numel() / number
        dx = dz - dbeta.view(tall) / m - xhat * (dgamma.view(tall) / m)
    dx = dx * invstd
    if weight is not None:
        dx = dx * weight.to(wide).view(tall)
    return (
        dx.to(saved_x.dtype),
        None if weight is None else dgamma.to(weight.dtype),
        None if bias is None else dbeta.to(bias.dtype),
        None if mask is None else dz.to(saved_x.dtype),
    )


def _passes(ctx: Any) -> Any:
    # Where ReLU lets the gradient pass, to the bit as the kernels have it.
    x, weight, bias, mask = ctx.saved_tensors
    array, how = _array(x), ctx.how
    if mask is not None:
        zeros, ones = np.zeros(x.size(1)), np.ones(x.size(1))
        options: dict[str, Any] = {"activation": "relu", "mask": mask.numpy(), "residual": True}
        passing = batch_norm_infer_backward(np.ones_like(array), array, zeros, ones, **options)
        assert passing.dresidual is not None
        return _tensor(passing.dresidual)
    affine = (_per_channel(weight), _per_channel(bias))
    if how.trains:
        y = batch_norm_train(array, *affine, eps=how.eps, activation="relu").y
    else:
        y = batch_norm_infer(array, ctx.mean, ctx.spread, *affine, eps=how.eps, activation="relu")
    return _tensor(y) != 0


def _array(tensor: Any) -> Array:
    """Return the tensor's memory as an array, bfloat16 as that of ml_dtypes."""
    tensor = tensor.detach()
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(_BFLOAT16)  # type: ignore[no-any-return]
    return tensor.numpy()  # type: ignore[no-any-return]


def _tensor(array: Array) -> Any:
    if array.dtype == _BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _per_channel(tensor: Any) -> Array | None:
    # The kernels take these in what they compute in; a half model has them in its own.
    if tensor is None:
        return None
    tensor = tensor.detach()
    array: Array = (tensor.float() if tensor.dtype.itemsize == 2 else tensor).numpy()
    return array
