"""Section 4.2, figures 2 and 3: a small Inception network, with and without its modifications."""

from typing import Any, ClassVar

import numpy as np

from bncpu import nn
from bncpu.data import Dataset
from bncpu.experiments import search
from bncpu.experiments.curves import steps_to
from bncpu.experiments.experiment import Experiment, Progress, Results, Run
from bncpu.experiments.figures import new_figure, plot_lines
from bncpu.experiments.networks import varied_images
from bncpu.experiments.numbers import percent
from bncpu.experiments.page import Page

BATCH_SIZE, MOMENTUM = 32, 0.9  # as in the paper
RATES = (0.003, 0.01, 0.03, 0.1)  # of the baseline; the others have multiples of its best one
SHORTER = 3  # times, the trainings of the search, with the decay that belongs to their length
FASTER = 5  # in a fifth of the baseline's steps: the bound set for BN-x5 (paper: a 14th)
TEST = 4_000  # test images at each checkpoint; all of them at the end
# What the baseline has, and what section 4.2.1 makes of it for networks with BN, each by itself.
MODIFICATIONS: dict[str, tuple[Any, Any]] = {
    "dropout": (0.4, 0.0),
    "l2": (5e-4, 1e-4),
    "halvings": (2.0, 12.0),  # of the rate during a training: it decays six times as fast
    "lrn": (True, False),
    "shuffle": ("once", "epoch"),
    "distortion": (0.4, 0.1),  # of brightness, contrast and saturation
}
ALL = list(MODIFICATIONS)
VARIANTS: dict[str, dict[str, Any]] = {
    "Inception": {"bn": False, "activation": "relu", "times": 1, "modified": []},
    "BN-Baseline": {"bn": True, "activation": "relu", "times": 1, "modified": []},
    "BN-x5": {"bn": True, "activation": "relu", "times": 5, "modified": ALL},
    "BN-x30": {"bn": True, "activation": "relu", "times": 30, "modified": ALL},
    "BN-x5-Sigmoid": {"bn": True, "activation": "sigmoid", "times": 5, "modified": ALL},
    "Inception-Sigmoid": {"bn": False, "activation": "sigmoid", "times": 1, "modified": []},
}
# Figure 3: steps to 72.2 %, in millions, and the highest accuracy.
PAPER = {"Inception": ("31.0", "72.2 %"), "BN-Baseline": ("13.3", "72.7 %")}
PAPER |= {"BN-x5": ("2.1", "73.0 %"), "BN-x30": ("2.7", "74.8 %"), "BN-x5-Sigmoid": ("", "69.8 %")}
# With --full BN-x5 is also trained with one modification less, for each of them.
LESS = {f"BN-x5, {name} as before": [each for each in ALL if each != name] for name in ALL}
ONE_LESS = {name: VARIANTS["BN-x5"] | {"modified": modified} for name, modified in LESS.items()}


class Inception(Experiment):
    """A small Inception network with BN, higher rates and fewer regularisers."""

    NAME, SECTION, DATASETS = "inception", "section 4.2, figures 2 and 3", ("cifar10", "digits")
    ABOUT = f"""
The paper trains Inception on ImageNet, then with batch normalisation, with 5 and 30 times the
learning rate, and with sigmoids. Here it is `bncpu.nn.inception`, in batches of {BATCH_SIZE}. The
baseline has the rate, of {", ".join(map(str, RATES))}, that ends best on a held-out tenth of the
training set; *BN-Baseline* is the same with BN. *BN-x5* and *BN-x30* have that many times its rate
and what section 4.2.1 changes: no dropout, a fifth of the L2, a decay six times as fast, no LRN, a
new order in every epoch, less photometric distortion. Accuracy by step is that of the first
{TEST:,} test images, from moving averages.
"""
    SETTINGS: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"steps": 6, "checkpoints": 2},
        "quick": {"steps": 250, "checkpoints": 10},
        "default": {"steps": 10_000, "checkpoints": 40},
        "full": {"steps": 40_000, "checkpoints": 80},
    }

    def runs(self, results: Results) -> list[Run]:
        """Search the baseline's rate, then train all variants."""
        steps, seed, baseline = self.settings["steps"], self.seeds[0], VARIANTS["Inception"]
        short = {"part": "validation", "seed": seed, "steps": steps // SHORTER}
        searched = [Run({**baseline, **short, "rate": rate}, short["steps"]) for rate in RATES]
        if not all(results.where(**run.settings) for run in searched):
            return searched
        variants = VARIANTS | (ONE_LESS if self.size == "full" else {})
        rate = search.best_rate(results, baseline)
        long = {"part": "test", "seed": seed, "steps": steps}
        return searched + [
            Run({**each, **long, "rate": each["times"] * rate}, steps) for each in variants.values()
        ]

    def measure(
        self, settings: dict[str, Any], data: Dataset, progress: Progress
    ) -> dict[str, Any]:
        """Train one network."""
        how = {name: pair[name in settings["modified"]] for name, pair in MODIFICATIONS.items()}
        steps, seed, rate = settings["steps"], settings["seed"], settings["rate"]
        data = search.part_of(data, settings["part"])
        pixels, x_test, augment = varied_images(data, how["distortion"])
        network: dict[str, Any] = {name: how[name] for name in ("lrn", "dropout")}
        network["activation"] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}[settings["activation"]]
        rng = np.random.default_rng(seed)
        model = nn.inception(pixels.shape[1], batch_norm=settings["bn"], rng=rng, **network)
        optimizer = nn.SGD(rate, MOMENTUM, how["l2"])
        training: dict[str, Any] = {
            "schedule": nn.ExponentialDecay(rate, 0.5, steps / how["halvings"]),
            "augment": augment,
            "shuffle": how["shuffle"],
            "test": (x_test[:TEST], data.y_test[:TEST]),
            "test_batch_size": 100,
            "every": self.settings["steps"] // self.settings["checkpoints"],
        }
        training |= {"steps": steps, "batch_size": BATCH_SIZE, "seed": seed, "progress": progress}
        records: list[nn.Record] = []
        try:
            nn.fit(model, optimizer, pixels, data.y_train, callback=records.append, **training)
        except FloatingPointError:
            return search.DIVERGED | {"steps": [0], "accuracies": [0.0]}
        curve = {"steps": [r.step for r in records], "accuracies": [r.accuracy for r in records]}
        return curve | {"accuracy": nn.evaluate(model, x_test, data.y_test, batch_size=100)}

    def report(self, results: Results, page: Page) -> None:
        """Compare steps and accuracies with the baseline's."""
        runs = {n: results.where(**v, part="test") for n, v in (VARIANTS | ONE_LESS).items()}
        curves = {name: found[0].measured for name, found in runs.items() if found}
        ends = {name: curve["accuracy"] for name, curve in curves.items()}
        best, searched = max(curves["Inception"]["accuracies"]), results.where(part="validation")
        taken = {n: steps_to(best, c["steps"], c["accuracies"]) for n, c in curves.items()}
        told = {n: "never" if steps is None else f"{steps:,}" for n, steps in taken.items()}

        bounds = {"BN-x5": (FASTER, "1/14"), "BN-Baseline": (1, "less than half")}
        for name, (part, paper) in bounds.items():
            bound, steps = (taken["Inception"] or 0) // part, taken[name]
            text = f"{name} reaches the baseline's best accuracy in at most "
            text += f"1/{part} of its steps" if part > 1 else "as many steps"
            ours = f"{told[name]}; baseline {told['Inception']} ({percent(best)})"
            page.claim(text, paper=paper, ours=ours, held=steps is not None and steps <= bound)
        for name in ("BN-x5", "BN-x30"):
            text, base = f"{name} ends more accurate than the baseline", ends["Inception"]
            paper, ours = f"{PAPER[name][1]}; 72.2 %", f"{percent(ends[name])}; {percent(base)}"
            page.claim(text, paper=paper, ours=ours, held=ends[name] > base)
        plain, with_bn = ends["Inception-Sigmoid"], ends["BN-x5-Sigmoid"]
        text = "With sigmoids and without BN it does not learn: within 3 points of chance"
        page.claim(text, paper="at chance", ours=percent(plain), held=abs(plain - 0.1) <= 0.03)
        text = "With sigmoids and BN it does: at least 45 %"
        page.claim(text, paper="69.8 %", ours=percent(with_bn), held=with_bn >= 0.45)

        head = ["network", "paper: million steps", "paper", f"steps to {percent(best)}", "best"]
        highest = {name: percent(max(curve["accuracies"])) for name, curve in curves.items()}
        rows = [[n, *PAPER.get(n, ("", "")), told[n], highest[n], percent(ends[n])] for n in curves]
        page.table([*head, "end"], rows, "Figure 3; at the end all test images are counted")
        rates = [f"{r.settings['rate']:g}: {percent(r.measured['accuracy'])}" for r in searched]
        page.text(f"The baseline's accuracy on the held-out part by rate: {', '.join(rates)}.")
        figure, (axes,) = new_figure(width=6)
        lines = {n: (c["steps"], c["accuracies"]) for n, c in curves.items() if n in VARIANTS}
        plot_lines(axes, lines, xlabel="training step", ylabel="test accuracy")
        axes.axhline(best, color="black", linewidth=0.8, linestyle=":")
        page.figure("figure2", figure, "Figure 2; dotted: the baseline's best accuracy")
