"""What a run leaves in its folder: a JSON file and a PNG figure, each written whole or not at all.

matplotlib is imported when a figure is made, without pyplot: no window, no global state.
"""

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bncpu.atomic import atomic_write, check_writable

JSON_NAME, FIGURE_NAME = "results.json", "figure.png"

# Of Okabe & Ito's palette, told apart by colour-blind readers too; the line style says it again.
STYLES = ({"color": "#D55E00", "linestyle": "--"}, {"color": "#0072B2", "linestyle": "-"})


def prepare_folder(out: Path) -> None:
    """Make the folder and find out now, not after the training, whether results can be written.

    Raises
    ------
    OSError
        If the folder cannot be made or written to.
    ImportError
        If matplotlib is not installed.
    """
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise ImportError('figures: need matplotlib; pip install "bncpu[train]"') from error
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out}: is not a folder")
    out.mkdir(parents=True, exist_ok=True)
    for name in (JSON_NAME, FIGURE_NAME):
        check_writable(out / name)


def write_json(out: Path, results: Mapping[str, Any]) -> Path:
    """Write the results into the folder and return the file's path."""
    path = out / JSON_NAME
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode())
    return path


def new_figure(panels: int) -> tuple[Any, Any]:
    """Return a figure and its axes in one row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.6 + 4.2 * panels, 3.6), dpi=150, layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def plot_accuracy(axes: Any, curves: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> None:
    """Draw test accuracy by step, one line for each label of `curves`."""
    styles = STYLES if len(curves) > 1 else STYLES[1:]
    for (label, (steps, accuracy)), style in zip(curves.items(), styles, strict=False):
        axes.plot(steps, accuracy, label=label, linewidth=1.6, **style)
    axes.set(xlabel="training step", ylabel="test accuracy", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(loc="best")


def write_figure(out: Path, figure: Any) -> Path:
    """Write the figure into the folder and return the file's path."""
    path = out / FIGURE_NAME
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
    return path
