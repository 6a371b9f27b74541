"""Section 5, future work: population statistics recomputed for another domain, without labels."""

from typing import Any, ClassVar

import numpy as np

from bncpu import nn
from bncpu.data import Dataset
from bncpu.experiments.experiment import Experiment, Progress, Results, Run
from bncpu.experiments.figures import new_figure, plot_lines
from bncpu.experiments.numbers import mean, percent
from bncpu.experiments.page import Page

HIDDEN, BATCH_SIZE = (100, 100, 100), 60  # as in section 4.1, with ReLU
RATE = 0.1  # no search: networks with and without BN are not compared with each other
# How test images x in [0, 1] are changed.
SHIFTS = ("none", "noise 0.3", "noise 0.6", "contrast 1/2", "contrast 1/5", "inversion")
COUNTS = (3, 10, 30, 100, 300, 1_000)  # of unlabelled examples
STATISTICS_BATCH = 1_000
REASONS = """Why: less contrast makes Wu into aWu + c, which the first normalisation undoes whatever
a > 0 and c are. An inversion changes the sign of a, which no mean and variance give back. Noise
differs from image to image, and its mean and variance are not what it destroys."""


class Domain(Experiment):
    """Population statistics recomputed on shifted data, without labels."""

    NAME, SECTION = "domain", "section 5"
    ABOUT = """Among the things to be studied the paper names domain adaptation: whether a
network generalises to new data distributions by no more than recomputing the population means and
variances. Here a network of three hidden layers of 100 ReLUs is trained on the images as they are,
and tested on images with noise (of that standard deviation), with less contrast, and inverted. The
statistics come from images of the first half of the test set, shifted in the same way; the
accuracy is that on the second half, whose images they have not seen. No label is used, and no
weight, gamma or beta changes. What is recovered is the part of the lost accuracy that comes
back."""
    SETTINGS: ClassVar = {
        "tiny": {"steps": 60, "seeds": 1},
        "quick": {"steps": 1_000, "seeds": 1},
        "default": {"steps": 5_000, "seeds": 3},
    }

    def runs(self, results: Results) -> list[Run]:  # noqa: ARG002
        """Return one training for each seed, with BN and without."""
        return [
            Run({"bn": bn, "seed": seed}, self.settings["steps"])
            for bn in (True, False)
            for seed in self.seeds
        ]

    def measure(
        self, settings: dict[str, Any], data: Dataset, progress: Progress
    ) -> dict[str, Any]:
        """Train on the images as they are; test on shifted ones, with old and new statistics."""
        bn, seed = settings["bn"], settings["seed"]
        model = nn.fully_connected(
            [data.x_train.shape[1], *HIDDEN, 10],
            activation=nn.ReLU,
            batch_norm=bn,
            gain=2**0.5,
            rng=np.random.default_rng(seed),
        )
        how: dict[str, Any] = {"batch_size": BATCH_SIZE, "seed": seed, "progress": progress}
        x, y, half = data.x_train, data.y_train, len(data.x_test) // 2
        nn.fit(model, nn.SGD(RATE), x, y, steps=self.settings["steps"], **how)
        nn.population_statistics(model, x, batch_size=STATISTICS_BATCH)
        trained = model.state_dict()
        # The test set may be in some order of its own.
        order = np.random.default_rng(seed).permutation(len(data.x_test))
        unlabelled, tested = order[:half], order[half:]
        counts = [n for n in COUNTS if n < half] + [half]
        before: dict[str, float] = {}
        after: dict[str, list[float]] = {}
        for i, shift in enumerate(SHIFTS):
            images = shifted(data.x_test, shift, np.random.default_rng([seed, i]))
            x, y = images[tested], data.y_test[tested]
            model.load_state_dict(trained)
            before[shift] = nn.evaluate(model, x, y)
            after[shift] = []
            for n in counts if bn else []:
                u = images[unlabelled[:n]]
                nn.population_statistics(model, u, batch_size=STATISTICS_BATCH)
                after[shift].append(nn.evaluate(model, x, y))
        return {"counts": counts, "before": before, "after": after}

    def report(self, results: Results, page: Page) -> None:
        """Say of each shift what it costs and what new statistics give back."""
        counts = results[0].measured["counts"]
        before = {bn: results.values("before", bn=bn) for bn in (True, False)}
        after = results.values("after", bn=True)
        clean = [accuracy["none"] for accuracy in before[True]]
        rows, lines, bands = [], {}, {}
        for shift in SHIFTS:
            old = [accuracy[shift] for accuracy in before[True]]
            new = np.array([accuracies[shift] for accuracies in after])
            lines[shift] = (counts, new.mean(axis=0))
            bands[shift] = (new.min(axis=0), new.max(axis=0))
            plain = percent([accuracy[shift] for accuracy in before[False]])
            rows.append([shift, plain, percent(old), percent(new[:, -1])])
            if shift == "none":
                page.claim(
                    "Without a shift, statistics of other images do no harm (half a point)",
                    paper="to be studied",
                    ours=f"{percent(new[:, -1])} against {percent(old)}",
                    held=mean(new[:, -1]) > mean(old) - 0.005,
                )
                continue
            # Section 5: generalise to the new domain by new means and variances alone.
            lost = np.subtract(clean, old)
            back = new[:, -1] - old
            page.claim(
                f"{shift}: new statistics give back most of the lost accuracy",
                paper="to be studied",
                ours=f"of {percent(lost)} lost, {percent(back)} come back".replace(" %", " points"),
                held=all(back > lost / 2),
            )
        page.text(REASONS)
        head = ["shift", "without BN", "BN, old statistics", "BN, new statistics"]
        page.table(head, rows, f"Test accuracy; new statistics are of {counts[-1]} images.")
        figure, (axes,) = new_figure(1, width=5.6)
        plot_lines(
            axes,
            lines,
            xlabel="unlabelled images for the statistics",
            ylabel="test accuracy (fraction)",
            band=bands,
        )
        axes.set_xscale("log")
        page.figure("domain", figure, "Accuracy with new statistics; the range over seeds shaded.")


def shifted(x: nn.Array, shift: str, rng: np.random.Generator) -> nn.Array:
    """Return images after a shift of domain."""
    kind, _, size = shift.partition(" ")
    if kind == "noise":
        x = x + np.float32(size) * rng.standard_normal(x.shape, np.float32)
    elif kind == "contrast":
        c = 1 / np.float32(size.removeprefix("1/"))
        x = c * x + (1 - c) / 2
    elif kind == "inversion":
        x = 1 - x
    return x
