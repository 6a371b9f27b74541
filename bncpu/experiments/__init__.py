"""One file for each figure, table or claim of the paper (Ioffe & Szegedy 2015, arXiv:1502.03167).

========================  ===========================================================
mnist.py                  section 4.1, figure 1: accuracy and a sigmoid's inputs over time
inception.py              section 4.2, figures 2 and 3: an Inception network, higher rates
naive.py                  section 2: normalisation outside the gradient step
scale.py                  section 3.3: scale of the weights, learning rates, Jacobians
inference.py              section 3.1: which statistics, and the folded linear map
placement.py              section 3.2: where the normalisation stands, and what of it is needed
regularisation.py         section 3.4: beside dropout and L2
whitening.py              section 2: full whitening against normalisation by feature
ensemble.py               section 4.2.3: six networks, averaged
batch_size.py             what readers disliked: small batches; and virtual ones
domain.py                 future work: statistics recomputed where the data shift
recurrent.py              future work: a recurrent network
------------------------  -----------------------------------------------------------
search.py, curves.py      the best learning rate of each network; accuracy by step
networks.py               the networks that several experiments train
layerwise.py              rescaled weights and Jacobians, layer by layer
fixed_statistics.py       inference as a linear map, and what an output depends on
virtual.py                batch normalisation over larger virtual batches
whitened.py               whitening as a layer, with its gradient
experiment.py             what an experiment is: settings, runs, a report
runner.py                 measures the runs in worker processes, and keeps the results
reproduction.py           from names to folders with pages, and their index
page.py                   the page of an experiment: claims, tables, figures
figures.py, numbers.py    how lines are drawn, and numbers written
results.py                files, each written whole or not at all
========================  ===========================================================

`EXPERIMENTS` is what ``bncpu reproduce NAME`` chooses from.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from bncpu.experiments import reproduction
from bncpu.experiments.batch_size import BatchSize
from bncpu.experiments.domain import Domain
from bncpu.experiments.ensemble import Ensemble
from bncpu.experiments.experiment import Experiment
from bncpu.experiments.inception import Inception
from bncpu.experiments.inference import Inference
from bncpu.experiments.mnist import Mnist
from bncpu.experiments.naive import Naive
from bncpu.experiments.placement import Placement
from bncpu.experiments.recurrent import Recurrent
from bncpu.experiments.regularisation import Regularisation
from bncpu.experiments.runner import RunError
from bncpu.experiments.scale import Scale
from bncpu.experiments.whitening import Whitening

EXPERIMENTS: dict[str, type[Experiment]] = {
    kind.NAME: kind
    for kind in (
        Mnist,
        Inception,
        Naive,
        Scale,
        Inference,
        Placement,
        Regularisation,
        Whitening,
        Ensemble,
        BatchSize,
        Domain,
        Recurrent,
    )
}


def reproduce(
    names: Sequence[str],
    out: Path,
    *,
    size: str = "default",
    dataset: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    jobs: int | None = None,
    progress: bool = True,
) -> None:
    """Make experiments of the paper: a page for each, with its claims, and an index of several.

    Parameters
    ----------
    names : sequence of str
        Of EXPERIMENTS.
    out : Path
        The folder for the page, or, if there are several, for a folder for each.
    size : str
        "tiny", "quick", "default" or "full".
    dataset : str, optional
        By default each experiment has the best of its DATASETS that is there.
    data_dir : path, optional
        Where the datasets are (default: the environment variable BNCPU_DATA).
    seed : int
        The first one.
    jobs : int, optional
        How many runs are measured at a time (default: one for each CPU); each has one thread.
    progress : bool
        Show progress bars on stderr.

    Raises
    ------
    ValueError
        If there is no experiment, size or dataset of that name; before any work.
    OSError
        If the data cannot be read, or a folder not be written to; before any work.
    ImportError
        If what ``bncpu[train]`` brings is not installed.
    RunError
        If a run failed; all that was finished is kept, as after an interrupt.

    Notes
    -----
    Runs that an earlier call has finished are taken from ``out/runs`` if they have the same
    settings, size, data and version of bncpu. Changes of the code are not noticed: remove that
    folder after them. With several jobs, call it below ``if __name__ == "__main__":``.
    """
    for name in names:
        if name not in EXPERIMENTS:
            raise ValueError(f"names: expected some of {', '.join(EXPERIMENTS)}; got {name!r}")
    if not names:
        raise ValueError(f"names: expected some of {', '.join(EXPERIMENTS)}; got none")
    kinds = [EXPERIMENTS[name] for name in dict.fromkeys(names)]
    reproduction.reproduce(
        kinds,
        out,
        size=size,
        dataset=dataset,
        data_dir=data_dir,
        seed=seed,
        jobs=jobs,
        progress=progress,
    )


__all__ = ["EXPERIMENTS", "Experiment", "RunError", "reproduce"]
