"""Section 4.2.3: six networks, their class probabilities averaged."""

from itertools import combinations
from typing import Any, ClassVar

import numpy as np

from bncpu import nn
from bncpu.data import Dataset
from bncpu.experiments.experiment import Experiment, Progress, Results, Run
from bncpu.experiments.figures import new_figure, plot_lines
from bncpu.experiments.networks import multilayer
from bncpu.experiments.numbers import mean, percent
from bncpu.experiments.page import Page

HIDDEN, BATCH_SIZE, RATE = (100, 100, 100), 60, 1.0
# As in the paper the six differ in what may make them err differently: some have larger initial
# weights, some dropout of 5 or 10 %; and all have seeds of their own.
NETWORKS = [(gain, dropout) for gain in (1.0, 2.0) for dropout in (0.0, 0.05, 0.1)]


class Ensemble(Experiment):
    """An ensemble of six networks with batch normalisation."""

    NAME, SECTION = "ensemble", "section 4.2.3"
    ABOUT = """The paper's best result on ImageNet is that of six networks whose class probabilities
are averaged. Each is the network with the 30-fold learning rate, changed a little: larger initial
weights, dropout of 5 or 10 %. Here six networks of three hidden layers of 100 ReLUs, with BN, are
changed in the same way; the ensemble of all six, and of every choice of some of them, is compared
with each alone. The whole is done once for every seed."""
    SETTINGS: ClassVar = {
        "tiny": {"steps": 40, "seeds": 1},
        "quick": {"steps": 1_000, "seeds": 1},
        "default": {"steps": 10_000, "seeds": 3},
    }

    def runs(self, results: Results) -> list[Run]:  # noqa: ARG002
        """Return an ensemble for each seed."""
        return [Run({"seed": seed}, len(NETWORKS) * self.settings["steps"]) for seed in self.seeds]

    def measure(
        self, settings: dict[str, Any], data: Dataset, progress: Progress
    ) -> dict[str, Any]:
        """Train six networks; return the accuracy of every choice of 1, 2, ... of them."""
        probabilities = []
        for i, (gain, dropout) in enumerate(NETWORKS):
            seed = settings["seed"] * len(NETWORKS) + i
            model = multilayer(
                data.x_train.shape[1],
                HIDDEN,
                lambda m: [nn.BatchNorm(m)],
                gain=gain,
                dropout=dropout,
                seed=seed,
            )
            how: dict[str, Any] = {"batch_size": BATCH_SIZE, "seed": seed, "progress": progress}
            steps = self.settings["steps"]
            how |= {"steps": steps, "schedule": nn.ExponentialDecay(RATE, 0.01, steps)}
            nn.fit(model, nn.SGD(RATE), data.x_train, data.y_train, **how)
            nn.population_statistics(model, data.x_train, batch_size=BATCH_SIZE)
            probabilities.append(softmax(nn.predict(model, data.x_test)))
        # Section 4.2.3: the arithmetic mean of the probabilities.
        return {
            str(k): [
                float((np.mean(chosen, axis=0).argmax(axis=1) == data.y_test).mean())
                for chosen in combinations(probabilities, k)
            ]
            for k in range(1, len(NETWORKS) + 1)
        }

    def report(self, results: Results, page: Page) -> None:
        """Compare the ensemble with each of its networks, by size and by seed."""
        sizes = range(1, len(NETWORKS) + 1)
        alone, together = results.values("1"), [each for (each,) in results.values(str(sizes[-1]))]
        page.claim(
            "The ensemble of six is better than each of them, for every seed",
            paper="top-1 error 20.1 % against 21.99 % of one network",
            ours=f"{percent(together, 2)} against {percent([max(each) for each in alone], 2)} "
            "of the best one",
            held=all(a > max(each) for a, each in zip(together, alone, strict=True)),
        )
        fewer = [1 - (1 - a) / (1 - mean(each)) for a, each in zip(together, alone, strict=True)]
        page.claim(
            "It errs less by at least a tenth than its networks on average",
            paper="9 % fewer errors (top-1), 16 % fewer (top-5: 4.9 % against 5.82 %)",
            ours=f"{percent(fewer)} fewer errors",
            held=min(fewer) >= 0.1,
        )
        rows = [
            [f"one: initial weights x {gain:g}, dropout {dropout:.0%}", percent(accuracy, 2)]
            for (gain, dropout), accuracy in zip(NETWORKS, zip(*alone, strict=True), strict=True)
        ]
        page.table(
            ["network", "test accuracy"],
            [*rows, ["all six, probabilities averaged", percent(together, 2)]],
            "Mean ± half the range over seeds.",
        )
        figure, (axes,) = new_figure(1, width=5.2)
        lines, bands = {}, {}
        for result in results:
            label = f"seed {result.settings['seed']}"
            accuracy = [result.measured[str(k)] for k in sizes]
            lines[label] = (sizes, [mean(each) for each in accuracy])
            bands[label] = ([min(each) for each in accuracy], [max(each) for each in accuracy])
        plot_lines(axes, lines, xlabel="networks", ylabel="test accuracy (fraction)", band=bands)
        page.figure("ensemble", figure, "Mean and range over all choices of so many of the six.")


def softmax(logits: nn.Array) -> nn.Array:
    """Return class probabilities."""
    probabilities: nn.Array = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return probabilities
