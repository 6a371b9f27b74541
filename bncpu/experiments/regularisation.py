"""Section 3.4: batch normalisation regularises: the gap between training and test accuracy."""

from functools import partial
from itertools import product
from typing import Any, ClassVar

import numpy as np

from bncpu import nn
from bncpu.data import Dataset
from bncpu.experiments import search
from bncpu.experiments.experiment import Experiment, Progress, Results, Run
from bncpu.experiments.figures import new_figure, plot_lines
from bncpu.experiments.networks import multilayer
from bncpu.experiments.numbers import mean, percent
from bncpu.experiments.page import Page

HIDDEN = (200, 200)
BATCH_SIZE = 60
# Of the hidden units. The paper removes dropout, or reduces it to 5 or 10 % (section 4.2.3).
DROPOUT = (0.0, 0.1, 0.5)
# Nothing, a common weight, and a fifth of it as in section 4.2.1.
L2 = (0.0, 1e-3, 5e-3)
VARIANTS: list[dict[str, Any]] = [
    {"bn": bn, "dropout": dropout, "l2": l2}
    for bn, dropout, l2 in product((False, True), DROPOUT, L2)
]
COMPANIONS = 100  # batches in which an example is seen, to tell how its logits depend on the others


class Regularisation(Experiment):
    """Batch normalisation as a regulariser, beside dropout and L2."""

    NAME, SECTION = "regularisation", "section 3.4"
    ABOUT = """In training, an example is normalised together with the others of its batch, and the
network gives no deterministic value for it. The paper found that this helps generalisation: dropout
can be removed or reduced, and the weight of the L2 loss divided by five (section 4.2.1). Here a
network of two hidden layers of 200 ReLUs is trained to the end on few examples, with every
combination of batch normalisation, dropout and L2, each at its best learning rate by the same
search on held-out examples. The gap is training accuracy less test accuracy, both in inference. A
claim of more or less is held if it is so for every seed."""
    SETTINGS: ClassVar = {
        "tiny": {"examples": 120, "steps": 24, "rates": (0.3,), "seeds": 1},
        "quick": {"examples": 500, "steps": 200, "rates": (0.3, 1.0), "seeds": 1},
        "default": {"examples": 1_000, "steps": 1_000, "rates": (0.1, 0.3, 1.0, 3.0), "seeds": 3},
    }

    def runs(self, results: Results) -> list[Run]:
        """Return the search for each variant's rate, then its runs on the test set."""
        rates, steps = self.settings["rates"], self.settings["steps"]
        return search.runs(results, VARIANTS, rates, self.seeds, lambda _: steps)

    def measure(
        self, settings: dict[str, Any], data: Dataset, progress: Progress
    ) -> dict[str, Any]:
        """Train on few examples; evaluate on them and on the test set."""
        # What is held out is the end of the whole set, so the search trains on the same examples.
        data = search.part_of(data, settings["part"]).subset(self.settings["examples"])
        x, y, seed = data.x_train, data.y_train, settings["seed"]
        model = multilayer(
            x.shape[1],
            HIDDEN,
            lambda m: [nn.BatchNorm(m)] * settings["bn"],
            dropout=settings["dropout"],
            seed=seed,
        )
        how: dict[str, Any] = {"batch_size": BATCH_SIZE, "seed": seed, "progress": progress}
        optimizer = nn.SGD(settings["rate"], l2=settings["l2"])
        try:
            nn.fit(model, optimizer, x, y, steps=self.settings["steps"], **how)
        except FloatingPointError:
            return search.DIVERGED | {"gap": 0.0, "noise": 0.0}
        nn.population_statistics(model, x, batch_size=BATCH_SIZE)
        trained, tested = nn.evaluate(model, x, y), nn.evaluate(model, data.x_test, data.y_test)
        measured = {"accuracy": tested, "train accuracy": trained, "gap": trained - tested}
        return measured | {"noise": noise(model, x, seed)}

    def report(self, results: Results, page: Page) -> None:
        """Compare with and without BN, and what dropout and L2 do in either case."""

        def got(bn: bool, dropout: float, l2: float, key: str = "accuracy") -> list[float]:
            return search.on_test(results, key, bn=bn, dropout=dropout, l2=l2)

        # Section 3.4: no deterministic values for a given training example.
        noise = got(True, 0.0, 0.0, "noise")
        page.claim(
            "With BN, the logits of an example in training depend on the rest of its batch",
            paper="not deterministic",
            ours=f"by {percent(noise)} of the logits' deviation, without BN by "
            f"{percent(got(False, 0.0, 0.0, 'noise'))}",
            held=min(noise) > 0.01,
        )
        # Section 3.4: advantageous to generalisation.
        alone, plain = got(True, 0.0, 0.0), got(False, 0.0, 0.0)
        gap, plain_gap = got(True, 0.0, 0.0, "gap"), got(False, 0.0, 0.0, "gap")
        claim = partial(search.claim_better, page, paper="generalises better")
        claim("Without BN, dropout and L2 the gap is wider than with BN alone", plain_gap, gap)
        claim("BN alone is more accurate than nothing", alone, plain)
        # Section 3.4: dropout can be removed. Against it stands the best dropout on the test set.
        rate = max(DROPOUT[1:], key=lambda rate: mean(got(False, rate, 0.0)))
        dropped = got(False, rate, 0.0)
        claim = partial(search.claim_better, page, paper="dropout can be removed or reduced")
        claim(f"BN alone is more accurate than dropout alone (the best: {rate:g})", alone, dropped)
        gain = np.subtract(dropped, plain).tolist()
        gain_with_bn = np.subtract(got(True, rate, 0.0), alone).tolist()
        claim(f"Dropout of {rate:g} gains more without BN than with it", gain, gain_with_bn)
        # Section 4.2.1: L2 / 5 improves accuracy on held-out data.
        fifth, whole = (got(True, 0.0, l2) for l2 in L2[1:])
        text, paper = "With BN, a fifth of the L2 weight is more accurate", "improves accuracy"
        search.claim_better(page, text, fifth, whole, paper=paper)

        head = ["BN", "dropout", "L2", "learning rate", "training", "test", "gap"]
        page.table(
            head,
            [
                ["yes" if v["bn"] else "no", v["dropout"], v["l2"], search.best_rate(results, v)]
                + [
                    percent(search.on_test(results, key, **v))
                    for key in ("train accuracy", "accuracy", "gap")
                ]
                for v in VARIANTS
            ],
            "Accuracy, mean ± half the range over seeds.",
        )
        figure, panels = new_figure(2)
        for axes, key in zip(panels, ("accuracy", "gap"), strict=True):
            lines = {
                f"{'BN' if bn else 'no BN'}, L2 {l2:g}": (
                    DROPOUT,
                    [mean(got(bn, dropout, l2, key)) for dropout in DROPOUT],
                )
                for bn, l2 in product((False, True), L2)
            }
            ylabel = "test accuracy" if key == "accuracy" else "training less test accuracy"
            plot_lines(axes, lines, xlabel="dropout rate", ylabel=ylabel)
        page.figure("regularisation", figure, "Test accuracy and gap by dropout, means over seeds.")


def noise(model: nn.Sequential, x: nn.Array, seed: int) -> float:
    """Return by how much x[0]'s logits vary with its batch, relative to those of all examples."""
    rng, scale = np.random.default_rng(seed), nn.predict(model, x).std(axis=0)
    model.train()
    logits = [
        model.forward(x[[0, *rng.choice(np.arange(1, len(x)), BATCH_SIZE - 1, replace=False)]])[0]
        for _ in range(COMPANIONS)
    ]
    spread = np.std(logits, axis=0)
    # A network whose units have all died says the same of every example, whatever the batch.
    return float(np.divide(spread, scale, out=np.zeros_like(spread), where=scale > 0).mean())
