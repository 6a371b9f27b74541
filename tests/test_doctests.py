"""The examples of the documentation run as written."""

import doctest
import importlib.util
import inspect
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest

import bncpu

# Compiled modules have no source to read examples from; those that import CuPy show none; running
# __main__ starts the program.
MODULES = [
    module.name
    for module in pkgutil.walk_packages(bncpu.__path__, "bncpu.", onerror=lambda _: None)
    if not module.name.startswith("bncpu.cpu.kernels")
    and module.name
    not in ("bncpu.cpu.detect", "bncpu.cuda.kernels", "bncpu.bench.gpu", "bncpu.__main__")
]


def public_callables():
    return sorted(name for name in bncpu.__all__ if callable(getattr(bncpu, name)))


# What examples need that their module does not import at once.
NEEDS = {"bncpu.distributed": "mpi4py.MPI"}

# What functions return shows itself in the examples of those functions.
RESULTS = {"Gradients", "LinearMap", "TrainResult"}


@pytest.mark.parametrize("name", ["bncpu", *MODULES])
@pytest.mark.usefixtures("default_threads")
def test_examples(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if (error.name or "").startswith("bncpu"):
            raise
        pytest.skip(f"{name} needs {error.name}")
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], exc_type=(ImportError, RuntimeError))
    # pytest's warning filter and the examples' own printing should not meet.
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE, report=True)
    assert result.failed == 0


@pytest.mark.parametrize("name", sorted(set(public_callables()) - RESULTS))
def test_every_public_function_has_an_example(name):
    tests = doctest.DocTestFinder(recurse=True).find(getattr(bncpu, name), name)
    assert any(test.examples for test in tests), f"bncpu.{name} shows no example"


def test_examples_of_the_readme():
    """In their order, one after the other, as somebody would type them."""
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```python(.*)\n((?:.*\n)*?)^```", text, flags=re.MULTILINE)
    assert examples
    names = {}
    for words, example in examples:
        needs = words.removeprefix(" needs=")
        if not needs or importlib.util.find_spec(needs):
            exec(example, names)
    assert abs(names["y"].mean()) < 1e-6
    assert abs(names["y"].std() - 1) < 1e-4
    assert np.abs(names["dx"]).max() < 1e-5  # dy is constant
    assert (names["running_mean"] > 0).all()
    assert names["z"].shape == names["x"].shape


def documented(text, section):
    """Return the names on the lines of a numpydoc section that stand at its margin."""
    names = set()
    inside = False
    lines = text.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if set(following) == {"-"}:
            inside = line == section
        elif inside and line and not line.startswith((" ", "-")):
            names |= {word.strip(" *") for word in line.partition(" : ")[0].split(",")}
    return names


@pytest.mark.parametrize("name", public_callables())
def test_every_argument_is_documented(name):
    thing = getattr(bncpu, name)
    text = inspect.getdoc(thing) or ""
    if inspect.isclass(thing) and issubclass(thing, tuple):
        assert set(thing._fields) <= documented(text, "Attributes")
    else:
        assert set(inspect.signature(thing).parameters) <= documented(text, "Parameters")
