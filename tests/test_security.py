"""What the package's own source may not do, whoever wrote the file that it reads: run it.

Read from the syntax tree of every module, so that a comment is no use and an alias no way round.
"""

import ast
from pathlib import Path

import pytest

import bncpu

PACKAGE = Path(bncpu.__file__).parent
# They run what they read, or build objects of any class from it.
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
MODULES |= {"yaml", "ruamel", "code", "codeop", "runpy"}
CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
# Readers of NumPy's that unpickle what is an array of objects, unless they are told not to.
LOADERS = {"load", "read_array"}
# The forward of a PyTorch module, which torch.fx has written from that module's own code.
ALLOWED = {("torch/fusion.py", "exec")}


def findings(tree):
    """Return the line and the name of everything in a syntax tree that is not allowed."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        found += [(node.lineno, n) for n in names if n.partition(".")[0] in MODULES]
        if isinstance(node, ast.Call):
            found += called(node)
    return found


def called(node):
    function = node.func
    if isinstance(function, ast.Name):
        return [(node.lineno, function.id)] if function.id in CALLS else []
    if not isinstance(function, ast.Attribute):
        return []
    owner = ast.unparse(function.value)
    name = f"{owner}.{function.attr}"
    if function.attr == "import_module":
        given = [a.value for a in node.args if isinstance(a, ast.Constant)]
        return [(node.lineno, n) for n in given if str(n).partition(".")[0] in MODULES]
    if owner == "builtins" and function.attr in CALLS:
        return [(node.lineno, name)]
    of_numpy = owner.partition(".")[0] in ("np", "numpy", "format")
    if of_numpy and function.attr in LOADERS:
        told = {k.arg: ast.unparse(k.value) for k in node.keywords}
        return [] if told.get("allow_pickle") == "False" else [(node.lineno, name)]
    if function.attr in ("loads", "load") and owner.partition(".")[0] == "torch":
        return [(node.lineno, name)]
    return []


def test_nothing_that_runs_what_it_reads():
    found = {
        (path.relative_to(PACKAGE).as_posix(), name, line)
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, name in findings(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert {(path, name) for path, name, _ in found} == ALLOWED, sorted(found)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads as json_loads",
        "import numpy, marshal as m",
        "from yaml import safe_load",
        "importlib.import_module('shelve')",
        "eval('1')",
        "exec(code)",
        "builtins.exec(code)",
        "__import__(name)",
        "np.load(path)",
        "numpy.load(path, allow_pickle=True)",
        "np.lib.format.read_array(file)",
        "np.load(path, allow_pickle=allowed)",
        "torch.load(path)",
    ],
)
def test_it_is_found(source):
    assert len(findings(ast.parse(source))) == 1


@pytest.mark.parametrize(
    "source", ["model.eval()", "re.compile('a')", "np.load(p, allow_pickle=False)", "json.loads(t)"]
)
def test_what_is_harmless_is_not(source):
    assert findings(ast.parse(source)) == []
