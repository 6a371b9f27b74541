"""The documentation is whole: every public name, every link of the README, one set of figures.

That its pages are built without a warning is `make docs`' to say, that their code runs is
test_docs.py's.
"""

import ast
import csv
import importlib
import re
from pathlib import Path

import pytest

import bncpu
from bncpu.bench.report import document
from bncpu.bench.rows import Row

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MODULES = {
    "bncpu": "functions",
    "bncpu.nn": "nn",
    "bncpu.data": "data",
    "bncpu.torch": "torch",
    "bncpu.distributed": "distributed",
    "bncpu.experiments": "experiments",
}

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="only a checkout has docs/")


@pytest.fixture
def speed(monkeypatch):
    """Return the program that draws the picture of the speed."""
    monkeypatch.syspath_prepend(str(DOCS / "extensions"))
    return importlib.import_module("speed")


def public_names(module):
    """Return the module's __all__, without importing what it needs."""
    base = Path(bncpu.__file__).parent.joinpath(*module.split(".")[1:])
    source = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    raise AssertionError(f"{source} has no __all__")


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_in_the_reference(module):
    page = (DOCS / "api" / f"{MODULES[module]}.rst").read_text(encoding="utf-8")
    assert f".. module:: {module}\n" in page
    described = re.findall(r"^\.\. (?:auto\w+|py:data):: (\w+)$", page, flags=re.MULTILINE)
    assert len(described) == len(set(described))
    elsewhere = set(re.findall(rf"``{re.escape(module)}\.(\w+)`` is", page))
    assert set(described) | elsewhere == set(public_names(module))
    if module != "bncpu":
        assert elsewhere <= set(bncpu.__all__)
    summary = page.split("autosummary::", 1)[1].split("\n\n")[1].split()
    functions = [name for name in described if f":: {name}\n\n   " not in page]
    assert sorted(summary) == sorted(functions)


def test_every_function_is_in_the_table_of_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    shown = set(re.findall(r"`(\w+)", " ".join(row.split(" | ")[0] for row in rows)))
    results = {"Gradients", "LinearMap", "Moments", "TrainResult"}
    assert set(bncpu.__all__) - results <= shown


def test_the_readme_is_short():
    """Two screens before the functions; one picture; what it links to is there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    above = text.split("| function |", 1)[0]
    assert above.count("\n") <= 90
    assert text.count("![") == 1
    linked = re.findall(r"\]\(([^)#]+)", text)
    missing = [to for to in linked if "://" not in to and not (ROOT / to).exists()]
    assert not missing


def test_the_picture_is_of_the_table(speed):
    assert speed.draw(speed.read()).svg(background=True) == speed.PICTURE.read_text()


def test_the_page_and_the_table_have_the_same_figures(speed):
    text = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| ([\d, ]*?) ?\| (training|backward) \| ([\d.]+) ms \| (\d+) % "
        r"\| ([\d.]+)x \| ([\d.]+)x \| ([\d.]+)x \|$",
        text,
        flags=re.MULTILINE,
    )
    found, shape = [], ""
    for where, what, time, part, numpy, torch, jax in rows:
        shape = where.replace(",", "") or shape
        operation = {"training": "train", "backward": "backward"}[what]
        numbers = [float(n) for n in (time, int(part) / 100, jax, torch, numpy)]
        found.append((shape, operation, *numbers))
    own = [
        (row["shape"], row["operation"], *(row[name] for name in speed.NUMBERS))
        for row in speed.read()
    ]
    assert found == own


def test_the_picture_takes_what_the_benchmark_writes(speed, monkeypatch, tmp_path):
    times = {"bncpu": 2e-3, "bncpu, allocating": 3e-3, "torch": 9e-3, "jax": 6e-3, "numpy": 30e-3}
    rows = [
        Row(
            shape=(32, 64, 7, 7),
            operation=operation,
            dtype="float32",
            layout="nchw",
            threads=1,
            level="generic",
            bytes=8,
            stream="copy",
            stream_bytes=8,
            stream_turns=[1e-3] * 3,
            from_memory=True,
            turns={name: [time] * 3 for name, time in times.items()},
        )
        for operation in ("train", "infer", "backward")
    ]
    bench = tmp_path / "bench.json"
    bench.write_bytes(document({}, rows))
    monkeypatch.setattr(speed, "TABLE", tmp_path / "speed.csv")
    monkeypatch.setattr(speed, "PICTURE", tmp_path / "speed.svg")
    monkeypatch.setattr("sys.argv", ["speed.py", str(bench)])
    speed.main()
    with (tmp_path / "speed.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [row["operation"] for row in written] == ["train", "backward"]
    assert {row["shape"] for row in written} == {"64 7 7"}
    first = {name: float(written[0][name]) for name in speed.NUMBERS}
    assert first == {"milliseconds": 2, "of_stream": 0.5, "jax": 2, "torch": 3, "numpy": 10}
    assert "64 channels" in (tmp_path / "speed.svg").read_text()
