"""The picture of the speed, from the measurements in docs/speed.csv.

    bncpu bench --quick --json bench.json          # measures: on a machine that does nothing else
    python docs/extensions/speed.py bench.json     # into docs/speed.csv, and the picture of that
    python docs/extensions/speed.py                # the picture alone, docs/speed.svg

The start page draws the same at build time.
"""

import argparse
import csv
import json
from pathlib import Path

from svg import Sheet

DOCS = Path(__file__).parents[1]
TABLE, PICTURE = DOCS / "speed.csv", DOCS / "speed.svg"
OPERATIONS = {"train": "training forward", "backward": "backward"}
# Columns of the table after C, H, W and operation; who is drawn, how, and in which colour.
NUMBERS = ("milliseconds", "of_stream", "jax", "torch", "numpy")
BARS = (
    ("a streaming copy or triad", "grey"),
    ("bncpu", "blue"),
    ("JAX", "green"),
    ("PyTorch", "orange"),
    ("NumPy", "pink"),
)
WIDTH, PANEL, LEFT, BAR, GAP = 760, 278, 112, 13, 16


def read(path=TABLE):
    """Return the rows of the table, numbers as floats."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row | {name: float(row[name]) for name in NUMBERS} for row in rows]


def from_bench(document):
    """Return the table's rows from what `bncpu bench --json` wrote."""
    rows = []
    for row in document["rows"]:
        if row["operation"] in OPERATIONS:
            shape = " ".join(map(str, row["shape"][1:]))
            own = {"milliseconds": 1e3 * row["seconds"]["bncpu"], "of_stream": row["fraction"]}
            ratios = {name: row["ratios"][name] for name in ("jax", "torch", "numpy")}
            rows.append({"shape": shape, "operation": row["operation"]} | own | ratios)
    return rows


def draw(rows):
    """Return a sheet with a panel for each operation, a group of bars for each shape."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    group = len(BARS) * BAR + GAP
    sheet = Sheet(
        WIDTH,
        88 + len(shapes) * group,
        "How many times as long others take, for four shapes of ResNet-50",
    )
    x = LEFT
    for name, role in BARS:
        sheet.box(x, 10, 11, 11, role, None, round_=2)
        sheet.text(x + 17, 20, name, 12)
        x += 40 + 6.4 * len(name)
    most = max(row["numpy"] for row in rows) * 1.15
    for panel, (operation, words) in enumerate(OPERATIONS.items()):
        left = LEFT + panel * (PANEL + 40)
        scale = PANEL / most
        sheet.text(left, 50, f"{words}: time, bncpu = 1", 13, bold=True)
        for i, shape in enumerate(shapes):
            (row,) = (r for r in rows if (r["shape"], r["operation"]) == (shape, operation))
            top = 64 + i * group
            if panel == 0:
                c, h, w = shape.split()
                sheet.text(LEFT - 12, top + 30, f"{c} channels", 12, anchor="end")
                sheet.text(LEFT - 12, top + 46, f"{h} x {w}", 12, "faint", anchor="end")
            times = (row["of_stream"], 1.0, row["jax"], row["torch"], row["numpy"])
            for k, (time, (_, role)) in enumerate(zip(times, BARS, strict=True)):
                y = top + k * BAR
                sheet.box(left, y, time * scale, BAR - 2, role, None, round_=1)
                label = f"{time:.2g}" if time < 1 else f"{time:.1f}"
                if k == 1:
                    label = f"1  ({row['milliseconds']:.2g} ms)"
                sheet.text(left + time * scale + 5, y + BAR - 3, label, 10.5, "faint")
        sheet.line([(left, 60), (left, 60 + len(shapes) * group)])
    sheet.text(
        LEFT,
        sheet.height - 8,
        "float32, NCHW, N = 32, 2 cores of an AMD EPYC (Zen 4); shorter is better",
        11,
        "faint",
    )
    return sheet


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bench", nargs="?", type=Path, help="what bncpu bench --json wrote")
    given = parser.parse_args().bench
    if given:
        with TABLE.open("w", newline="") as file:
            writer = csv.DictWriter(file, ("shape", "operation", *NUMBERS), lineterminator="\n")
            writer.writeheader()
            for row in from_bench(json.loads(given.read_text())):
                numbers = {name: f"{row[name]:.3g}" for name in NUMBERS}
                writer.writerow(row | numbers)
    PICTURE.write_text(draw(read()).svg(background=True))


if __name__ == "__main__":
    main()
