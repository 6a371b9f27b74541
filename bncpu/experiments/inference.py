"""Section 3.1: the statistics of inference, and that with them BN is a fixed linear map."""

from typing import Any, ClassVar

import numpy as np

from bncpu import nn
from bncpu.data import Dataset
from bncpu.experiments import fixed_statistics as fixed
from bncpu.experiments.experiment import Experiment, Progress, Results, Run
from bncpu.experiments.figures import STYLES, new_figure
from bncpu.experiments.networks import convolutional
from bncpu.experiments.numbers import mean, percent, spread
from bncpu.experiments.page import Page

CHANNELS, HIDDEN = (8, 16), (64,)
BATCH_SIZE, RATE = 60, 0.1
EXACT, BATCHES, MOVING = (
    "population, exact moments",
    "population, mean of batches",
    "moving averages",
)
OWN, SORTED = "the test batch's own", "the test batch's own, sorted by class"
PART = 420  # test images, for what is compared image by image
COMPANIONS = 50  # batches in which one image is seen
# float32 keeps 2^-24 of a number; four layers of sums over some hundred terms stay below this.
ROUNDING = 1e-5
WHY = """Moving averages of momentum 0.1 are of the last ten or twenty batches, and the weights move
meanwhile at the full learning rate; population statistics are of the weights as they are."""


class Inference(Experiment):
    """Statistics of inference, the linear map that they make, and folding it away."""

    NAME, SECTION = "inference", "section 3.1"
    ABOUT = """In training mean and variance are those of the batch; in inference they are fixed, so
that the output depends on the input alone. They come from the training set (Algorithm 2), or from
moving averages kept in training. Then batch normalisation is a linear map of each activation, and
can be composed with the layer before it. Here that is done to a network of two convolutions and two
linear layers, with batch normalisation and ReLU after each but the last."""
    SETTINGS: ClassVar = {
        "tiny": {"steps": 30, "examples": 600, "seeds": 1},
        "quick": {"steps": 300, "examples": 6_000, "seeds": 1},
        "default": {"steps": 2_000, "examples": 60_000, "seeds": 3},
    }

    def runs(self, results: Results) -> list[Run]:  # noqa: ARG002
        """Return one training for each seed."""
        return [Run({"seed": seed}, self.settings["steps"]) for seed in self.seeds]

    def measure(
        self, settings: dict[str, Any], data: Dataset, progress: Progress
    ) -> dict[str, Any]:
        """Train, then look at the test set's logits under every kind of statistics."""
        data, seed = data.subset(self.settings["examples"]), settings["seed"]
        x, x_test, y_test = data.images("train"), data.images("test"), data.y_test
        model = convolutional(
            data.image_shape, CHANNELS, lambda s: [nn.BatchNorm(s[0])], hidden=HIDDEN, seed=seed
        )
        how: dict[str, Any] = {"batch_size": BATCH_SIZE, "seed": seed, "progress": progress}
        nn.fit(model, nn.SGD(RATE), x, data.y_train, steps=self.settings["steps"], **how)

        logits = {MOVING: nn.predict(model, x_test)}
        nn.population_statistics(model, x, batch_size=BATCH_SIZE, method="batches")
        logits[BATCHES] = nn.predict(model, x_test)
        nn.population_statistics(model, x, batch_size=BATCH_SIZE, method="moments")
        logits[EXACT] = nn.predict(model, x_test)
        mixed = np.random.default_rng(seed).permutation(len(x_test))
        for name, order in ((OWN, mixed), (SORTED, np.argsort(y_test, kind="stable"))):
            batches = np.array_split(order, len(x_test) // BATCH_SIZE)
            logits[name] = np.empty_like(logits[EXACT])
            logits[name][order] = fixed.by_batch(model, x_test, batches)
        folded = nn.predict(fixed.fold(model), x_test)
        labels = {name: each.argmax(axis=1) for name, each in logits.items()}

        some = x_test[:PART]
        return {
            "accuracy": {name: float((each == y_test).mean()) for name, each in labels.items()},
            "difference": {
                name: float(np.abs(each - logits[EXACT]).max()) for name, each in logits.items()
            },
            "deviation": float(logits[EXACT].std()),
            "linear map": fixed.linear_map_error(model, some),
            "folded": fixed.relative(folded, logits[EXACT]),
            "other labels": int((folded.argmax(axis=1) != labels[EXACT]).sum()),
        } | fixed.dependence(model, some, BATCH_SIZE, COMPANIONS, seed)

    def report(self, results: Results, page: Page) -> None:
        """Say how far the statistics differ, and what is the same to rounding or to the bit."""
        names = (EXACT, BATCHES, MOVING, OWN, SORTED)
        accuracy, difference = (
            {name: [each[name] for each in results.values(key)] for name in names}
            for key in ("accuracy", "difference")
        )
        page.text(WHY)
        # Section 3.1: moving averages track the accuracy; the batch's own are not desirable.
        for name in (BATCHES, MOVING):
            page.claim(
                f"{name[0].upper()}{name[1:]}: as accurate as exact moments, within half a point",
                paper="tracks the accuracy",
                ours=f"{percent(accuracy[name], 2)} against {percent(accuracy[EXACT], 2)}",
                held=abs(mean(accuracy[name]) - mean(accuracy[EXACT])) <= 0.005,
            )
        page.claim(
            "With the statistics of test batches, accuracy falls if these are sorted by class",
            paper="neither necessary nor desirable",
            ours=f"{percent(accuracy[SORTED])} against {percent(accuracy[EXACT])}",
            held=max(accuracy[SORTED]) < min(accuracy[EXACT]),
        )
        # Algorithm 2, line 11; then composed with the layer before.
        for key, text in (
            ("linear map", "With fixed statistics BN is a linear map, scale x + shift"),
            ("folded", "Folded into convolutions and linear layers, the logits are the same"),
        ):
            error = max(results.values(key))
            ours = f"to {error:.1e} of the largest value"
            page.claim(text, paper="a linear transform", ours=ours, held=error < ROUNDING)
        # Section 3.1: the output depends only on the input, deterministically.
        moves = [float(np.std(each, axis=0).mean()) for each in results.values("in training")]
        page.claim(
            "In inference an image has the same logits, bit by bit, whatever shares its batch, and "
            "for every number of bncpu's threads",
            paper="depends only on the input",
            ours=f"the same in {COMPANIONS} batches; deviation in training {spread(moves, 2)}",
            held=all(results.values("same beside others") + results.values("same for threads")),
        )
        page.claim(
            f"BN has the same bits in batches of {fixed.SIZES}; the logits have them to "
            "rounding, since BLAS may add in another order",
            paper="depends only on the input",
            ours=f"logits to {max(results.values('sizes')):.1e} of the largest",
            held=all(results.values("same for sizes, BN"))
            and max(results.values("sizes")) < ROUNDING,
        )
        page.table(
            ["statistics", "test accuracy", "largest difference of a logit from the first"],
            [[name, percent(accuracy[name], 2), spread(difference[name])] for name in names],
            f"The logits' standard deviation is {spread(results.values('deviation'))}. Folding "
            f"changes {max(results.values('other labels'))} labels.",
        )
        figure, (axes,) = new_figure(1, width=5.2)
        for logits in results[0].measured["in training"]:
            axes.plot(logits, **STYLES[1] | {"linestyle": "", "alpha": 0.3})
        axes.plot(results[0].measured["in inference"], **STYLES[0] | {"linestyle": ""})
        axes.legend([axes.lines[0], axes.lines[-1]], ["training", "inference"])
        axes.set(xlabel="class", ylabel="logit", xticks=range(10))
        page.figure("one-image", figure, f"The logits of one image in {COMPANIONS} batches.")
