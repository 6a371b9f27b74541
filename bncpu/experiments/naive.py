"""Section 2: what happens when the gradient step does not know of the normalisation."""

from typing import Any, ClassVar

import numpy as np

import bncpu
from bncpu import nn
from bncpu.data import Dataset
from bncpu.experiments.curves import learning_curve
from bncpu.experiments.experiment import Experiment, Progress, Results, Run
from bncpu.experiments.figures import new_figure, plot_lines
from bncpu.experiments.numbers import mean, percent, spread
from bncpu.experiments.page import Page

HIDDEN, BATCH_SIZE, EXAMPLES, RECORDS = 100, 60, 1_000, 20
CENTRE, CENTRE_INSIDE = "mean, outside the step", "mean, inside the step"
BOTH, BOTH_INSIDE = "mean and variance, outside", "mean and variance, inside (BN)"
NAMES = (CENTRE, CENTRE_INSIDE, BOTH, BOTH_INSIDE)
PAIRS = ((CENTRE, CENTRE_INSIDE), (BOTH, BOTH_INSIDE))
RATES = [0.1, 1.0, 10.0, 100.0]
LOST = 0.1  # of the test set: what tells a model that has blown up from one that is a bit worse


class Normalise(nn.Layer):
    """x - E[x], then with a variance over sqrt(Var[x] + eps); E and Var are those of the batch."""

    def __init__(self, name: str) -> None:
        self.scales, self.knows = name in (BOTH, BOTH_INSIDE), name in (CENTRE_INSIDE, BOTH_INSIDE)

    def forward(self, x: nn.Array) -> nn.Array:
        """Return the normalised x."""
        self.x = x
        y, self.mean, self.invstd = bncpu.batch_norm_train(x)
        return y if self.scales else (x - self.mean).astype(x.dtype)

    def backward(self, dy: nn.Array) -> nn.Array:
        """Return dx; outside the step, as if E[x] and Var[x] did not depend on x."""
        if not self.scales:
            return dy - dy.mean(axis=0) if self.knows else dy
        if not self.knows:
            return (dy * self.invstd).astype(dy.dtype)
        return bncpu.batch_norm_backward(dy, self.x, self.mean, self.invstd).dx


class Naive(Experiment):
    """Normalising outside the gradient step."""

    NAME = "naive"
    SECTION = "section 2"
    ABOUT = (
        "A layer adds a learned bias b to its input u and subtracts the mean: with x = u + b, "
        "x̂ = x - E[x]. If a gradient step ignores that E[x] depends on b, it changes b, but "
        "u + (b + Δb) - E[u + (b + Δb)] = u + b - E[u + b]: neither output nor loss move, and b "
        "grows without end. First exactly that, b alone learning, with all else as it was drawn; "
        "then the whole network, in which x̂ feeds sigmoids and these a softmax. It "
        f"has blown up where it is right on {LOST:.0%} of the test set less than its twin inside."
    )
    SETTINGS: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"steps": {"b": 10, "all": 40}},
        "quick": {"steps": {"b": 200, "all": 1_000}},
        "default": {"steps": {"b": 1_000, "all": 5_000}, "seeds": 3},
    }

    def runs(self, results: Results) -> list[Run]:  # noqa: ARG002
        """Let b alone learn, then the whole network at every rate."""
        how = [{"learns": "b", "how": n, "rate": 1.0, "seed": self.seeds[0]} for n in NAMES]
        grid = [(name, rate, seed) for name in NAMES for rate in RATES for seed in self.seeds]
        how += [{"learns": "all", "how": n, "rate": r, "seed": s} for n, r, s in grid]
        return [Run(settings, self.settings["steps"][settings["learns"]]) for settings in how]

    def measure(
        self, settings: dict[str, Any], data: Dataset, progress: Progress
    ) -> dict[str, Any]:
        """Take gradient steps, and watch b and the loss."""
        rng, normalise = np.random.default_rng(settings["seed"]), Normalise(settings["how"])
        inputs, size = data.x_train.shape[1], list[float]()
        if settings["learns"] == "b":
            data = data.subset(EXAMPLES)
            head = nn.Linear(HIDDEN, 10, rng=rng, dtype=np.float64)
            network, loss = nn.Sequential(normalise, nn.Sigmoid(), head), nn.SoftmaxCrossEntropy()
            u = data.x_train @ rng.normal(0, inputs**-0.5, (inputs, HIDDEN))
            b, losses = np.zeros(HIDDEN), []
            for _ in range(self.settings["steps"]["b"]):
                losses.append(loss.forward(network.forward(u + b), data.y_train))
                b -= settings["rate"] * network.backward(loss.backward()).sum(axis=0)
                size.append(float(np.linalg.norm(b)))
                progress.update()
            return {"b": size, "loss": losses}
        layers = nn.Linear(inputs, HIDDEN, rng=rng), normalise, nn.Sigmoid()
        model = nn.Sequential(*layers, nn.Linear(HIDDEN, 10, rng=rng))
        options = {"steps": (steps := self.settings["steps"]["all"]), "every": steps // RECORDS}
        options |= {"batch_size": BATCH_SIZE, "seed": settings["seed"], "progress": progress}
        bias = model.parameters()["0.bias"]
        options |= {"observe": lambda: size.append(float(np.linalg.norm(bias)))}
        return learning_curve(model, settings["rate"], data, **options) | {"b": size}

    def report(self, results: Results, page: Page) -> None:
        """Compare inside with outside."""
        alone = {name: results.where(learns="b", how=name)[0].measured for name in NAMES}
        grown = [alone[n]["b"][-1] / alone[n]["b"][len(alone[n]["b"]) // 2 - 1] for n, _ in PAIRS]
        moved = [np.ptp(alone[n]["loss"]) for n, _ in PAIRS]
        page.claim(
            "Outside the step b grows without end while the loss stays as it is",
            paper="b grows indefinitely, the loss is fixed",
            ours=f"|b| {alone[CENTRE]['b'][-1]:.3g}, with the variance {alone[BOTH]['b'][-1]:.3g}, "
            f"{min(grown):.2f} times that of half the steps; the loss moved by {max(moved):.0e}",
            held=min(grown) > 1.9 and max(moved) < 1e-9,
        )
        still = max(alone[n]["b"][-1] for _, n in PAIRS)
        page.claim(
            "Inside it does not", paper="no figure", ours=f"|b| {still:.0e}", held=still < 1e-9
        )

        whole, cells = results.where(learns="all"), [(n, r) for n in NAMES for r in RATES]
        size = {(n, r): [b[-1] for b in whole.values("b", how=n, rate=r)] for n, r in cells}
        right = {(n, r): whole.values("accuracy", how=n, rate=r) for n, r in cells}
        worse = [rate for rate in RATES if mean(size[BOTH, rate]) > mean(size[CENTRE, rate])]
        page.claim(
            "It can be worse if the variance too is outside",
            paper="can get worse, no figure",
            ours=f"|b| of the whole network ends larger at {len(worse)} of {len(RATES)} rates",
            held=bool(worse),
        )
        # Of two trainings, the one outside the step and the one inside, that differ in this alone.
        both = [(r, np.transpose([right[o, r], right[i, r]])) for o, i in PAIRS for r in RATES]
        twins = [(rate, *pair) for rate, pairs in both for pair in pairs]
        blown = [rate for rate, outside, inside in twins if outside < inside - LOST]
        saved = [rate for rate, outside, inside in twins if inside < outside - LOST]
        page.claim(
            "Outside the step the model blows up where inside it trains",
            paper="it blows up, no figure",
            ours=f"{len(blown)} of {len(twins)} pairs; the reverse in {len(saved)}",
            held=bool(blown) and not saved,
        )
        ends = {cell: f"{percent(right[cell])}, {spread(size[cell], 2)}" for cell in cells}
        rows = [[name, *(ends[name, rate] for rate in RATES)] for name in NAMES]
        head = ["normalised", *(f"rate {rate:g}" for rate in RATES)]
        page.table(head, rows, "The whole network: test accuracy and |b| after the last step.")

        figure, panels = new_figure(3)
        for axes, key, ylabel in zip(panels, ("b", "loss"), ("|b|", "loss (nats)"), strict=False):
            lines = {n: (range(1, len(m[key]) + 1), m[key]) for n, m in alone.items()}
            plot_lines(axes, lines, xlabel="step, b learns alone", ylabel=ylabel)
        first = [whole.where(how=name, rate=1.0)[0].measured for name in NAMES]
        lines = {n: (m["steps"][1:], m["b"][1:]) for n, m in zip(NAMES, first, strict=True)}
        plot_lines(panels[2], lines, xlabel="step, all learns (rate 1)", ylabel="|b|")
        panels[2].set_yscale("log")
        page.figure("naive", figure, "b and the loss where b learns alone, and b where all learns.")
