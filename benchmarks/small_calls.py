"""The table of calls on small arrays: what a call costs when there is next to nothing to compute.

NumPy's side is written out for (N, C) as one would by hand, without the generality of
bncpu.bench.textbook, which would cost it a third.
"""

import functools
import importlib
import statistics
import timeit

import numpy as np
from setting import markdown, marked

import bncpu
from bncpu.bench.operations import EPS

SHAPE = (8, 16)
CALLS, REPEATS = 2000, 15


def numpy_train(x, gamma, beta):
    mean = x.mean(axis=0)
    var = x.var(axis=0)
    return gamma * (x - mean) / np.sqrt(var + np.float32(EPS)) + beta


def numpy_infer(x, mean, var, gamma, beta):
    return gamma * (x - mean) / np.sqrt(var + np.float32(EPS)) + beta


def numpy_backward(dy, x, mean, invstd, gamma):
    xhat = (x - mean) * invstd
    dbeta = dy.sum(axis=0)
    dgamma = (dy * xhat).sum(axis=0)
    m = np.float32(len(x))
    return gamma * invstd / m * (m * dy - dbeta - xhat * dgamma), dgamma, dbeta


def calls(torch):
    """Return, for each operation, the call of each contender by name."""
    random = np.random.default_rng(0)
    x, dy = random.standard_normal((2, *SHAPE), np.float32)
    gamma, beta = random.standard_normal((2, SHAPE[1]), np.float32)
    _, mean, invstd = bncpu.batch_norm_train(x, gamma, beta)
    var = 1 / invstd**2 - EPS
    narrow = mean.astype(np.float32), var.astype(np.float32), invstd.astype(np.float32)
    running = np.zeros(SHAPE[1], np.float32), np.ones(SHAPE[1], np.float32)
    p = functools.partial
    running_names = dict(zip(("running_mean", "running_var"), running, strict=True))
    found = {
        "training": {
            "bncpu": p(bncpu.batch_norm_train, x, gamma, beta),
            "numpy": p(numpy_train, x, gamma, beta),
        },
        "training, running statistics": {
            "bncpu": p(bncpu.batch_norm_train, x, gamma, beta, **running_names),
        },
        "inference": {
            "bncpu": p(bncpu.batch_norm_infer, x, *narrow[:2], gamma, beta),
            "numpy": p(numpy_infer, x, *narrow[:2], gamma, beta),
        },
        "backward": {
            "bncpu": p(bncpu.batch_norm_backward, dy, x, mean, invstd, gamma),
            "numpy": p(numpy_backward, dy, x, narrow[0], narrow[2], gamma),
        },
    }
    if torch is not None:
        x, dy, gamma, beta = (torch.from_numpy(a) for a in (x, dy, gamma, beta))
        mean, var, invstd = (torch.from_numpy(a) for a in narrow)
        running = [torch.from_numpy(a) for a in running]
        function = torch.nn.functional.batch_norm
        found["training"]["torch"] = p(function, x, None, None, gamma, beta, training=True)
        found["training, running statistics"]["torch"] = p(
            function, x, *running, gamma, beta, training=True
        )
        found["inference"]["torch"] = p(function, x, mean, var, gamma, beta)
        found["backward"]["torch"] = p(
            torch.ops.aten.native_batch_norm_backward.default,
            *(dy, x, gamma, None, None, mean, invstd, True, EPS, [True] * 3),
        )
    return found


def small(options):
    """Print what a call on (8, 16) float32 costs: bncpu, PyTorch's functional call, NumPy."""
    torch = None
    if "torch" in options.found.modules:
        torch = importlib.import_module("torch")
    lines = []
    for operation, contenders in calls(torch).items():
        taken = {name: [] for name in contenders}
        for _ in range(REPEATS):
            for name, call in contenders.items():
                taken[name].append(timeit.timeit(call, number=CALLS) / CALLS * 1e6)
        medians = {name: statistics.median(times) for name, times in taken.items()}
        line = [operation, f"{medians['bncpu']:.2f}"]
        for peer, goal in (("torch", 1), ("numpy", 2)):
            if peer in medians:
                ratio = medians[peer] / medians["bncpu"]
                line += [f"{medians[peer]:.2f}", marked(ratio, goal, f"{ratio:.2f}x")]
            else:
                line += ["-", "-"]
        lines.append(line)
    head = [f"{SHAPE} float32, us", "bncpu", "PyTorch", "(goal > 1)", "NumPy", "(goal > 2)"]
    markdown(head, lines)
    return []
