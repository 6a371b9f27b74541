"""How calls are cut into launches: a pure function, so no GPU and no emulator is needed."""

import subprocess
import sys
from math import prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bncpu.cuda import plan as planning
from bncpu.cuda.plan import PARAMETERS, Access, Device, access, options, plan, widths

H200 = Device(processors=132, shared_per_block=227 << 10)
T4 = Device(processors=40, shared_per_block=64 << 10)
OPERATIONS = ("moments", "train", "infer", "backward", "infer_backward")
ALIGNED = Access(adjoining=True, rows=8, channels=8)
STRIDED = Access(adjoining=False, rows=8, channels=8)

shapes = st.tuples(st.integers(1, 80), st.integers(1, 80), st.integers(1, 300))
itemsizes = st.sampled_from([2, 4, 8])
ways = st.builds(
    Access, st.booleans(), st.sampled_from([1, 2, 4, 8]), st.just(1)
) | st.sampled_from([ALIGNED, STRIDED])
devices = st.sampled_from([H200, T4, Device(1, 0)])


def fields_of(planned):
    return dict(planned.fields)


def threads_of(planned):
    """Return every (part, thread) as arrays that broadcast, and the fields of the plan."""
    f = fields_of(planned)
    parts = f["tiles"] * f["row_parts"] * f["column_parts"]
    main = next(launch for launch in planned.launches if not launch.entry.startswith("merge"))
    return f, parts, main.block


def covered(planned):
    """Count how often each element is visited, by the arithmetic of Part and Walk in kernels.cu."""
    f, items, block = threads_of(planned)
    seen = np.zeros((f["rows"], f["channels"] * f["run"]), np.int64)
    for item in range(items):
        parts = f["row_parts"] * f["column_parts"]
        tile, index = divmod(item, parts)
        c0 = tile * f["tile_channels"]
        channels = min(f["tile_channels"], f["channels"] - c0)
        row_part, column_part = divmod(index, f["column_parts"])
        k0 = row_part * f["part_rows"]
        k1 = min(k0 + f["part_rows"], f["rows"])
        v0 = column_part * f["part_vectors"]
        v1 = min(v0 + f["part_vectors"], channels * f["run"] // planned.vector)
        assert k0 < k1, "no part is empty"
        assert v0 < v1, "no part is empty"
        assert channels * f["run"] % planned.vector == 0
        for thread in range(block):
            row_lane, lane = divmod(thread, f["lanes"])
            if row_lane >= f["row_lanes"]:
                continue
            rows = np.arange(k0 + row_lane, k1, f["row_lanes"])
            vectors = np.arange(v0 + lane, v1, f["lanes"])
            columns = c0 * f["run"] + (
                vectors[:, None] * planned.vector + np.arange(planned.vector)
            ).reshape(-1)
            seen[np.ix_(rows, columns)] += 1
    return seen


@given(
    st.sampled_from(OPERATIONS),
    itemsizes,
    st.tuples(st.integers(1, 40), st.integers(1, 24), st.integers(1, 80)),
    ways,
    devices,
    st.booleans(),
)
def test_every_element_is_visited_once(operation, itemsize, shape, way, device, fills_mask):
    assert (covered(plan(operation, itemsize, *shape, way, device, fills_mask)) == 1).all()


def test_every_element_of_several_parts_is_visited_once():
    for shape in ((3, 2, 40_000), (5000, 3, 1), (40, 20, 1000), (700, 300, 1), (130, 70, 9)):
        planned = plan("train", 4, *shape, ALIGNED, Device(1, 0))
        f = fields_of(planned)
        assert f["tiles"] * f["row_parts"] * f["column_parts"] > 1
        assert (covered(planned) == 1).all()


@given(st.sampled_from(OPERATIONS), itemsizes, shapes, ways, devices, st.booleans())
def test_what_every_plan_keeps_to(operation, itemsize, shape, way, device, fills_mask):
    planned = plan(operation, itemsize, *shape, way, device, fills_mask)
    f = fields_of(planned)
    assert planned.vector in widths(itemsize, planned.tiled)
    aligned = way.rows if planned.tiled else way.channels
    assert aligned % planned.vector == 0
    assert way.adjoining or not planned.tiled
    assert 1 <= f["lanes"] * f["row_lanes"] <= planning.THREADS
    for launch in planned.launches:
        assert launch.block % planning.WARP == 0
        assert launch.block <= planning.THREADS
        assert 1 <= launch.grid <= planning.GRID_LIMIT
        limit = device.shared_per_block if launch.entry.endswith("_tile") else 64 << 10
        assert launch.shared <= limit
    if planned.tiled:
        assert f["lanes"] * planned.vector == f["tile_channels"] * f["run"], "a column each"
        assert f["column_parts"] == 1
    else:
        assert f["tile_channels"] == 1
    if f["mask_in_map"]:
        per_byte = 8 // planned.vector
        assert f["lanes"] % per_byte == 0
        assert f["part_vectors"] % per_byte == 0
        assert f["tile_channels"] * f["run"] % 8 == 0
    packs = any(launch.entry == "pack_mask" for launch in planned.launches)
    assert packs == (fills_mask and not f["mask_in_map"])


@given(st.sampled_from(OPERATIONS), itemsizes, shapes, ways)
def test_sums_are_formed_over_parts_of_the_shape_alone(operation, itemsize, shape, way):
    first, *others = (
        plan(operation, itemsize, *shape, way, Device(processors, shared))
        for processors, shared in ((1, 0), (10_000, 0), (132, 48 << 10), (40, 64 << 10))
    )
    for other in others:
        assert other.mode == "whole" or other == first


def test_a_plan_is_pure():
    given = ("train", 2, 32, 64, 3136, ALIGNED, H200)
    before = plan(*given)
    plan.cache_clear()
    assert plan(*given) == before


@pytest.mark.parametrize(
    ("operation", "entries"),
    [
        ("moments", ["sum_moments", "merge_moments"]),
        ("train", ["sum_moments", "merge_moments", "map_forward"]),
        ("infer", ["map_forward"]),
        ("backward", ["sum_gradients", "merge_gradients", "map_backward"]),
        ("infer_backward", ["frozen_backward", "merge_gradients"]),
    ],
)
def test_the_launches_of_a_large_call(operation, entries):
    planned = plan(operation, 2, 256, 64, 12544, ALIGNED, H200)
    assert planned.mode == "parts"
    assert [launch.entry for launch in planned.launches] == entries
    assert planned.launches[0].grid >= 7 * H200.processors
    of_sums = fields_of(planned)["row_parts"] * fields_of(planned)["column_parts"]
    assert planned.workspace == (0 if operation == "infer" else 64 * (of_sums + 1) * 24)


def test_one_part_needs_no_merge():
    planned = plan("backward", 4, 32, 5000, 100, ALIGNED, Device(1, 0))
    assert [launch.entry for launch in planned.launches] == ["sum_gradients", "map_backward"]


@pytest.mark.parametrize(
    ("shape", "device", "mode"),
    [
        ((8, 64, 1024), H200, "whole"),  # small, though fewer channels than processors
        ((4, 256, 784), H200, "whole"),
        ((32, 1024, 196), H200, "whole"),  # a channel of 12.5 kB each
        ((32, 64, 12544), H200, "parts"),  # a channel of 1.6 MB
        ((32, 512, 784), T4, "parts"),  # too large for a block there
        ((256, 2048, 49), T4, "parts"),
    ],
    ids=str,
)
def test_the_mode(shape, device, mode):
    assert plan("train", 4, *shape, ALIGNED, device).mode == mode


def test_few_channels_still_fill_a_device():
    for shape in ((4, 3, 1 << 20), (20, 6, 65536), (4, 128, 1 << 20), (401_408, 64, 1)):
        for itemsize in (2, 4, 8):
            planned = plan("train", itemsize, *shape, ALIGNED, H200)
            assert planned.launches[0].grid > 3 * H200.processors, (shape, itemsize)


@pytest.mark.parametrize(
    "shape",
    [
        (1 << 31, 3, 1),
        (2, 3, 1 << 32),
        (3, 3_000_000_001, 1),
        (3, 1 << 31, 64),
        (1 << 33, 1, 1),
        (1, 1, (1 << 32) + 1),
    ],
    ids=str,
)
def test_more_than_two_to_the_31_elements(shape):
    for operation in OPERATIONS:
        planned = plan(operation, 2, *shape, ALIGNED, H200, True)
        f = fields_of(planned)
        assert all(launch.grid <= 2**31 - 1 for launch in planned.launches)
        rows = f["row_parts"] * f["part_rows"]
        vectors = f["column_parts"] * f["part_vectors"]
        assert rows >= shape[0]
        assert rows - f["part_rows"] < shape[0]
        assert vectors * planned.vector >= f["tile_channels"] * shape[2]
        assert f["tiles"] * f["tile_channels"] >= shape[1]
        assert planned.workspace < prod(shape) * 2 * 64
        parameters = np.zeros(1, PARAMETERS)
        for name, value in planned.fields:
            parameters[name] = value
            assert parameters[name][0] == value, "it fits its field"


def test_access_is_what_all_arrays_have_in_common():
    walk = (4, 10, 6, 64)  # itemsize, rows, channels, run
    plain = (1 << 20, 6 * 64, 64)
    assert access(*walk, [plain]) == Access(adjoining=True, rows=8, channels=8)
    assert access(*walk, [plain, ((1 << 20) + 8, 6 * 64, 64)]) == Access(True, 2, 2)
    assert access(*walk, [plain, (1 << 20, 7 * 65, 65)]) == Access(False, 1, 1)
    assert access(*walk, [(1 << 20, -6 * 64, 66)]) == Access(False, 8, 2)
    assert access(4, 1, 1, 64, [(1 << 20, 5, 3)]) == Access(True, 8, 8), "strides over one step"


def test_options_name_the_instance():
    planned = plan("train", 4, 32, 64, 49, ALIGNED, H200)
    assert planned.tiled
    assert options("float32", planned)[2:] == (
        "-DBNCPU_STORAGE=float32",
        "-DBNCPU_VECTOR=4",
        "-DBNCPU_TILED=1",
    )


def test_the_kernels_are_beside_the_plan():
    assert Path(planning.__file__).with_name("kernels.cu").is_file()


def test_a_plan_needs_no_cupy():
    code = "import sys, bncpu.cuda.plan; sys.exit('cupy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
