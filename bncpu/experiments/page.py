"""The page of an experiment: what `report` says, as Markdown, PNG figures, JSON and plain text.

Nothing is written before the report is complete; then each file whole or not at all, and the page
itself last, so that it never shows a figure that is not there.
"""

import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bncpu.experiments.figures import png
from bncpu.experiments.results import write_bytes

PAGE_NAME = "README.md"  # what a hosted repository shows of a folder
CLAIM_WIDTH = 44  # characters of a column of the table on a terminal
HEAD = ("claim", "paper", "ours", "held")


class Claim(NamedTuple):
    """What is claimed, the paper's figure, ours, and whether it held."""

    text: str
    paper: str
    ours: str
    held: bool

    @property
    def row(self) -> tuple[str, str, str, str]:
        """The line of a table."""
        return self.text, self.paper, self.ours, "yes" if self.held else "**no**"


class Page:
    """Collects what a report says, in its order; the claims stand above it all.

    Attributes
    ----------
    claims : list of Claim
    tables : list of dict
        With "caption", "head" and "rows".
    figures : dict of str to bytes
        PNG files by their names.
    """

    def __init__(self) -> None:
        self.claims: list[Claim] = []
        self.tables: list[dict[str, Any]] = []
        self.figures: dict[str, bytes] = {}
        self._blocks: list[str] = []

    def text(self, markdown: str) -> None:
        """Add a paragraph."""
        self._blocks.append(markdown.strip())

    def table(self, head: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "") -> None:
        """Add a table.

        Raises
        ------
        ValueError
            If a row has not as many cells as the head.
        """
        cells = [[shown(cell) for cell in row] for row in rows]
        for row in cells:
            if len(row) != len(head):
                raise ValueError(f"rows: expected {len(head)} cells, as in the head; got {row}")
        self.tables.append({"caption": caption, "head": list(head), "rows": cells})
        self._blocks.append(markdown_table(head, cells))
        if caption:
            self._blocks.append(f"*{caption}*")

    def figure(self, name: str, figure: Any, caption: str) -> None:
        """Add a matplotlib Figure, written as NAME.png.

        Raises
        ------
        ValueError
            If the name is not of letters, digits and hyphens, or there is one of that name.
        """
        if not re.fullmatch(r"[\w-]+", name, flags=re.ASCII):
            raise ValueError(f"name: expected letters, digits and hyphens; got {name!r}")
        if f"{name}.png" in self.figures:
            raise ValueError(f"name: expected one that no other figure has; got {name!r} again")
        self.figures[f"{name}.png"] = png(figure)
        self._blocks += [f"![{caption.replace(']', ')')}]({name}.png)", f"*{caption}*"]

    def claim(self, text: str, *, paper: str, ours: str, held: bool) -> None:
        """Add a claim: what is claimed, the paper's figure, ours, and whether it held."""
        self.claims.append(Claim(text, paper, ours, bool(held)))

    def markdown(self, title: str, about: str, how: str) -> str:
        """Return the whole page; `how` says how it came about."""
        claims = markdown_table(HEAD, [claim.row for claim in self.claims])
        blocks = [f"# {title}", about.strip(), "## Claims", claims, "## Results", *self._blocks]
        return "\n\n".join([*blocks, "## How it was made", how.strip()]) + "\n"

    def write(self, out: Path, title: str, about: str, how: str) -> Path:
        """Write figures and page into a folder and return the page's path."""
        for name, content in self.figures.items():
            write_bytes(out / name, content)
        return write_bytes(out / PAGE_NAME, self.markdown(title, about, how).encode())


def shown(cell: Any) -> str:
    """Return a cell's text: numbers with four digits, everything else as it is."""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in GitHub's Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(c.split()).replace("|", "\\|") for c in line) + " |"
        for line in lines
    )


def plain_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table for a terminal: columns as wide as they must be, long cells in several lines.

    Markdown's stars and backquotes are left out.
    """
    wrapped = [
        [textwrap.wrap(re.sub(r"[*`]", "", cell), CLAIM_WIDTH) or [""] for cell in row]
        for row in [head, *rows]
    ]
    widths = [max(len(line) for row in wrapped for line in row[i]) for i in range(len(head))]
    lines = []
    for row in wrapped:
        for k in range(max(map(len, row))):
            cells = [cell[k] if k < len(cell) else "" for cell in row]
            line = "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
            lines.append(line.rstrip())
    return "\n".join(lines)
