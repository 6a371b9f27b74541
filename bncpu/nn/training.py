"""The training loop: batches in a reproducible order, evaluation, records, a progress bar.

Not a trainer class: the state is the model, the optimizer's velocity and the number of the step,
all in the caller's hands. Batch n of epoch e is a function of (seed, e, n) alone, so a run that was
stopped after any step goes on exactly as if it had not been.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bncpu.backends import array_module, on_gpu
from bncpu.nn.arguments import integer
from bncpu.nn.base import Array, Layer, modes_of
from bncpu.nn.optimizers import SGD
from bncpu.nn.parallel import Process, Ranks
from bncpu.progress import bar as progress_bar


class Record(NamedTuple):
    """What is known after `step` steps: the mean loss since the last record, the test accuracy.

    `loss` is None before the first step, `accuracy` (a fraction) where there is no test set.
    """

    step: int
    loss: float | None
    accuracy: float | None


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Return the number of batches in n examples.

    A last batch of a single example cannot be batch-normalised (its variance is zero whatever it
    is), so such an example is merged into the batch before it.
    """
    if batch_size > 1 and n > 1 and n % batch_size == 1:
        return n // batch_size
    return -(-n // batch_size)


def batches(n: int, batch_size: int, seed: int, start: int = 0) -> Iterator[NDArray[np.intp]]:
    """Yield without end the rows of each batch, from step `start` on.

    Every epoch is a new permutation; the one of epoch e comes from the generator [seed, e].
    """
    per_epoch = steps_per_epoch(n, batch_size)
    epoch, first = divmod(start, per_epoch)
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(n)
        for k in range(first, per_epoch):
            yield order[k * batch_size : n if k == per_epoch - 1 else (k + 1) * batch_size]
        epoch, first = epoch + 1, 0


@contextmanager
def inference(model: Layer) -> Iterator[None]:
    """Put all layers in inference inside a with statement; each gets its own mode back."""
    before = modes_of(model)
    model.eval()
    try:
        yield
    finally:
        for layer, mode in before:
            layer.train(mode)


def evaluate(model: Layer, x: Array, y: Array, *, batch_size: int = 1000) -> float:
    """Return the fraction of rows of x that the model, in inference, gives the label y.

    Every layer is left in the mode in which it was.

    Raises
    ------
    TypeError
        If x or y is not an array, or `batch_size` not an integer.
    ValueError
        If there is no row, x and y differ in length, or `batch_size` is not positive.
    """
    batch_size = integer("batch_size", batch_size, 1)
    check_examples(x, y)
    return _right(model, x, y, batch_size) / len(x)


def _right(model: Layer, x: Array, y: Array, batch_size: int = 1000) -> int:
    right = 0
    with inference(model):
        for i in range(0, len(x), batch_size):
            logits = model.forward(x[i : i + batch_size])
            right += int(np.count_nonzero(logits.argmax(axis=1) == y[i : i + batch_size]))
    return right


def check_examples(
    x: Array, y: Array, names: tuple[str, str] = ("x", "y"), *, may_be_empty: bool = False
) -> None:
    """Refuse what is not at least one example with one label for each."""
    for name, array in zip(names, (x, y), strict=True):
        if not isinstance(array, np.ndarray) and not on_gpu(array):
            raise TypeError(f"{name}: expected a NumPy or CuPy array; got {type(array).__name__}")
        if not array.ndim:
            raise ValueError(f"{name}: expected one row per example; got an array without axes")
    if not len(x) and not may_be_empty:
        raise ValueError(f"{names[0]}: expected at least one example; got shape {x.shape}")
    if len(x) != len(y):
        raise ValueError(
            f"{names[1]}: expected one label per example of {names[0]} ({len(x)}); got {len(y)}"
        )


def fit(
    model: Layer,
    optimizer: SGD,
    x: Array,
    y: Array,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int = 60,
    seed: int = 0,
    start: int = 0,
    test: tuple[Array, Array] | None = None,
    every: int | None = None,
    callback: Callable[[Record], None] | None = None,
    progress: bool = False,
    title: str = "training",
    comm: Any = None,
) -> list[Record]:
    """Train a classifier on x, y with softmax cross-entropy.

    Parameters
    ----------
    model, optimizer
        Changed in place. All layers of the model are put in training mode.
    x : array, shape (n, ...)
        The training examples, of the model's dtype and on its device, as y and the test examples.
    y : array, shape (n,), integer
        Their labels.
    epochs, steps : int
        How long to train; exactly one of the two. An epoch is one pass over x.
    batch_size : int
        The size of a batch; the last one of an epoch holds what remains, and is merged with the
        one before it if that is a single example.
    seed : int
        Of the order of the examples, >= 0.
    start : int
        The number of steps already taken, when a run is resumed.
    test : (x, y), optional
        Evaluated at every record.
    every : int, optional
        A record is made at `start`, at each step divisible by `every`, and at the end. By
        default that is once an epoch.
    callback : callable, optional
        Called with every record as it is made.
    progress : bool
        Show a progress bar (tqdm) on stderr, with `title` before it.
    comm : mpi4py.MPI.Intracomm, optional
        Train together with its other ranks, all of which make this call, and whose model has the
        same layers. x, y and `test` are then this rank's shard of them, of any length; in the order
        of the ranks, the shards are the data set. A batch is the one that a single process would
        take from the whole, each rank computes on those of its examples that it holds, and
        gradients are added up over the ranks. Batch norms should be `bncpu.distributed`'s
        `SyncBatchNorm`: a plain one normalises by its rank's examples alone.

    Returns
    -------
    list of Record
        All records; the last one's step is the `start` of a later run.

    Raises
    ------
    TypeError, ValueError
        If a number is none or out of range, or x and y are not arrays of one length; before any
        step.
    FloatingPointError
        If the loss is not finite. No parameter has been changed by that step.

    Notes
    -----
    With `comm`, all ranks start with rank 0's state of model and optimizer and take the same steps;
    records are the same on all of them, and to rounding those of a single process, whatever the
    number of ranks. A rank that raises leaves the others waiting: end them with ``comm.Abort``.
    """
    if (epochs is None) == (steps is None):
        raise ValueError("epochs, steps: expected exactly one of the two")
    batch_size = integer("batch_size", batch_size, 1)
    seed, start = integer("seed", seed, 0), integer("start", start, 0)
    shards = comm is not None
    check_examples(x, y, may_be_empty=shards)
    if test is not None:
        if not isinstance(test, tuple | list) or len(test) != 2:
            raise TypeError(f"test: expected two arrays, x and y; got {type(test).__name__}")
        check_examples(*test, names=("test[0]", "test[1]"), may_be_empty=shards)
    if shards and on_gpu(x):
        raise TypeError("x: expected a NumPy array beside comm, ranks train on the CPU; got CuPy's")
    here = Ranks(comm, len(x)) if shards else Process(len(x))

    per_epoch = steps_per_epoch(here.examples, batch_size)
    if epochs is not None:
        stop = start + integer("epochs", epochs, 1) * per_epoch
    else:
        stop = start + integer("steps", steps, 1)
    every = per_epoch if every is None else integer("every", every, 1)
    records: list[Record] = []
    losses: list[float] = []

    def record(step: int) -> None:
        mean = math.fsum(losses) / len(losses) if losses else None
        losses.clear()
        accuracy = here.fraction(_right(model, *test), len(test[0])) if test else None
        records.append(Record(step, mean, accuracy))
        if callback is not None:
            callback(records[-1])

    here.begin(model, optimizer)
    model.train()
    order = batches(here.examples, batch_size, seed, start)
    shown = progress_bar(stop, title, progress, start=start)
    # A diverging network overflows somewhere first; the loss tells of it once, below.
    with shown as bar, np.errstate(over="ignore", invalid="ignore"):
        record(start)
        for step in range(start + 1, stop + 1):
            batch = next(order)
            rows = array_module(x).asarray(here.own(batch))
            losses.append(here.loss(model.forward(x[rows]), y[rows], len(batch)))
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(
                    f"loss: {losses[-1]} at step {step}; the training diverged, lower the "
                    f"learning rate ({optimizer.learning_rate:g})"
                )
            model.backward(here.loss_gradient())
            here.add_up(model.gradients())
            optimizer.step(model)
            bar.update()
            if step % every == 0 or step == stop:
                record(step)
                if test:
                    bar.set_postfix_str(f"test accuracy {records[-1].accuracy:.4f}", refresh=False)
    return records
