"""Population statistics of a trained network: Algorithm 2 of the paper, over a training set.

An alternative to the moving averages that `BatchNorm` keeps in training, which lag behind the
weights and weigh the last batches most. For arrays in files there is `bncpu.population`.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bncpu.distributed import SyncBatchNorm
from bncpu.functional import batch_moments
from bncpu.layer import BatchNorm
from bncpu.moments import Moments
from bncpu.nn.arguments import integer
from bncpu.nn.base import Array, Layer, layers_of
from bncpu.nn.recording import observed
from bncpu.nn.training import check_rows, epoch_slices, inference
from bncpu.progress import Progress
from bncpu.progress import bar as progress_bar

Method = Literal["moments", "batches"]
Statistics = tuple[NDArray[np.float64], NDArray[np.float64]]


def population_statistics(
    model: Layer,
    x: Array,
    *,
    batch_size: int = 100,
    method: Method = "moments",
    progress: bool | Progress = False,
) -> None:
    r"""Set running_mean and running_var of every BatchNorm from the examples x.

    Parameters
    ----------
    model : Layer
        Its BatchNorm layers, at any depth, get new running statistics; those without any are left
        alone. Nothing else about it changes.
    x : array, shape (n, ...)
        Training examples; batches are taken in their order, so shuffle them if it has a meaning.
    batch_size : int
        The size of a batch, as in training; the last one is what remains, and is merged with the
        one before it if that is a single example.
    method : "moments" or "batches"
        "moments": mean and unbiased variance of all values that a layer is given, merged exactly.
        "batches": Algorithm 2, the mean of the batches' means, and of their unbiased variances.
    progress : bool or Progress
        Show a progress bar (tqdm) on stderr, or tell this object of each batch.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind or out of range, a layer is a `SyncBatchNorm`, or a
        batch has one value per channel, as for `batch_norm_train`. Nothing has been changed then.
    ImportError
        If there is to be a bar, and tqdm is not installed.

    Notes
    -----
    One forward for each batch, in which batch normalisation uses the batch's own statistics, as in
    training, and everything else behaves as in inference: `Dropout` drops nothing, for this is what
    the statistics will be used with. With batches :math:`B` of m values,

    .. math:: E[x] = E_B[\mu_B], \quad Var[x] = E_B\left[\frac{m}{m - 1} \sigma_B^2\right]

    for "batches"; "moments" adds the variance between the batches' means to that within them. All
    sums are of float64, the results are rounded to the layer's dtype.

    Running statistics change when all is computed. Modes and num_batches_tracked stay as they are.

    References
    ----------
    S. Ioffe, C. Szegedy, arXiv:1502.03167, Algorithm 2 and section 3.1.

    Examples
    --------
    >>> import numpy as np
    >>> from bncpu import nn
    >>> model = nn.Sequential(nn.BatchNorm(1))
    >>> x = np.arange(4, dtype=np.float32).reshape(4, 1)
    >>> nn.population_statistics(model, x, batch_size=2)
    >>> model.layers[0].running_mean.item(), model.layers[0].running_var.item()
    (1.5, 1.6666666269302368)
    >>> nn.population_statistics(model, x, batch_size=2, method="batches")
    >>> model.layers[0].running_mean.item(), model.layers[0].running_var.item()
    (1.5, 0.5)
    """
    batch_size = integer("batch_size", batch_size, 1)
    if method not in ("moments", "batches"):
        raise ValueError(f'method: expected "moments" or "batches"; got {method!r:.60}')
    check_rows("x", x)
    layers = _tracking(model)
    if not layers:
        return
    gathered = [_Exact() if method == "moments" else _MeanOfBatches() for _ in layers]
    slices = epoch_slices(len(x), batch_size)
    with ExitStack() as stack:
        bar = stack.enter_context(
            progress_bar(len(slices), "population statistics", progress, unit="batch")
        )
        stack.enter_context(inference(model))
        stack.enter_context(_batch_statistics(layers))
        for layer, its in zip(layers, gathered, strict=True):
            stack.enter_context(observed(layer, before=_taker(layer, its)))
        for rows in slices:
            model.forward(x[rows])
            bar.update()
    # All are computed before the first is set. A layer that was never applied has none.
    new = [its.statistics() if its.count else None for its in gathered]
    for layer, statistics in zip(layers, new, strict=True):
        if statistics is not None:
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean[...], layer.running_var[...] = statistics


class _Exact:
    """Moments of all values."""

    def __init__(self) -> None:
        self.total: Moments | None = None

    @property
    def count(self) -> int:
        return self.total.count if self.total else 0

    def add(self, part: Moments) -> None:
        self.total = part if self.total is None else self.total + part

    def statistics(self) -> Statistics:
        assert self.total is not None
        return self.total.mean, self.total.var(ddof=1)


class _MeanOfBatches:
    """Sums over batches of their means and unbiased variances."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Any = 0.0
        self.var: Any = 0.0

    def add(self, part: Moments) -> None:
        self.count += 1
        self.mean = self.mean + part.mean
        self.var = self.var + part.var(ddof=1)

    def statistics(self) -> Statistics:
        return self.mean / self.count, self.var / self.count


def _tracking(model: Layer) -> list[BatchNorm]:
    """Return each BatchNorm with running statistics inside a model once."""
    found = {id(layer): layer for layer in layers_of(model) if isinstance(layer, BatchNorm)}
    for layer in found.values():
        if isinstance(layer, SyncBatchNorm):
            # Its forward waits for the other ranks, which are perhaps not here.
            raise ValueError(
                f"model: expected layers of one process; got {layer!r}; load its state into a "
                "model of BatchNorm layers and call this there"
            )
    return [layer for layer in found.values() if layer.running_mean is not None]


@contextmanager
def _batch_statistics(layers: list[BatchNorm]) -> Iterator[None]:
    """Let layers use their batch's statistics, in inference too, and track nothing."""
    # This is what a layer without running statistics does; its own arrays stay untouched.
    taken = [(layer, layer.running_mean, layer.running_var) for layer in layers]
    try:
        for layer in layers:
            layer.running_mean = layer.running_var = None
        yield
    finally:
        for layer, mean, var in taken:
            layer.running_mean, layer.running_var = mean, var


def _taker(layer: BatchNorm, gathered: _Exact | _MeanOfBatches) -> Callable[[Array], None]:
    def take(x: Array) -> None:
        gathered.add(batch_moments(x, axis=layer.axis))

    return take
