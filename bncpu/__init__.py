"""bncpu: batch normalisation (Ioffe & Szegedy 2015) as a fast NumPy library."""

from bncpu.folding import LinearMap, fold_into_conv, fold_into_linear, linear_map
from bncpu.functional import (
    Gradients,
    TrainResult,
    batch_moments,
    batch_norm_backward,
    batch_norm_infer,
    batch_norm_infer_backward,
    batch_norm_train,
)
from bncpu.layer import BatchNorm
from bncpu.moments import Moments
from bncpu.threads import config, get_num_threads, set_num_threads, show_config

__version__ = "0.1.0"

__all__ = [
    "BatchNorm",
    "Gradients",
    "LinearMap",
    "Moments",
    "TrainResult",
    "batch_moments",
    "batch_norm_backward",
    "batch_norm_infer",
    "batch_norm_infer_backward",
    "batch_norm_train",
    "config",
    "fold_into_conv",
    "fold_into_linear",
    "get_num_threads",
    "linear_map",
    "set_num_threads",
    "show_config",
]
