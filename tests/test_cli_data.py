"""`bncpu data`: what it lists of files that are there, missing and damaged."""

import hashlib
import itertools
import struct
import sys

import numpy as np
import pytest

from bncpu import cli


@pytest.fixture(autouse=True)
def no_folder(monkeypatch):
    monkeypatch.delenv("BNCPU_DATA", raising=False)


LABELS = {"train-labels-idx1-ubyte": 30, "t10k-labels-idx1-ubyte": 7}


def write_mnist(folder):
    """Write images of 2 x 2 and their labels as IDX files."""
    folder.mkdir()
    for name, n in LABELS.items():
        (folder / name).write_bytes(b"\0\0\x08\x01" + struct.pack(">I", n) + bytes(n))
        images = name.replace("labels-idx1", "images-idx3")
        content = b"\0\0\x08\x03" + struct.pack(">3I", n, 2, 2) + bytes(4 * n)
        (folder / images).write_bytes(content)


def test_data_without_a_folder(capsys, monkeypatch):
    assert cli.main(["data"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for text in (
        "No data folder: name one with --data-dir FOLDER, or in the variable BNCPU_DATA.",
        "x_train (1438, 64), y_train (1438,), x_test (359, 64), y_test (359,)",
        "missing: train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k",
        "missing: data_batch_1.bin, test_batch.bin",
        "scikit-learn",
        "yann.lecun.com/exdb/mnist",
        "ossci-datasets.s3.amazonaws.com/mnist",
        "www.cs.toronto.edu/~kriz/cifar.html",
    ):
        assert text in out
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert cli.main(["data"]) == 0
    assert 'digits: need scikit-learn; pip install "bncpu[train]"' in capsys.readouterr().out


def test_data_lists_what_is_there(capsys, tmp_path, monkeypatch):
    write_mnist(tmp_path / "mnist")
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(3 * 3073))
    (tmp_path / "test_batch.bin").write_bytes(bytes(2 * 3073))
    monkeypatch.setenv("BNCPU_DATA", str(tmp_path))
    assert cli.main(["data"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0] == f"Data folder: {tmp_path}"
    path = tmp_path / "mnist/train-images-idx3-ubyte"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (row,) = (line for line in lines if str(path) in line)
    assert row.split() == [str(path), "136", "(30,", "2,", "2)", "no", digest]
    (row,) = (line for line in lines if "data_batch_1.bin" in line)
    assert row.split()[1:5] == ["9,219", "(3,", "3073)", "unknown"]
    assert "  arrays: x_train (30, 4), y_train (30,), x_test (7, 4), y_test (7,)" in lines
    assert "  arrays: x_train (3, 3072), y_train (3,), x_test (2, 3072), y_test (2,)" in lines
    assert "missing:" not in out
    # The columns of a table stand below each other.
    tables = [i for i, line in enumerate(lines) if line.startswith("  file ")]
    assert len(tables) == 2
    for i in tables:
        start = lines[i].index("sha256")
        for row in itertools.takewhile(lambda line: line.startswith("  /"), lines[i + 1 :]):
            assert len(row) == start + 64
            assert row[start - 1] == " "


def test_data_ends_with_2_if_something_is_damaged(capsys, tmp_path):
    write_mnist(tmp_path / "mnist")
    (tmp_path / "mnist/t10k-labels-idx1-ubyte").write_bytes(b"nothing of the kind")
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(3072))
    assert cli.main(["data", "--data-dir", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert err == "bncpu data: mnist and cifar10: cannot be loaded; see what is listed\n"
    assert "\n    not an IDX file of 1-dimensional bytes; expected it to begin with 00000801" in out
    assert "\n    cut short, or not of CIFAR-10; expected a multiple of 3073 bytes; got 3072" in out
    assert "  missing: test_batch.bin\n" in out
    assert "www.cs.toronto.edu" in out


def test_training_on_cifar10(capsys, tmp_path, rng):
    for name, n in (("data_batch_1.bin", 30), ("test_batch.bin", 10)):
        rows = rng.integers(0, 10, (n, 3073), np.uint8)
        (tmp_path / name).write_bytes(rows.tobytes())
    argv = ["train", "--dataset", "cifar10", "--data-dir", str(tmp_path), "--steps", "2"]
    argv += ["--hidden", "5", "--batch-size", "10", "--no-progress"]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "cifar10: 30 images to train, 10 to test\n3072 inputs" in out
