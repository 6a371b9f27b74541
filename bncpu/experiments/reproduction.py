"""From the names of experiments to the folders with their pages: what ``bncpu reproduce`` does."""

import contextlib
import datetime
import functools
import hashlib
import importlib
import inspect
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import bncpu
from bncpu import data
from bncpu.experiments.experiment import SIZES, Experiment
from bncpu.experiments.page import HEAD, PAGE_NAME, Claim, Page, markdown_table, plain_table
from bncpu.experiments.results import JSON_NAME, prepare_folder, write_bytes, write_json
from bncpu.experiments.runner import RUNS, Source, measure_all, usable_cpus


class Facts(NamedTuple):
    """A dataset as a page names it: its shapes, and a checksum of its four arrays."""

    name: str
    x_train: tuple[int, ...]
    x_test: tuple[int, ...]
    sha256: str


class Made(NamedTuple):
    """What is left of an experiment when its page is written."""

    experiment: Experiment
    claims: list[Claim]


def reproduce(
    kinds: Sequence[type[Experiment]],
    out: Path,
    *,
    size: str = "default",
    dataset: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    jobs: int | None = None,
    progress: bool = True,
) -> None:
    """Make the experiments and write a page for each, and an index if there are several.

    Parameters are those of `bncpu.experiments.reproduce`, with classes for names.
    """
    if size not in SIZES:
        raise ValueError(f"size: expected one of {', '.join(SIZES)}; got {size!r}")
    try:
        importlib.import_module("threadpoolctl")
    except ImportError as error:
        raise ImportError('experiments: need threadpoolctl; pip install "bncpu[train]"') from error
    places = {kind: out if len(kinds) == 1 else out / kind.NAME for kind in kinds}
    sources = {kind: choose(kind, dataset, data_dir) for kind in kinds}
    if len(kinds) > 1:
        prepare_folder(out, (JSON_NAME, PAGE_NAME))
    for kind in kinds:
        prepare_folder(places[kind], (JSON_NAME, PAGE_NAME))
        prepare_folder(places[kind] / RUNS, (JSON_NAME,))
    # Before hours of work, and once for each, whatever may be wrong with the files.
    facts = {source: describe(source) for source in sources.values()}
    made = []
    for kind in kinds:
        source = sources[kind]
        experiment = kind(size, source.name, seed)
        made.append(make(experiment, source, facts[source], places[kind], seed, jobs, progress))
    if len(kinds) > 1:
        write_index(out, made, size)


def choose(
    kind: type[Experiment], dataset: str | None, folder: str | os.PathLike[str] | None
) -> Source:
    """Return the dataset for an experiment: the one that is asked for, or the best that is there.

    Raises
    ------
    ValueError
        If the experiment does not know the one that is asked for.
    """
    if dataset is None:
        there = data.available(folder)
        return Source(next(name for name in kind.DATASETS if name in there), folder)
    if dataset not in kind.DATASETS:
        raise ValueError(
            f"dataset: {kind.NAME} expects one of {', '.join(kind.DATASETS)}; got {dataset!r}"
        )
    return Source(dataset, folder)


def describe(source: Source) -> Facts:
    """Load a dataset and return what there is to say about it."""
    loaded = source.load()
    digest = hashlib.sha256()
    for array in (loaded.x_train, loaded.y_train, loaded.x_test, loaded.y_test):
        digest.update(array.data)
    return Facts(source.name, loaded.x_train.shape, loaded.x_test.shape, digest.hexdigest())


def make(
    experiment: Experiment,
    source: Source,
    facts: Facts,
    out: Path,
    seed: int,
    jobs: int | None,
    progress: bool,
) -> Made:
    """Measure an experiment, write its page and its results, and print its claims."""
    start = time.perf_counter()
    # The number of seeds may grow: those that are there are the first of them.
    settings = {key: value for key, value in experiment.settings.items() if key != "seeds"}
    identity = {
        "experiment": experiment.NAME,
        "size": experiment.size,
        "settings of the size": json.loads(json.dumps(settings)),
        "dataset": facts.name,
        "sha256": facts.sha256,
        "bncpu": bncpu.__version__,
    }
    results = measure_all(
        experiment, source, out / RUNS, identity=identity, jobs=jobs, progress=progress
    )
    page = Page()
    experiment.report(results, page)
    measured = sum(result.seconds for result in results)
    record = {
        "experiment": experiment.NAME,
        "section": experiment.SECTION,
        "title": title_of(experiment),
        "command": command_of(experiment, seed),
        "size": experiment.size,
        "settings": experiment.settings,
        "seeds": experiment.seeds,
        "dataset": facts._asdict(),
        **circumstances(),
        "seconds": {
            "of all runs": round(measured, 3),
            "now": round(time.perf_counter() - start, 3),
        },
        "claims": [claim._asdict() for claim in page.claims],
        "tables": page.tables,
        "figures": list(page.figures),
        "runs": [result._asdict() for result in results],
    }
    write_json(out, record)
    how = how_made(record, facts, len(results), measured)
    path = page.write(out, title_of(experiment), inspect.cleandoc(experiment.ABOUT), how)
    print(f"\n{experiment.NAME} on {facts.name}: {title_of(experiment)}\n")
    print(plain_table(HEAD, [claim.row for claim in page.claims]))
    print(f"\nPage: {path}", flush=True)
    return Made(experiment, page.claims)


def title_of(experiment: Experiment) -> str:
    """Return the first line of its docstring, and where in the paper it stands."""
    title = (type(experiment).__doc__ or experiment.NAME).splitlines()[0].rstrip(".")
    return f"{title} ({experiment.SECTION})"


def command_of(experiment: Experiment, seed: int) -> str:
    """Return the command that makes it again."""
    size = "" if experiment.size == "default" else f" --{experiment.size}"
    seeded = f" --seed {seed}" if seed else ""
    return f"bncpu reproduce {experiment.NAME}{size} --dataset {experiment.dataset}{seeded}"


def circumstances() -> dict[str, Any]:
    """Return when, where and with what."""
    now = datetime.datetime.now(datetime.UTC)
    return {"date": now.isoformat(timespec="seconds"), **installation()}


@functools.cache
def installation() -> dict[str, Any]:
    """Return where and with what, which takes a while to find out."""
    machine = {"platform": platform.platform(), "processor": processor(), "cpus": usable_cpus()}
    return {"machine": machine, "versions": bncpu.config()}


def processor() -> str:
    """Return the processor's name, as far as the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def how_made(record: Mapping[str, Any], facts: Facts, runs: int, seconds: float) -> str:
    """Return the last section of a page."""
    seeds = record["seeds"]
    text = f"""\
`{record["command"]}`, with {facts.name} ({facts.x_train[0]:,} examples to train, \
{facts.x_test[0]:,} to test), bncpu {bncpu.__version__}, {record["machine"]["processor"]}, \
{record["date"][:10]}: {runs} runs, of {seconds:,.0f} s together on one thread each. \
[{JSON_NAME}]({JSON_NAME}) has all that was measured."""
    if len(seeds) > 1:
        text += (
            f" Each number that depends on chance is the mean over the seeds "
            f"{', '.join(map(str, seeds))}; the number after ± is half their range."
        )
    return text


def write_index(out: Path, made: Sequence[Made], size: str) -> None:
    """Write a page with the claims of all experiments, and the same as JSON."""
    claims = [(each.experiment, claim) for each in made for claim in each.claims]
    rows = [(f"[{e.NAME}]({e.NAME}/{PAGE_NAME})", e.dataset, *claim.row) for e, claim in claims]
    held = sum(claim.held for _, claim in claims)
    path = out / PAGE_NAME
    write_json(
        out,
        {
            "size": size,
            **circumstances(),
            "claims": [
                {"experiment": e.NAME, "dataset": e.dataset, **claim._asdict()}
                for e, claim in claims
            ],
        },
    )
    text = f"# The paper's claims, measured\n\n{held} of {len(claims)} held.\n\n"
    text += markdown_table(("experiment", "data", *HEAD), rows)
    write_bytes(path, f"{text}\n".encode())
    print(f"\n{held} of {len(claims)} claims held. Index: {path}")
