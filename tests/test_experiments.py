"""What runs experiments, on planted ones; and each of the paper's, in its smallest size."""

import io
import json
import multiprocessing
import os
import re
import signal

import numpy as np
import planted_experiments
import pytest
from PIL import Image
from planted_experiments import FAULT, LOG, Planted, Timed

import bncpu
from bncpu import data
from bncpu.experiments import EXPERIMENTS, RunError, figures, mnist, numbers, reproduce, runner
from bncpu.experiments.experiment import Experiment, Result, Results, Run
from bncpu.experiments.page import Page, markdown_table, plain_table

FIRST = ['n=2 pair=[2, "x"]', 'n=5 pair=[5, "x"]', 'n=3 pair=[3, "x"]']
SECOND = ["best=25.0 seed=0", "best=25.0 seed=1"]


@pytest.fixture
def planted(monkeypatch, tmp_path):
    """Return a function that makes the planted experiment, and returns what it measured anew."""
    log = tmp_path / "log"
    monkeypatch.setenv(LOG, str(log))
    monkeypatch.delenv("BNCPU_DATA", raising=False)
    for kind in (Planted, Timed):
        monkeypatch.setitem(EXPERIMENTS, kind.NAME, kind)
        monkeypatch.setattr(kind, "DRAWS", False)  # which takes longer than all the rest

    def make(out="out", *names, fault=None, **options):
        monkeypatch.setenv(FAULT, json.dumps(fault or {}))
        log.write_text("")
        options = {"size": "tiny", "jobs": 1, "progress": False} | options
        try:
            reproduce(names or ["planted"], tmp_path / out, **options)
        finally:
            make.measured = log.read_text().splitlines()
        return make.measured

    return make


def results_in(folder):
    return json.loads((folder / "results.json").read_text())


def kept_in(folder):
    return [json.loads(path.read_text()) for path in (folder / "runs").iterdir()]


def test_runs_of_two_phases(planted, tmp_path):
    assert planted() == FIRST + SECOND
    runs = results_in(tmp_path / "out")["runs"]
    assert [Run(run["settings"]).name for run in runs] == FIRST + SECOND
    assert runs[1]["measured"].items() >= {"square": 25.0, "rows": [0, 1, 2], "test": 359}.items()
    assert all(run["seconds"] >= 0 for run in runs)
    assert {run["measured"]["pid"] for run in runs} == {os.getpid()}


def test_workers_measure_the_same_each_on_one_thread(planted, tmp_path):
    planted("one")
    assert sorted(planted("two", jobs=2)) == sorted(FIRST + SECOND)
    assert planted("two", jobs=2) == []
    one, two = (results_in(tmp_path / out)["runs"] for out in ("one", "two"))
    pids = {run["measured"].pop("pid") for run in two}
    assert len(pids) == 2
    assert os.getpid() not in pids
    for run in (*one, *two):
        run["measured"].pop("pid", None)
        del run["seconds"]
        assert run["measured"]["threads"] == run["measured"]["blas"] == 1
    assert one == two


def test_an_experiment_that_is_to_be_alone(planted, tmp_path):
    before = bncpu.get_num_threads()
    planted("out", "timed", jobs=2)
    measured = [run["measured"] for run in results_in(tmp_path / "out")["runs"]]
    assert {each["pid"] for each in measured} == {os.getpid()}
    assert {each["threads"] for each in measured} == {before}


@pytest.fixture
def interruptible():
    """Let SIGINT interrupt, as at a terminal: what a shell puts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_keeps_what_is_finished(planted, tmp_path, capsys, jobs):
    with pytest.raises(KeyboardInterrupt):
        planted(fault={"n": 3, "do": "interrupt"}, jobs=jobs)
    assert multiprocessing.active_children() == []
    kept = kept_in(tmp_path / "out")
    names = [Run(each["settings"]).name for each in kept]
    # Of two workers the one that goes on to the third run has finished one; the other may have.
    assert set(names) <= set(FIRST[:2])
    assert len(names) >= (1 if jobs == 2 else 2)
    assert capsys.readouterr().err == (
        f"planted: {len(kept)} of 3 runs are kept in {tmp_path / 'out' / 'runs'}; "
        "the same command goes on from there\n"
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["runs"]
    assert planted() == [name for name in FIRST + SECOND if name not in names]
    assert planted() == []


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_raises(planted, tmp_path, jobs):
    message = (
        r'planted: the run n=3 pair=\[3, "x"\] failed: ZeroDivisionError: division by zero '
        r"\(planted_experiments.py, line \d+\)"
    )
    with pytest.raises(RunError, match=f"^{message}$"):
        planted(fault={"n": 3, "do": "raise"}, jobs=jobs)
    kept = [each["settings"]["n"] for each in kept_in(tmp_path / "out")]
    assert set(kept) <= {2, 5}
    assert len(planted()) == 5 - len(kept)


@pytest.mark.parametrize(
    ("do", "message"),
    [
        ("kill", "ended by SIGKILL, perhaps for want of memory; fewer --jobs need less"),
        ("exit", "ended with status 3"),
    ],
)
def test_a_worker_that_dies(planted, tmp_path, do, message):
    with pytest.raises(RunError, match=rf"the run n=3 .* failed: its process (was )?{message}$"):
        planted(fault={"n": 3, "do": do}, jobs=2)
    assert multiprocessing.active_children() == []
    assert kept_in(tmp_path / "out")


def test_a_worker_without_data():
    """The file was there when the parent looked."""
    source = runner.Source("mnist", "nowhere")
    crew = runner.Crew(Planted("tiny"), source, 2)
    with crew, pytest.raises(RunError, match="FileNotFoundError"):
        list(crew.measure([Run({"n": 1})], runner.Steps(1, print)))


def test_a_worker_ends_with_the_one_who_asked(planted):
    """Here in this process: it measures what it was given, and finds nobody to tell."""
    planted()
    handler = signal.getsignal(signal.SIGINT)
    try:
        for ask in (True, False):
            ours, theirs = multiprocessing.Pipe()
            if ask:
                ours.send(Run({"n": 7}))
            ours.close()
            runner.work(theirs, Planted("tiny"), runner.Source("digits"))
    finally:
        signal.signal(signal.SIGINT, handler)


def test_what_a_worker_says(planted):
    planted()
    handler = signal.getsignal(signal.SIGINT)
    ours, theirs = multiprocessing.Pipe()
    ours.send(Run({"n": 7}, steps=1))
    ours.send(Run({}))
    try:
        runner.work(theirs, Planted("tiny"), runner.Source("digits"))
    finally:
        signal.signal(signal.SIGINT, handler)
    kind, (settings, measured, _) = ours.recv()
    assert (kind, settings, measured["square"]) == ("done", {"n": 7}, 49.0)
    assert ours.recv()[0] == "failed"


CHANGES = {
    "settings": lambda patch: patch.setitem(Planted.SETTINGS["tiny"], "other", 1),
    "version": lambda patch: patch.setattr(bncpu, "__version__", "0.0.1"),
    "size": lambda patch: patch.setitem(Planted.SETTINGS, "quick", Planted.SETTINGS["tiny"]),
    "data": lambda patch: patch.setattr(
        data, "load", lambda *_: (digits := data.load_digits())._replace(y_test=digits.y_test * 0)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_measured_again(planted, monkeypatch, change):
    assert planted() == FIRST + SECOND
    CHANGES[change](monkeypatch)
    assert planted(size="quick" if change == "size" else "tiny") == FIRST + SECOND


def test_what_has_not_changed_is_not(planted, monkeypatch, tmp_path):
    planted()
    monkeypatch.setitem(Planted.SETTINGS["tiny"], "seeds", 3)
    assert planted() == ["best=25.0 seed=2"]
    monkeypatch.setitem(Planted.SETTINGS["tiny"], "numbers", [2, 5, 3])
    assert planted(seed=1) == ["best=25.0 seed=3"]
    damaged = next((tmp_path / "out" / "runs").glob("n-5-*.json"))
    for text in ("{", "[]", "{}", damaged.read_text().replace("25.0", "[")):
        damaged.write_text(text)
        assert planted() == FIRST[1:2]


def test_the_names_of_kept_runs(tmp_path):
    kept = runner.Kept(tmp_path, {"experiment": "x"})
    settings = [{"path": "a/b ../c"}, {"path": "a/b---c"}, {"layers": list(range(300))}, {}]
    for i, each in enumerate(settings):
        kept.keep(Result(each, {"i": i}, 0.5))
    assert [kept.find(each).measured["i"] for each in settings] == [0, 1, 2, 3]
    names = [path.name for path in tmp_path.iterdir()]
    assert len(names) == 4
    assert all(re.fullmatch(r"[\w.+-]{1,120}\.json", name, re.ASCII) for name in names)


@pytest.mark.parametrize("value", [np.nan, [1, {"a": np.inf}], {1, 2}, np.array([np.nan])])
def test_what_json_cannot_hold(planted, monkeypatch, value):
    monkeypatch.setattr(Planted, "measure", lambda *_: {"fine": 1, "square": value})
    with pytest.raises(RunError, match=r"measured\['square'\]: expected what JSON can hold"):
        planted()


def test_the_progress_bar(planted, capsys):
    planted(progress=True)
    assert "planted: 100%|" in (err := capsys.readouterr().err)
    assert re.search(r"\b13/13 .*5 of 5 runs", err)
    planted(progress=True)
    assert "13/13" in capsys.readouterr().err


def test_steps_are_told_now_and_then_and_not_more_than_promised(monkeypatch):
    told, now = [], [0.0]
    monkeypatch.setattr(runner.time, "monotonic", lambda: now[0])
    steps = runner.Steps(50, told.append, seconds=1)
    for _ in range(30):
        now[0] += 0.125
        steps.update()
    assert told == [8, 8, 8]
    steps.update(9)
    now[0] += 9
    steps.update(40)
    steps.update(5)
    steps.finish()
    assert told == [8, 8, 8, 26]


def test_the_page(planted, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Planted, "DRAWS", True)
    planted(seed=4)
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "results.json",
        "runs",
        "squares.png",
    ]
    page = (out / "README.md").read_text()
    assert page.startswith("# Numbers that are found | in two steps (section 3.1)\n\nFirst *all*")
    assert "| The best is 25 | `25` | 25.4 ± 0.1 | **no** |" in page.replace("25.45", "25.4")
    assert "\n| n | n \\| n |\n| --- | --- |\n| 1 | 0.1235 |\n| two | a b |\n\n*Some" in page
    assert "\n\n![The squares [of n)](squares.png)\n\n*The squares [of n]*\n" in page
    assert "`bncpu reproduce planted --tiny --dataset digits --seed 4`, with digits (1,438 " in page
    assert "the mean over the seeds 4, 5; the number after ± is half their range." in page
    with Image.open(out / "squares.png") as figure:
        assert figure.size == (720, 540)

    printed = capsys.readouterr().out.splitlines()
    assert printed[1] == "planted on digits: Numbers that are found | in two steps (section 3.1)"
    assert re.fullmatch(r"claim +paper +ours +held", printed[3])
    assert re.fullmatch(r"There are ten +10 +2 +no", printed[5])
    assert printed[-1] == f"Page: {out / 'README.md'}"


def test_the_results(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(Planted, "DRAWS", True)
    planted()
    results = results_in(tmp_path / "out")
    assert results["command"] == "bncpu reproduce planted --tiny --dataset digits"
    assert results["size"] == "tiny"
    assert results["seeds"] == [0, 1]
    assert results["settings"] == Planted.SETTINGS["tiny"]
    assert results["dataset"]["x_train"] == [1438, 64]
    assert len(results["dataset"]["sha256"]) == 64
    assert results["versions"]["numpy"] == np.__version__
    assert results["machine"]["processor"]
    assert results["machine"]["cpus"] >= 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", results["date"])
    assert results["claims"][1] == {
        "text": "There are ten",
        "paper": "10",
        "ours": "2",
        "held": False,
    }
    assert results["tables"][0]["rows"] == [["1", "0.1235"], ["two", "a\nb"]]
    assert results["figures"] == ["squares.png"]


def test_several_have_an_index(planted, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Timed, "DRAWS", True)
    planted("all", "planted", "timed", "planted")
    out = tmp_path / "all"
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "planted",
        "results.json",
        "timed",
    ]
    index = (out / "README.md").read_text()
    assert "2 of 4 held." in index
    assert "| [timed](timed/README.md) | digits | There are ten | 10 | 2 | **no** |\n" in index
    claims = results_in(out)["claims"]
    assert [(c["experiment"], c["held"]) for c in claims] == [
        ("planted", True),
        ("planted", False),
        ("timed", True),
        ("timed", False),
    ]
    assert capsys.readouterr().out.endswith(f"\n2 of 4 claims held. Index: {out / 'README.md'}\n")
    assert (out / "timed" / "squares.png").is_file()


@pytest.mark.parametrize(
    ("names", "options", "error", "message"),
    [
        (["zzz"], {}, ValueError, r"^names: expected some of mnist.*, planted, timed; got 'zzz'"),
        ([], {}, ValueError, "^names: .*; got none"),
        (
            ["planted"],
            {"size": "huge"},
            ValueError,
            "^size: expected one of tiny, quick, default, full; got 'huge'",
        ),
        (
            ["planted"],
            {"dataset": "cifar10"},
            ValueError,
            "^dataset: planted expects one of mnist, digits; got 'cifar10'",
        ),
        (["planted"], {"dataset": "mnist"}, FileNotFoundError, "BNCPU_DATA"),
    ],
)
def test_what_is_refused_before_any_work(planted, tmp_path, names, options, error, message):
    options = {"size": "tiny", "jobs": 1, "progress": False} | options
    with pytest.raises(error, match=message):
        reproduce(names, tmp_path / "out", **options)
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        planted("log")


def test_the_best_data_that_is_there(planted, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(data, "available", lambda _: ["digits", "mnist", "cifar10"])
    monkeypatch.setattr(data, "load", lambda *which: asked.append(which) or data.load_digits())
    planted(data_dir=tmp_path)
    assert set(asked) == {("mnist", tmp_path)}
    assert results_in(tmp_path / "out")["dataset"]["name"] == "mnist"
    asked.clear()
    planted(data_dir=tmp_path, dataset="digits")
    assert set(asked) == {("digits", tmp_path)}


def test_sizes_and_seeds():
    assert Planted("full").settings == Planted("default").settings
    assert Planted("full").size == "full"
    assert Planted("tiny", seed=3).seeds == (3, 4)


def test_results():
    results = Results([Result({"bn": i % 2 == 0, "i": i}, {"a": i}, 1.0) for i in range(4)])
    assert results.values("a", bn=True) == [0, 2]
    assert results.where(bn=False).where(i=3)[0].measured == {"a": 3}
    assert len(results.where(other=1)) == 0
    assert [r.settings["i"] for r in results[1:3]] == [1, 2]


def test_tables():
    assert markdown_table(["a"], [["x | y\nz"]]) == "| a |\n| --- |\n| x \\| y z |"
    long = "word " * 20
    lines = plain_table(["claim", "held"], [[long, "**no**"], ["", "yes"]]).splitlines()
    assert lines[0] == f"claim{' ' * 41}held"
    assert lines[1].endswith("word  no")
    assert len(lines) == 5
    assert all(len(line) <= 50 for line in lines)
    page = Page()
    with pytest.raises(ValueError, match=r"^rows: expected 2 cells, as in the head; got \['1'\]"):
        page.table(["a", "b"], [[1]])


def test_a_page_refuses_names_that_are_no_names():
    page = Page()
    figure, _ = figures.new_figure(1)
    page.figure("fig-1", figure, "")
    for name, message in (("a/b", "letters, digits"), ("fig-1", "no other figure has")):
        with pytest.raises(ValueError, match=f"^name: expected .*{message}"):
            page.figure(name, figure, "")


def test_numbers():
    assert numbers.percent([0.97849]) == "97.8 %"
    assert numbers.percent(np.array([0.5, 0.7])) == "60.0 ± 10.0 %"
    assert numbers.spread([0, 0]) == "0.00 ± 0.00"
    assert numbers.spread(0.0123456) == "0.0123"
    assert numbers.spread([99.96, 100.04]) == "100 ± 0"
    assert numbers.spread([1e7, 3e7], digits=2) == "2.0e+07 ± 1.0e+07"
    assert numbers.spread(-2.5) == "-2.50"
    assert numbers.mean(3) == 3.0
    for function in (numbers.mean, numbers.percent, numbers.spread):
        with pytest.raises(ValueError, match=r"^values: expected at least one; got none"):
            function([])


def test_lines_are_told_apart_and_drawn():
    assert len(figures.STYLES) >= 6
    for key in ("color", "linestyle", "marker"):
        assert len({str(style[key]) for style in figures.STYLES}) == len(figures.STYLES)
    figure, (left, right) = figures.new_figure(2, width=3, height=2)
    lines = {f"line {i}": (range(100), np.full(100, i)) for i in range(8)}
    figures.plot_lines(left, lines, xlabel="step", ylabel="m", band={"line 1": (0, 2)})
    figures.plot_lines(right, {}, xlabel="step", ylabel="m", styles=figures.STYLES[1:])
    assert (left.get_xlabel(), left.get_ylabel()) == ("step", "m")
    assert [text.get_text() for text in left.get_legend().get_texts()] == list(lines)
    with Image.open(io.BytesIO(figures.png(figure))) as image:
        assert image.size == (990, 300)
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
    for style in figures.STYLES[:7]:
        color = [int(style["color"][i : i + 2], 16) for i in (1, 3, 5)]
        assert np.count_nonzero(np.abs(pixels - color).max(axis=1) < 12) > 100, style


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_makes_its_page(tmp_path, name):
    """In the smallest size and on the embedded data: it ends, and says what held and what not."""
    reproduce([name], tmp_path, size="tiny", dataset="digits", jobs=1, progress=False)
    results = results_in(tmp_path)
    assert results["claims"]
    for claim in results["claims"]:
        assert claim["text"]
        assert claim["paper"]
        assert re.search(r"\w", claim["ours"])
        assert "nan" not in claim["ours"]
    assert results["figures"]
    for figure in results["figures"]:
        with Image.open(tmp_path / figure) as image:
            assert image.format == "PNG"
            assert image.width >= 500
            assert len(image.getcolors()) > 10
        assert f"]({figure})" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("kind", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_every_experiment_says_what_it_is(kind):
    assert issubclass(kind, Experiment)
    assert EXPERIMENTS[kind.NAME] is kind
    assert set(kind.SETTINGS) >= {"tiny", "quick", "default"}
    assert kind.DATASETS[-1] == "digits"
    assert set(kind.DATASETS) <= set(data.NAMES)
    assert len(kind.__doc__.splitlines()[0]) < 100


def test_figure_1(tmp_path):
    reproduce(["mnist"], tmp_path, size="tiny", dataset="digits", jobs=1, progress=False)
    runs = Results([Result(**run) for run in results_in(tmp_path)["runs"]])
    curves = {}
    for name, network in mnist.NETWORKS.items():
        searched = runs.where(part="validation", **network)
        assert [result.settings["rate"] for result in searched] == list(mnist.RATES)
        # The lowest of the best rates.
        best = max(searched.values("accuracy"))
        rate = min(r.settings["rate"] for r in searched if r.measured["accuracy"] == best)
        (run,) = runs.where(part="test", **network)
        assert run.settings["rate"] == rate
        measured = run.measured
        assert measured["steps"] == list(range(101))
        assert measured["accuracy"] == measured["accuracies"][-1]
        curves[name] = measured["accuracies"]
        percentiles = np.array(measured["percentiles"])
        assert percentiles.shape == (101, 3)
        assert np.all(np.diff(percentiles, axis=1) >= 0)
        late = percentiles[10:]
        width = np.mean(late[:, 2] - late[:, 0])
        slack = 2e-4 * (1 + measured["variation"])  # percentiles are kept to four places
        assert late.std(axis=0).mean() == pytest.approx(measured["variation"] * width, abs=slack)
    # The paper's claim, which a hundred steps show already.
    for weights in mnist.WEIGHTS:
        a, b = (np.mean(curves[f"{w} BN, {weights} weights"][20:]) for w in ("with", "without"))
        assert a > 2 * b


def test_planted_experiments_are_those_of_this_folder():
    assert planted_experiments.__name__ == Planted.__module__ == "planted_experiments"
