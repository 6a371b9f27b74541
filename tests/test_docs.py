"""The pages of docs/ do what they say: their code runs and prints what is shown below it."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TOOLS = ROOT / "tools"


@pytest.fixture
def pages(monkeypatch):
    """Return the program that runs pages."""
    if not (TOOLS / "pages.py").is_file():
        pytest.skip("only a checkout has docs/ and tools/")
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("pages")


def runs(page):
    """Say whether a page has a block that runs; which they are, the program itself says."""
    return re.search(r"^```(python|sh run)\b", page.read_text(encoding="utf-8"), re.MULTILINE)


PAGES = [str(page.relative_to(DOCS)) for page in sorted(DOCS.rglob("*.md")) if runs(page)]


@pytest.mark.usefixtures("pages")
def test_pages_are_found():
    assert {"tutorial.md", "migration.md"} <= set(PAGES)


def run_apart(page, folder):
    """Run a page in a process of its own: JAX, once imported, warns at every fork."""
    program = "import json, pages, pathlib, sys; a, b = map(pathlib.Path, sys.argv[1:])"
    program += "; print(json.dumps(pages.run_page(a, b)))"
    command = [sys.executable, "-W", "error", "-c", program, page, folder]
    path = os.pathsep.join([str(TOOLS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.usefixtures("default_threads")
def test_page(pages, page, tmp_path):
    text = (DOCS / page).read_text(encoding="utf-8")
    run = run_apart if "needs=" in text else pages.run_page
    lacking = run(DOCS / page, tmp_path)
    for picture in tmp_path.rglob("*.png"):
        assert f"](images/{picture.name})" in text, f"{page} draws {picture.name} and shows it not"
        assert (DOCS / "images" / picture.name).is_file(), "make it: tools/pages.py --images"
    if lacking:
        pytest.skip(f"blocks that need {', '.join(lacking)} did not run; all others did")


def page_of(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    return page


def python(code, output=None, words=""):
    shown = f"\n```output\n{output}\n```\n" if output is not None else ""
    return f"```python{words}\n{code}\n```\n{shown}"


def test_blocks_run_in_order_in_one_namespace_and_folder(pages, tmp_path):
    text = python("from pathlib import Path\na = 1")
    text += python("Path('left').write_text('7')\nprint(a + 1)", "2")
    text += "Then:\n\n" + python("print(a, Path('left').read_text())", "1 7")
    assert pages.run_page(page_of(tmp_path, text), tmp_path) == []
    assert (tmp_path / "left").is_file()


def test_what_is_only_shown_does_not_run(pages, tmp_path):
    text = "```py\nraise ValueError\n```\n\n```sh\nfalse\n```\n\n```\nraise ValueError\n```\n"
    text += "````md\n```python\nraise ValueError\n```\n````\n"
    assert pages.run_page(page_of(tmp_path, text), tmp_path) == []


def test_commands_run(pages, tmp_path):
    text = "```sh run\n# prints\npython -c 'print(3)' \\\n  more\nbncpu --version\n```\n\n"
    text += "```output\n3\nbncpu ...\n```\n"
    assert pages.run_page(page_of(tmp_path, text), tmp_path) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (python("print(2)", "3"), "page.md:2: prints something else.*\n *printed: 2\n *shown: *3"),
        (python("print(2)"), "page.md:2: prints what the page does not show:\n2"),
        (python("a = 2", "2"), "page.md:2: prints something else"),
        ("```python\na = 2\n", "page.md:1: this fence is not closed"),
        ("```output\n2\n```\n", "page.md:1: an output that follows no block"),
        (python("a = 2") + "\nText.\n\n```output\n```\n", ":7: an output that follows no block"),
        (python("a = 2", words=" no-run"), "page.md:1: expected needs=.*got 'no-run'"),
        ("```sh run\npython -c 'assert 0'\n```\n", "page.md:2: .*ends with\n(.*\n)*AssertionError"),
        ("```sh run\nrm -rf .\n```\n", "page.md:2: expected bncpu or python; got rm"),
    ],
    ids=range(9),
)
def test_a_page_that_is_wrong(pages, tmp_path, text, message):
    with pytest.raises(pages.PageError, match=message):
        pages.run_page(page_of(tmp_path, text), tmp_path)


def test_errors_and_warnings_of_a_block_come_through(pages, tmp_path):
    with pytest.raises(ZeroDivisionError) as error:
        pages.run_page(page_of(tmp_path, "Text.\n\n" + python("a = 1\na / 0")), tmp_path)
    assert (error.traceback[-1].path.name, error.traceback[-1].lineno + 1) == ("page.md", 5)
    page = page_of(tmp_path, python("import numpy as np\nnp.log(np.zeros(1))"))
    with pytest.raises(RuntimeWarning):
        pages.run_page(page, tmp_path)


def test_blocks_that_need_what_is_not_there(pages, tmp_path):
    text = python("raise ValueError", words=" needs=no_such_module,math")
    text += python("print(1)", "1", words=" needs=math,re")
    assert pages.run_page(page_of(tmp_path, text), tmp_path) == ["no_such_module"]


@pytest.mark.parametrize(
    ("printed", "shown", "same"),
    [
        ("a  b\n", " a b", True),
        ("a\nb", "a b", False),
        ("[ 1.  2.]", "[1. 2.]", True),
        ("[1. 2.]", "[1. 3.]", False),
        ("[[1 2]\n [3 4]]", "[[1 2]\n  [3 4]]", True),
        ("0.971", "0.972", True),
        ("0.971", "0.973", False),
        ("-0.00", "0.01", False),
        ("-0.00", "0.00", True),
        ("-0.001", "0.000", False),
        ("0.12", "0.11", True),
        ("0.1", "0.2", False),
        ("1.2e-07", "1.3e-07", True),
        ("1.2e-07", "1.2e-08", False),
        ("12", "13", False),
        ("nan", "1.5", False),
        ("1.5 s", "1.5 ms", False),
        ("took 1.5 s, sum 2.25", "took ... s, sum 2.25", True),
        ("took 1.5 s, sum 2.35", "took ... s, sum 2.25", False),
        ("first\nmore\nmore\nlast", "first\n...\nlast", True),
        ("first\nmore\nlast", "first\n...\nleast", False),
        ("a.b", "acb", False),
    ],
    ids=range(22),
)
def test_what_counts_as_the_same(pages, printed, shown, same):
    assert pages.same(printed, shown) is same


def test_the_program_keeps_pictures(pages, tmp_path, monkeypatch, capsys):
    code = "import matplotlib.pyplot as plt\nplt.figure().savefig('empty.png', dpi=10)"
    page = page_of(tmp_path, python(code) + python("a", words=" needs=no_such_module"))
    argv = ["pages.py", str(page), "--images", str(tmp_path / "images")]
    monkeypatch.setattr(sys, "argv", argv)
    pages.main()
    assert (tmp_path / "images" / "empty.png").is_file()
    out = capsys.readouterr().out
    assert out.startswith("page.md: as it says, but for no_such_module\n")
