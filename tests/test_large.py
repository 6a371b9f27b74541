"""Arrays of more than 2**31 elements, and of more than 2**32 bytes: no index is 32 bits wide.

`make test-large` runs what is marked; it takes minutes and up to 19 GB of memory, and each test
says so and skips where there is less. Every array repeats a run of P values, P a prime, so that its
moments and gradients are known without summing it, and an index that lost its upper bits would find
another value. Every element of a result is compared with the truth.
"""

import re
from pathlib import Path

import numpy as np
import pytest
from accuracy import assert_close, tolerance

import bncpu
import bncpu.cpu

NATIVE = Path(bncpu.cpu.__file__).parent
P = 1021
BORDER = 2**31
CHUNK = P << 14  # elements that are filled or compared at a time
VALUES = np.arange(P) / 256 - 1.5  # exact in all types: a mean far from 0, both signs
MEAN, VAR = VALUES.mean(), VALUES.var()
EPS = 1e-5
INVSTD = 1 / np.sqrt(VAR + EPS)
XHAT = (VALUES - MEAN) * INVSTD
# A gradient with the same period that is no linear function of x.
DY = np.cos(np.arange(P) * 0.37)


def times_of_p(least):
    """Return the smallest multiple of P that is larger."""
    return (least // P + 1) * P


def needs(gigabytes):
    """Skip a test that would drive the machine into swapping."""
    try:
        lines = Path("/proc/meminfo").read_text()
    except OSError:
        pytest.skip("how much memory there is stands in /proc/meminfo")
    available = int(re.search(r"MemAvailable: +(\d+) kB", lines)[1]) / 1e6
    if available < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of memory, and {available:.1f} GB are available")


def repeated(values, shape, dtype):
    """Return an array in which the values follow each other over and over, in C order."""
    array = np.empty(shape, dtype)
    fill(array, values)
    return array


def fill(array, values):
    flat = array.reshape(-1)
    block = np.tile(values.astype(array.dtype), CHUNK // P)
    for first in range(0, flat.size, CHUNK):
        part = flat[first : first + CHUNK]
        part[...] = block[: part.size]


def assert_repeats(array, truth, *, size=1.0, m=1, what):
    """Compare every element with the truth for its place in the run."""
    flat = array.reshape(-1)
    limit = np.broadcast_to(tolerance(array.dtype, m) * size, truth.shape)
    assert_close(flat[:P], truth, limit=limit, what=what)
    # The same values have mostly the same bits; sums of other channels may be rounded otherwise.
    block = np.tile(flat[:P], CHUNK // P)
    for first in range(0, flat.size, CHUNK):
        part = flat[first : first + CHUNK]
        (other,) = np.nonzero(part != block[: part.size])
        of_run = other % P
        assert_close(
            part[other], truth[of_run], limit=limit[of_run], what=f"{what} from element {first}"
        )


def assert_statistics(mean, invstd, m):
    close = {"rtol": tolerance(np.float32, m), "atol": 0}
    np.testing.assert_allclose(mean, np.full_like(mean, MEAN), **close)
    np.testing.assert_allclose(invstd, np.full_like(invstd, INVSTD), **close)


def gradient(dy):
    """Return dx, dgamma / m and dbeta / m of channels that hold whole runs."""
    dbeta, dgamma = dy.mean(), (dy * XHAT).mean()
    return INVSTD * (dy - dbeta - XHAT * dgamma), dgamma, dbeta


@pytest.mark.large
def test_one_channel_of_float32():
    """Training forward and backward, dx in the memory of dy; 9 GB each of x and y."""
    needs(18.5)
    m = times_of_p(BORDER)
    x = repeated(VALUES, (1, 1, m), np.float32)
    y, mean, invstd = bncpu.batch_norm_train(x, eps=EPS)
    assert_statistics(mean, invstd, m)
    assert_repeats(y, XHAT, size=np.abs(XHAT) + 1, m=m, what="y")

    dy = y
    fill(dy, DY)
    gradients = bncpu.batch_norm_backward(dy, x, mean, invstd, out=dy)
    dx, dgamma, dbeta = gradient(DY)
    limit = tolerance(np.float32, m)
    np.testing.assert_allclose(gradients.dgamma / m, [dgamma], rtol=0, atol=limit)
    np.testing.assert_allclose(gradients.dbeta / m, [dbeta], rtol=0, atol=limit)
    assert_repeats(gradients.dx, dx, size=INVSTD * (3 + np.abs(XHAT)), m=m, what="dx")


@pytest.mark.large
@pytest.mark.parametrize(
    "shape",
    [(1, 1, times_of_p(BORDER)), (2, 3, times_of_p(BORDER // 6)), (times_of_p(BORDER // 3), 3)],
    ids=str,
)
def test_inference_of_float32_in_place(shape):
    """Runs of one channel, long rows of some, and three channels innermost; 9 GB."""
    needs(10)
    x = repeated(VALUES, shape, np.float32)
    assert x.size > BORDER
    mean, var = np.full(shape[1], MEAN), np.full(shape[1], VAR)
    y = bncpu.batch_norm_infer(x, mean, var, eps=EPS, activation="relu", out=x)
    assert y is x
    assert_repeats(y, np.maximum(XHAT, 0), size=np.abs(XHAT) + 1, what="y")


@pytest.mark.large
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((1, 1, times_of_p(BORDER)), 1),
        ((P, 1_000_000 + 3, 3), 1),  # every P-th value of a channel's is x's next, P being prime
        ((3 * P, 1_000_000), 1),
        ((times_of_p(BORDER // 5), 5), -1),
    ],
    ids=str,
)
def test_float16_with_a_mask(shape, axis):
    """Training, with ReLU and a mask of more than 2**31 bits, and backward in place; 13 GB."""
    size = int(np.prod(shape))
    needs(size * 4 / 1e9 + 1.5)
    assert size > BORDER
    m = size // shape[1]
    x = repeated(VALUES, shape, np.float16)
    mask = np.full((size + 7) // 8, 0xA5, np.uint8)
    y, mean, invstd = bncpu.batch_norm_train(x, eps=EPS, axis=axis, activation="relu", mask=mask)
    assert_statistics(mean, invstd, m)
    assert_repeats(y, np.maximum(XHAT, 0), size=np.abs(XHAT) + 1, m=m, what="y")
    passes = XHAT > 0
    bits = np.packbits(np.tile(passes, 8 * (CHUNK // P)), bitorder="little")
    for first in range(0, mask.size, bits.size):
        part = mask[first : first + bits.size]
        expected = bits[: part.size].copy()
        if first + part.size == mask.size and size % 8:
            expected[-1] &= (1 << size % 8) - 1
        np.testing.assert_array_equal(part, expected, err_msg=f"mask from byte {first}")

    dy = y
    fill(dy, DY)
    stored = DY.astype(np.float16).astype(float)
    how = {"axis": axis, "activation": "relu", "mask": mask, "out": dy}
    gradients = bncpu.batch_norm_backward(dy, x, mean, invstd, **how)
    dx, dgamma, dbeta = gradient(stored * passes)
    limit = tolerance(np.float32, m)
    np.testing.assert_allclose(gradients.dgamma / m, np.full(shape[1], dgamma), rtol=0, atol=limit)
    np.testing.assert_allclose(gradients.dbeta / m, np.full(shape[1], dbeta), rtol=0, atol=limit)
    assert_repeats(gradients.dx, dx, size=INVSTD * (3 + np.abs(XHAT)), m=m, what="dx")


@pytest.mark.large
def test_rows_further_apart_than_2_to_the_31():
    """A view whose rows begin 2**31 elements apart, and moments of a channel in two of them."""
    needs(10)
    half = times_of_p(BORDER // 2)
    base = np.empty((2, 2, half), np.float16)
    fill(base[0, :1], VALUES)
    fill(base[1, :1], VALUES)
    base[:, 1] = np.nan  # what lies between is nobody's
    view = base[:, :1]
    assert view.strides[0] // view.itemsize > BORDER
    moments = bncpu.batch_moments(view)
    assert moments.count == 2 * half > BORDER
    limit = tolerance(np.float32, moments.count)
    np.testing.assert_allclose(moments.mean, [MEAN], rtol=limit)
    np.testing.assert_allclose(moments.m2 / moments.count, [VAR], rtol=limit)


# What follows takes no memory.

# Variables of at most 32 bits in the native sources, by what they hold.
NARROW = {
    "threads": "threads num_threads workers outer outer_threads inner_threads parts",
    "values or bits of a vector, and vectors or rows at a time": "i j r n L R lanes width shift "
    "count waiting bits next four ours kLanes kAccumulators kAtOnce",
    "coefficients of a channel, by kind": "field fields kPlanes",
    "arrays of a call, axes, dtypes": "dims at kind may_be is_dy kBlocks",
    "flags and versions": "pass is_forked openmp_standard",
}


@pytest.mark.skipif(not (NATIVE / "kernels.pyx").is_file(), reason="only a checkout has sources")
def test_narrow_integers_count_what_is_small():
    """Whoever adds a name to the list asks whether it can count elements, or index them.

    What the compiler would have to narrow for it, -Wconversion tells.
    """
    narrow = r"(?<!as )\b(?:int|unsigned|long|short|u?int32_t)[ &]+(?!long\b)(\w+)\b(?! *\()"
    found = set()
    for path in [*NATIVE.glob("*.hpp"), *NATIVE.glob("*.pyx"), *NATIVE.glob("*.pxi")]:
        if path.stem != "detect":  # the words of a processor
            for line in path.read_text().splitlines():
                if not line.startswith(("from ", "typedef ", "    int import_array")):
                    found |= set(re.findall(narrow, line.partition("//")[0]))
    assert found - {name for names in NARROW.values() for name in names.split()} == set()


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize(
    ("rows", "channels", "run"),
    [
        (1, 1, 2**40 + 1),
        (2**40 + 1, 1, 64),
        (2**33 + 5, 7, 1),
        (2**20, 2**20, 3),
        (3, 2**31 + 11, 65),
        (2, 2**24 + 1, 2**18 + 1),
    ],
)
@pytest.mark.parametrize("threads", [1, 3, 1024])
@pytest.mark.parametrize("passes", [1, 2])
def test_the_plan_of_what_no_machine_holds(columns, rows, channels, run, threads, passes):
    """The numbers of a grid and a plan are those of integers without an end."""
    plan = bncpu.cpu.kernels.tile_plan(columns, rows, channels, run, passes=passes, threads=threads)
    folded = plan["rows"] * plan["fold"] - (plan["fold"] - plan["last"])
    assert folded == rows
    groups = -(-plan["rows"] // plan["piece_rows"])
    assert plan["pieces"] == groups * plan["segments"]
    assert 1 <= plan["parts"] <= plan["pieces"]
    assert 1 <= plan["tiles"] <= channels
    assert plan["tile_channels"] == -(-channels // plan["tiles"])
    assert 1 <= plan["units"] <= plan["tile_channels"]
    assert plan["outer_threads"] * plan["inner_threads"] <= threads
    # The ends of shares are formed as products.
    assert channels * plan["tiles"] < 2**63
