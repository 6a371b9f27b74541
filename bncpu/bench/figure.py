"""Bars by shape: bytes per second of bncpu, its peers and the memory.

matplotlib is imported when a figure is made, without pyplot: no window, no global state.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bncpu.bench.rows import Row

# Of Okabe & Ito's palette, told apart by colour-blind readers too.
COLORS = {
    "stream": "#999999",
    "bncpu": "#0072B2",
    "bncpu, allocating": "#56B4E9",
    "torch": "#D55E00",
    "torch, out=": "#E69F00",
    "jax": "#009E73",
    "numpy": "#CC79A7",
    "cupy": "#CC79A7",
    "onednn nchw": "#000000",
    "onednn nhwc": "#C7B800",
    "onednn nChw16c": "#F0E442",
}
BAR_INCHES = 0.13
DPI = 130


def require() -> None:
    """Raise ImportError now, not after the measuring, if there is no matplotlib."""
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise ImportError('--plot: needs matplotlib; pip install "bncpu[bench]"') from error


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """Return a figure and its axes as a two-dimensional array; inches are of one panel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), dpi=DPI, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def bars(rows: Sequence[Row], title: str) -> Any:
    """Return a figure with a panel for each operation and a group of bars for each shape."""
    operations = list(dict.fromkeys(row.operation for row in rows))
    shapes = list(dict.fromkeys(row.shape for row in rows))
    names = ["stream", *dict.fromkeys(name for row in rows for name in row.seconds)]
    width = 1.6 + len(shapes) * max(1.3, (len(names) + 1.5) * BAR_INCHES)
    figure, panels = new_figure(len(operations), 1, max(8.0, width), 2.9)
    figure.suptitle(title, fontsize="medium")
    for axes, operation in zip(panels[:, 0], operations, strict=True):
        of = {row.shape: row for row in rows if row.operation == operation}
        for i, name in enumerate(names):
            heights = [speed(of[shape], name) if shape in of else 0.0 for shape in shapes]
            places = [
                place + (i - (len(names) - 1) / 2) / (len(names) + 1.5)
                for place in range(len(shapes))
            ]
            axes.bar(
                places,
                heights,
                1 / (len(names) + 1.5),
                label=name,
                color=COLORS.get(name),
            )
        axes.set_ylabel("GB/s of the fewest bytes")
        axes.set_title(operation, fontsize="medium", loc="left")
        axes.set_xticks(range(len(shapes)), [str(shape) for shape in shapes], fontsize="x-small")
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize="small", ncols=5, loc="outside lower center")
    return figure


def speed(row: Row, name: str) -> float:
    """Return the GB/s of a contender, "stream" included."""
    if name == "stream":
        return row.stream_bytes / row.stream_seconds / 1e9
    return row.bytes / row.seconds[name] / 1e9 if name in row.seconds else 0.0
