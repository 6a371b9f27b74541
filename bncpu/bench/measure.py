"""How it is measured: contenders in turn, in one process, and medians.

Machines drift: a rented one may get half of its memory's speed from one second to the next. So
whatever is compared runs alternately in the same rounds, a ratio is formed in each round before the
median is taken, and no time means anything beside one of another run.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from typing import TYPE_CHECKING, Protocol, TypeVar

from bncpu import cpu

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from bncpu.bench.operations import Call

    Key = TypeVar("Key", bound=Hashable)

# Between two contenders the threads of the one stop spinning, so that they do not take the cores
# of the other.
PAUSE_SECONDS = 0.01
# A fast contender runs several times in its turn, for as long as this.
TURN_SECONDS = 0.02
ROUNDS = 5


class Contender(Protocol):
    """Anything that can take its turn."""

    def turn(self, seconds: float) -> list[float]:
        """Run for about so long, at least once, and return the seconds of each run."""


class Timed:
    """A contender that is a call in this process.

    Parameters
    ----------
    call : callable
        What is timed.
    level : str, optional
        Kernels of another level than bncpu has chosen.
    """

    def __init__(self, call: Call, level: str | None = None) -> None:
        self.call, self.level = call, level

    def turn(self, seconds: float) -> list[float]:
        """Call until the time is over; the first call is for warming up, if others follow."""
        with contextlib.nullcontext() if self.level is None else cpu.use_level(self.level):
            begin = time.perf_counter()
            self.call()
            now = time.perf_counter()
            end = begin + seconds
            taken: list[float] = []
            if now > end:
                return [now - begin]
            while now < end or not taken:
                begin = time.perf_counter()
                self.call()
                now = time.perf_counter()
                taken.append(now - begin)
            return taken


def measure(
    contenders: Mapping[Key, Contender], seconds: float, rounds: int | None = None
) -> dict[Key, list[float]]:
    """Return each contender's median seconds of each round, all of them measured in turn.

    Parameters
    ----------
    contenders : mapping
        What to time, by name. Each takes a short turn before the clock runs.
    seconds : float
        When this much time has gone by, no further round begins.
    rounds : int, optional
        The least number of rounds, ROUNDS by default; every round is a turn of every contender.
    """
    left = ROUNDS if rounds is None else rounds
    order = list(contenders.items())
    for contender in contenders.values():
        contender.turn(0.0)
    taken: dict[Key, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds
    while left > 0 or time.perf_counter() < end:
        left -= 1
        # Back and forth, so that nobody always follows the same one.
        order.reverse()
        for name, contender in order:
            time.sleep(PAUSE_SECONDS)
            taken[name].append(statistics.median(contender.turn(TURN_SECONDS)))
    return taken


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Return the median over the rounds of one contender's time divided by another's."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))
