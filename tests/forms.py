"""The public functions in all their forms on one problem: computed, and checked with the truth.

A form is what is fused with batch normalisation: ReLU, a residual, a mask. Tests of layouts,
threads, caches and bounds vary how a problem is computed, run it here, and compare.
"""

from typing import NamedTuple

import numpy as np
from accuracy import (
    assert_backward,
    assert_infer,
    assert_infer_backward,
    assert_moments,
    assert_same_bits,
    assert_train,
)
from cases import lay, new_mask, normal, parameters, statistics

import bncpu


class Form(NamedTuple):
    """What is fused with batch normalisation."""

    relu: bool
    residual: bool
    mask: bool

    @property
    def activation(self):
        return "relu" if self.relu else None

    @property
    def has_backward(self):
        """Whether a backward can know which elements passed."""
        return not self.relu or not self.residual or self.mask


PLAIN = Form(relu=False, residual=False, mask=False)
RELU = Form(relu=True, residual=False, mask=False)
EVERYTHING = Form(relu=True, residual=True, mask=True)
FUSED = {
    "relu": RELU,
    "relu with mask": Form(relu=True, residual=False, mask=True),
    "residual": Form(relu=False, residual=True, mask=False),
    "residual, relu": Form(relu=True, residual=True, mask=False),
    "residual, relu with mask": EVERYTHING,
}
FORMS = {"plain": PLAIN, **FUSED}
# What long tests try of each dtype: every loop of the kernels once, if not in every dtype.
SOME_FORMS = {
    "float32": (PLAIN, RELU, EVERYTHING),
    "float64": (PLAIN, EVERYTHING),
    "float16": (EVERYTHING,),
    "bfloat16": (RELU,),
}


class Problem(NamedTuple):
    """What the functions take; mean and var are given to inference."""

    dy: np.ndarray
    x: np.ndarray
    residual: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    gamma: np.ndarray | None
    beta: np.ndarray | None
    axis: int | tuple[int, ...] = 1


def problem(rng, shape, dtype, axis=1, layout="c"):
    """Return a problem of random numbers whose large arrays have that layout."""
    dy, x, residual = (lay(layout, normal(rng, shape, dtype)) for _ in range(3))
    axes = axis if isinstance(axis, tuple) else (axis,)
    channels = [shape[a] for a in axes]
    mean, var = statistics(rng, channels)
    return Problem(dy, x, residual, mean, var, *parameters(rng, channels, dtype), axis)


def run(form, p, *, out=lambda: None, mask=new_mask, place=np.asarray, train=True, **options):
    """Return all that the four functions and the moments compute in a form, by name.

    Parameters
    ----------
    out
        A function that returns memory for one result of x's shape, or None for new memory.
    mask
        A function of x that returns memory for its mask.
    place
        A function that puts a NumPy array where those of the problem are.
    train
        Whether x has the values per channel to train on.
    """
    inputs = (p.gamma, p.beta)
    forward = {"axis": p.axis, "activation": form.activation, **options}
    backward = dict(forward)
    masks = {name: mask(p.x) if form.mask else None for name in ("train", "infer")}
    if form.residual:
        forward["residual"] = p.residual
    moments = bncpu.batch_moments(p.x, axis=p.axis, **options)
    got = {"moments mean": moments.mean, "moments m2": moments.m2}

    y = bncpu.batch_norm_infer(
        p.x, p.mean, p.var, *inputs, mask=masks["infer"], out=out(), **forward
    )
    got |= {"infer y": y, "infer mask": masks["infer"]}
    if form.has_backward:
        gradients = bncpu.batch_norm_infer_backward(
            *(p.dy, p.x, p.mean, p.var, *inputs),
            mask=masks["infer"],
            residual=_dresidual(form, out),
            out=out(),
            **backward,
        )
        got |= {f"infer {name}": a for name, a in gradients._asdict().items()}
    if not train:
        return got

    running_mean, running_var = place(np.zeros(p.mean.shape)), place(np.ones(p.mean.shape))
    trained = bncpu.batch_norm_train(
        *(p.x, *inputs),
        running_mean=running_mean,
        running_var=running_var,
        mask=masks["train"],
        out=out(),
        **forward,
    )
    got |= {f"train {name}": a for name, a in trained._asdict().items()}
    got |= {"train mask": masks["train"]}
    got |= {"running_mean": running_mean, "running_var": running_var}
    if form.has_backward:
        gradients = bncpu.batch_norm_backward(
            *(p.dy, p.x, trained.mean, trained.invstd, *inputs),
            mask=masks["train"],
            residual=_dresidual(form, out),
            out=out(),
            **backward,
        )
        got |= {f"train {name}": a for name, a in gradients._asdict().items()}
    return got


def check(form, p, got):
    """Compare what run returned with the truth."""
    inputs = (p.gamma, p.beta)
    how = {"axis": p.axis}
    forward = how | {
        "activation": form.activation,
        "residual": p.residual if form.residual else None,
    }
    assert_moments(
        bncpu.Moments(_values(p), got["moments mean"], got["moments m2"]), p.x, axis=p.axis
    )
    y = got["infer y"]
    assert_infer(y, p.x, p.mean, p.var, *inputs, mask=got["infer mask"], **forward)
    if form.has_backward:
        how["passes"] = y != 0 if form.relu else None
        gradients = _gradients("infer", got)
        assert (gradients.dresidual is not None) == form.residual
        assert_infer_backward(gradients, p.dy, p.x, p.mean, p.var, p.gamma, **how)
    if "train y" not in got:
        return
    batch = got["train mean"], got["train invstd"]
    trained = bncpu.TrainResult(got["train y"], *batch)
    assert_train(trained, p.x, *inputs, mask=got["train mask"], **forward)
    if form.has_backward:
        how["passes"] = trained.y != 0 if form.relu else None
        gradients = _gradients("train", got)
        assert (gradients.dresidual is not None) == form.residual
        assert_backward(gradients, p.dy, p.x, *batch, p.gamma, **how)


def run_and_check(form, p, **options):
    got = run(form, p, **options)
    check(form, p, got)
    return got


def assert_same_results(got, expected, what=""):
    """Compare what run returned twice, bit by bit."""
    assert got.keys() == expected.keys()
    for name, a in got.items():
        assert_same_bits(a, expected[name], f"{name} {what}")


def _dresidual(form, out):
    """Return what a backward is told about the residual: no, yes, or yes and where to."""
    if not form.residual:
        return False
    array = out()
    return True if array is None else array


def _values(p):
    axes = p.axis if isinstance(p.axis, tuple) else (p.axis,)
    kept = [n for a, n in enumerate(p.x.shape) if a not in {b % p.x.ndim for b in axes}]
    return int(np.prod(kept, dtype=np.int64))


def _gradients(which, got):
    return bncpu.Gradients(*(got[f"{which} {name}"] for name in bncpu.Gradients._fields))
