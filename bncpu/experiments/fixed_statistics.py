"""A network whose statistics are fixed: as linear maps, folded, and what its outputs depend on.

Measurements for inference.py. The folding of a whole `Sequential` is nothing but
`bncpu.fold_into_conv` and `bncpu.fold_into_linear`, layer by layer.
"""

import copy
from typing import Any

import numpy as np

import bncpu
from bncpu import nn
from bncpu.threads import number_of_threads

THREADS = (1, 2, 4)
SIZES = (1, 7, 60)


def fold(model: nn.Sequential) -> nn.Sequential:
    """Return the network without its BatchNorms, each folded into the layer before it."""
    layers: list[Any] = []
    for layer in model.layers:
        if isinstance(layer, nn.BatchNorm):
            into = layers[-1]
            linear = isinstance(into, nn.Linear)
            composed = bncpu.fold_into_linear if linear else bncpu.fold_into_conv
            into.weight, into.bias = composed(into.weight, into.bias, *fixed(layer), eps=layer.eps)
        else:
            layers.append(copy.deepcopy(layer))
    return nn.Sequential(*layers)


def linear_map_error(model: nn.Sequential, x: nn.Array) -> float:
    """Return by how much a BatchNorm differs from scale u + shift, in the worst of the layers."""
    errors = []
    for layer, u in norms_and_inputs(model, x):
        scale, shift = bncpu.linear_map(*fixed(layer), eps=layer.eps)
        channels = (-1,) + (1,) * (u.ndim - 2)
        y = bncpu.batch_norm_infer(u, *fixed(layer), eps=layer.eps)
        errors.append(relative(scale.reshape(channels) * u + shift.reshape(channels), y))
    return max(errors)


def by_batch(model: nn.Sequential, x: nn.Array, batches: Any) -> nn.Array:
    """Return logits where each batch, an array of rows of x, is normalised by its own statistics.

    They are in the order of the batches; the network's running statistics are as before.
    """
    trained = model.state_dict()
    model.train()
    logits = [model.forward(x[rows]) for rows in batches]
    model.load_state_dict(trained)
    y: nn.Array = np.concatenate(logits)
    return y


def dependence(
    model: nn.Sequential, x: nn.Array, batch_size: int, batches: int, seed: int
) -> dict[str, Any]:
    """Return what, besides an example, has an influence on its output.

    Returns
    -------
    dict
        "in training", "in inference": the logits of x[0] in so many random batches; in inference
        one of them, and in "same beside others" whether they all have the same bits.
        "same for threads": whether logits have the same bits for all THREADS of bncpu.
        "same for sizes, BN": whether every BatchNorm, given the same inputs, has the same bits for
        all SIZES of the batch. "sizes": the largest difference of the network's logits, relative.
    """
    rng = np.random.default_rng(seed)
    rows = [np.append(0, rng.integers(1, len(x), batch_size - 1)) for _ in range(batches)]
    in_inference = np.array([nn.predict(model, x[each])[0] for each in rows])
    by_threads = []
    for threads in THREADS:
        with number_of_threads(threads):
            by_threads.append(nn.predict(model, x, batch_size=len(x)))
    by_size = [nn.predict(model, x, batch_size=size) for size in SIZES]
    return {
        "in training": by_batch(model, x, rows)[::batch_size].tolist(),
        "in inference": in_inference[0].tolist(),
        "same beside others": bool((in_inference == in_inference[0]).all()),
        "same for threads": all(np.array_equal(each, by_threads[0]) for each in by_threads),
        "same for sizes, BN": all(same_for_sizes(*pair) for pair in norms_and_inputs(model, x)),
        "sizes": max(relative(each, by_threads[0]) for each in by_size),
    }


def same_for_sizes(layer: nn.BatchNorm, u: nn.Array) -> bool:
    """Return whether a layer in inference has the same bits for all SIZES of a batch."""

    def infer(part: nn.Array) -> nn.Array:
        return bncpu.batch_norm_infer(part, *fixed(layer), eps=layer.eps)

    whole = infer(u)
    return all(
        np.array_equal(infer(u[i : i + n]), whole[i : i + n])
        for n in SIZES
        for i in range(0, len(u), n)
    )


def norms_and_inputs(model: nn.Sequential, x: nn.Array) -> list[tuple[nn.BatchNorm, nn.Array]]:
    """Return the BatchNorms of a network, each with its input in inference."""
    norms = [layer for layer in model.layers if isinstance(layer, nn.BatchNorm)]
    with nn.recording(model, *norms) as inputs:
        nn.predict(model, x, batch_size=len(x))
    return list(zip(norms, inputs[0], strict=True))


def fixed(layer: nn.BatchNorm) -> tuple[Any, Any, Any, Any]:
    """Return what a layer normalises by in inference."""
    return layer.running_mean, layer.running_var, layer.gamma, layer.beta


def relative(a: nn.Array, b: nn.Array) -> float:
    """Return the largest difference of two arrays, relative to the largest value of b."""
    return float(np.abs(a - b).max() / np.abs(b).max())
