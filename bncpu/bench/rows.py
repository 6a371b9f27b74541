"""Rows of a table: operations on problems, measured in the same rounds."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, NamedTuple

from bncpu.bench.contenders import ours, stream_bytes, streams
from bncpu.bench.measure import measure, ratio

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bncpu.bench.measure import Contender
    from bncpu.bench.operations import Operation, Problem, Shape


class Row(NamedTuple):
    """What was measured of one operation on one shape: seconds of each round, by contender.

    "bncpu" writes into a given array and "bncpu, allocating" into a new one; peers are set against
    the one that does as they do. `stream_turns` are of the streaming kernel of the same bytes per
    element or nearest to it, the faster of plain and non-temporal stores.
    """

    shape: Shape
    operation: str
    dtype: str
    layout: str
    threads: int
    level: str
    bytes: int
    stream: str
    stream_bytes: int
    stream_turns: list[float]
    from_memory: bool
    turns: dict[str, list[float]]

    @property
    def seconds(self) -> dict[str, float]:
        """Return the median seconds by contender."""
        return {name: statistics.median(times) for name, times in self.turns.items()}

    @property
    def stream_seconds(self) -> float:
        """Return the median seconds of the streaming kernel."""
        return statistics.median(self.stream_turns)

    @property
    def fraction(self) -> float:
        """Return bncpu's bytes per second as a part of the streaming kernel's."""
        return self.bytes / self.stream_bytes * ratio(self.stream_turns, self.turns["bncpu"])

    def ratio(self, peer: str) -> float:
        """Return how many times as long a peer takes as bncpu does under the same conditions."""
        against = "bncpu" if writes_into_given(peer) else "bncpu, allocating"
        return ratio(self.turns[peer], self.turns.get(against, self.turns["bncpu"]))

    @property
    def peers(self) -> list[str]:
        """Return the names of the contenders that are not bncpu."""
        return [name for name in self.turns if not name.startswith("bncpu")]


def writes_into_given(peer: str) -> bool:
    """Tell a peer that writes into a given array from one that makes a new one at each call."""
    return peer.startswith("onednn") or peer.endswith("out=")


class Part(NamedTuple):
    """Operations on one problem; `peers` returns the other contenders of an operation, by name."""

    problem: Problem
    operations: Sequence[Operation]
    threads: int
    peers: Callable[[Operation], Mapping[str, Contender]] = lambda _: {}

    def contenders(self) -> dict[tuple[str, str], Contender]:
        """Return all contenders by (operation, name); streaming kernels as ("stream", name)."""
        problem, threads = self.problem, self.threads
        found: dict[tuple[str, str], Contender] = {}
        for kind in dict.fromkeys(map(problem.stream, self.operations)):
            for name, stream in streams(problem, kind, threads).items():
                found["stream", name] = stream
        for operation in self.operations:
            found[operation.name, "bncpu"] = problem.timed(ours(problem, operation, threads))
            others = self.peers(operation)
            if not all(map(writes_into_given, others)) and operation.function != "moments":
                allocating = ours(problem, operation, threads, allocate=True)
                found[operation.name, "bncpu, allocating"] = problem.timed(allocating)
            found |= {(operation.name, name): peer for name, peer in others.items()}
        return found

    def rows(self, turns: Mapping[tuple[str, str], list[float]]) -> list[Row]:
        """Return a row for each operation from the rounds of all contenders."""
        problem = self.problem
        return [
            Row(
                problem.shape,
                operation.name,
                problem.dtype,
                problem.layout,
                self.threads,
                problem.level,
                operation.bytes(problem.size, problem.itemsize),
                problem.stream(operation),
                stream_bytes(problem, problem.stream(operation)),
                min(
                    (
                        times
                        for (of, name), times in turns.items()
                        if of == "stream" and name.startswith(problem.stream(operation))
                    ),
                    key=statistics.median,
                ),
                problem.from_memory,
                {name: times for (of, name), times in turns.items() if of == operation.name},
            )
            for operation in self.operations
        ]


def measure_parts(
    parts: Mapping[str, Part], seconds: float, rounds: int | None = None
) -> dict[str, list[Row]]:
    """Measure several parts in the same rounds, and return the rows of each.

    Parameters
    ----------
    parts : mapping of str to Part
        What to measure.
    seconds : float
        For how long at least, all together.
    rounds : int, optional
        The least number of rounds.
    """
    taken = measure(
        {
            (part, *key): contender
            for part in parts
            for key, contender in parts[part].contenders().items()
        },
        seconds,
        rounds,
    )
    return {
        name: part.rows({(of, what): t for (p, of, what), t in taken.items() if p == name})
        for name, part in parts.items()
    }


def measure_part(part: Part, seconds: float, rounds: int | None = None) -> list[Row]:
    """Measure one part, and return its rows."""
    return measure_parts({"": part}, seconds, rounds)[""]
