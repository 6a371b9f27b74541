"""The fully connected network of the paper's section 4.1, of any width and depth.

Anything else is a `Sequential` of the reader's own.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike

from bncpu.distributed import SyncBatchNorm
from bncpu.layer import BatchNorm
from bncpu.nn.activations import Sigmoid
from bncpu.nn.arguments import integer, real
from bncpu.nn.base import Layer
from bncpu.nn.containers import Sequential
from bncpu.nn.linear import MAX_WEIGHTS, Linear


def fully_connected(
    sizes: Sequence[int],
    *,
    activation: Callable[[], Layer] = Sigmoid,
    batch_norm: bool = True,
    gain: float = 1.0,
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
        std = gain * inputs**-0.5
        layers.append(Linear(inputs, outputs, bias=not batch_norm, rng=rng, std=std, **where))
        if batch_norm:
            layers.append(
                BatchNorm(outputs, **where)
                if comm is None
                else SyncBatchNorm(outputs, comm=comm, dtype=dtype)
            )
        layers.append(activation())
    layers.append(Linear(sizes[-2], sizes[-1], rng=rng, **where))
    return Sequential(*layers)
