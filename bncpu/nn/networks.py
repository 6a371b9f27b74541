"""The networks of the paper's experiments: fully connected (section 4.1), Inception (section 4.2).

Anything else is a `Sequential` of the reader's own.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from bncpu.distributed import SyncBatchNorm
from bncpu.layer import BatchNorm
from bncpu.nn.activations import ReLU, Sigmoid
from bncpu.nn.arguments import integer, real
from bncpu.nn.base import Layer
from bncpu.nn.containers import Concat, Sequential
from bncpu.nn.convolution import Conv2d
from bncpu.nn.dropout import Dropout
from bncpu.nn.initialization import MAX_WEIGHTS
from bncpu.nn.linear import Linear
from bncpu.nn.lrn import LocalResponseNorm
from bncpu.nn.pooling import AvgPool2d, GlobalAvgPool, MaxPool2d


def fully_connected(
    sizes: Sequence[int],
    *,
    activation: Callable[[], Layer] = Sigmoid,
    batch_norm: bool = True,
    gain: float = 1.0,
    std: float | None = None,
    rng: np.random.Generator,
    dtype: DTypeLike = np.float32,
    comm: Any = None,
    device: Literal["cpu", "cuda"] = "cpu",
) -> Sequential:
    """Return g(BN(Wu)) for every hidden layer, then a linear layer to the logits.

    Batch normalisation stands on Wu, before the nonlinearity g and in place of the bias (Ioffe &
    Szegedy 2015, section 3.2). Without it the layers are g(Wu + b), and from the same `rng` the
    two networks start with the same weights.

    Parameters
    ----------
    sizes : sequence of int
        Of the input, the hidden layers, and the output (the number of classes).
    activation : callable
        Makes the nonlinearity, for instance `Sigmoid`.
    batch_norm : bool
        Whether hidden layers are batch-normalised.
    gain : float
        The initial weights have the standard deviation gain / sqrt(inputs of their layer); before
        a ReLU, which halves the variance, sqrt(2) keeps it (He et al. 2015).
    std : float, optional
        The standard deviation of all initial weights, in place of those by `gain`.
    rng : numpy.random.Generator
        Draws them, layer by layer.
    dtype : dtype
        float32 or float64.
    comm : mpi4py.MPI.Intracomm, optional
        The ranks that share each batch: hidden layers are then `SyncBatchNorm`.
    device : "cpu" or "cuda"
        Where the network computes, with NumPy or CuPy arrays.

    Raises
    ------
    TypeError
        If a size is not an integer, or `gain` not a number.
    ValueError
        If there are fewer than two sizes, one is not positive, or the ranks of `comm` shall train
        on a GPU.
    MemoryError
        If there is no room for the largest weights.

    Examples
    --------
    >>> import numpy as np
    >>> from bncpu.nn import fully_connected
    >>> model = fully_connected([64, 100, 10], rng=np.random.default_rng(0))
    >>> list(model.parameters())
    ['0.weight', '1.weight', '1.bias', '3.weight', '3.bias']
    """
    if len(sizes) < 2:
        raise ValueError(f"sizes: expected at least an input and an output; got {list(sizes)}")
    sizes = [integer("sizes", size, 1) for size in sizes]
    gain = real("gain", gain)
    # Room for the largest weights, asked for and given back: what memory cannot hold is refused
    # now, not after the layers before it have been drawn.
    np.empty(min(MAX_WEIGHTS, max(inputs * outputs for inputs, outputs in pairwise(sizes))))
    if comm is not None and device != "cpu":
        raise ValueError(
            f'comm: ranks train on the CPU; expected device="cpu" beside it; got {device!r}'
        )
    where: dict[str, Any] = {"dtype": dtype, "device": device}
    layers: list[Layer | BatchNorm] = []
    for inputs, outputs in pairwise(sizes[:-1]):
        deviation = gain * inputs**-0.5 if std is None else std
        how: dict[str, Any] = {"bias": not batch_norm, "rng": rng, "std": deviation}
        layers.append(Linear(inputs, outputs, **how, **where))
        if batch_norm:
            layers.append(
                BatchNorm(outputs, **where)
                if comm is None
                else SyncBatchNorm(outputs, comm=comm, dtype=dtype)
            )
        layers.append(activation())
    layers.append(Linear(sizes[-2], sizes[-1], rng=rng, std=std, **where))
    return Sequential(*layers)


class Module(NamedTuple):
    """The channels inside an Inception module (Szegedy et al. 2014, figure 2b), branch by branch.

    A 1x1 convolution; a 3x3 one; two 3x3 ones in place of a 5x5 one, as the paper has them; a mean
    over 3x3 pixels. What leads to a 3x3 convolution is first made narrow by a 1x1 one.
    """

    one: int
    reduce: int
    three: int
    reduce_double: int
    double: int
    pool: int

    @property
    def channels(self) -> int:
        """How many leave the module."""
        return self.one + self.three + self.double + self.pool


STEM = 16
MODULES = (
    Module(one=16, reduce=12, three=24, reduce_double=8, double=12, pool=12),
    Module(one=32, reduce=24, three=48, reduce_double=12, double=24, pool=24),
    Module(one=48, reduce=32, three=64, reduce_double=16, double=32, pool=32),
)


def inception(
    in_channels: int = 3,
    classes: int = 10,
    *,
    activation: Callable[[], Layer] = ReLU,
    batch_norm: bool = True,
    lrn: bool = False,
    dropout: float = 0.0,
    rng: np.random.Generator,
    dtype: DTypeLike = np.float32,
) -> Sequential:
    """Return an Inception network for small images, 11 layers deep.

    A 3x3 convolution, then three Inception modules with a halving of the image (the maximum of 3x3
    pixels) before each, the mean over all pixels, and a linear layer: 4.2 million multiplications
    for 32 x 32 pixels in 3 channels. It is to the network of the paper's section 4.2, which is for
    224 x 224 pixels, as CIFAR-10 is to ImageNet.

    Parameters
    ----------
    in_channels, classes : int
        Of the images, and of the logits.
    activation : callable
        Makes the nonlinearity. Initial weights are Gaussian with the deviation 1 / sqrt(inputs),
        sqrt(2) times that before a `ReLU`.
    batch_norm : bool
        Whether g(BN(Wu)) stands where else is g(Wu + b).
    lrn : bool
        Whether local response normalisation follows the first convolution, as in Inception.
    dropout : float
        The rate before the linear layer; 0 is none.
    rng : numpy.random.Generator
        Draws the weights and the seed of the dropout.
    dtype : dtype
        float32 or float64.

    Raises
    ------
    TypeError, ValueError
        If a number is none or out of range.

    Examples
    --------
    >>> import numpy as np
    >>> from bncpu.nn import inception
    >>> model = inception(rng=np.random.default_rng(0))
    >>> model.forward(np.zeros((2, 3, 32, 32), np.float32)).shape
    (2, 10)
    """
    gain = math.sqrt(2) if activation is ReLU else 1.0

    def convolution(inputs: int, outputs: int, size: int, *between: Layer) -> list[Any]:
        """Return the layers of g(BN(Wu)), with what stands between W and BN."""
        std = gain * (inputs * size * size) ** -0.5
        how: dict[str, Any] = {"rng": rng, "std": std, "dtype": dtype, "bias": not batch_norm}
        layers = [Conv2d(inputs, outputs, size, padding=size // 2, **how), *between]
        if not batch_norm:
            return [*layers, activation()]
        if activation is ReLU:
            return [*layers, BatchNorm(outputs, activation="relu", dtype=dtype)]
        return [*layers, BatchNorm(outputs, dtype=dtype), activation()]

    def module(inputs: int, of: Module) -> Concat:
        # Mean and 1x1 convolution commute, and the mean of fewer channels costs less.
        return Concat(
            Sequential(*convolution(inputs, of.one, 1)),
            Sequential(*convolution(inputs, of.reduce, 1), *convolution(of.reduce, of.three, 3)),
            Sequential(
                *convolution(inputs, of.reduce_double, 1),
                *convolution(of.reduce_double, of.double, 3),
                *convolution(of.double, of.double, 3),
            ),
            Sequential(*convolution(inputs, of.pool, 1, AvgPool2d(3, 1, 1))),
        )

    layers: list[Any] = convolution(integer("in_channels", in_channels, 1), STEM, 3)
    layers[0].input_gradient = False
    if lrn:
        layers.append(LocalResponseNorm())
    channels = STEM
    for each in MODULES:
        layers += [MaxPool2d(3, 2, 1), module(channels, each)]
        channels = each.channels
    layers.append(GlobalAvgPool())
    if dropout:
        layers.append(Dropout(dropout, seed=int(rng.integers(2**31))))
    layers.append(Linear(channels, classes, rng=rng, dtype=dtype))
    return Sequential(*layers)
