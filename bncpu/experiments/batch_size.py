"""What readers disliked: batch normalisation depends on the size of the batch."""

from typing import Any, ClassVar

import numpy as np

import bncpu
from bncpu import nn
from bncpu.data import Dataset
from bncpu.experiments import search
from bncpu.experiments.experiment import Experiment, Progress, Results, Run
from bncpu.experiments.figures import new_figure, plot_lines
from bncpu.experiments.networks import Layers, multilayer
from bncpu.experiments.numbers import mean, percent
from bncpu.experiments.page import Page
from bncpu.experiments.virtual import VirtualBatchNorm

HIDDEN = (100, 100)
SIZES, SMALL = (2, 4, 8, 16, 32, 64, 128, 256), (2, 4, 8, 16)
VIRTUAL = 64  # examples, at least, whose statistics a small batch shares
# Rates are scaled with the batch (linear scaling), and the factor is searched for every network
# and size: a rate means that of a batch of 64.
RATE_BATCH = 64
POPULATION = 6_000  # training examples for Algorithm 2
VARIANTS: list[dict[str, Any]]
VARIANTS = [{"norm": norm, "batch": m} for norm in ("none", "batch") for m in SIZES]
VARIANTS += [{"norm": "virtual", "batch": m} for m in SMALL]
LABELS = {"none": "without BN", "batch": "BN", "virtual": f"BN, statistics of {VIRTUAL} or more"}


class BatchSize(Experiment):
    """Accuracy by the size of the batch, and statistics of larger virtual batches."""

    NAME, SECTION = "batch-size", "section 3.1"
    ABOUT = """The statistics of a small batch are noisy, and in training they are all that the
network sees; readers found that batch normalisation loses accuracy there. Here a network of two
hidden layers of 100 ReLUs sees the same number of examples in batches of every size. The learning
rate is proportional to the batch, and the factor is searched for each network and size, on held-out
examples. Statistics of a larger virtual batch are pooled over successive batches, exactly, by
`Moments.merge`. The gradient then flows through the present batch and through its own share of the
pooled mean and variance. None flows to the earlier batches: they are constants, and a little old,
for the weights have changed since."""
    SETTINGS: ClassVar = {
        "tiny": {"examples": 512, "rates": (0.4,), "seeds": 1},
        "quick": {"examples": 6_000, "rates": (0.1, 0.4), "seeds": 1},
        "default": {"examples": 60_000, "rates": (0.025, 0.1, 0.4, 1.6, 6.4), "seeds": 3},
    }

    def runs(self, results: Results) -> list[Run]:
        """Return the refusal of a batch of 1, then the search and the runs of all sizes."""
        rates, seeds = self.settings["rates"], self.seeds
        examples = self.settings["examples"]
        found = search.runs(results, VARIANTS, rates, seeds, lambda v: examples // v["batch"])
        return [Run({"norm": "batch", "batch": 1}), *found]

    def measure(
        self, settings: dict[str, Any], data: Dataset, progress: Progress
    ) -> dict[str, Any]:
        """Train with batches of that size, all with the same number of examples."""
        norm, m = settings["norm"], settings["batch"]
        if m == 1:
            try:
                bncpu.BatchNorm(HIDDEN[0]).forward(np.zeros((1, HIDDEN[0]), np.float32))
            except ValueError as error:
                return {"error": str(error)}
            return {"error": ""}
        data, seed = search.part_of(data, settings["part"]), settings["seed"]
        x, y = data.x_train, data.y_train

        def normalise(features: int) -> Layers:
            if norm == "virtual":
                return [VirtualBatchNorm(features, VIRTUAL // m)]
            return [nn.BatchNorm(features)] if norm == "batch" else []

        model = multilayer(x.shape[1], HIDDEN, normalise, seed=seed)
        optimizer = nn.SGD(settings["rate"] * m / RATE_BATCH)
        how: dict[str, Any] = {"batch_size": m, "seed": seed, "progress": progress}
        try:
            nn.fit(model, optimizer, x, y, steps=self.settings["examples"] // m, **how)
        except FloatingPointError:
            return search.DIVERGED
        size = VIRTUAL if norm == "virtual" else m
        nn.population_statistics(model, x[:POPULATION], batch_size=size)
        return {"accuracy": nn.evaluate(model, data.x_test, data.y_test)}

    def report(self, results: Results, page: Page) -> None:
        """Say what small batches cost, and what virtual ones give back."""

        def got(norm: str, m: int) -> list[float]:
            return search.on_test(results, "accuracy", norm=norm, batch=m)

        def loss(norm: str, m: int) -> list[float]:
            return [a - b for a, b in zip(got(norm, RATE_BATCH), got(norm, m), strict=True)]

        error = results.values("error", batch=1)[0]
        text, held = "A batch of 1 is refused with a clear error", "more than one value" in error
        page.claim(text, paper="m / (m - 1) needs m > 1", ours=f"`{error}`", held=held)
        for m in SMALL[:2]:
            # What readers disliked, and whether it is batch normalisation's doing.
            page.claim(
                f"BN is less accurate with batches of {m} than of {RATE_BATCH}, by more than the "
                "network without BN is",
                paper="readers' experience",
                ours=f"{percent(loss('batch', m))} less; {percent(loss('none', m))} without BN",
                held=search.better(loss("batch", m), loss("none", m)) and min(loss("batch", m)) > 0,
            )
            text = f"Statistics of {VIRTUAL} examples or more make batches of {m} more accurate"
            search.claim_better(page, text, got("virtual", m), got("batch", m), paper="-")
        best = max((got("batch", m) for m in SIZES), key=mean)
        page.claim(
            "With BN, batches of 16 are within half a point of the best size",
            paper="batches of 32 and 60 are used",
            ours=f"{percent(got('batch', 16))}, the best {percent(best)}",
            held=mean(got("batch", 16)) > mean(best) - 0.005,
        )
        rows = []
        for m in SIZES:
            row = [str(m)]
            for norm in LABELS:
                there = {"norm": norm, "batch": m} in VARIANTS
                rate = search.best_rate(results, {"norm": norm, "batch": m}) if there else 0
                row.append(
                    f"{percent(got(norm, m))} ({rate * m / RATE_BATCH:.3g})" if there else "-"
                )
            rows.append(row)
        page.table(["batch", *LABELS.values()], rows, "Test accuracy, and the learning rate.")
        figure, (axes,) = new_figure(1, width=5.2)
        lines, bands = {}, {}
        for norm, label in LABELS.items():
            sizes = [v["batch"] for v in VARIANTS if v["norm"] == norm]
            values = [got(norm, m) for m in sizes]
            lines[label] = (sizes, [mean(each) for each in values])
            bands[label] = ([min(each) for each in values], [max(each) for each in values])
        plot_lines(axes, lines, xlabel="batch", ylabel="test accuracy (fraction)", band=bands)
        axes.set_xscale("log", base=2)
        axes.set_xticks(SIZES, map(str, SIZES))
        page.figure("batch-size", figure, "Test accuracy by batch; the range over seeds shaded.")
