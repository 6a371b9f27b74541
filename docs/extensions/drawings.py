"""Sphinx extension: `drawing` shows a drawing of this file in the page, in the page's colours.

The house is drawn from the import contract in pyproject.toml and the tile plans from what the
kernels themselves plan, so that they are true at every build.
"""

import tomllib
from pathlib import Path

import speed
from docutils import nodes
from sphinx.util.docutils import SphinxDirective
from svg import Sheet

from bncpu.cpu import kernels

ROOT = Path(__file__).parents[2]
# What a box of the house says below its name.
HOUSE = {
    "__main__": "python -m bncpu",
    "cli": "bncpu info, bench, train, moments, data, reproduce",
    "experiments": "one file per claim of the paper",
    "bench": "bncpu bench",
    "nn": "the minimal trainer",
    "data": "datasets to arrays",
    "distributed": "BN over MPI ranks",
    "population": "moments of files",
    "layer": "BatchNorm",
    "torch": "BN for PyTorch on CPU",
    "functional": "the public functions",
    "folding": "BN as a linear map",
    "arguments": "the door: all errors",
    "moments": "exact merging",
    "problem": "arrays for one walk",
    "threads": "how many; fork",
    "backends": "array → kernels",
    "memory": "what overlaps",
    "cpu": "SIMD, OpenMP",
    "cuda": "CuPy kernels",
    "reference": "the truth, float64",
    "atomic": "whole files",
    "progress": "bars",
    "layout": "shape and strides → K rows by C channels by runs of S values",
}
# Roles of the threads in the tile plans.
THREADS = ("blue", "orange", "green", "pink")
MACHINE = {"threads": 4, "l2": 1 << 20, "l3": 32 << 20}
PLANS = (
    ("(32, 64, 112, 112)", "whole channels to threads", (False, 32, 64, 12544)),
    ("(32, 2048, 7, 7)", "many short runs: columns", (True, 32, 2048, 49)),
    ("(8, 3, 224, 224)", "few channels: all threads share", (False, 8, 3, 50176)),
)


def house():
    """Return the map of the package, one row for each layer of the import contract."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = [layer.split(" | ") for layer in contracts["contracts"][0]["layers"]]
    row, width = 46, 760
    sheet = Sheet(width, len(layers) * row + 10, "The modules of bncpu, whose imports go down only")
    left = 40
    for i, modules in enumerate(layers):
        y, gap = 4 + i * row, 8
        each = (width - left - 10 - gap * (len(modules) - 1)) / len(modules)
        for k, name in enumerate(modules):
            x = left + k * (each + gap)
            sheet.box(x, y, each, row - 8)
            middle = x + each / 2
            sheet.text(middle, y + 16, name, 13, "accent", anchor="middle", bold=True, mono=True)
            sheet.text(middle, y + 31, HOUSE[name], 11, "faint", anchor="middle")
    sheet.line([(16, 8), (16, len(layers) * row - 4)], "faint", arrow=True)
    return sheet


def call():
    """Return the life of a call, from the array that somebody has to the result."""
    width, x, wide, step = 760, 8, 400, 74
    steps = [
        ("bncpu.batch_norm_train(x, ...)", "functional.py: the steps below, in this order"),
        ("plain.pxi", "is it plain? C-contiguous, right dtypes: then straight on"),
        ("arguments.py", "the door: every TypeError and ValueError; nothing written yet"),
        ("problem.py, layout.py", "one walk over all arrays; what does not fit is copied"),
        ("backends.kernels_for(x)", "NumPy's to bncpu.cpu, CuPy's to bncpu.cuda"),
        ("kernels.train(...)", "grid, plan; then tile by tile: sum, finish, map"),
        ("walk.finish(), running statistics", "copies back; old and new mixed by momentum"),
        ("TrainResult(y, mean, invstd)", "arrays of x's kind"),
    ]
    sheet = Sheet(width, len(steps) * step - 20, "The life of a call of batch_norm_train")
    for i, (name, words) in enumerate(steps):
        y = 4 + i * step
        edge = "accent" if i in (0, len(steps) - 1) else "line"
        sheet.box(x, y, wide, 48, "box", edge)
        sheet.text(x + 14, y + 20, name, 13, "accent", bold=True, mono=True)
        sheet.text(x + 14, y + 38, words, 11, "faint")
        if i < len(steps) - 1:
            sheet.line([(x + 60, y + 48), (x + 60, y + step - 1)], "faint", arrow=True)
    right = x + wide
    # The short cut of a plain call, and where errors leave.
    top, bottom = 4 + step + 24, 4 + 5 * step + 24
    sheet.line(
        [(right, top), (right + 44, top), (right + 44, bottom), (right + 2, bottom)],
        "green",
        1.6,
        arrow=True,
    )
    sheet.text(right + 54, 4 + 3 * step + 4, "a plain call: no Python in between;", 12, "green")
    sheet.text(right + 54, 4 + 3 * step + 20, "its running statistics and results", 12, "green")
    sheet.text(right + 54, 4 + 3 * step + 36, "are made there too", 12, "green")
    y = 4 + 2 * step + 24
    sheet.line([(right, y), (right + 24, y)], "red", 1.6, arrow=True)
    sheet.text(right + 28, y + 4, "✗", 13, "red", bold=True)
    sheet.text(right + 54, y + 4, "an error: name, expected, got, remedy", 12, "red")
    return sheet


def tiles():
    """Return three plans of the kernels: which thread has which part of x."""
    width, panel, left, high, top = 820, 226, 46, 190, 84
    sheet = Sheet(width, top + high + 96, "Who computes which part of x, for three shapes")
    for t, role in enumerate(THREADS):
        sheet.box(left + t * 96, 8, 12, 12, role, None, round_=2)
        sheet.text(left + 18 + t * 96, 18, f"thread {t}", 12)
    for i, (shape, words, (columns, rows, channels, run)) in enumerate(PLANS):
        plan = kernels.tile_plan(columns, rows, channels, run, **MACHINE)
        x = left + i * (panel + 36)
        sheet.text(x, 52, shape, 13, bold=True, mono=True)
        sheet.text(x, 70, words, 12, "faint")
        draw_plan(sheet, x, top, panel, high, plan, channels)
        sheet.text(x + panel / 2, top + high + 18, "channels →", 11, "faint", anchor="middle")
        y = top + high + 40
        for line in described(plan):
            sheet.text(x, y, line, 11.5)
            y += 17
    sheet.text(left - 8, top + 12, "rows", 11, "faint", anchor="end")
    sheet.text(left - 8, top + 26, "↓", 11, "faint", anchor="end")
    return sheet


def draw_plan(sheet, x, y, width, height, plan, channels):
    """Draw x as a rectangle, rows down and channels to the right, in the threads' colours."""
    tiles, parts, units = plan["tiles"], plan["parts"], plan["units"]
    outer, inner = plan["outer_threads"], plan["inner_threads"]
    for tile in range(tiles):
        first, last = (channels * (tile + i) // tiles for i in (0, 1))
        strand = next(s for s in range(outer) if tile < tiles * (s + 1) // outer)
        for item in range(parts * units):
            # As Item in pieces.hpp: rows outermost, unless a part is a stretch of a long row.
            down = plan["whole_rows"] or plan["segments"] == 1
            part, unit = divmod(item, units) if down else reversed(divmod(item, parts))
            worker = next(w for w in range(inner) if item < parts * units * (w + 1) // inner)
            thread = strand if outer > 1 else worker
            c0, c1 = (first + (last - first) * (unit + i) // units for i in (0, 1))
            sheet.box(
                x + width * c0 / channels,
                y + height * part / parts,
                width * (c1 - c0) / channels,
                height / parts,
                THREADS[thread],
                None,
                round_=0,
                opacity=0.85 if (tile + part + unit) % 2 else 0.6,
            )
    sheet.box(x, y, width, height, "box", "ink", round_=0, opacity=0)


def described(plan):
    """Return what a plan says, in words."""
    tiles = f"{plan['tiles']} tiles of {plan['tile_channels']} channels"
    if plan["tile_channels"] == 1:
        tiles = f"{plan['tiles']} tiles of one channel"
    elif plan["tiles"] == 1:
        tiles = "one tile"
    parts = f"{plan['parts']} partial sums per channel"
    if plan["parts"] == 1:
        parts = "one sum per channel"
    way = "pipelined" if plan["pipelined"] else "one step after the other"
    return tiles, parts, f"{way}, y {'streamed' if plan['stream'] else 'through the caches'}"


def pipeline():
    """Return what one thread does over time with the tiles of a pipeline."""
    width, left, each, high = 760, 150, 118, 34
    sheet = Sheet(width, 3 * high + 92, "A tile's results are written while the next one is summed")
    names = ("reads x (memory)", "finishes", "writes y (x: cache)")
    for i, name in enumerate(names):
        sheet.text(left - 12, 40 + i * (high + 6), name, 12, "faint", anchor="end")
    for tile, role in enumerate(THREADS):
        x = left + tile * each
        sheet.box(x, 18, each - 4, high, role, None, opacity=0.75)
        sheet.text(x + each / 2, 40, f"sum tile {tile}", 12, anchor="middle")
        sheet.box(x + each - 22, 18 + high + 6, 18, high, role, None, opacity=0.75)
        sheet.box(x + each, 18 + 2 * (high + 6), each - 4, high, role, None, opacity=0.75)
        sheet.text(x + each * 1.5, 40 + 2 * (high + 6), f"map tile {tile}", 12, anchor="middle")
    y = 18 + 3 * high + 32
    sheet.line([(left, y), (left + 5 * each, y)], "faint", arrow=True)
    sheet.text(left + 5 * each, y + 18, "time", 12, "faint", anchor="end")
    sheet.text(left, y + 18, "mean and invstd of a tile's channels, then its y", 12, "faint")
    return sheet


def speeds():
    """Return the picture of the speed, as in docs/speed.svg."""
    return speed.draw(speed.read())


DRAWINGS = {"house": house, "call": call, "tiles": tiles, "pipeline": pipeline, "speed": speeds}


class Drawing(SphinxDirective):
    required_arguments = 1
    has_content = True

    def run(self):
        name = self.arguments[0]
        if name not in DRAWINGS:
            raise self.error(f"drawing: expected one of {', '.join(DRAWINGS)}; got {name}")
        figure = nodes.figure(classes=["drawn"])
        figure += nodes.raw("", DRAWINGS[name]().svg(), format="html")
        if self.content:
            caption = nodes.caption()
            words, _ = self.state.inline_text("\n".join(self.content), self.lineno)
            caption += words
            figure += caption
        for path in (Path(__file__), Path(speed.__file__), speed.TABLE, ROOT / "pyproject.toml"):
            self.env.note_dependency(str(path))
        return [figure]


def setup(app):
    app.add_directive("drawing", Drawing)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
