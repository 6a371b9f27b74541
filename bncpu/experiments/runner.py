"""Measures an experiment's runs, several at a time, and keeps each result as soon as it is there.

Each run is measured on one thread, in a worker process of its own or, if there is to be only one at
a time, in this process. Workers are spawned, not forked, and load the data themselves; results and
steps come back through a pipe for each, and only this process writes files. A result is one JSON
file; the next call with the same experiment, size, data and version finds it there. What a run
computes is none of this file's business.
"""

import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from bncpu import data
from bncpu.experiments.experiment import Experiment, Progress, Result, Results, Run
from bncpu.experiments.results import write_json
from bncpu.progress import bar

RUNS = "runs"  # the folder, within that of the page
REPORT_SECONDS = 0.1  # between two messages of a worker about its steps


class RunError(RuntimeError):
    """A run that could not be measured: it raised an error, or its process died."""


class Source(NamedTuple):
    """Where a dataset comes from: its name, and the folder with its files."""

    name: str
    folder: str | os.PathLike[str] | None = None

    def load(self) -> data.Dataset:
        """Return the dataset."""
        return data.load(self.name, self.folder)


def usable_cpus() -> int:
    """Return on how many CPUs this process may run."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def measure_all(
    experiment: Experiment,
    source: Source,
    folder: Path,
    *,
    identity: dict[str, Any],
    jobs: int | None = None,
    progress: bool = True,
) -> Results:
    """Return the results of all runs of the experiment, those that `folder` holds among them.

    Parameters
    ----------
    experiment : Experiment
        Its class must be importable by name, if there are several jobs.
    source : Source
        The data.
    folder : Path
        Gets one file for each run.
    identity : dict
        What a kept result must agree in, besides its settings, to be taken.
    jobs : int, optional
        How many runs are measured at a time; by default one for each CPU. An experiment that is to
        be ALONE has one, and that one may use all threads.
    progress : bool
        Show a bar over the steps of all runs on stderr.

    Raises
    ------
    RunError
        If a run raised an error or its process died. All that was finished is kept.
    KeyboardInterrupt
        As it came, with a line on stderr about what is kept; workers are ended.
    """
    kept = Kept(folder, identity)
    jobs = 1 if experiment.ALONE else jobs or usable_cpus()
    done: dict[str, Result] = {}
    wanted: dict[str, Run] = {}
    try:
        with bar(0, experiment.NAME, progress) as shown, Crew(experiment, source, jobs) as crew:
            while True:
                results = Results([done[name] for name in wanted])
                new = {run.name: plain(run) for run in experiment.runs(results)}
                new = {name: run for name, run in new.items() if name not in wanted}
                if not new:
                    return results
                wanted |= new
                found = {name: kept.find(run.settings) for name, run in new.items()}
                done |= {name: result for name, result in found.items() if result}
                missing = [run for name, run in new.items() if name not in done]
                if progress:
                    shown.total += sum(run.steps for run in new.values())
                    # What was there has cost no time, and counts for none in the time left.
                    steps = sum(run.steps for name, run in new.items() if name in done)
                    shown.initial += steps
                    shown.n += steps
                    shown.last_print_n += steps
                for run, result in crew.measure(missing, shown):
                    kept.keep(result)
                    done[run.name] = result
                    shown.set_postfix_str(f"{len(done)} of {len(wanted)} runs", refresh=False)
    except KeyboardInterrupt:
        print(
            f"{experiment.NAME}: {len(done)} of {len(wanted)} runs are kept in {folder}; "
            "the same command goes on from there",
            file=sys.stderr,
        )
        raise


class Kept:
    """The results that a folder holds, a file for each."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, identity
        folder.mkdir(parents=True, exist_ok=True)

    def find(self, settings: dict[str, Any]) -> Result | None:
        """Return the result with these settings, if it is there and is of this identity."""
        try:
            found = json.loads(self._path(settings).read_bytes())
            if found["identity"] == self.identity and found["settings"] == settings:
                measured, seconds = found["measured"], float(found["seconds"])
                if isinstance(measured, dict) and 0 <= seconds < math.inf:
                    return Result(settings, json_of(measured, "measured"), seconds)
        # JSON holds numbers that no float does, and is read by a function that calls itself.
        except (FileNotFoundError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
            pass  # what is not a result is measured again
        return None

    def keep(self, result: Result) -> None:
        """Write it."""
        path = self._path(result.settings)
        write_json(path.parent, {"identity": self.identity, **result._asdict()}, path.name)

    def _path(self, settings: dict[str, Any]) -> Path:
        """Return a name that says what it is, and that no other settings have."""
        mark = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
        words = re.sub(r"[^\w.+-]+", "-", Run(settings).name.replace("=", "-"), flags=re.ASCII)
        return self.folder / f"{words[:100]}-{mark}.json"


class Steps:
    """Tells somebody of a run's steps: now and then, and never of more than were promised."""

    def __init__(self, total: int, tell: Callable[[int], Any], seconds: float = 0) -> None:
        self._left, self._tell, self._seconds = total, tell, seconds
        self._untold, self._next = 0, time.monotonic() + seconds

    def update(self, n: int = 1) -> None:
        """Count n more steps."""
        self._untold += n
        if time.monotonic() >= self._next:
            self._report()

    def finish(self) -> None:
        """Count all that are left: a training may have ended before its time."""
        self._untold = self._left
        self._report()

    def _report(self) -> None:
        told = min(self._untold, self._left)
        self._left -= told
        self._untold, self._next = 0, time.monotonic() + self._seconds
        if told:
            self._tell(told)


class Crew:
    """Those who measure: up to `jobs` worker processes, or this process if that is one."""

    def __init__(self, experiment: Experiment, source: Source, jobs: int) -> None:
        self._experiment, self._source, self._jobs = experiment, source, jobs
        self._data: data.Dataset | None = None
        self._workers: list[Worker] = []

    def __enter__(self) -> "Crew":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the workers at once, whatever they do."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()

    def measure(self, runs: list[Run], progress: Progress) -> Iterator[tuple[Run, Result]]:
        """Yield each run with its result, in the order in which they are finished."""
        return self._here(runs, progress) if self._jobs == 1 else self._apart(runs, progress)

    def _here(self, runs: list[Run], progress: Progress) -> Iterator[tuple[Run, Result]]:
        for run in runs:
            if self._data is None:
                self._data = self._source.load()
            steps = Steps(run.steps, progress.update)
            try:
                result = measure_one(self._experiment, run.settings, self._data, steps)
            except Exception as error:
                raise self._failed(run, summary(error)) from error
            steps.finish()
            yield run, result

    def _apart(self, runs: list[Run], progress: Progress) -> Iterator[tuple[Run, Result]]:
        while len(self._workers) < min(self._jobs, len(runs)):
            self._workers.append(Worker(self._experiment, self._source))
        waiting = deque(runs)
        busy: dict[Any, tuple[Worker, Run, Steps]] = {}

        def give(worker: Worker) -> None:
            run = waiting.popleft()
            busy[worker.pipe] = worker, run, Steps(run.steps, progress.update)
            worker.give(run)

        for worker in self._workers[: len(runs)]:
            give(worker)
        while busy:
            for pipe in wait(list(busy)):
                worker, run, steps = busy[pipe]
                try:
                    kind, message = worker.pipe.recv()
                except (EOFError, OSError):
                    raise self._failed(run, worker.death()) from None
                if kind == "steps":
                    steps.update(message)
                elif kind == "failed":
                    raise self._failed(run, message)
                else:
                    steps.finish()
                    del busy[pipe]
                    yield run, Result(*message)  # kept before anything else can go wrong
                    if waiting:
                        give(worker)

    def _failed(self, run: Run, why: str) -> RunError:
        return RunError(f"{self._experiment.NAME}: the run {run.name} failed: {why}")


class Worker:
    """A process that measures what it is given, one run after the other."""

    def __init__(self, experiment: Experiment, source: Source) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, experiment, source), daemon=True)
        with interrupts_ignored():
            self.process.start()
        theirs.close()

    def give(self, run: Run) -> None:
        """Let it measure a run; one that has died is found out when the answer is read."""
        with suppress(OSError):
            self.pipe.send(run)

    def death(self) -> str:
        """Say how it ended, which it has."""
        self.process.join()
        code = self.process.exitcode or 0
        if code >= 0:
            return f"its process ended with status {code}"
        text = f"its process was ended by {signal.Signals(-code).name}"
        if -code == getattr(signal, "SIGKILL", 9):
            text += ", perhaps for want of memory; fewer --jobs need less"
        return text


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Let a process that is started inherit that Ctrl-C is none of its business."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def work(pipe: Connection, experiment: Experiment, source: Source) -> None:
    """Measure runs from the pipe until its other end is closed: what a worker does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        try:
            dataset = source.load()
            while True:
                run = pipe.recv()
                steps = Steps(run.steps, lambda n: pipe.send(("steps", n)), REPORT_SECONDS)
                result = measure_one(experiment, run.settings, dataset, steps)
                pipe.send(("done", tuple(result)))
        except (EOFError, BrokenPipeError):
            raise
        except Exception as error:
            pipe.send(("failed", summary(error)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # whoever asked is gone


def measure_one(
    experiment: Experiment, settings: dict[str, Any], dataset: data.Dataset, progress: Progress
) -> Result:
    """Measure with these settings, on one thread unless the experiment is ALONE."""
    from threadpoolctl import threadpool_limits

    # Matrices this small gain nothing from several threads, which beside other workers only wait
    # for each other: ten times longer has been seen. bncpu respects the limit as well.
    with nullcontext() if experiment.ALONE else threadpool_limits(1):
        start = time.perf_counter()
        measured = experiment.measure(settings, dataset, progress)
        seconds = time.perf_counter() - start
    return Result(settings, json_of(measured, "measured"), round(seconds, 3))


def plain(run: Run) -> Run:
    """Return the run with its settings as they are in a file: lists, not tuples."""
    return Run(json_of(run.settings, "settings"), run.steps)


def json_of(value: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the values as JSON gives them back.

    Raises
    ------
    ValueError
        If one is not finite, or of a type that JSON does not have.
    """
    parts = {}
    for key, part in value.items():
        try:
            text = json.dumps(part, allow_nan=False, default=_number)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}[{key!r}]: expected what JSON can hold; {error}") from None
        parts[key] = json.loads(text)
    return parts


def _number(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"got {type(value).__name__}")


def summary(error: Exception) -> str:
    """Return an error in one line, with the place where it was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(frame.filename).name}, line {frame.lineno})"
