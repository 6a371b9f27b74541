"""convert and restore: BatchNorm of a model becomes bncpu's, and PyTorch's again, in place.

A module changes its class and nothing else: it is the same object with the same parameters,
buffers, hooks and names, so optimizers and checkpoints do not notice. Which pairs can be one call
is found in fusion.py.
"""

from __future__ import annotations

from typing import Any

import torch

from bncpu.torch import modules
from bncpu.torch.fusion import FusedForward, fusible
from bncpu.torch.memory import release

# PyTorch's class: bncpu's, with ReLU, with an addition and ReLU.
_FORMS = {
    torch.nn.BatchNorm1d: (
        modules.BatchNorm1d,
        modules.BatchNormReLU1d,
        modules.BatchNormAddReLU1d,
    ),
    torch.nn.BatchNorm2d: (
        modules.BatchNorm2d,
        modules.BatchNormReLU2d,
        modules.BatchNormAddReLU2d,
    ),
    torch.nn.BatchNorm3d: (
        modules.BatchNorm3d,
        modules.BatchNormReLU3d,
        modules.BatchNormAddReLU3d,
    ),
}
_THEIRS = {ours: theirs for theirs, forms in _FORMS.items() for ours in forms}
_OURS = {theirs: forms[0] for theirs, forms in _FORMS.items()}


def convert(model: Any, *, fuse: bool = False) -> Any:
    """Let every torch.nn.BatchNorm1d, 2d and 3d of a model compute with bncpu, in place.

    Parameters
    ----------
    model : torch.nn.Module
        Subclasses of BatchNorm, SyncBatchNorm among them, are left as they are.
    fuse : bool, default False
        Whether BatchNorm followed by ReLU, or by an addition and ReLU, becomes one call.

    Returns
    -------
    torch.nn.Module
        The model itself.

    Raises
    ------
    TypeError
        If model is not a torch.nn.Module.

    Notes
    -----
    Modules stay the same objects under the same names and change their class; `restore` is the way
    back. With `fuse`, torch.fx reads the forward of every module that has a BatchNorm, in training
    and in evaluation. Where a BatchNorm is called once and its result goes to nothing but ReLU (a
    module, function or method), or to an addition whose result does, it becomes a BatchNormReLU or
    BatchNormAddReLU, and the module's forward the same code with the one call. A forward that
    torch.fx cannot read or that draws random numbers, and a BatchNorm or ReLU with hooks, are not
    fused. What forward decides by
    its module's attributes, `training` aside, is decided at the conversion; after changing such an
    attribute, `restore` and convert again. A BatchNorm whose result is taken out otherwise than by
    its module's forward (by an index into torch.nn.Sequential, say) has ReLU behind it there too.

    Examples
    --------
    >>> import torch, bncpu.torch
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
    ... )
    >>> x = torch.randn(2, 3, 8, 8)
    >>> y = model(x)
    >>> type(bncpu.torch.convert(model, fuse=True)[1]).__name__
    'BatchNormReLU2d'
    >>> torch.allclose(model(x), y, atol=1e-5)
    True
    >>> type(bncpu.torch.restore(model)[1])
    <class 'torch.nn.modules.batchnorm.BatchNorm2d'>
    """
    _check(model)
    for module in model.modules():
        if type(module) in _OURS:
            module.__class__ = _OURS[type(module)]
    if fuse:
        for owner, pairs in fusible(model).items():
            for name, adds in pairs.items():
                norm = owner.get_submodule(name)
                norm.__class__ = _FORMS[_THEIRS[type(norm)]][2 if adds else 1]
            owner.forward = FusedForward(owner, pairs)
    return model


def restore(model: Any) -> Any:
    """Undo `convert`: every BatchNorm is PyTorch's again, and nothing is fused, in place.

    Parameters
    ----------
    model : torch.nn.Module
        A BatchNormReLU or BatchNormAddReLU that its author put there stays.

    Returns
    -------
    torch.nn.Module
        The model itself.

    Raises
    ------
    TypeError
        If model is not a torch.nn.Module.

    Examples
    --------
    >>> import torch, bncpu.torch
    >>> type(bncpu.torch.restore(bncpu.torch.BatchNorm1d(3)))
    <class 'torch.nn.modules.batchnorm.BatchNorm1d'>
    """
    _check(model)
    for module in model.modules():
        release(module)
        forward = vars(module).get("forward")
        if isinstance(forward, FusedForward):
            del module.forward
            for name in forward.pairs:
                norm = module.get_submodule(name)
                norm.__class__ = _THEIRS[type(norm)]
        elif type(module) in _OURS.values():
            module.__class__ = _THEIRS[type(module)]
    return model


def _check(model: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
