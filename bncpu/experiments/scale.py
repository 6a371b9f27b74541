"""Section 3.3: batch normalisation enables higher learning rates; the scale of W has no effect."""

from typing import Any, ClassVar

import numpy as np

from bncpu import nn
from bncpu.data import Dataset
from bncpu.experiments import search
from bncpu.experiments.curves import best_rate, learning_curve
from bncpu.experiments.experiment import Experiment, Progress, Results, Run
from bncpu.experiments.figures import new_figure, plot_lines
from bncpu.experiments.layerwise import layer_jacobians, rescaling_errors
from bncpu.experiments.numbers import mean, percent
from bncpu.experiments.page import Page

HIDDEN, BATCH_SIZE, EXAMPLES = 100, 60, 500
SCALES = [2.0**k for k in range(-8, 9)]  # powers of two, which round nothing
RATES = [float(f"{10 ** (k / 2):.2g}") for k in range(-4, 7)]
TRAINS = 0.8  # a rate trains a network if all seeds end with this accuracy on held-out images
ACTIVATIONS = {"sigmoid": nn.Sigmoid, "ReLU": nn.ReLU}
NETS = {f"{a}, with{'' if bn else 'out'} BN": (a, bn) for a in ACTIVATIONS for bn in (False, True)}
PERCENTILES = range(101)
NEAR = 2.0  # singular values from 1/2 to 2 are near 1


class Scale(Experiment):
    """The scale of the weights, learning rates and singular values."""

    NAME = "scale"
    SECTION = "section 3.3"
    ABOUT = f"""
BN(aWu) = BN(Wu): its gradient by u does not depend on a, that by aW is 1/a of that by W, so that
larger weights grow slower and higher rates do not make them explode. The Jacobians of layers, from
normalised vector to normalised vector, are conjectured to have singular values close to 1. Here,
first the identities, for {EXAMPLES} images and the weights of a first layer; then networks with
three layers of {HIDDEN}. A rate trains one if all seeds end with {TRAINS:.0%} on the last tenth of
the training set; Jacobians, at single test images, are those of networks with the best rate there.
"""
    SETTINGS: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"steps": 30, "rates": RATES[4::4], "images": 5},
        "quick": {"steps": 500, "rates": RATES, "images": 20},
        "default": {"steps": 2_000, "rates": RATES, "images": 50, "seeds": 3},
    }

    def runs(self, results: Results) -> list[Run]:
        """Measure the identities and try all rates; then train each network at its best one."""
        kinds = [(dtype, eps) for dtype in ("float64", "float32") for eps in (0.0, 1e-5)]
        runs = [Run({"part": "identity", "dtype": dtype, "eps": eps}) for dtype, eps in kinds]
        tried = [("validation", net, rate) for net in NETS for rate in self.settings["rates"]]
        found = results.where(part="validation")
        if len(found) == len(tried) * len(self.seeds):
            tried += [("test", net, best_rate(found.where(net=net))) for net in NETS]
        for part, net, rate in tried:
            settings = [{"part": part, "net": net, "rate": rate, "seed": s} for s in self.seeds]
            runs += [Run(each, self.settings["steps"]) for each in settings]
        return runs

    def measure(
        self, settings: dict[str, Any], data: Dataset, progress: Progress
    ) -> dict[str, Any]:
        """Measure the identities, or train and look at the Jacobians before and after it."""
        rng, inputs = np.random.default_rng(settings.get("seed", 0)), data.x_train.shape[1]
        if settings["part"] == "identity":
            u, w = data.x_train[:EXAMPLES], rng.normal(0, inputs**-0.5, (HIDDEN, inputs))
            arrays = (u, w, rng.standard_normal((EXAMPLES, HIDDEN)))
            u, w, dy = (array.astype(settings["dtype"]) for array in arrays)
            return {"errors": rescaling_errors(u, w, dy, SCALES, settings["eps"])}
        data, steps = search.part_of(data, settings["part"]), self.settings["steps"]
        activation, bn = NETS[settings["net"]]
        sizes = [inputs, *[HIDDEN] * 3, 10]
        kind: dict[str, Any] = {"activation": ACTIVATIONS[activation], "batch_norm": bn, "rng": rng}
        model = nn.fully_connected(sizes, **kind)
        found: list[list[float]] = []
        options: dict[str, Any] = {"steps": steps, "every": steps, "batch_size": BATCH_SIZE}
        options |= {"seed": settings["seed"], "progress": progress}

        x, x_test = data.x_train[:10_000], data.x_test[: self.settings["images"]]

        def look() -> None:
            if settings["part"] == "test":
                nn.population_statistics(model, x, batch_size=1000)
                values = np.linalg.svd(layer_jacobians(model, x_test), compute_uv=False)
                found.append(np.percentile(values, PERCENTILES).tolist())

        measured = learning_curve(model, settings["rate"], data, observe=look, **options)
        return {"accuracy": measured["accuracy"], "initial": found[:1], "trained": found[-1:]}

    def report(self, results: Results, page: Page) -> None:
        """Compare the errors with rounding, and the networks with each other."""
        identities = [(r.settings, np.array(r.measured["errors"])) for r in results[:4]]
        exact = {s["dtype"]: errors.max(axis=0) for s, errors in identities if s["eps"] == 0}
        for i, text in enumerate(("BN(aWu) = BN(Wu)", "d/du is the same", "d/d(aW) is 1/a d/dW")):
            errors = ", ".join(f"{e[i]:.0e} in {dtype}" for dtype, e in exact.items())
            held = all(e[i] < 1e-5 for e in exact.values())
            page.claim(f"{text} (eps = 0)", paper="exact", ours=f"off by {errors}", held=held)
        head = ["a", *(f"{s['dtype']}, eps = {s['eps']:g}" for s, _ in identities)]
        rows = zip(
            SCALES, *([f"{e:.0e}" for e in each.max(1)] for _, each in identities), strict=True
        )
        page.table(head, rows, "Largest error of the three, over the largest value; eps costs it.")

        tried, test = results.where(part="validation"), results.where(part="test")
        rates = self.settings["rates"]
        ends = {n: {r: tried.values("accuracy", net=n, rate=r) for r in rates} for n in NETS}
        trains = {n: [r for r, a in by.items() if min(a) >= TRAINS] for n, by in ends.items()}
        when = ("initial", "trained")
        found = {n: np.mean([test.values(w, net=n) for w in when], axis=(1, 2)) for n in NETS}
        near = {n: ((v >= 1 / NEAR) & (v <= NEAR)).mean(axis=1) for n, v in found.items()}
        # Units that a ReLU has switched off make zeros; they count as 1/1000.
        off = {n: np.abs(np.log10(np.maximum(v, 1e-3))).mean(axis=1) for n, v in found.items()}
        for bn, without in zip([*NETS][1::2], [*NETS][::2], strict=True):
            high, low = (max(trains[n], default=0.0) for n in (bn, without))
            page.claim(
                f"Higher learning rates train with BN ({NETS[bn][0]})",
                paper="higher; section 4.2 has 5 and 30 times the rate",
                ours=f"up to {high:g}; without BN {low:g}",
                held=high > low,
            )
            shares = [" and ".join(map(percent, near[n])) for n in (bn, without)]
            page.claim(
                f"With BN the singular values of Jacobians are close to 1 ({NETS[bn][0]})",
                paper="a conjecture, no figure",
                ours=f"before and after training {shares[0]} are between 1/{NEAR:g} and {NEAR:g}; "
                f"without BN {shares[1]}",
                held=min(near[bn]) > 0.9,
            )
            both = [" and ".join(f"{each:.2f}" for each in off[n]) for n in (bn, without)]
            page.claim(
                f"They are closer to 1 than without BN ({NETS[bn][0]})",
                paper="the same conjecture",
                ours=f"mean of |log10|, before and after training: {both[0]}; without BN {both[1]}",
                held=bool(np.all(off[bn] < off[without])),
            )
        figure, (left, right) = new_figure(2)
        lines = {n: (rates, [mean(a) for a in by.values()]) for n, by in ends.items()}
        plot_lines(left, lines, xlabel="learning rate", ylabel="accuracy on held-out images")
        left.set_xscale("log")
        lines = {n: (PERCENTILES, values[1]) for n, values in found.items()}
        plot_lines(right, lines, xlabel="percentile", ylabel="singular value, trained")
        right.set(yscale="log", ylim=(1e-3, 1e2))
        page.figure("scale", figure, "Accuracy by learning rate; singular values by percentile.")
