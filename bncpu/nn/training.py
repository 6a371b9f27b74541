"""The training loop: batches in a reproducible order, evaluation, records, a progress bar.

Not a trainer class: the state is the model, the optimizer's velocity and the number of the step,
all in the caller's hands. Batch n of epoch e is a function of (seed, e, n) alone, its augmentation
of (seed, step), the learning rate of the step, so a run that was stopped after any step goes on
exactly as if it had not been.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bncpu.backends import array_module, on_gpu
from bncpu.nn.arguments import integer, nonnegative
from bncpu.nn.augmentation import Augmentation
from bncpu.nn.base import Array, Layer, layers_of, modes_of
from bncpu.nn.convolution import Conv2d
from bncpu.nn.dropout import Dropout
from bncpu.nn.optimizers import SGD
from bncpu.nn.parallel import Process, Ranks
from bncpu.progress import Progress
from bncpu.progress import bar as progress_bar

Shuffle = Literal["epoch", "once"]
# Set after seed and step: the order of an epoch comes from a generator of two numbers.
AUGMENTATION = 1


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


def epoch_slices(n: int, batch_size: int) -> list[slice]:
    """Return the batches of an epoch as slices of its n examples in their order."""
    count = steps_per_epoch(n, batch_size)
    ends = [*range(batch_size, count * batch_size, batch_size), n]
    return [slice(k * batch_size, end) for k, end in enumerate(ends)]


def batches(
    n: int, batch_size: int, seed: int, start: int = 0, shuffle: Shuffle = "epoch"
) -> Iterator[NDArray[np.intp]]:
    """Yield without end the rows of each batch, from step `start` on.

    Every epoch is a new permutation; the one of epoch e comes from the generator [seed, e]. With
    `shuffle` "once" all epochs have that of epoch 0.
    """
    slices = epoch_slices(n, batch_size)
    epoch, first = divmod(start, len(slices))
    while True:
        order = np.random.default_rng([seed, epoch if shuffle == "epoch" else 0]).permutation(n)
        for rows in slices[first:]:
            yield order[rows]
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


def predict(model: Layer, x: Array, *, batch_size: int = 1000) -> Array:
    """Return what the model makes of x in inference, logits mostly.

    Parameters
    ----------
    model : Layer
        Every layer is left in the mode in which it was.
    x : array, shape (n, ...)
        The examples.
    batch_size : int
        How many go through the model at a time: memory grows with it, the result does not depend
        on it beyond rounding.

    Returns
    -------
    array, shape (n, ...)
        Of the dtype of the model's output and the kind of x.

    Raises
    ------
    TypeError
        If x is not an array, or `batch_size` not an integer.
    ValueError
        If there is no row, or `batch_size` is not positive.
    """
    batch_size = integer("batch_size", batch_size, 1)
    check_rows("x", x)
    with inference(model), _one_thread_of_blas(model):
        y = model.forward(x[:batch_size])
        outputs: Array = array_module(y).empty((len(x), *y.shape[1:]), y.dtype)
        outputs[:batch_size] = y
        for i in range(batch_size, len(x), batch_size):
            outputs[i : i + batch_size] = model.forward(x[i : i + batch_size])
    return outputs


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


def _right(model: Layer, x: Array, y: Array, batch_size: int) -> int:
    if not len(x):  # a rank may have no test example
        return 0
    return int(np.count_nonzero(predict(model, x, batch_size=batch_size).argmax(axis=1) == y))


def check_rows(name: str, array: Array, *, may_be_empty: bool = False) -> None:
    """Refuse what is not an array with at least one row."""
    if not isinstance(array, np.ndarray) and not on_gpu(array):
        raise TypeError(f"{name}: expected a NumPy or CuPy array; got {type(array).__name__}")
    if not array.ndim:
        raise ValueError(f"{name}: expected one row per example; got an array without axes")
    if not len(array) and not may_be_empty:
        raise ValueError(f"{name}: expected at least one example; got shape {array.shape}")


def check_examples(
    x: Array, y: Array, names: tuple[str, str] = ("x", "y"), *, may_be_empty: bool = False
) -> None:
    """Refuse what is not at least one example with one label for each."""
    check_rows(names[0], x, may_be_empty=may_be_empty)
    check_rows(names[1], y, may_be_empty=True)
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
    test_batch_size: int = 1000,
    every: int | None = None,
    schedule: Callable[[int], float] | None = None,
    augment: Augmentation | None = None,
    shuffle: Shuffle = "epoch",
    callback: Callable[[Record], None] | None = None,
    progress: bool | Progress = False,
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
    test_batch_size : int
        How many of its examples go through the model at a time; large ones take the layers' memory.
    every : int, optional
        A record is made at `start`, at each step divisible by `every`, and at the end. By
        default that is once an epoch.
    schedule : callable, optional
        ``schedule(step)`` is the learning rate of the step that follows `step` steps; it is set
        before it, and the optimizer keeps the last one. `ExponentialDecay` and `StepDecay` are two.
    augment : callable, optional
        ``augment(x, rng)`` returns what the model is given in the place of a batch x, an array of
        its shape and dtype; rng is made of the seed and the number of the step. bncpu's own, such
        as `Flip`, take NumPy arrays of shape (n, C, H, W). Not for ranks: none has a whole batch.
    shuffle : "epoch" or "once"
        Whether each epoch has an order of its own, or all have one, and so the same batches.
    callback : callable, optional
        Called with every record as it is made.
    progress : bool or Progress
        Show a progress bar (tqdm) on stderr, with `title` before it; or tell an object that has
        `update` of every step.
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
        If an argument is of the wrong kind or out of range, or x and y are not arrays of one
        length, before any step; or if `schedule` returns no learning rate, or `augment` an array of
        another shape or dtype.
    FloatingPointError
        If the loss is not finite. No parameter has been changed by that step.

    Notes
    -----
    With `comm`, all ranks start with rank 0's state of model and optimizer and take the same steps;
    records are the same on all of them, and to rounding those of a single process, whatever the
    number of ranks. `Dropout` is refused there, because its masks would not be. A rank that raises
    leaves the others waiting: end them with ``comm.Abort``.
    """
    if (epochs is None) == (steps is None):
        raise ValueError("epochs, steps: expected exactly one of the two")
    batch_size = integer("batch_size", batch_size, 1)
    seed, start = integer("seed", seed, 0), integer("start", start, 0)
    test_batch_size = integer("test_batch_size", test_batch_size, 1)
    _check_options(schedule, augment, shuffle)
    _check_data(x, y, test, may_be_empty=comm is not None)
    if comm is not None:
        _check_for_ranks(model, x, augment)
    here = Process(len(x)) if comm is None else Ranks(comm, len(x))
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
        accuracy = (
            here.fraction(_right(model, *test, test_batch_size), len(test[0])) if test else None
        )
        records.append(Record(step, mean, accuracy))
        if callback is not None:
            callback(records[-1])

    shown = progress_bar(stop, title, progress, start=start)
    here.begin(model, optimizer)
    model.train()
    order = batches(here.examples, batch_size, seed, start, shuffle)
    # A diverging network overflows somewhere first; the loss tells of it once, below.
    with shown as bar, _one_thread_of_blas(model), np.errstate(over="ignore", invalid="ignore"):
        record(start)
        for step in range(start + 1, stop + 1):
            batch = next(order)
            rows = array_module(x).asarray(here.own(batch))
            examples = x[rows]
            if augment is not None:
                examples = _augmented(augment, examples, [seed, step - 1, AUGMENTATION])
            if schedule is not None:
                optimizer.learning_rate = nonnegative("schedule", schedule(step - 1))
            losses.append(here.loss(model.forward(examples), y[rows], len(batch)))
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


@contextmanager
def _one_thread_of_blas(model: Layer) -> Iterator[None]:
    """Keep BLAS to one thread while a model with convolutions shares out its images to several.

    BLAS's own would wait for each other, and while they do so keep the cores from the others: a
    training step was seen to take twice as long. Without threadpoolctl that is how it is.
    """
    if not any(isinstance(layer, Conv2d) for layer in layers_of(model)):
        yield
        return
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        yield
        return
    with threadpool_limits(1, user_api="blas"):
        yield


def _augmented(augment: Augmentation, x: Array, seed: list[int]) -> Array:
    y = augment(x, np.random.default_rng(seed))
    there, here = ((getattr(a, "shape", None), getattr(a, "dtype", None)) for a in (y, x))
    if there != here:
        raise ValueError(
            f"augment: expected an array of shape {here[0]}, {here[1]} as it was given; got "
            f"{there[0]}, {there[1]}"
        )
    return y


def _check_options(schedule: Any, augment: Any, shuffle: Any) -> None:
    for name, value in (("schedule", schedule), ("augment", augment)):
        if value is not None and not callable(value):
            raise TypeError(f"{name}: expected a callable; got {value!r:.60}")
    if shuffle not in ("epoch", "once"):
        raise ValueError(f'shuffle: expected "epoch" or "once"; got {shuffle!r:.60}')


def _check_data(x: Array, y: Array, test: Any, *, may_be_empty: bool) -> None:
    check_examples(x, y, may_be_empty=may_be_empty)
    if test is not None:
        if not isinstance(test, tuple | list) or len(test) != 2:
            raise TypeError(f"test: expected two arrays, x and y; got {type(test).__name__}")
        check_examples(test[0], test[1], ("test[0]", "test[1]"), may_be_empty=may_be_empty)


def _check_for_ranks(model: Layer, x: Array, augment: Augmentation | None) -> None:
    """Refuse what would not be the same training on any number of ranks."""
    if on_gpu(x):
        raise TypeError("x: expected a NumPy array beside comm, ranks train on the CPU; got CuPy's")
    if augment is not None:
        raise ValueError(
            "augment: expected None beside comm, where no rank has a whole batch to draw for; "
            "augment the examples before the call"
        )
    for layer in layers_of(model):
        if isinstance(layer, Dropout):
            raise ValueError(
                f"model: expected no Dropout beside comm, where no rank has a whole batch to draw "
                f"for; got {layer!r}"
            )
