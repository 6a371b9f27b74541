"""What an experiment is: runs that are measured apart, and a report that reads them together.

An experiment's file has its settings at the top, one `measure` and one `report`. Which run is
measured where, what is kept after an interrupt, and how pages look is not its business: see
runner.py and page.py.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

if TYPE_CHECKING:
    from bncpu.data import Dataset
    from bncpu.experiments.page import Page

SIZES = ("tiny", "quick", "default", "full")


class Run(NamedTuple):
    """One measurement: a training, mostly.

    Parameters
    ----------
    settings : dict
        All that the measurement depends on, besides the data and the code; what JSON can hold.
    steps : int
        How much of a progress bar it is: `measure` calls ``progress.update()`` so many times.
    """

    settings: dict[str, Any]
    steps: int = 1

    @property
    def name(self) -> str:
        """The settings in one line, for instance ``bn=True rate=1.0 seed=0``."""
        return " ".join(
            f"{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in self.settings.items()
        )


class Result(NamedTuple):
    """What `measure` returned for the settings of a run; what JSON can hold."""

    settings: dict[str, Any]
    measured: dict[str, Any]
    seconds: float


class Results(Sequence[Result]):
    """The results so far, in the order of the runs."""

    def __init__(self, results: Sequence[Result] = ()) -> None:
        self._results = list(results)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._results)

    def __getitem__(self, i: Any) -> Any:
        """Return one of them, or a slice of them."""
        return self._results[i]

    def __iter__(self) -> Iterator[Result]:
        """Iterate over them."""
        return iter(self._results)

    def where(self, **settings: Any) -> Results:
        """Return those with these settings."""
        return Results(
            [
                result
                for result in self
                if all(result.settings.get(key) == value for key, value in settings.items())
            ]
        )

    def values(self, key: str, **settings: Any) -> list[Any]:
        """Return what was measured under that key by those with these settings, one per seed."""
        return [result.measured[key] for result in self.where(**settings)]


class Progress(Protocol):
    """What tells a progress bar that a step has been taken; `fit` takes it as its `progress`."""

    def update(self, n: int = 1) -> Any:
        """Count n more steps."""


class Experiment(ABC):
    """An experiment in one of its sizes, on one dataset.

    Subclasses have a one-line docstring, which is the title of their page.

    Attributes
    ----------
    NAME, SECTION : str
        What ``bncpu reproduce`` calls it, and where in the paper it stands.
    ABOUT : str
        A paragraph of Markdown for the page: what the paper says, what is done here.
    DATASETS : tuple of str
        On what it can be made, the best first; the last one is "digits", which is always there.
    SETTINGS : dict
        For each of SIZES the settings that differ between them; "full" may be left out, and is
        "default" then. "tiny" ends in a second or two on digits and is for tests.
    ALONE : bool
        Whether nothing may run beside a run, because it measures time.
    settings : dict
        The entry of SETTINGS.
    seeds : tuple of int
        For claims that are statistical; the first `seeds` of the settings, or from ``--seed`` on.
    """

    NAME: ClassVar[str]
    SECTION: ClassVar[str]
    ABOUT: ClassVar[str]
    DATASETS: ClassVar[tuple[str, ...]] = ("mnist", "digits")
    SETTINGS: ClassVar[Mapping[str, Mapping[str, Any]]]
    ALONE: ClassVar[bool] = False

    def __init__(self, size: str = "default", dataset: str = "digits", seed: int = 0) -> None:
        chosen = "default" if size == "full" and size not in self.SETTINGS else size
        self.size, self.dataset = size, dataset
        self.settings: dict[str, Any] = dict(self.SETTINGS[chosen])
        self.seeds = tuple(range(seed, seed + self.settings.get("seeds", 1)))

    @abstractmethod
    def runs(self, results: Results) -> list[Run]:
        """Return all runs that are known to be needed, given the results that are there.

        It is asked again when all of them have been measured, until there is no new one: a
        learning rate may be searched first, and used then.
        """

    @abstractmethod
    def measure(
        self, settings: dict[str, Any], data: Dataset, progress: Progress
    ) -> dict[str, Any]:
        """Return what there is to measure with these settings; the same again for the same.

        A training that diverges raises FloatingPointError, which is the experiment's to catch: it
        is a result. Any other error ends the whole experiment, and so does what JSON cannot hold
        (a number that is not finite); NumPy's numbers and arrays become Python's and lists.
        """

    @abstractmethod
    def report(self, results: Results, page: Page) -> None:
        """Write claims, tables and figures."""
