"""BatchNorm for PyTorch on CPU: its modules, on the kernels of bncpu; convert(model) swaps them in.

They are torch.nn's classes with another forward: constructor, buffers, state_dict, train and eval
are PyTorch's own. autograd.py has the gradients, modules.py the classes, conversion.py convert and
restore, fusion.py the forward of blocks whose BatchNorm, addition and ReLU are one call. This is
the only part of bncpu that imports PyTorch, the benchmarks' peer aside.
"""

import importlib

for _needed in ("torch", "ml_dtypes"):
    try:
        importlib.import_module(_needed)
    except ModuleNotFoundError as error:
        if error.name != _needed:
            raise
        raise ImportError(
            f"bncpu.torch: needs {_needed}, which is not installed; "
            'pip install "bncpu[torch]" installs it',
            name=_needed,
        ) from error

from bncpu.torch.conversion import convert, restore  # noqa: E402 - they import torch
from bncpu.torch.modules import (  # noqa: E402
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAddReLU1d,
    BatchNormAddReLU2d,
    BatchNormAddReLU3d,
    BatchNormReLU1d,
    BatchNormReLU2d,
    BatchNormReLU3d,
)

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAddReLU1d",
    "BatchNormAddReLU2d",
    "BatchNormAddReLU3d",
    "BatchNormReLU1d",
    "BatchNormReLU2d",
    "BatchNormReLU3d",
    "convert",
    "restore",
]
