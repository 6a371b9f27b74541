"""Section 4.1, figure 1: three sigmoid layers on MNIST, with and without batch normalisation."""

from typing import Any, ClassVar

import numpy as np

from bncpu import nn
from bncpu.data import Dataset
from bncpu.experiments import search
from bncpu.experiments.experiment import Experiment, Progress, Results, Run
from bncpu.experiments.figures import accuracy_and_inputs
from bncpu.experiments.numbers import percent, spread
from bncpu.experiments.page import Page

HIDDEN, BATCH_SIZE, PERCENTILES = (100, 100, 100), 60, (15, 50, 85)
# "Small random Gaussian values": the deviation that Krizhevsky et al. (2012) had made customary.
# And, beside it, one that suits the network without BN better: 1 / sqrt(inputs) of each layer.
WEIGHTS = {"small": 0.01, "scaled": None}
RATES = (0.1, 0.3, 1.0, 3.0)  # for all networks
SHORTER = 3  # times, the trainings in which they are compared
POPULATION = 10_000  # training images from which Algorithm 2 has its statistics
DIGITS_STEPS = 5_000  # two hundred times the 1,438 digits; 50,000 steps are fifty times MNIST
CHECKPOINTS = 100
EARLY = 1_000  # or a tenth of a shorter training: what is before is no part of the claims
STEADIER = 2  # what "far steadier" shall mean, set before it was measured
NETWORKS = {
    f"{'with' if bn else 'without'} BN, {weights} weights": {"bn": bn, "weights": weights}
    for weights in WEIGHTS
    for bn in (True, False)
}


class Mnist(Experiment):
    """Accuracy over time, and the inputs of a sigmoid over time, with and without BN."""

    NAME, SECTION = "mnist", "section 4.1, figure 1"
    ABOUT = f"""
The paper trains three fully connected layers of 100 sigmoids on MNIST for 50,000 steps of 60
examples, with and without batch normalisation, and shows (a) the test accuracy over time and (b, c)
the {{15, 50, 85}}th percentiles of the inputs of a typical sigmoid of the last hidden layer. Here
the networks start with the same weights and see the same batches; each has the rate, of
{", ".join(map(str, RATES))}, that ends best on a held-out tenth of the training set. The paper's
initial weights are small Gaussian values: their deviation is {WEIGHTS["small"]} here. How much that
matters the *scaled* weights show, of deviation 1 / sqrt(inputs). Statistics for inference are those
of {POPULATION:,} training images (Algorithm 2). The *variation* of a sigmoid's inputs is the mean
standard deviation of the percentiles over time, from step {EARLY:,} on (or after a tenth of fewer),
by the mean distance of the 15th and the 85th; the typical sigmoid has the median of all 100.
"""
    SETTINGS: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"steps": 100, "seeds": 1},
        "quick": {"steps": 2_000, "seeds": 1},
        "default": {"steps": 50_000, "seeds": 3},
    }

    def __init__(self, size: str = "default", dataset: str = "digits", seed: int = 0) -> None:
        super().__init__(size, dataset, seed)
        steps = self.settings["steps"]
        self.steps = min(steps, DIGITS_STEPS) if dataset == "digits" else steps
        self.early = min(EARLY, self.steps // 10)

    def runs(self, results: Results) -> list[Run]:
        """Search every network's rate on the held-out part; then measure these on the test set."""
        networks = list(NETWORKS.values())
        return search.runs(results, networks, RATES, self.seeds, lambda _: self.steps, SHORTER)

    def measure(
        self, settings: dict[str, Any], data: Dataset, progress: Progress
    ) -> dict[str, Any]:
        """Train a network, and look at it at every checkpoint."""
        searching, seed = settings["part"] != "test", settings["seed"]
        length = self.steps // (SHORTER if searching else 1)
        data = search.part_of(data, settings["part"])
        sizes, std = [data.x_train.shape[1], *HIDDEN, 10], WEIGHTS[settings["weights"]]
        rng = np.random.default_rng(seed)
        model = nn.fully_connected(sizes, batch_norm=settings["bn"], std=std, rng=rng)
        steps, accuracies, percentiles = [], [], []

        def look(record: nn.Record) -> None:
            nn.population_statistics(model, data.x_train[:POPULATION], batch_size=1000)
            with nn.recording(model, model.layers[-2]) as inputs:
                logits = nn.predict(model, data.x_test, batch_size=len(data.x_test))
            model.train()
            steps.append(record.step)
            accuracies.append(float(np.mean(logits.argmax(axis=1) == data.y_test)))
            percentiles.append(np.percentile(inputs[0][0], PERCENTILES, axis=0))

        how = {"batch_size": BATCH_SIZE, "seed": seed, "callback": look, "progress": progress}
        how |= {"steps": length, "every": length if searching else length // CHECKPOINTS}
        try:
            nn.fit(model, nn.SGD(settings["rate"]), data.x_train, data.y_train, **how)
        except FloatingPointError:
            return search.DIVERGED
        if searching:
            return {"accuracy": accuracies[-1]}
        shown = np.array(percentiles)
        late = shown[np.array(steps) >= self.early]  # (checkpoints, 3, units)
        variation = late.std(axis=0).mean(axis=0) / (late[:, 2] - late[:, 0]).mean(axis=0)
        typical = int(np.argsort(variation)[len(variation) // 2])
        measured = {"steps": steps, "accuracies": accuracies, "accuracy": accuracies[-1]}
        inputs = shown[:, :, typical].round(4)
        return measured | {"unit": typical, "variation": variation[typical], "percentiles": inputs}

    def report(self, results: Results, page: Page) -> None:
        """Compare the networks, seed by seed."""
        found = {name: results.where(**each, part="test") for name, each in NETWORKS.items()}
        accuracies = {name: np.array(each.values("accuracies")) for name, each in found.items()}
        (with_bn, a), (without, b) = [(found[n], accuracies[n]) for n in list(NETWORKS)[:2]]
        steps = np.array(with_bn[0].measured["steps"])
        late = steps >= self.early
        for weights in WEIGHTS:
            pair = (accuracies[f"{w} BN, {weights} weights"][:, late] for w in ("with", "without"))
            gain = np.subtract(*pair)
            text = (
                f"With BN more accurate at every checkpoint from step {self.early:,} on, {weights}"
            )
            ours = f"at {(gain > 0).sum()} of {gain.size}; by {100 * gain.mean():.2f} points"
            paper = "throughout (figure 1a)" if weights == "small" else "(not in the paper)"
            page.claim(f"{text} weights", paper=paper, ours=ours, held=bool(np.all(gain > 0)))

        text, final = "With BN the final test accuracy is at least 98.0 %", a[:, -1]
        ours = f"{percent(final, 2)}; without BN {percent(b[:, -1], 2)}"
        page.claim(text, paper="no number", ours=ours, held=bool(final.min() >= 0.98))

        best_of_b, needed = b.max(axis=1), steps[b.argmax(axis=1)]
        taken = [min(steps[x >= y], default=np.inf) for x, y in zip(a, best_of_b, strict=True)]
        text = "With BN the highest accuracy of the network without BN is reached in fewer steps"
        ours = f"{'never' if np.inf in taken else spread(taken)}; without BN {spread(needed)}"
        page.claim(text, paper="faster (figure 1a)", ours=ours, held=bool(np.all(taken < needed)))

        steady, drifting = with_bn.values("variation"), without.values("variation")
        text = f"With BN a sigmoid's inputs are far steadier: at most 1/{STEADIER} of the variation"
        ours = f"{spread(steady, 2)}; without BN {spread(drifting, 2)}"
        held = bool(np.all(STEADIER * np.array(steady) <= drifting))
        page.claim(text, paper="much more stable (figures 1b, 1c)", ours=ours, held=held)

        head, rows = ["network", *map(str, RATES), "at the best rate, test", "variation"], []
        for name, each in NETWORKS.items():
            searched = results.where(**each, part="validation").values("accuracy")
            final, variation = accuracies[name][:, -1], found[name].values("variation")
            rows.append([name, *map(percent, searched), percent(final, 2), spread(variation, 2)])
        page.table(
            head, rows, "Accuracy on the held-out part by learning rate, and on the test set"
        )
        shown = {"with BN": with_bn[0].measured, "without BN": without[0].measured}
        page.figure(
            "figure1",
            accuracy_and_inputs(shown),
            "Figure 1 of the paper, for the first seed, small weights",
        )
