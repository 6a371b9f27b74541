"""Experiments that take no time and fail when they are told to, for tests of those that run them.

Workers import this file by its name. What they shall do, and where they shall note what they have
measured, is in the environment, which they inherit.
"""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_info

import bncpu
from bncpu.experiments.experiment import Experiment, Run
from bncpu.experiments.figures import new_figure, plot_lines
from bncpu.experiments.numbers import spread

LOG, FAULT = "PLANTED_LOG", "PLANTED_FAULT"


class Planted(Experiment):
    """Numbers that are found | in two steps."""

    NAME, SECTION, DRAWS = "planted", "section 3.1", True
    ABOUT = "First *all* of them, then the best one again."
    DATASETS = ("mnist", "digits")
    SETTINGS = {  # noqa: RUF012
        "tiny": {"numbers": [2, 5, 3], "seeds": 2},
        "default": {"numbers": [2, 5, 3, 4], "seeds": 3},
    }

    def runs(self, results):
        first = [Run({"n": n, "pair": (n, "x")}, steps=3) for n in self.settings["numbers"]]
        if len(results) < len(first):
            return first
        best = max(results.where(pair=[5, "x"]).values("square"))
        return first + [Run({"best": best, "seed": seed}, steps=2) for seed in self.seeds]

    def measure(self, settings, data, progress):
        with Path(os.environ[LOG]).open("a") as log:
            log.write(f"{Run(settings).name}\n")
        progress.update()
        fault = json.loads(os.environ.get(FAULT, "{}"))
        if settings.get("n") == fault.get("n", 0):
            FAULTS[fault["do"]]()
        here = {"pid": os.getpid(), "threads": bncpu.get_num_threads()}
        here["blas"] = max(each["num_threads"] for each in threadpool_info())
        if "n" in settings:
            square = np.float32(settings["n"] ** 2)
            return {"square": square, "rows": np.arange(3), "test": len(data.x_test), **here}
        return {"value": settings["best"] + settings["seed"] / 10, **here}

    def report(self, results, page):
        values = [value for r in results if (value := r.measured.get("value")) is not None]
        page.claim("The best is 25", paper="`25`", ours=spread(values), held=25 in values)
        page.claim("There are ten", paper="10", ours=f"{len(values)}", held=len(values) == 10)
        page.text("  A paragraph.\n")
        page.table(["n", "n | n"], [[1, 0.123456], ["two", "a\nb"]], caption="Some numbers")
        if not self.DRAWS:
            return
        figure, (axes,) = new_figure(1)
        plot_lines(
            axes,
            {"squares": ([1, 2], [1, 4])},
            xlabel="n",
            ylabel="n²",
            band={"squares": ([0, 3], [2, 5])},
        )
        page.figure("squares", figure, "The squares [of n]")


class Timed(Planted):
    """The same, alone."""

    NAME, ALONE = "timed", True


def interrupt():
    """Do to the process that waits for the results what Ctrl-C does to it and to its workers."""
    os.kill(os.getpid(), signal.SIGINT)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)


FAULTS = {
    "raise": lambda: 1 / 0,
    "diverge": lambda: (_ for _ in ()).throw(FloatingPointError("loss: nan")),
    "interrupt": interrupt,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(3),
}
