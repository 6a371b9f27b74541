"""Section 3.2: where in a layer the normalisation stands, over what, and with what after it."""

from collections.abc import Callable, Sequence
from itertools import pairwise, product
from typing import Any, ClassVar

import numpy as np

from bncpu import nn
from bncpu.data import Dataset
from bncpu.experiments import search
from bncpu.experiments.experiment import Experiment, Progress, Results, Run
from bncpu.experiments.figures import STYLES, new_figure
from bncpu.experiments.networks import Layers, convolutional
from bncpu.experiments.numbers import percent, spread
from bncpu.experiments.page import Page

BATCH_SIZE, HIDDEN, CHANNELS = 60, (100, 100, 100), (8, 16)  # the first two as in section 4.1
CONV_PLACES: dict[str, Callable[[tuple[int, ...]], Layers]] = {
    "nothing": lambda _: [],
    "maps": lambda shape: [nn.BatchNorm(shape[0])],
    "activations": lambda shape: [nn.BatchNorm(shape, axis=(1, 2, 3))],
}
CONV_SHARE = 4  # of the steps: a convolutional network's take ten times longer, and learn more
POPULATION = 6_000  # examples for Algorithm 2
FUNCTIONS: dict[str, tuple[type[nn.Layer], float]]  # and the gain of the initial weights for each
FUNCTIONS = {"sigmoid": (nn.Sigmoid, 1.0), "ReLU": (nn.ReLU, 2**0.5)}
# A layer is g(Wu + b). Gulcehre & Bengio (2013) normalise its output; to normalise the input u of
# each is that too but for the ends, where the image is normalised and the last output is not.
KEYS, AFFINE = ("net", "normalised", "then"), "gamma, beta"
NORMALISED = [("nothing", ""), *product(("Wu+b", "u", "g(Wu+b)"), (AFFINE, ""))]
VARIANTS = [(g, *normalised) for g in FUNCTIONS for normalised in NORMALISED]
VARIANTS += [("conv", "nothing", ""), ("conv", "maps", AFFINE), ("conv", "activations", AFFINE)]
HEAD = ["network", "normalised", "then", "rate", "test accuracy"]
# What should be better than what, and what the paper says of it.
CLAIMS = [
    (FUNCTIONS, "Wu+b", ("nothing", ""), "more accurate (section 4)"),
    (FUNCTIONS, "Wu+b", ("u", AFFINE), "Wu+b preferred (section 3.2)"),
    (FUNCTIONS, "Wu+b", ("g(Wu+b)", AFFINE), "Wu+b preferred (section 5)"),
    (FUNCTIONS, "Wu+b", ("Wu+b", ""), "they restore what a layer can represent (section 3)"),
    (["conv"], "maps", ("nothing", ""), "more accurate (section 4)"),
    (["conv"], "maps", ("activations", AFFINE), "as convolutions are (section 3.2)"),
]


class Placement(Experiment):
    """Where to normalise: Wu + b, u or g(Wu + b), by map or activation, with gamma and beta."""

    NAME, SECTION = "placement", "section 3.2"
    ABOUT = """The paper normalises Wu + b, before the nonlinearity g: the distribution of u, the
output of another nonlinearity, changes its shape in training, while Wu + b is more likely to be
symmetric and not sparse. It adds gamma and beta, without which the inputs of a sigmoid would stay
in its linear part, and it normalises convolutions by feature map. Here a network of three hidden
layers of 100 and one of two convolutions are trained in every variant by plain SGD, each at its
best learning rate by the same search. Better is what is better for every seed."""
    SETTINGS: ClassVar = {
        "tiny": {"steps": 24, "rates": (0.3,), "seeds": 1},
        "quick": {"steps": 300, "rates": (0.1, 1.0), "seeds": 1},
        "default": {"steps": 2_000, "rates": (0.1, 0.3, 1.0, 3.0, 10.0), "seeds": 3},
    }

    def steps(self, settings: dict[str, Any]) -> int:
        """Return the steps of a training."""
        return int(self.settings["steps"]) // (CONV_SHARE if settings["net"] == "conv" else 1)

    def runs(self, results: Results) -> list[Run]:
        """Return the search for each variant's rate, then its runs on the test set."""
        rates, seeds = self.settings["rates"], self.seeds
        return search.runs(results, [*map(named, VARIANTS)], rates, seeds, self.steps)

    def measure(
        self, settings: dict[str, Any], data: Dataset, progress: Progress
    ) -> dict[str, Any]:
        """Train; without BN also look at what the second hidden layer gets and makes."""
        data, seed = search.part_of(data, settings["part"]), settings["seed"]
        images = data.images("train"), data.images("test")
        x, x_test = images if settings["net"] == "conv" else (data.x_train, data.x_test)
        model = network(x.shape[1:], [settings[key] for key in KEYS], seed)
        how: dict[str, Any] = {"batch_size": BATCH_SIZE, "seed": seed, "progress": progress}
        sgd, steps = nn.SGD(settings["rate"]), self.steps(settings)
        try:
            nn.fit(model, sgd, x, data.y_train, steps=steps, **how)
        except FloatingPointError:
            return search.DIVERGED | {"skewness of u": 0.0, "skewness of Wu+b": 0.0}
        nn.population_statistics(model, x[:POPULATION], batch_size=BATCH_SIZE)
        measured = {"accuracy": nn.evaluate(model, x_test, data.y_test)}
        if settings["normalised"] == "nothing" and settings["net"] in FUNCTIONS:
            with nn.recording(model, *model.layers[2:4]) as inputs:
                nn.predict(model, x_test, batch_size=len(x_test))
            measured["skewness of u"], measured["skewness of Wu+b"] = map(skewness, inputs[0])
        return measured

    def report(self, results: Results, page: Page) -> None:
        """Compare the variants in pairs."""
        accuracy, rows = {}, []
        for variant in VARIANTS:
            accuracy[variant] = search.on_test(results, "accuracy", **named(variant))
            rate = search.best_rate(results, named(variant))
            rows.append([*variant, f"{rate:g}", percent(accuracy[variant])])
        for nets, place, other, paper in CLAIMS:
            for a, b in (((net, place, AFFINE), (net, *other)) for net in nets):
                text = f"{label(a)} is better than {label(b)}"
                search.claim_better(page, text, accuracy[a], accuracy[b], paper=paper)
        for g in FUNCTIONS:
            plain = {"net": g, "normalised": "nothing"}
            u, wu = (search.on_test(results, f"skewness of {x}", **plain) for x in ("u", "Wu+b"))
            text, ours = f"{g}: Wu+b is less skewed than u", f"{spread(wu)} against {spread(u)}"
            page.claim(text, paper="more symmetric (3.2)", ours=ours, held=search.better(u, wu))
        page.table(HEAD, rows, "Mean ± half the range over seeds.")
        figure, (axes,) = new_figure(1, width=6.4, height=5.2)
        for i, (variant, values) in enumerate(accuracy.items()):
            axes.plot(values, [i] * len(values), **STYLES[not variant[2]] | {"linestyle": ""})
        axes.set_yticks(range(len(VARIANTS)), [label(variant) for variant in VARIANTS])
        axes.invert_yaxis()
        axes.set_xlabel("test accuracy (fraction)")
        axes.grid(alpha=0.3)
        page.figure("placement", figure, "Test accuracy of every variant, a point for each seed.")


def network(shape: tuple[int, ...], variant: Sequence[str], seed: int) -> nn.Sequential:
    """Return a variant of the network for examples of that shape."""
    net, place, then = variant
    if net == "conv":
        return convolutional(shape, CHANNELS, CONV_PLACES[place], seed=seed)
    (g, gain), rng = FUNCTIONS[net], np.random.default_rng(seed)
    layers: Layers = []
    for i, o in pairwise((*shape, *HIDDEN)):
        wu = nn.Linear(i, o, bias=place != "Wu+b", rng=rng, std=gain * i**-0.5)
        bn = nn.BatchNorm(i if place == "u" else o, affine=then == AFFINE)
        order: dict[str, Layers]
        order = {"u": [bn, wu, g()], "Wu+b": [wu, bn, g()], "g(Wu+b)": [wu, g(), bn]}
        layers += order.get(place, [wu, g()])
    return nn.Sequential(*layers, nn.Linear(HIDDEN[-1], 10, rng=rng))


def skewness(x: nn.Array) -> float:
    """Return the mean over features of the size of their third standardised moment."""
    z = (x - x.mean(axis=0)) / np.maximum(x.std(axis=0), 1e-6)  # a feature may be constant
    return float(np.abs((z**3).mean(axis=0)).mean())


def named(variant: tuple[str, str, str]) -> dict[str, str]:
    """Return a variant as settings of a run."""
    return dict(zip(KEYS, variant, strict=True))


def label(variant: tuple[str, ...]) -> str:
    """Return a variant in words."""
    return ", ".join(filter(None, variant))
