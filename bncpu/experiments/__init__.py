"""One file for each figure, table or claim of the paper (Ioffe & Szegedy 2015, arXiv:1502.03167).

========================  ===========================================================
digits.py                 figure 1, section 4.1: accuracy and a sigmoid's inputs over time
results.py                where the results go: results.json and figure.png in a folder
========================  ===========================================================

`EXPERIMENTS` is what ``bncpu reproduce NAME`` chooses from.
"""

from pathlib import Path
from typing import Protocol

from bncpu.experiments import digits


class Experiment(Protocol):
    """Run, print the result as a table, and write results.json and figure.png into `out`."""

    def __call__(self, out: Path, *, quick: bool, seed: int, progress: bool) -> None:
        """Run the experiment, for a few seconds only if `quick`."""


EXPERIMENTS: dict[str, Experiment] = {"digits": digits.run}

__all__ = ["EXPERIMENTS", "Experiment"]
