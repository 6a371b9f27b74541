"""Section 5's future work, recurrent networks, after Cooijmans et al. (2016, arXiv:1603.09025)."""

from typing import Any, ClassVar

import numpy as np

from bncpu import nn
from bncpu.data import Dataset
from bncpu.experiments import search
from bncpu.experiments.curves import learning_curve
from bncpu.experiments.experiment import Experiment, Progress, Results, Run
from bncpu.experiments.figures import new_figure, plot_lines
from bncpu.experiments.numbers import percent, spread
from bncpu.experiments.page import Page

BATCH_SIZE = 60
# By where gamma of the normalised state starts; None is without BN. Cooijmans et al. (section 4)
# found that 1 lets the gradients of an LSTM vanish, and 0.1 does not.
NAMES = {None: "without BN", 0.1: "BN, gamma from 0.1", 1.0: "BN, gamma from 1"}
VARIANTS = [{"gamma": gamma} for gamma in NAMES]
RATES = [0.01, 0.03, 0.1, 0.3, 1.0]
# Margins are blank in nearly every image, and eps keeps BN from blowing up the few that are not:
# on held-out MNIST, after 600 steps at 0.1, 1e-5 gave 78 % with gamma from 1, and 1e-2 gave 85 %.
EPS = 1e-2


class Recurrent(Experiment):
    """Batch normalisation in a recurrent network."""

    NAME = "recurrent"
    SECTION = "section 5"
    ABOUT = """
The paper leaves recurrent networks to future work: there, vanishing and exploding gradients may be
especially severe, and BN may improve how gradients propagate. Here a layer of tanh units reads
images row by row, and names the digit after the last row. What comes from the row and what comes
from the state are normalised apart, with statistics per time step (Cooijmans et al. 2016, who have
an LSTM, and gamma of the state start at 0.1). Each network has its best rate of one grid, by
accuracy on the last tenth of the training set; so chosen, too, is the gamma that claims are about.
Accuracy by step is with moving averages.
"""
    SETTINGS: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"hidden": 16, "steps": 40, "every": 20, "rates": RATES[3:]},
        "quick": {"hidden": 50, "steps": 400, "every": 100, "rates": RATES[1:4]},
        "default": {"hidden": 100, "steps": 2_000, "every": 200, "rates": RATES, "seeds": 3},
    }

    def runs(self, results: Results) -> list[Run]:
        """Search the learning rate of every network, then train it on all."""
        s = self.settings
        return search.runs(results, VARIANTS, s["rates"], self.seeds, lambda _: s["steps"])

    def measure(
        self, settings: dict[str, Any], data: Dataset, progress: Progress
    ) -> dict[str, Any]:
        """Train one network; see how far its gradients reach, and how it infers."""
        data = search.part_of(data, settings["part"])
        # (n, 1, rows, columns) without the channel is (n, time steps, features).
        x, x_test = (np.ascontiguousarray(data.images(part)[:, 0]) for part in ("train", "test"))
        rng, hidden = np.random.default_rng(settings["seed"]), self.settings["hidden"]
        bn, gamma = settings["gamma"] is not None, settings["gamma"] or 0
        sizes = (x.shape[2], hidden, x.shape[1])
        layer = nn.RNN(*sizes, batch_norm=bn, scale=gamma, eps=EPS, rng=rng)
        model = nn.Sequential(layer, nn.Linear(hidden, 10, rng=rng))
        reaches = [reach(model, layer, data)]
        options = {name: self.settings[name] for name in ("steps", "every")}
        options |= {"batch_size": BATCH_SIZE, "seed": settings["seed"], "progress": progress}
        measured = learning_curve(model, settings["rate"], data, (x, x_test), **options)
        reaches.append(reach(model, layer, data))
        if bn and settings["part"] == "test":
            nn.population_statistics(model, x, batch_size=1000)
            measured["per step"] = nn.evaluate(model, x_test, data.y_test)
            pool(layer.input_norms)
            pool(layer.state_norms)
            measured["pooled"] = nn.evaluate(model, x_test, data.y_test)
        return measured | {"reach": reaches}

    def report(self, results: Results, page: Page) -> None:
        """Compare accuracy by step, how far gradients reach, and statistics for inference."""
        rates = {g: search.best_rate(results, {"gamma": g}) for g in NAMES}
        held_out = {g: max(results.values("accuracy", part="validation", gamma=g)) for g in NAMES}
        bn = max((0.1, 1.0), key=held_out.__getitem__)  # the better one with BN
        test = results.where(part="test")
        steps = test[0].measured["steps"]
        curves = {g: np.array(test.values("curve", gamma=g)) for g in NAMES}
        ahead = (curves[bn].mean(axis=0) > curves[None].mean(axis=0))[1:]
        ends = [f"{percent(c[:, -1])} {NAMES[g]} (rate {rates[g]:g})" for g, c in curves.items()]
        page.claim(
            "With BN a recurrent network is more accurate at every checkpoint",
            paper="future work, no figure",
            ours=f"at {sum(ahead)} of {len(ahead)}; after {steps[-1]} steps {', '.join(ends)}",
            held=all(ahead),
        )

        # Gradients half-way back through time; 1 is one as large as at the last step.
        reaches = {g: np.array(test.values("reach", gamma=g)) for g in NAMES}
        half = {g: r[..., r.shape[-1] // 2].T for g, r in reaches.items()}
        off = {g: np.abs(np.log10(h.mean(axis=1) + 1e-30)) for g, h in half.items()}
        both = {g: " and ".join(spread(list(h), 2) for h in half[g]) for g in NAMES}
        page.claim(
            "BN improves how gradients propagate: half-way back they are nearer to the last ones",
            paper="a hypothesis of section 5, no figure",
            ours="norm over that at the last step, before and after training: "
            + ", ".join(f"{both[g]} {NAMES[g]}" for g in NAMES),
            held=bool(np.all(off[bn] < off[None])),
        )
        per_step, pooled = (test.values(key, gamma=bn) for key in ("per step", "pooled"))
        page.claim(
            "Inference needs population statistics of every time step, not one for all",
            paper="no figure; Cooijmans et al. keep them per time step",
            ours=f"{percent(per_step)} per time step, {percent(pooled)} pooled ({NAMES[bn]})",
            held=search.better(per_step, pooled),
        )

        figure, (left, right) = new_figure(2)
        lines = {NAMES[g]: (steps, c.mean(axis=0)) for g, c in curves.items()}
        band = {NAMES[g]: (c.min(axis=0), c.max(axis=0)) for g, c in curves.items()}
        plot_lines(left, lines, xlabel="training step", ylabel="test accuracy", band=band)
        rows = range(1, reaches[bn].shape[-1] + 1)
        lines = {
            f"{NAMES[g]}, {when}": (rows, r[:, i].mean(axis=0))
            for i, when in enumerate(("initial", "trained"))
            for g, r in reaches.items()
        }
        plot_lines(right, lines, xlabel="row of the image", ylabel="gradient norm / the last row's")
        right.set_yscale("log")
        page.figure("recurrent", figure, "Means of the seeds; left, the range of the seeds too.")


def reach(model: nn.Sequential, layer: nn.RNN, data: Dataset) -> list[float]:
    """Return |dL/dz_t|, z_t the argument of tanh, over that of the last step; L of 500 examples."""
    state, loss = model.state_dict(), nn.SoftmaxCrossEntropy()
    model.train()
    loss.forward(model.forward(data.images("test")[:500, 0]), data.y_test[:500])
    model.backward(loss.backward())
    model.load_state_dict(state)  # with its running statistics, which are not to know of these
    assert layer.dz is not None
    norms = np.linalg.norm(layer.dz, axis=(1, 2))
    return [float(norm) for norm in norms / norms[-1]]


def pool(norms: tuple[nn.BatchNorm, ...]) -> None:
    """Give all time steps the mean and variance of their values taken together."""
    means = np.array([norm.running_mean for norm in norms])
    variances = np.array([norm.running_var for norm in norms])
    mean, var = means.mean(axis=0), variances.mean(axis=0) + means.var(axis=0)
    for norm in norms:
        norm.load_state_dict(norm.state_dict() | {"running_mean": mean, "running_var": var})
