"""How problems are cut: every cut is complete, and no machine's caches or threads change a result.

The plan of a machine decides what stays in cache, who computes it and whether results go past the
caches; the grid of partial sums depends on the shape alone. So with the caches of any other machine
the results are the same to the bit.
"""

import hypothesis.strategies as st
import numpy as np
import pytest
from accuracy import assert_same_bits
from cases import ROWS_OF_CHANNELS, SIZES, Output, normal, of_size, parameters
from hypothesis import given
from test_bounds import call_with_every_size, exit_code_of

import bncpu
import bncpu.cpu

# L2 and L3 in bytes: of a machine so small that nothing fits and every result streams past the
# caches, of one where tiles fit but results do not, and of one where everything does.
CACHES = {"tiny": (4096, 4096), "small": (1 << 17, 1 << 17), "vast": (1 << 30, 1 << 34)}
GRID = ("piece_rows", "segments", "pieces", "parts")

sizes = st.one_of(
    st.integers(1, 70), st.integers(1, 5000), st.sampled_from([49, 196, 784, 3136, 12544, 1 << 20])
)


@pytest.fixture(params=CACHES)
def other_caches(request, level):
    """Compute as on a machine with other caches; the level's own come back with the level."""
    bncpu.cpu.kernels.set_cache_sizes(*CACHES[request.param])
    yield request.param
    bncpu.cpu.load_level(level)


def all_results(x, dy, gamma, beta, axis, **options):
    mean, invstd = np.full(gamma.shape, 0.5), np.full(gamma.shape, 0.4)
    moments = bncpu.batch_moments(x, axis=axis, **options)
    return [
        *bncpu.batch_norm_train(x, gamma, beta, axis=axis, **options),
        bncpu.batch_norm_infer(x, mean, invstd, gamma, beta, axis=axis, **options),
        *bncpu.batch_norm_backward(dy, x, mean, invstd, gamma, axis=axis, **options),
        *bncpu.batch_norm_infer_backward(dy, x, mean, invstd, gamma, axis=axis, **options),
        *(moments.mean, moments.m2),
    ]


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("name", CACHES)
def test_caches_do_not_change_results(rng, level, dtype, name, axis):
    for size in SIZES if axis == 1 else ROWS_OF_CHANNELS:
        shape = of_size(size)
        x, dy = normal(rng, shape, dtype), normal(rng, shape, dtype)
        arrays = x, dy, *parameters(rng, shape[axis], dtype), axis
        expected = all_results(*arrays, num_threads=1)
        for threads in (1, 3):
            try:
                bncpu.cpu.kernels.set_cache_sizes(*CACHES[name])
                got = all_results(*arrays, num_threads=threads)
            finally:
                bncpu.cpu.load_level(level)
            for a, b in zip(got, expected, strict=True):
                assert_same_bits(a, b, f"{size} with {threads} threads")


@pytest.mark.parametrize("layout", ["c", "off_by_an_item", "cropped", "channels_cut", "reversed"])
@pytest.mark.parametrize("shape", [(3, 17, 33), (4, 5, 2049), (65, 33), (2, 3, 9, 31)], ids=str)
@pytest.mark.usefixtures("other_caches")
def test_outputs_past_the_caches(rng, dtype, layout, shape):
    """Streaming stores want whole aligned vectors; what surrounds an output is not theirs."""
    x, dy = normal(rng, shape, dtype), normal(rng, shape, dtype)
    gamma, beta = parameters(rng, shape[1], dtype)
    for function, arrays in [
        (bncpu.batch_norm_train, (x, gamma, beta)),
        (bncpu.batch_norm_backward, (dy, x, np.zeros(shape[1]), np.ones(shape[1]), gamma)),
    ]:
        output = Output(layout, shape, dtype)
        function(*arrays, out=output.array)
        assert_same_bits(output.array, function(*arrays)[0])
        output.assert_only_inside()


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.usefixtures("other_caches")
def test_no_access_outside(rng, dtype, axis, at_end):
    seed = int(rng.integers(2**32))
    assert exit_code_of(call_with_every_size, seed, dtype, axis, at_end) == 0


@given(
    columns=st.booleans(),
    rows=sizes,
    channels=sizes,
    run=sizes,
    machine=st.fixed_dictionaries(
        {
            "itemsize": st.sampled_from([4, 8]),
            "inputs": st.sampled_from([1, 2]),
            "threads": st.integers(1, 200),
            "l2": st.sampled_from([4096, 1 << 18, 1 << 20, 1 << 22]),
            "l3": st.sampled_from([4096, 1 << 23, 1 << 28]),
        }
    ),
)
def test_plans(columns, rows, channels, run, machine):
    """Tiles cover the channels; threads are no more than there are; the grid is the shape's own."""
    if columns:
        run = min(run, 512)
    plan = bncpu.cpu.kernels.tile_plan(columns, rows, channels, run, **machine)
    assert plan["outer_threads"] >= 1
    assert plan["inner_threads"] >= 1
    assert plan["outer_threads"] * plan["inner_threads"] <= machine["threads"]
    assert 1 <= plan["unit_channels"] <= plan["tile_channels"]
    assert (plan["tiles"] - 1) * plan["tile_channels"] < channels
    assert plan["tiles"] * plan["tile_channels"] >= channels

    assert 1 <= plan["parts"] <= plan["pieces"]
    assert plan["segments"] >= 1
    assert plan["pieces"] == -(-rows // plan["piece_rows"]) * plan["segments"]
    default = bncpu.cpu.kernels.tile_plan(columns, rows, channels, run)
    assert {k: plan[k] for k in GRID} == {k: default[k] for k in GRID}


def test_streaming_is_for_large_results():
    def streams(rows):
        plan = bncpu.cpu.kernels.tile_plan(False, rows, 64, 3136, l2=1 << 20, l3=1 << 23)
        return plan["stream"]

    assert not streams(1)
    assert streams(64)
