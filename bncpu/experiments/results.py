"""What a run leaves in its folder: JSON files and PNG figures, each written whole or not at all."""

import importlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bncpu.atomic import atomic_write, check_writable
from bncpu.experiments.figures import png

JSON_NAME, FIGURE_NAME = "results.json", "figure.png"


def prepare_folder(out: Path, names: Iterable[str] = (JSON_NAME, FIGURE_NAME)) -> None:
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
    for name in names:
        check_writable(out / name)


def write_json(out: Path, results: Mapping[str, Any], name: str = JSON_NAME) -> Path:
    """Write the results into the folder and return the file's path."""
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    return write_bytes(out / name, text.encode())


def write_figure(out: Path, figure: Any, name: str = FIGURE_NAME) -> Path:
    """Write the figure into the folder and return the file's path."""
    return write_bytes(out / name, png(figure))


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file, whole or not at all, and return its path."""
    with atomic_write(path) as file:
        file.write(content)
    return path
