"""Figures that a colour-blind reader can read: Okabe & Ito's colours, and lines and marks besides.

matplotlib is imported when a figure is made, without pyplot: no window, no global state.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

# Blue, vermillion, green, purple, orange, sky blue, black.
STYLES: list[dict[str, Any]] = [
    {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    {"color": "#009E73", "linestyle": "-.", "marker": "^"},
    {"color": "#CC79A7", "linestyle": ":", "marker": "D"},
    {"color": "#E69F00", "linestyle": (0, (5, 1)), "marker": "v"},
    {"color": "#56B4E9", "linestyle": (0, (3, 1, 1, 1)), "marker": "P"},
    {"color": "#000000", "linestyle": (0, (1, 1)), "marker": "X"},
]
MARKS = 8  # on a line, at most about so many
DPI = 150
COLORS = 128  # of a PNG; lines on white need no more, and the file is a third


def new_figure(panels: int = 1, width: float = 4.2, height: float = 3.6) -> tuple[Any, Any]:
    """Return a figure and an array of its axes in one row, each of that size in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.6 + width * panels, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def plot_lines(
    axes: Any,
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    band: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    styles: Sequence[Mapping[str, Any]] = STYLES,
) -> None:
    """Draw a line for each label, in the order of the styles, with a legend and a grid.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
        One of those of `new_figure`.
    lines : dict of str to (xs, ys)
        The lines by their labels.
    xlabel, ylabel : str
        What the axes show, with its unit.
    band : dict of str to (low, high), optional
        The range around the line of that label, shaded.
    styles : sequence of dict, optional
        Others, or another order.
    """
    for i, (label, (xs, ys)) in enumerate(lines.items()):
        style = styles[i % len(styles)]
        if band and label in band:
            low, high = band[label]
            axes.fill_between(xs, low, high, color=style["color"], alpha=0.2, linewidth=0)
        every = max(1, len(xs) // MARKS)
        axes.plot(xs, ys, label=label, linewidth=1.6, markersize=4, markevery=every, **style)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    if lines:
        axes.legend(loc="best", fontsize="small")


def accuracy_and_inputs(measured: Mapping[str, Mapping[str, Any]]) -> Any:
    """Return the three panels of the paper's figure 1.

    Parameters
    ----------
    measured : dict of str to dict
        For the network with BN and the one without: "steps", and for each of them "accuracies" and
        "percentiles", which are the 15th, 50th and 85th of a unit's inputs.
    """
    figure, (accuracy, *panels) = new_figure(3)
    curves = {name: (each["steps"], each["accuracies"]) for name, each in measured.items()}
    plot_lines(accuracy, curves, xlabel="training step", ylabel="test accuracy")
    accuracy.set(title="(a) test accuracy", ylim=(0.7, 1))
    label = "50th percentile; 15th to 85th shaded"
    which = zip(reversed(panels), "cb", STYLES, measured.items(), strict=False)
    for axes, letter, style, (name, each) in which:
        low, middle, high = zip(*each["percentiles"], strict=True)
        lines, band = {label: (each["steps"], middle)}, {label: (low, high)}
        plot_lines(axes, lines, xlabel="training step", ylabel="input", band=band, styles=[style])
        axes.set_title(f"({letter}) inputs of a typical sigmoid, {name}")
    panels[0].sharey(panels[1])
    panels[0].autoscale(axis="y")
    return figure


def plot_accuracy(axes: Any, curves: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> None:
    """Draw test accuracy by step, one line for each label of `curves`."""
    plot_lines(axes, curves, xlabel="training step", ylabel="test accuracy")
    axes.set_ylim(0, 1.02)


def png(figure: Any) -> bytes:
    """Return a figure as a PNG file of few colours."""
    from PIL import Image

    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    drawn.seek(0)
    with Image.open(drawn) as image:
        few = image.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
    few.save(packed, format="png", optimize=True)
    return packed.getvalue()
