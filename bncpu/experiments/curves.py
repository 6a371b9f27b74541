"""A training as several experiments make it: plain SGD, the accuracy at each record, the best rate.

One that diverges is a result like another: from there on the network counts as right nowhere.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bncpu import nn
from bncpu.data import Dataset
from bncpu.experiments.experiment import Progress, Results


def learning_curve(
    model: nn.Layer,
    rate: float,
    data: Dataset,
    x: tuple[nn.Array, nn.Array] | None = None,
    *,
    steps: int,
    every: int,
    batch_size: int,
    seed: int,
    progress: Progress,
    observe: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Train a classifier, and evaluate it on the test set at every record.

    Parameters
    ----------
    model
        Changed in place.
    rate : float
        The learning rate.
    data : Dataset
        Whose labels, and images if there is no `x`, are taken.
    x : (train, test), optional
        The images in another shape.
    steps, every, batch_size, seed, progress
        As `bncpu.nn.fit` takes them.
    observe : callable, optional
        Called at every record, the last one before a divergence included.

    Returns
    -------
    dict
        "steps", "curve" (the accuracies) and "loss" (the mean since the record before, None where
        there is none), a value for each record; "accuracy", the last one; "diverged", whether the
        loss was not finite at some step.
    """
    train, test = x or (data.x_train, data.x_test)
    records: list[nn.Record] = []
    diverged = False

    def record(new: nn.Record) -> None:
        records.append(new)
        if observe is not None:
            observe()

    try:
        nn.fit(
            model,
            nn.SGD(rate),
            train,
            data.y_train,
            steps=steps,
            batch_size=batch_size,
            seed=seed,
            test=(test, data.y_test),
            every=every,
            callback=record,
            progress=progress,
        )
    except FloatingPointError:
        diverged = True
    expected = sorted({*range(0, steps + 1, every), steps})
    records += [nn.Record(step, None, 0.0) for step in expected[len(records) :]]
    curve = [record.accuracy for record in records]
    return {
        "steps": expected,
        "curve": curve,
        "loss": [record.loss for record in records],
        "accuracy": curve[-1],
        "diverged": diverged,
    }


def steps_to(level: float, steps: Sequence[int], curve: Sequence[float]) -> int | None:
    """Return the first step at whose record the accuracy was at least `level`, if there is one.

    Examples
    --------
    >>> from bncpu.experiments.curves import steps_to
    >>> steps_to(0.9, [0, 50, 100], [0.1, 0.92, 0.89])
    50
    """
    return next((s for s, accuracy in zip(steps, curve, strict=True) if accuracy >= level), None)


def best_rate(results: Results) -> float:
    """Return the learning rate of the highest mean "accuracy" over seeds, the lower one of equals.

    For a search that has several seeds; where it has one, that of search.py does.
    """
    rates: list[float] = sorted({result.settings["rate"] for result in results})
    return max(rates, key=lambda rate: float(np.mean(results.values("accuracy", rate=rate))))
