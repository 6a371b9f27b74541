"""Section 3.3's mathematics of single layers: weights of another scale, and Jacobians.

Which networks are looked at, and what is claimed of them, is scale.py's business.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

import bncpu
from bncpu import nn


def rescaling_errors(
    u: nn.Array, w: nn.Array, dy: nn.Array, scales: Sequence[float], eps: float
) -> list[list[float]]:
    """Return how far BN(aWu) = BN(Wu) is off, and what the paper says of its gradients.

    Parameters
    ----------
    u : array, shape (n, features)
        The inputs of the layer.
    w : array, shape (units, features), dtype of u
        W.
    dy : array, shape (n, units), dtype of u
        The gradient of some loss by BN(aWu).
    scales : sequence of float
        The values of a.
    eps : float
        Batch normalisation's.

    Returns
    -------
    list of lists of three floats
        For each a, the largest error of BN(aWu), of d/du, and of d/d(aW) times a, each over the
        largest value that it has for a = 1.
    """

    def values(w: nn.Array) -> tuple[nn.Array, nn.Array, nn.Array]:
        x = u @ w.T
        y, mean, invstd = bncpu.batch_norm_train(x, eps=eps)
        dx = bncpu.batch_norm_backward(dy, x, mean, invstd).dx
        return y, dx @ w, dx.T @ u

    truth, errors = values(w), []
    for scale in scales:
        a = w.dtype.type(scale)
        y, du, dw = values(a * w)
        pairs = zip((y, du, a * dw), truth, strict=True)
        errors.append([float(np.abs(got - t).max() / np.abs(t).max()) for got, t in pairs])
    return errors


def layer_jacobians(model: nn.Sequential, x: nn.Array) -> nn.Array:
    """Return the Jacobians from what each nonlinearity is given to what the next one is given.

    Parameters
    ----------
    model : Sequential
        As `bncpu.nn.fully_connected` makes it, of hidden layers of one size.
    x : array, shape (n, features)
        Where; in inference, in which every example stands alone.

    Returns
    -------
    array, shape (n * (hidden layers - 1), size, size)
        With batch normalisation from normalised vector to normalised vector, before gamma and beta
        of both; without it from Wu + b to Wu + b.
    """
    kinds = (nn.Sigmoid, nn.Tanh, nn.ReLU)
    places = [i for i, layer in enumerate(model.layers) if isinstance(layer, kinds)]
    found = []
    with nn.inference(model):
        for start, stop in pairwise(places):
            between = nn.Sequential(*model.layers[start:stop])
            before, after = (scale_of(model.layers[i - 1]) for i in (start, stop))
            for z in nn.Sequential(*model.layers[:start]).forward(x):
                # Row i of a batch of the same example gets the gradient of output i.
                copies = between.forward(np.repeat(z[None], len(z), axis=0))
                rows = between.backward(np.eye(len(z), dtype=copies.dtype))
                found.append(rows * before / after.reshape(-1, 1))
    return np.array(found)


def scale_of(layer: nn.Layer | nn.BatchNorm) -> nn.Array:
    """Return the gamma with which a layer multiplies what it has normalised, or 1."""
    gamma = layer.gamma if isinstance(layer, nn.BatchNorm) else None
    return np.ones(1) if gamma is None else gamma
