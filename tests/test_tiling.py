"""How problems are cut: every cut is complete, and no machine's caches or threads change a result.

The plan of a machine decides what stays in cache, who computes it and whether results go past the
caches; the grid of partial sums depends on the shape alone. So with the caches of any other machine
the results are the same to the bit.
"""

import hypothesis.strategies as st
import pytest
from cases import FLOATS, HALVES, ROWS_OF_CHANNELS, SIZES, Output, of_size
from forms import FORMS, SOME_FORMS, assert_same_results, problem, run
from hypothesis import given
from test_bounds import call_with_every_size, exit_code_of

import bncpu
import bncpu.cpu

# L2 and L3 in bytes: of a machine so small that nothing fits and every result streams past the
# caches, of one where tiles fit but results do not, and of one where everything does.
CACHES = {"tiny": (4096, 4096), "small": (1 << 17, 1 << 17), "vast": (1 << 30, 1 << 34)}
GRID = ("rows", "fold", "last", "piece_rows", "segments", "pieces", "parts")
# Channels of an item in the rows form, whose sums stand on the stack, and columns in the other.
MOST_CHANNELS, MOST_COLUMNS = 256, 4096

sizes = st.one_of(
    st.integers(1, 70), st.integers(1, 5000), st.sampled_from([49, 196, 784, 3136, 12544, 1 << 20])
)


@pytest.fixture(params=CACHES)
def other_caches(request, level):
    """Compute as on a machine with other caches; the level's own come back with the level."""
    bncpu.cpu.kernels.set_cache_sizes(*CACHES[request.param])
    yield request.param
    bncpu.cpu.load_level(level)


@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES], ids=str)
@pytest.mark.parametrize("axis", [1, -1])
def test_caches_do_not_change_results(rng, level, dtype, axis):
    for size in SIZES if axis == 1 else ROWS_OF_CHANNELS:
        p = problem(rng, of_size(size), dtype, axis)
        for form in SOME_FORMS[dtype.name]:
            expected = run(form, p, num_threads=1)
            for name, threads in [("tiny", 1), ("tiny", 3), ("small", 3), ("vast", 3)]:
                try:
                    bncpu.cpu.kernels.set_cache_sizes(*CACHES[name])
                    got = run(form, p, num_threads=threads)
                finally:
                    bncpu.cpu.load_level(level)
                assert_same_results(got, expected, f"of {size}, {name}, with {threads} threads")


@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES], ids=str)
@pytest.mark.parametrize("layout", ["c", "off_by_an_item", "cropped", "channels_cut", "reversed"])
@pytest.mark.parametrize("shape", [(3, 17, 33), (4, 5, 2049), (65, 33), (2, 3, 9, 31)], ids=str)
@pytest.mark.usefixtures("other_caches")
def test_outputs_past_the_caches(rng, dtype, layout, shape):
    """Streaming stores want whole aligned vectors; what surrounds an output is not theirs."""
    p = problem(rng, shape, dtype)
    for form in FORMS.values():
        outputs = []

        def new(outputs=outputs):
            outputs.append(Output(layout, shape, dtype))
            return outputs[-1].array

        assert_same_results(run(form, p, out=new), run(form, p))
        for output in outputs:
            output.assert_only_inside()


@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES], ids=str)
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("other_caches", ["tiny"], indirect=True)  # where everything is streamed
@pytest.mark.usefixtures("other_caches")
def test_no_access_outside(rng, dtype, axis, at_end):
    seed = int(rng.integers(2**32))
    assert exit_code_of(call_with_every_size, seed, dtype, axis, at_end) == 0


KIB, MIB = 1 << 10, 1 << 20
# L2 of one core and L3 of them all: many cores with little each and a large L3, the same with none
# (l3 = l2), cores with a large L2, and desktops.
MACHINES = {
    "small L2": (256 * KIB, 40 * MIB),
    "small L2 and nothing behind": (256 * KIB, 256 * KIB),
    "desktop": (512 * KIB, 32 * MIB),
    "server": (MIB, 32 * MIB),
    "large L2": (2 * MIB, 60 * MIB),
    "large L2 and nothing behind": (2 * MIB, 2 * MIB),
    "tiny": (4096, 4096),
}
# (columns, rows, channels, run): feature maps of ResNet for a batch of 32, and rows of features.
PROBLEMS = {
    "64 x 112 x 112": (False, 32, 64, 12544),
    "256 x 56 x 56": (False, 32, 256, 3136),
    "512 x 28 x 28": (False, 32, 512, 784),
    "1024 x 14 x 14": (False, 32, 1024, 196),
    "2048 x 7 x 7": (True, 32, 2048, 49),
    "one image": (False, 1, 64, 12544),
    "features": (True, 4096, 1024, 1),
    "few features": (True, 1_000_000, 8, 1),
    "one channel": (False, 1, 1, 1 << 24),
}


def check_plan(plan, columns, rows, channels, run, *, threads, **_):
    """Check what holds for every problem on every machine."""
    assert plan["outer_threads"] >= 1
    assert plan["inner_threads"] >= 1
    assert plan["outer_threads"] * plan["inner_threads"] <= threads
    assert min(plan["outer_threads"], plan["inner_threads"]) == 1
    assert plan["outer_threads"] <= plan["tiles"] <= channels
    assert plan["tile_channels"] == -(-channels // plan["tiles"])
    assert 1 <= plan["units"] <= plan["tile_channels"]
    widest = -(-plan["tile_channels"] // plan["units"])
    if columns:
        assert widest == 1 or widest * run * plan["fold"] <= MOST_COLUMNS
    else:
        assert widest <= MOST_CHANNELS

    assert (plan["rows"] - 1) * plan["fold"] + plan["last"] == rows
    assert 1 <= plan["last"] <= plan["fold"]
    assert plan["fold"] == 1 or (columns and plan["tiles"] == plan["units"] == 1)
    assert 1 <= plan["parts"] <= plan["pieces"]
    assert plan["segments"] >= 1
    assert plan["pieces"] == -(-plan["rows"] // plan["piece_rows"]) * plan["segments"]
    # The grid of partial sums is the shape's own.
    default = bncpu.cpu.kernels.tile_plan(columns, rows, channels, run)
    assert {k: plan[k] for k in GRID} == {k: default[k] for k in GRID}


@given(
    columns=st.booleans(),
    rows=sizes,
    channels=sizes,
    run=sizes,
    machine=st.fixed_dictionaries(
        {
            "itemsize": st.sampled_from([2, 4, 8]),
            "inputs": st.sampled_from([1, 2, 3]),
            "passes": st.sampled_from([1, 2]),
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
    check_plan(plan, columns, rows, channels, run, **machine)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("which", PROBLEMS)
@pytest.mark.parametrize("threads", [1, 2, 8, 64])
@pytest.mark.parametrize(("itemsize", "inputs"), [(4, 1), (4, 2), (2, 1), (8, 2)])
def test_plans_of_machines(machine, which, threads, itemsize, inputs):
    """No thread that has a megabyte to read is idle, and what can stay in its caches does."""
    l2, l3 = MACHINES[machine]
    columns, rows, channels, run = PROBLEMS[which]
    machine = {"itemsize": itemsize, "inputs": inputs, "threads": threads, "l2": l2, "l3": l3}
    plan = bncpu.cpu.kernels.tile_plan(*PROBLEMS[which], **machine)
    check_plan(plan, *PROBLEMS[which], **machine)
    channel = rows * run * itemsize * inputs
    used = plan["outer_threads"] * plan["inner_threads"]
    assert used >= min(threads, channels * channel // MIB)
    # In a core's own L2, or all tiles together in the L3; but columns too few to be worth a tile.
    least = -(-8192 // (run * itemsize)) if columns else 1
    if plan["inner_threads"] == 1 and 2 * channel * min(least, channels) <= l2:
        tile = plan["tile_channels"] * channel
        assert tile <= l2 or tile * used <= l3


def test_streaming_is_for_large_results():
    def streams(rows):
        plan = bncpu.cpu.kernels.tile_plan(False, rows, 8, 3136, l2=1 << 20, l3=1 << 23)
        return plan["stream"]

    assert not streams(1)
    assert streams(64)
