"""Run the code of documentation pages and compare what it prints with what the pages show.

All code blocks of a page run in their order, in one namespace and one empty folder, so a page reads
as one program. What is in a fence's first line:

    ```python                  runs
    ```python needs=torch,jax  runs where these can be imported
    ```py, ```sh               is shown only
    ```sh run                  runs line by line: `bncpu ...` and `python ...`
    ```output                  what the block before it prints

Words must be the same, white space may differ, `...` stands for anything. A number with a fraction
of at least two digits may differ by one in its last digit, because processors may round otherwise.
A python block that prints something is followed by its output. Warnings are errors.

tests/test_docs.py runs all pages by this. Not a renderer: that is Sphinx.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 60  # for a command; those of the pages take about one
COLORS = 128  # of a PNG: no eye misses the others
FENCE = re.compile(r"^(`{3,})(.*)$")
NUMBER = r"[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?"
PROGRAMS = {"bncpu": [sys.executable, "-m", "bncpu"], "python": [sys.executable]}


class PageError(Exception):
    """A page is not what it says: the place, and what is wrong there."""


@dataclass
class Block:
    """One block that runs: its lines from line `line` of the page on, and what it shall print."""

    language: str
    line: int
    code: str = ""
    needs: list[str] = field(default_factory=list)
    output: str | None = None

    def lacks(self) -> list[str]:
        """Return the modules that it needs and that cannot be imported here."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


def blocks(text: str, name: str = "page") -> list[Block]:
    """Return the blocks of a page that run, each with its output.

    Raises
    ------
    PageError
        If a fence is not closed, its first line is not understood, or an output follows nothing.
    """
    found: list[Block] = []
    may_print: Block | None = None  # the block whose output may come next
    lines = enumerate(text.splitlines(), 1)
    for number, line in lines:
        fence = FENCE.match(line)
        if not fence:
            if line.strip():
                may_print = None
            continue
        inside = []
        for _, line in lines:
            if line.rstrip() == fence[1]:
                break
            inside.append(line)
        else:
            raise PageError(f"{name}:{number}: this fence is not closed")
        body = "".join(f"{line}\n" for line in inside)
        language, *words = fence[2].split() or [""]
        if language == "output":
            if may_print is None:
                raise PageError(f"{name}:{number}: an output that follows no block that runs")
            may_print.output, may_print = body, None
            continue
        may_print = _block(language, words, number, body, name)
        if may_print:
            found.append(may_print)
    return found


def _block(language: str, words: list[str], number: int, body: str, name: str) -> Block | None:
    """Return a block that runs, or None for one that is only shown."""
    if language not in ("python", "sh"):
        return None
    block = Block(language, number + 1, body)
    runs = language == "python"
    for word in words:
        if word == "run" and language == "sh":
            runs = True
        elif word.startswith("needs="):
            block.needs = word.removeprefix("needs=").split(",")
        else:
            raise PageError(
                f"{name}:{number}: expected needs=MODULE,... (or run, after sh); got {word!r}"
            )
    return block if runs else None


def run_page(page: Path, folder: Path) -> list[str]:
    """Run the blocks of a page in a folder; return the modules for want of which some did not.

    Raises
    ------
    PageError
        If a command fails, or something is printed that the page does not show.
    Exception
        What a block raises, with the lines of the page in its traceback.
    """
    names: dict[str, Any] = {"__name__": "page"}
    lacking: list[str] = []
    with contextlib.chdir(folder), warnings.catch_warnings(), _no_window():
        warnings.simplefilter("error")
        for block in blocks(page.read_text(encoding="utf-8"), str(page)):
            if block.lacks():
                lacking += block.lacks()
                continue
            printed = io.StringIO()
            if block.language == "python":
                # Moved down to its place, so that a traceback shows the page.
                code = "\n" * (block.line - 1) + block.code
                with contextlib.redirect_stdout(printed):
                    exec(compile(code, str(page), "exec"), names)
            else:
                printed.write(_run_commands(block, page))
            _compare(printed.getvalue(), block, page)
    return sorted(set(lacking))


def _run_commands(block: Block, page: Path) -> str:
    """Run the commands of a block, one after the other; return what they print."""
    printed = ""
    # The package of this tree, wherever the folder is.
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] not in PROGRAMS:
            raise PageError(f"{page}:{block.line}: expected bncpu or python; got {words[0]}")
        done = subprocess.run(
            [*PROGRAMS[words[0]], *words[1:]],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        if done.returncode:
            raise PageError(f"{page}:{block.line}: {line}: ends with\n{done.stderr}")
        printed += done.stdout
    return printed


@contextlib.contextmanager
def _no_window() -> Any:
    """Let matplotlib, where it is installed, draw into files alone; close what a page leaves."""
    try:
        import matplotlib as mpl
        import matplotlib.pyplot as plt
    except ImportError:
        yield
        return
    mpl.use("Agg")
    try:
        yield
    finally:
        plt.close("all")


def _compare(printed: str, block: Block, page: Path) -> None:
    shown = block.output
    if shown is None:
        if printed and block.language == "python":
            raise PageError(f"{page}:{block.line}: prints what the page does not show:\n{printed}")
        return
    if not same(printed, shown):
        lines = zip_longest(printed.splitlines(), shown.splitlines(), fillvalue="")
        differing = "\n".join(
            f"  printed: {ours}\n  shown:   {theirs}"
            for ours, theirs in lines
            if not same(ours, theirs)
        )
        raise PageError(f"{page}:{block.line}: prints something else than the page:\n{differing}")


def same(printed: str, shown: str) -> bool:
    """Return whether what is printed is what a page shows, but for white space and rounding."""
    pattern, numbers = "", []
    for part in re.split(rf"(\.\.\.|{NUMBER})", _squeezed(shown)):
        if part == "...":
            pattern += ".*?"
        elif re.fullmatch(NUMBER, part):
            pattern += f"({NUMBER})"
            numbers.append(part)
        else:
            pattern += re.escape(part)
    match = re.fullmatch(pattern, _squeezed(printed), flags=re.DOTALL)
    return match is not None and all(map(_near, match.groups(), numbers))


def _squeezed(text: str) -> str:
    lines = (" ".join(line.split()) for line in text.strip().splitlines())
    return re.sub(r" ?([\[\]]) ?", r"\1", "\n".join(lines))


def _near(printed: str, shown: str) -> bool:
    if float(printed) == float(shown):  # -0.00 is 0.00
        return True
    digits, _, exponent = shown.lower().partition("e")
    fraction = digits.partition(".")[2]
    if not fraction or len(re.sub(r"\D", "", digits).lstrip("0") or "0") < 2:
        return False
    unit = 10.0 ** (int(exponent or 0) - len(fraction))
    return abs(float(printed) - float(shown)) < 1.01 * unit


def _keep(picture: Path, folder: Path) -> None:
    """Copy a PNG file with so few colours that it is a fraction of the size."""
    from PIL import Image

    with Image.open(picture) as image:
        image.convert("RGB").quantize(COLORS).save(folder / picture.name, optimize=True)


def main() -> None:
    """Run pages as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="+", type=Path, metavar="PAGE", help="docs/tutorial.md, ...")
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="keep the PNG files that the pages write here"
    )
    args = parser.parse_args()
    images = args.images.resolve() if args.images else None
    for page in args.pages:
        page = page.resolve()
        with tempfile.TemporaryDirectory() as folder:
            lacking = run_page(page, Path(folder))
            pictures = sorted(Path(folder).rglob("*.png"))
            if images:
                images.mkdir(parents=True, exist_ok=True)
                for picture in pictures:
                    _keep(picture, images)
        print(f"{page.name}: as it says" + (f", but for {', '.join(lacking)}" if lacking else ""))
        for picture in pictures if images else ():
            print(f"  {images / picture.name}")


if __name__ == "__main__":
    main()
