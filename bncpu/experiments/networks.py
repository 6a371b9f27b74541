"""The networks that several experiments share: ReLUs, with something or nothing to normalise.

`normalise` returns the layers that stand between a linear layer or convolution and its ReLU, in a
list: an empty one is a network without batch normalisation, whose layers then have biases.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from bncpu import nn
from bncpu.data import Dataset

Layers = list[nn.Layer | nn.BatchNorm]


def multilayer(
    inputs: int,
    hidden: Sequence[int],
    normalise: Callable[[int], Layers],
    *,
    seed: int,
    gain: float = 1.0,
    dropout: float = 0.0,
) -> nn.Sequential:
    """Return Linear, what `normalise` gives for its outputs, ReLU and dropout, and 10 logits.

    Initial weights are Gaussian of standard deviation gain sqrt(2 / inputs), which for a gain of 1
    keeps the variance (He et al. 2015). For one seed they do not depend on `normalise`.
    """
    rng = np.random.default_rng(seed)
    layers: Layers = []
    for i, (n, m) in enumerate(pairwise((inputs, *hidden))):
        norm, std = normalise(m), gain * (2 / n) ** 0.5
        layers += [nn.Linear(n, m, bias=not norm, rng=rng, std=std), *norm, nn.ReLU()]
        if dropout:
            layers.append(nn.Dropout(dropout, seed=seed * len(hidden) + i))
    return nn.Sequential(*layers, nn.Linear(hidden[-1], 10, rng=rng))


def convolutional(
    shape: tuple[int, ...],
    channels: Sequence[int],
    normalise: Callable[[tuple[int, ...]], Layers],
    *,
    seed: int,
    hidden: Sequence[int] = (),
) -> nn.Sequential:
    """Return 3 x 3 convolutions of stride 2 for images of that shape, linear layers, and 10 logits.

    `normalise` is given the shape of what a convolution or hidden layer makes of one example.
    """
    rng = np.random.default_rng(seed)
    layers: Layers = []
    before, high, wide = shape
    for after in channels:
        high, wide = -(-high // 2), -(-wide // 2)
        norm, std = normalise((after, high, wide)), (2 / (9 * before)) ** 0.5
        conv = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=not norm, rng=rng, std=std)
        layers += [conv, *norm, nn.ReLU()]
        before = after
    sizes = (before * high * wide, *hidden)
    layers.append(nn.Flatten())
    for n, m in pairwise(sizes):
        norm = normalise((m,))
        layers += [nn.Linear(n, m, bias=not norm, rng=rng, std=(2 / n) ** 0.5), *norm, nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 10, rng=rng))


def varied_images(
    data: Dataset, distortion: float
) -> tuple[nn.Array, nn.Array, Callable[[nn.Array, np.random.Generator], nn.Array]]:
    """Return training images, test images, and what makes a batch of the former like the latter.

    Test images are standardised by the mean and deviation of each channel over the training set; so
    are those of a batch, after they have been flipped (not digits, which have a left and a right),
    moved by up to a sixteenth of their size, and distorted by `distortion` in brightness, contrast
    and saturation.
    """
    pixels = data.images("train")
    mean, std = (f(pixels, axis=(0, 2, 3), keepdims=True) for f in (np.mean, np.std))
    flips = [nn.Flip()] if data.name == "cifar10" else []
    shift = nn.Shift(max(1, data.image_shape[1] // 16))
    varied = nn.Compose(*flips, shift, nn.PhotometricDistortion(*[distortion] * 3))
    return pixels, (data.images("test") - mean) / std, lambda x, rng: (varied(x, rng) - mean) / std
