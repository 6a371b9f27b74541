"""The learning rate of every network: its best one, by one search over one grid for all.

The rates are compared on a part of the training set that is held out; the test set is seen by the
chosen rate alone. A network is a variant: a dict of the settings that tell it from the others.
"""

from collections.abc import Callable, Sequence
from typing import Any

from bncpu.data import Dataset
from bncpu.experiments.experiment import Results, Run
from bncpu.experiments.numbers import percent
from bncpu.experiments.page import Page

# What `measure` returns where the loss did not stay finite: any rate that trains is better.
DIVERGED: dict[str, Any] = {"accuracy": 0.0, "train accuracy": 0.0}


def runs(
    results: Results,
    variants: Sequence[dict[str, Any]],
    rates: Sequence[float],
    seeds: Sequence[int],
    steps: Callable[[dict[str, Any]], int],
    shorter: int = 1,
) -> list[Run]:
    """Return the runs of the search, and those on the test set once the search is over.

    Parameters
    ----------
    results : Results
        What has been measured so far.
    variants : sequence of dict
        The networks.
    rates : sequence of float
        The grid, the same for all.
    seeds : sequence of int
        Of the runs on the test set; the search has the first of them.
    steps : callable
        Gives the steps of a variant's training on the test set.
    shorter : int
        How many times shorter the trainings of the search are.
    """
    searched = [
        Run(
            {**variant, "part": "validation", "rate": rate, "seed": seeds[0]},
            steps(variant) // shorter,
        )
        for variant in variants
        for rate in rates
    ]
    if not all(results.where(**run.settings) for run in searched):
        return searched
    return searched + [
        Run(
            {**variant, "part": "test", "rate": best_rate(results, variant), "seed": seed},
            steps(variant),
        )
        for variant in variants
        for seed in seeds
    ]


def best_rate(results: Results, variant: dict[str, Any]) -> float:
    """Return the rate of the highest validation accuracy, the lower one of equals."""
    found = results.where(**variant, part="validation")
    best = max(found, key=lambda result: (result.measured["accuracy"], -result.settings["rate"]))
    return float(best.settings["rate"])


def part_of(data: Dataset, part: str) -> Dataset:
    """Return the data for a run: in the search, a held-out part stands for the test set."""
    return data.held_out() if part == "validation" else data


def on_test(results: Results, key: str = "accuracy", **variant: Any) -> list[float]:
    """Return what was measured of a variant on the test set, one value for each seed."""
    values: list[float] = results.where(part="test").values(key, **variant)
    return values


def better(a: Sequence[float], b: Sequence[float]) -> bool:
    """Return whether a is above b for every seed."""
    return all(x > y for x, y in zip(a, b, strict=True))


def claim_better(
    page: Page, text: str, a: Sequence[float], b: Sequence[float], *, paper: str
) -> None:
    """Claim on a page that a is better than b, both fractions, one for each seed."""
    page.claim(text, paper=paper, ours=f"{percent(a)} against {percent(b)}", held=better(a, b))
