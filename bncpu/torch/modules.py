"""BatchNorm1d, 2d, 3d of torch.nn with the forward of bncpu, alone and fused with what follows.

Each is a subclass of torch.nn's own and adds no state, so that one can become the other by its
class alone (conversion.py). What the kernels do not take is left to torch.nn's forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from bncpu.torch.autograd import How, batch_norm
from bncpu.torch.memory import kept_for

if TYPE_CHECKING:
    from collections.abc import Callable

_outside_graphs: Callable[..., Any] | None = None  # _eager, for torch.compile to leave alone
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_REAL = (torch.float32, torch.float64)
_HALF = (torch.float16, torch.bfloat16)


class _OnKernels:
    """What a class of torch.nn beside it gets; `relu` says what comes last."""

    relu = False

    def torch_forward(self: Any, input: Any, residual: Any) -> Any:  # noqa: A002 - PyTorch's name
        """Return the same by PyTorch's own operations."""
        z = super().forward(input)  # type: ignore[misc]  # torch.nn's
        if residual is not None:
            z = z + residual
        return torch.nn.functional.relu(z) if self.relu else z


class _Alone(_OnKernels):
    def forward(self: Any, input: Any) -> Any:  # noqa: A002
        """Return y; whatever is not for the kernels goes to PyTorch's own.

        Parameters
        ----------
        input : tensor, shape (N, C, ...)

        Raises
        ------
        RuntimeError
            If the input is on another device than the module's parameters.
        """
        return _forward(self, input, None)


class _BehindReLU(_Alone):
    relu = True


class _BehindAddReLU(_OnKernels):
    relu = True

    def forward(self: Any, input: Any, residual: Any) -> Any:  # noqa: A002
        """Return relu(batch_norm(input) + residual).

        Parameters
        ----------
        input : tensor, shape (N, C, ...)
        residual : tensor
            Of the input's shape and dtype; what is otherwise broadcast or promoted by PyTorch.
        """
        return _forward(self, input, residual)


class BatchNorm1d(_Alone, torch.nn.BatchNorm1d):
    """torch.nn.BatchNorm1d on the kernels of bncpu.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As for torch.nn.BatchNorm1d.

    Notes
    -----
    As in `BatchNorm2d`; inputs are (N, C) or (N, C, L).

    Examples
    --------
    >>> import torch, bncpu.torch
    >>> bncpu.torch.BatchNorm1d(3)(torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 4.0]])).detach()
    tensor([[-1.0000,  0.0000, -1.0000],
            [ 1.0000,  0.0000,  1.0000]])
    """


class BatchNorm2d(_Alone, torch.nn.BatchNorm2d):
    r"""torch.nn.BatchNorm2d on the kernels of bncpu.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As for torch.nn.BatchNorm2d.

    Raises
    ------
    RuntimeError
        If the input is on another device than the parameters.
    ValueError
        As torch.nn.BatchNorm2d, and if a running variance is negative.

    Notes
    -----
    The kernels take CPU tensors (N, C, H, W) of float32, float64, float16 and bfloat16, of any
    strides; contiguous and channels_last ones are read in place, and the result has the strides of
    the input. Parameters of a half input are float32 or its own dtype. Everything else is computed
    by torch.nn.BatchNorm2d, with its results and its errors: another device, tensors of a
    subclass, torch.func and forward-mode gradients, torch.jit.trace and torch.export, a momentum
    outside [0, 1], and an empty batch. torch.compile breaks its graph here. For torch.jit.script
    and a torch.fx tracer of your own, `restore` the model first.

    Results are bitwise the same for every number of threads, which is torch.get_num_threads().
    Statistics are right where \|mean\| is much larger than the standard deviation, so that results
    differ from PyTorch's there. The backward pass keeps the input, and of the running statistics a
    copy. After a forward pass that records gradients the module keeps the memory of a result of
    4 MB or more, for its next result or gradient once no tensor has it: page faults cost more than
    the arithmetic. `BNCPU_POOL_MB=0` forbids it, and `restore` ends it. A gradient that
    shall be differentiated again (create_graph=True) is composed of PyTorch's operations.

    References
    ----------
    S. Ioffe, C. Szegedy, arXiv:1502.03167, Algorithms 1 and 2.

    Examples
    --------
    >>> import torch, bncpu.torch
    >>> layer = bncpu.torch.BatchNorm2d(4)
    >>> x = torch.randn(2, 4, 5, 5, requires_grad=True)
    >>> layer(x).square().sum().backward()
    >>> x.grad.shape, layer.weight.grad.shape, layer.num_batches_tracked
    (torch.Size([2, 4, 5, 5]), torch.Size([4]), tensor(1))
    >>> torch.nn.BatchNorm2d(4).load_state_dict(layer.state_dict())
    <All keys matched successfully>
    """


class BatchNorm3d(_Alone, torch.nn.BatchNorm3d):
    """torch.nn.BatchNorm3d on the kernels of bncpu.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As for torch.nn.BatchNorm3d.

    Notes
    -----
    As in `BatchNorm2d`; inputs are (N, C, D, H, W).

    Examples
    --------
    >>> import torch, bncpu.torch
    >>> bncpu.torch.BatchNorm3d(3).eval()(torch.zeros(1, 3, 2, 2, 2)).sum().item()
    0.0
    """


class BatchNormReLU1d(_BehindReLU, torch.nn.BatchNorm1d):
    """relu(BatchNorm1d(x)) in one pass over memory.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As for torch.nn.BatchNorm1d.

    Notes
    -----
    As in `BatchNormReLU2d`.
    """


class BatchNormReLU2d(_BehindReLU, torch.nn.BatchNorm2d):
    """relu(BatchNorm2d(x)) in one pass over memory.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As for torch.nn.BatchNorm2d, whose state_dict it has.

    Notes
    -----
    As in `BatchNorm2d`. The backward pass keeps x alone and computes the sign again.

    Examples
    --------
    >>> import torch, bncpu.torch
    >>> layer, x = bncpu.torch.BatchNormReLU2d(3), torch.randn(2, 3, 4, 4)
    >>> torch.equal(layer(x), torch.relu(bncpu.torch.BatchNorm2d(3)(x)))
    True
    """


class BatchNormReLU3d(_BehindReLU, torch.nn.BatchNorm3d):
    """relu(BatchNorm3d(x)) in one pass over memory.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As for torch.nn.BatchNorm3d.

    Notes
    -----
    As in `BatchNormReLU2d`.
    """


class BatchNormAddReLU1d(_BehindAddReLU, torch.nn.BatchNorm1d):
    """relu(BatchNorm1d(x) + residual) in one pass over memory.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As for torch.nn.BatchNorm1d.

    Notes
    -----
    As in `BatchNormAddReLU2d`.
    """


class BatchNormAddReLU2d(_BehindAddReLU, torch.nn.BatchNorm2d):
    """relu(BatchNorm2d(x) + residual) in one pass over memory, the end of a residual block.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As for torch.nn.BatchNorm2d, whose state_dict it has.

    Notes
    -----
    As in `BatchNorm2d`. The backward pass keeps x and one bit per element.

    Examples
    --------
    >>> import torch, bncpu.torch
    >>> layer, x, residual = bncpu.torch.BatchNormAddReLU2d(3), *torch.randn(2, 2, 3, 4, 4)
    >>> y = layer(x, residual)
    >>> torch.allclose(y, torch.relu(bncpu.torch.BatchNorm2d(3)(x) + residual), atol=1e-6)
    True
    """


class BatchNormAddReLU3d(_BehindAddReLU, torch.nn.BatchNorm3d):
    """relu(BatchNorm3d(x) + residual) in one pass over memory.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As for torch.nn.BatchNorm3d.

    Notes
    -----
    As in `BatchNormAddReLU2d`.
    """


def _forward(module: Any, x: Any, residual: Any) -> Any:
    global _outside_graphs
    if torch.compiler.is_exporting():
        return module.torch_forward(x, residual)
    if not torch.compiler.is_compiling():
        return _eager(module, x, residual)
    if _outside_graphs is None:
        # Not before it is needed: this imports the compiler, which takes seconds.
        _outside_graphs = torch.compiler.disable(_eager)
    return _outside_graphs(module, x, residual)


def _eager(module: Any, x: Any, residual: Any) -> Any:
    module._check_input_dim(x)
    own = (module.weight, module.bias, module.running_mean, module.running_var)
    trains = module.training or (module.running_mean is None and module.running_var is None)
    if not _for_kernels(x, residual, own, trains):
        _same_device(x, own)
        return module.torch_forward(x, residual)

    # What torch.nn.modules.batchnorm has, in its order.
    momentum = module.momentum
    if momentum is not None and not 0 <= momentum <= 1:
        return module.torch_forward(x, residual)
    tracks = module.training and module.track_running_stats
    running = own[2:] if tracks or not trains else (None, None)
    if tracks and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1 / float(module.num_batches_tracked)
    momentum = 0.0 if momentum is None else momentum
    kept = kept_for(module)
    how = How(trains, running[0], running[1], momentum, module.eps, module.relu, kept)
    return batch_norm(x, module.weight, module.bias, residual, how)


def _for_kernels(x: Any, residual: Any, own: tuple[Any, ...], trains: bool) -> bool:
    """Return whether the kernels take these tensors; what they do not take is PyTorch's."""
    dtype = x.dtype
    if not (_is_plain(x) and (dtype in _REAL or dtype in _HALF)) or _transforms():
        return False
    channels = x.size(1)
    if x.numel() == 0 or (trains and x.numel() == channels):
        return False
    allowed = (dtype, torch.float32) if dtype in _HALF else (dtype,)
    for tensor in own:
        if tensor is not None and not (
            _is_plain(tensor) and tensor.dtype in allowed and tensor.shape == (channels,)
        ):
            return False
    if (own[2] is None) != (own[3] is None):
        return False
    return residual is None or (
        _is_plain(residual) and residual.dtype is dtype and residual.shape == x.shape
    )


def _is_plain(tensor: Any) -> bool:
    # In CPU memory, and nobody's subclass that makes something else of it.
    return type(tensor) in _PLAIN and tensor.is_cpu and tensor.layout is torch.strided


def _transforms() -> bool:
    # Whether PyTorch wants to see the operations themselves: torch.func, forward-mode gradients,
    # tracing.
    return bool(
        torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch.jit.is_tracing()
    )


def _same_device(x: Any, own: tuple[Any, ...]) -> None:
    for tensor in own:
        if tensor is not None and tensor.device != x.device:
            raise RuntimeError(
                f"input: expected a tensor on {tensor.device}, where the module is; got one on "
                f"{x.device}; move one to the other with .to(...)"
            )
