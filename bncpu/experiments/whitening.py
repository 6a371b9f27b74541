"""Section 2: whitening a layer's inputs in full, which costs too much, or each feature alone."""

import time
import timeit
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

import bncpu
from bncpu import nn
from bncpu.data import Dataset
from bncpu.experiments import search
from bncpu.experiments.curves import learning_curve, steps_to
from bncpu.experiments.experiment import Experiment, Progress, Results, Run
from bncpu.experiments.figures import new_figure, plot_lines
from bncpu.experiments.numbers import mean, percent, spread
from bncpu.experiments.page import Page
from bncpu.experiments.whitened import WhiteningLayer, whiten, whiten_backward

# Batches have twice as many examples as features at least, or there is no covariance to speak of.
TIMED_BATCH, REPEATS = 2_048, 7
WIDTHS = [16, 32, 64, 128, 256, 512, 1024]
HIDDEN, BATCH_SIZE = 32, 128
RATES = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0]
NORMALISATIONS = {"nothing": None, "BN": nn.BatchNorm, "whitening": WhiteningLayer}
VARIANTS = [{"normalised by": name} for name in NORMALISATIONS]
LEVEL = 0.9  # the test accuracy to which steps are counted; these small networks have it soon


class Whitening(Experiment):
    """Whitening in full against normalising each feature alone."""

    NAME = "whitening"
    SECTION = "section 2"
    ABOUT = f"""
Whitening the inputs of every layer takes their covariance, its inverse square root, and the
derivatives of both. The paper finds that too costly and normalises each feature alone. Here both
are timed, forward and backward, on batches of {TIMED_BATCH:,} random examples and one thread; then
networks with three layers of {HIDDEN} sigmoids learn from batches of {BATCH_SIZE}, normalised
before each sigmoid by nothing, BN or whitening, the last two with gamma and beta, each network at
its best rate of one grid, by accuracy on the last tenth of the training set.
"""
    ALONE = True
    SETTINGS: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"widths": WIDTHS[:2], "steps": 20, "every": 10, "rates": RATES[2:4]},
        "quick": {"widths": WIDTHS[:5], "steps": 600, "every": 30, "rates": RATES[1:5]},
        "default": {"widths": WIDTHS, "steps": 2_000, "every": 50, "rates": RATES, "seeds": 3},
    }

    def runs(self, results: Results) -> list[Run]:
        """Time every width; search the rates, and train."""
        timed = [Run({"part": "cost", "width": width}) for width in self.settings["widths"]]
        steps, rates = self.settings["steps"], self.settings["rates"]
        return timed + search.runs(results, VARIANTS, rates, self.seeds, lambda _: steps)

    def measure(
        self, settings: dict[str, Any], data: Dataset, progress: Progress
    ) -> dict[str, Any]:
        """Time the two at one width, or train one network."""
        if settings["part"] == "cost":
            return cost(settings["width"])
        data = search.part_of(data, settings["part"])
        rng = np.random.default_rng(settings["seed"])
        normalisation = NORMALISATIONS[settings["normalised by"]]
        layers: list[nn.Layer | nn.BatchNorm] = []
        for inputs, outputs in pairwise([data.x_train.shape[1], *[HIDDEN] * 3]):
            layers.append(nn.Linear(inputs, outputs, bias=normalisation is None, rng=rng))
            layers += [normalisation(HIDDEN)] if normalisation else []
            layers.append(nn.Sigmoid())
        model = nn.Sequential(*layers, nn.Linear(HIDDEN, 10, rng=rng))
        options = {key: self.settings[key] for key in ("steps", "every")}
        options |= {"batch_size": BATCH_SIZE, "seed": settings["seed"], "progress": progress}
        start = time.perf_counter()
        measured = learning_curve(model, settings["rate"], data, **options)
        return measured | {"seconds": time.perf_counter() - start}

    def report(self, results: Results, page: Page) -> None:
        """Compare what whitening costs with what it buys."""
        widths, timed = self.settings["widths"], results.where(part="cost")
        seconds = {name: timed.values(name) for name in ("BN", "whitening")}
        ratios = [w / b for w, b in zip(seconds["whitening"], seconds["BN"], strict=True)]
        page.claim(
            "Whitening in full is expensive",
            paper="expensive, no figure",
            ours=f"forward and backward take {ratios[0]:.0f} times as long as BN's for "
            f"{widths[0]} features, {ratios[-1]:.0f} times for {widths[-1]}",
            held=ratios[-1] > 10,
        )
        test = results.where(part="test")
        by = {name: test.where(**{"normalised by": name}) for name in NORMALISATIONS}
        steps = test[0].measured["steps"]
        curves = {name: each.values("curve") for name, each in by.items()}
        ends = {name: each.values("accuracy") for name, each in by.items()}
        taken = {n: [steps_to(LEVEL, steps, c) or np.inf for c in curves[n]] for n in by}
        pace = {name: mean(each.values("seconds")) / steps[-1] for name, each in by.items()}
        spent = {name: [pace[name] * count for count in taken[name]] for name in by}
        for text, paper, less, more, counts in (
            ("BN speeds up training", "faster (section 3)", "BN", "nothing", taken),
            ("Whitening takes fewer steps than BN", "no figure", "whitening", "BN", taken),
            ("BN takes fewer seconds than whitening", "implied", "BN", "whitening", spent),
        ):
            ours = f"{counted(counts[less])} with {less}, {counted(counts[more])} with {more}"
            held = search.better(counts[more], counts[less])
            page.claim(f"{text}, to {LEVEL:.0%} on the test set", paper=paper, ours=ours, held=held)
        head = ["normalised by", "rate", "steps", "seconds", "accuracy at the end"]
        rows = [
            [n, r[0].settings["rate"], *map(counted, (taken[n], spent[n])), percent(ends[n])]
            for n, r in by.items()
        ]
        page.table(head, rows, f"Steps and seconds to {LEVEL:.0%}, with the evaluations.")

        figure, (left, right) = new_figure(2)
        lines = {name: (widths, [1e3 * s for s in each]) for name, each in seconds.items()}
        plot_lines(left, lines, xlabel="features", ylabel="forward and backward (ms)")
        left.set(xscale="log", yscale="log")
        lines = {name: (steps, np.mean(curves[name], axis=0)) for name in by}
        plot_lines(right, lines, xlabel="training step", ylabel="test accuracy")
        page.figure("whitening", figure, "Time by width; accuracy by step, mean of the seeds.")


def cost(width: int) -> dict[str, float]:
    """Return the seconds that forward and backward take, the median of REPEATS."""
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, TIMED_BATCH, width), dtype=np.float32)

    def batch_norm() -> None:
        _, mean, invstd = bncpu.batch_norm_train(x, num_threads=1)
        bncpu.batch_norm_backward(dy, x, mean, invstd, num_threads=1)

    def whitening() -> None:
        whiten_backward(dy, x, whiten(x))

    calls = {"BN": batch_norm, "whitening": whitening}
    return {
        n: float(np.median(timeit.repeat(c, number=1, repeat=REPEATS))) for n, c in calls.items()
    }


def counted(values: list[float]) -> str:
    """Return a mean with its spread, or that not every seed has got there."""
    return spread(values) if max(values) < np.inf else "not every seed"
