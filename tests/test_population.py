"""Population statistics of .npy files: one pass over any layout, and files that are refused."""

import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from accuracy import assert_moments

import bncpu
from bncpu import cli, population
from bncpu.population import file_moments, open_files


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    """Write all files into an empty folder, and read them in many blocks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(population, "BLOCK_BYTES", 1 << 10)


def assert_file_moments(files, x, axis):
    """Compare with the truth in float64 for all values, in one part and in several."""
    x = x.astype(np.float64)
    assert_moments(file_moments(files), x, axis=axis)
    for parts in (2, 3, 50):  # some of them without a block
        moments = sum(file_moments(files, part=part, parts=parts) for part in range(parts))
        assert_moments(moments, x, axis=axis)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, (1, 2), (0, 2)])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(40, 5, 7), (1, 3, 4000), (3, 4000, 1)])
def test_layouts(rng, shape, order, axis):
    x = rng.normal(1e3, 1.0, shape).astype(np.float32)
    np.save("x.npy", np.asarray(x, order=order))
    if order == "F":
        assert open_files(["x.npy"], axis)[0].fortran_order == (x.ndim > 1)
    assert_file_moments(open_files(["x.npy"], axis), x, axis)


def test_files_of_other_sizes_and_dtypes(rng):
    parts = [
        rng.normal(3, 2, (70, 4)).astype(np.float32),
        rng.normal(3, 2, (1, 4)).astype(np.float16),
        np.empty((0, 4)),
        rng.integers(0, 256, (300, 4), np.uint8),
        rng.integers(-(2**40), 2**40, (3, 4)),
        rng.normal(3, 2, (200, 4)).astype(">f4"),
    ]
    for i, part in enumerate(parts):
        np.save(f"{i}.npy", part)
    files = open_files([f"{i}.npy" for i in range(len(parts))], 1)
    for i, part in enumerate(parts):
        assert_file_moments(files[i : i + 1], part, 1)
    assert_file_moments(files, np.concatenate([part.astype(np.float64) for part in parts]), 1)


def test_one_value_per_channel():
    np.save("x.npy", np.arange(3.0))
    moments = file_moments(open_files(["x.npy"] * 2, 0))
    assert (moments.count, *moments.mean, *moments.m2) == (2, 0, 1, 2, 0, 0, 0)


def test_blocks_cover_everything_once():
    for order in "CF":
        x = np.zeros((9, 5, 11, 13), np.int8, order=order)
        np.save("x.npy", x)
        for axis in (1, (0, 3), 3):
            files, largest = open_files(["x.npy"], axis), 0
            for part in range(4):
                for _, block, size in population._part(files, part, 4):
                    x[block] += 1
                    largest = max(largest, size)
            assert (x == 1).all()
            assert largest <= population.BLOCK_BYTES
            x[...] = 0


def test_memory_is_constant(tmp_path):
    """A file of a quarter of a GB, without blocks on disk, is read in far less memory."""
    with Path("x.npy").open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (1 << 20, 64)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + (1 << 28))
    code = """
import resource
from bncpu.population import file_moments, open_files
files = open_files(["x.npy"], 1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
moments = file_moments(files)
print(moments.count, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    count, megabytes = map(int, done.stdout.split())
    assert count == 1 << 20
    assert megabytes < 64


def npy(array):
    np.save("made.npy", array)
    content = Path("made.npy").read_bytes()
    Path("made.npy").unlink()
    return content


GOOD = (4, 3)


@pytest.mark.parametrize(
    ("make", "axis", "message"),
    [
        (lambda: b"", 1, "damaged, or not a .npy file"),
        (lambda: b"PK\x03\x04 an archive of them", 1, "damaged, or not a .npy file"),
        (lambda: npy(np.ones(GOOD))[:20], 1, "damaged, or not a .npy file"),
        (lambda: npy(np.ones(GOOD))[:-1], 1, "its header promises 96 bytes; it holds 95"),
        (lambda: npy(np.ones(GOOD)) + b"x", 1, "its header promises 96 bytes; it holds 97"),
        (
            lambda: npy(np.ones(GOOD, bool)),
            1,
            "expected numbers of at most 64 bits; got dtype bool",
        ),
        (lambda: npy(np.ones(GOOD, complex)), 1, "got dtype complex128"),
        (lambda: npy(np.ones(GOOD, object)), 1, "got dtype object"),
        (lambda: npy(np.ones(GOOD, ml_dtypes.bfloat16)), 1, "save bfloat16 as float32"),
        (lambda: npy(np.float32(1)), 1, "expected at least one dimension"),
        (lambda: npy(np.ones(4)), 1, r"axis: 1 is out of range for an array of shape \(4,\)"),
        (lambda: npy(np.ones((4, 2))), 1, r"expected \(3,\) channels on axis 1, as good.npy has"),
        (lambda: npy(np.ones((0, 3))), 1, "FILE: expected at least one value per channel"),
        (None, 1, "No such file or directory"),
    ],
)
def test_files_that_are_refused(make, axis, message, capsys):
    np.save("good.npy", np.ones(GOOD))
    files = ["bad.npy"] if "at least one value" in message else ["good.npy", "bad.npy"]
    if make:
        Path("bad.npy").write_bytes(make())
    before = sorted(Path().iterdir())
    argv = ["moments", *files, "--axis", str(axis), "--out", "out.npz", "--no-progress"]
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert re.search(f"^bncpu moments: (bad.npy: )?.*{message}", err)
    assert sorted(Path().iterdir()) == before


def test_a_file_that_changes(rng):
    np.save("x.npy", rng.normal(size=GOOD))
    files = open_files(["x.npy"])
    np.save("x.npy", rng.normal(size=(5, 3)))
    with pytest.raises(ValueError, match=r"x\.npy: has changed since it was opened"):
        file_moments(files)
    with Path("x.npy").open("r+b") as file:
        file.truncate(130)
    with pytest.raises(ValueError, match=r"x\.npy: has changed since it was opened"):
        file_moments(files)


def test_the_command(rng, capsys):
    x = rng.normal(5, 2, (6, 7, 30))
    np.save("a.npy", x[:2])
    np.save("b.npy", x[2:])
    assert cli.main(["moments", "a.npy", "b.npy", "--axis", "-1"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "42 values in each of 30 channels"
    assert lines[2].split() == ["0", f"{x[..., 0].mean():.6g}", f"{x[..., 0].std():.6g}"]
    assert (len(lines), lines[-2].strip(), lines[-1]) == (24, "...", "Moments: moments.npz")
    assert "10.1k/10.1k" in err  # bytes
    with np.load("moments.npz") as got:
        assert sorted(got) == ["count", "m2", "mean", "var"]
        moments = assert_moments(
            bncpu.Moments(int(got["count"]), got["mean"], got["m2"]), x, axis=-1
        )
        np.testing.assert_allclose(got["var"], moments.m2 / 42, rtol=1e-12)
    # Two channel axes, and what is there is replaced.
    assert cli.main(["moments", "a.npy", "--axis", "1,2", "--no-progress", "--threads", "1"]) == 0
    with np.load("moments.npz") as got:
        assert got["mean"].shape == (7, 30)
    out, err = capsys.readouterr()
    assert err == ""


@pytest.mark.parametrize("axis", ["x", "1,,2", ""])
def test_a_wrong_axis(axis, capsys):
    with pytest.raises(SystemExit):
        cli.main(["moments", "a.npy", "--axis", axis])
    expected = "bncpu moments: argument --axis: expected an axis, or several as 1,2,3; got "
    assert capsys.readouterr().err.startswith(expected)
