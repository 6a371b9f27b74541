"""The paper's figure 1 on the digits, in its quick form."""

import json

import numpy as np
import pytest
from PIL import Image

from bncpu import data, nn
from bncpu.experiments import EXPERIMENTS
from bncpu.experiments import digits as experiment


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with the results of one quick run, and a second run beside it."""
    out = tmp_path_factory.mktemp("reproduce")
    for name in ("first", "second"):
        EXPERIMENTS["digits"](out / name, quick=True, seed=1, progress=False)
    return out


def test_results(folder):
    assert sorted(path.name for path in (folder / "first").iterdir()) == [
        "figure.png",
        "results.json",
    ]
    results = json.loads((folder / "first" / "results.json").read_text())
    assert results["settings"]["learning_rate"] == experiment.LEARNING_RATE
    without, with_bn = results["without BN"], results["with BN"]
    expected = list(range(0, experiment.QUICK_STEPS + 1, experiment.EVERY))
    for curve in (without, with_bn):
        assert curve["steps"] == expected
        assert len(curve["accuracy"]) == len(expected)
        assert np.all(np.diff(curve["percentiles"], axis=1) >= 0)
        assert np.shape(curve["percentiles"]) == (len(expected), 3)
    # The claim: batch normalisation gets there in a small part of the steps.
    first = {
        name: next(s for s, a in zip(c["steps"], c["accuracy"], strict=True) if a >= 0.8)
        for name, c in (("without", without), ("with", with_bn))
    }
    assert 4 * first["with"] < first["without"]
    assert np.mean(with_bn["accuracy"][-10:]) > np.mean(without["accuracy"][-10:])


def test_a_run_can_be_had_again(folder):
    for name in ("results.json", "figure.png"):
        assert (folder / "first" / name).read_bytes() == (folder / "second" / name).read_bytes()


def test_the_figure_is_a_picture(folder):
    with Image.open(folder / "first" / "figure.png") as figure:
        assert figure.width > 1500
        pixels = np.asarray(figure.convert("RGB"))
    for color in ((0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)):
        assert np.count_nonzero(np.all(pixels == color, axis=-1)) > 500


def test_the_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experiment, "QUICK_STEPS", 60)
    EXPERIMENTS["digits"](tmp_path / "out", quick=True, seed=1, progress=False)
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.split("\n")
    assert "without BN" in lines[2]
    assert [line.split()[0] for line in lines[3:-2]] == ["0", "50", "60"]
    assert lines[-2] == f"Figure: {tmp_path / 'out' / 'figure.png'}"


def test_what_enters_the_sigmoids(rng):
    digits = data.load_digits()
    model = nn.fully_connected([64, 9, 7, 10], rng=rng)
    model.forward(digits.x_train)
    inputs = experiment.sigmoid_inputs(model, digits.x_test)
    assert inputs.shape == (359, 7)
    assert model.training
    model.layers[1].eval()
    experiment.sigmoid_inputs(model, digits.x_test)
    assert not model.layers[1].training
    assert model.layers[4].training
    model.eval()
    expected = model.layers[-1].forward(nn.Sigmoid()(inputs))
    np.testing.assert_array_equal(model.forward(digits.x_test), expected)
