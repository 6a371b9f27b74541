"""`bncpu reproduce`: what it hands over, what it lists, and how an experiment's errors end it.

No experiment is made here.
"""

from pathlib import Path

import pytest

from bncpu import cli, experiments


class Naive(experiments.Experiment):
    """A bias that grows without bound.

    Of what else it is, the list says nothing.
    """

    NAME, SECTION = "naive", "section 2"


@pytest.fixture
def reproductions(monkeypatch):
    """Two experiments, and a list of what is asked of them, instead of what would take minutes."""
    calls = []

    def reproduce(names, out, **options):
        calls.append((names, str(out), options))

    monkeypatch.setattr(experiments, "reproduce", reproduce)
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"naive": Naive, "scale": Naive})
    return calls


def test_reproduce_hands_over_its_arguments(reproductions):
    default = {
        "size": "default",
        "dataset": None,
        "data_dir": None,
        "seed": 0,
        "jobs": None,
        "progress": True,
    }
    options = ["--full", "--dataset", "mnist", "--data-dir", "data", "--jobs", "3", "--out", "a/b"]
    options += ["--seed", "2", "--no-progress"]
    given = {
        "size": "full",
        "dataset": "mnist",
        "data_dir": Path("data"),
        "seed": 2,
        "jobs": 3,
        "progress": False,
    }
    for argv, expected in (
        (["scale"], (["scale"], "bncpu-scale", default)),
        (["scale", "--quick"], (["scale"], "bncpu-scale", default | {"size": "quick"})),
        (["scale", *options], (["scale"], "a/b", given)),
        (["scale", "naive", "scale"], (["scale", "naive"], "bncpu-reproduce", default)),
        (["scale", "scale"], (["scale"], "bncpu-scale", default)),
        (["scale", "all"], (["naive", "scale"], "bncpu-reproduce", default)),
        (["all", "--out", "x"], (["naive", "scale"], "x", default)),
    ):
        assert cli.main(["reproduce", *argv]) == 0
        assert reproductions.pop() == expected


def test_the_list_of_experiments(capsys, reproductions):
    for argv in (["--list"], ["naive", "--list"]):
        assert cli.main(["reproduce", *argv]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == ["name", "in", "the", "paper", "what", "is", "measured"]
        assert lines[1:] == [
            "naive  section 2     A bias that grows without bound.",
            "scale  section 2     A bias that grows without bound.",
        ]
    assert reproductions == []


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("dataset: naive\nexpects digits"), 2, "dataset: naive expects digits"),
        (experiments.RunError("rate=1.0: its process died"), 2, "rate=1.0: its process died"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
@pytest.mark.usefixtures("reproductions")
def test_an_experiment_that_fails(capsys, monkeypatch, error, status, line):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(experiments, "reproduce", fail)
    assert cli.main(["reproduce", "naive"]) == status
    assert capsys.readouterr().err == f"bncpu reproduce: {line}\n"
