"""Right calls of every public function, by name, and the check that a wrong one is refused."""

import numpy as np
import pytest
from accuracy import assert_same_bits

import bncpu

SHAPE = (4, 3, 5)
LIKE_X = {"out": 7.0, "residual": 0.5}  # the second is read forward, and written backward
FUSED = "residual activation mask"
TAKES = {
    "batch_norm_train": "x gamma beta running_mean running_var momentum eps axis out num_threads "
    + FUSED,
    "batch_norm_infer": "x mean var gamma beta eps axis out num_threads " + FUSED,
    "batch_norm_backward": "dy x mean invstd gamma beta axis out num_threads " + FUSED,
    "batch_norm_infer_backward": "dy x mean var gamma beta eps axis out num_threads " + FUSED,
    "batch_moments": "x axis num_threads",
}
TAKES = {function: names.split() for function, names in TAKES.items()}
REQUIRED = {
    "batch_norm_train": ("x",),
    "batch_norm_infer": ("x", "mean", "var"),
    "batch_norm_backward": ("dy", "x", "mean", "invstd"),
    "batch_norm_infer_backward": ("dy", "x", "mean", "var"),
    "batch_moments": ("x",),
}
WITH_OUT = [function for function, names in TAKES.items() if "out" in names]
FORWARD = ["batch_norm_train", "batch_norm_infer"]
BACKWARD = ["batch_norm_backward", "batch_norm_infer_backward"]
STATISTICS = ("mean", "var", "invstd", "running_mean", "running_var")
OF_CHANNELS = ("gamma", "beta", *STATISTICS)
ARRAYS = ("x", "dy", "residual", "out", "mask", *OF_CHANNELS)


def arguments(function):
    """Return a right call of a function: every array that it takes, by name."""
    random = np.random.default_rng(7)
    x, dy = (random.standard_normal(SHAPE).astype(np.float32) for _ in range(2))
    of_channels = {
        "gamma": np.array([1.0, 2.0, -0.5], np.float32),
        "beta": np.array([0.5, 0.0, 1.0], np.float32),
        "mean": np.array([0.1, 0.2, 0.3]),
        "var": np.array([1.0, 2.0, 3.0]),
        "invstd": np.array([1.0, 0.5, 2.0]),
        "running_mean": np.array([0.1, 0.2, 0.3], np.float32),
        "running_var": np.array([1.0, 2.0, 3.0], np.float32),
    }
    arrays = {name: np.full(SHAPE, value, np.float32) for name, value in LIKE_X.items()}
    arrays |= {"x": x, "dy": dy, "mask": np.full(8, 0x55, np.uint8)} | of_channels
    given = {name: arrays[name] for name in TAKES[function] if name in arrays}
    return given | ({"activation": "relu"} if "activation" in TAKES[function] else {})


def assert_refused(function, given, error, match):
    """Call, expect the error, and find every array as it was."""
    arrays = {name: a for name, a in given.items() if isinstance(a, np.ndarray)}
    before = {name: a.copy() for name, a in arrays.items()}
    with pytest.raises(error, match=match):
        getattr(bncpu, function)(**given)
    for name, a in arrays.items():
        if a.dtype.kind in "fuV" and a.itemsize <= 8:
            assert_same_bits(a, before[name], name)


def takers(*names, functions=tuple(TAKES)):
    """Return each function with each of the names that it takes."""
    return [(f, name) for f in functions for name in names if name in TAKES[f]]
