"""How a call is cut into launches: a pure function of shape, dtype, alignment and device.

No array and no device is touched, and nothing but NumPy is imported. The kernels (kernels.cu) take
one structure by value, PARAMETERS here, `Parameters` there.

A call walks rows by channels by runs (bncpu.layout). Its values are cut into tiles of neighbouring
channels, and a tile into parts: of its rows, and of its columns where one row is long. A block
takes one part; its threads stand side by side along a row (`lanes`) and one below the other
(`row_lanes`), each with one vector of 16 bytes at a time where the memory allows. How many parts
there are follows from the shape, never from the device: they are what sums are formed over, and
their number decides the last bits.

Two modes:

"whole"
    One block keeps its tile in shared memory between the sums and the results, so that the memory
    is read once, in one launch. Where the tile fits, and tiles are enough for the device or the
    arrays are small.
"parts"
    Sums of every part, merged in a fixed order by a second launch where there are several, and the
    results by the last.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

Operation = Literal["moments", "train", "infer", "backward", "infer_backward"]

THREADS = 256  # of a block, at most
WARP = 32
# Blocks that keep any device of today busy: 132 processors with eight each.
BLOCKS = 1056
# Vectors a thread should have before more parts are made; fewer do not pay for a block's start.
VECTORS_PER_THREAD = 8
# A run this long is walked along; channels of shorter ones are walked side by side, if they adjoin.
LONG_RUN = 64
# Bytes of the arrays below which one launch beats a full device.
SMALL = 2 << 20
# Bytes that neighbouring lanes should cover of a row: a cache line.
LINE = 128
GRID_LIMIT = 2**31 - 1

STATE_BYTES = 24  # count, first and second sum of a channel's part, in double
FIELDS = 8  # coefficients of a channel
MOST_VALUES = 8  # of a vector

_ARRAY = np.dtype([("data", np.uint64), ("row", np.int64), ("channel", np.int64)], align=True)
_VALUES = np.dtype([("data", np.uint64), ("step", np.int64), ("wide", np.int64)], align=True)
ARRAYS = ("x", "residual", "dy", "out", "dresidual")
VALUES = (
    "mean",
    "var",
    "invstd",
    "m2",
    "gamma",
    "beta",
    "dgamma",
    "dbeta",
    "running_mean",
    "running_var",
)
PARAMETERS = np.dtype(
    [
        *((name, _ARRAY) for name in ARRAYS),
        *((name, _VALUES) for name in VALUES),
        ("mask", np.uint64),
        ("partials", np.uint64),
        ("eps", np.float64),
        ("momentum", np.float64),
        ("rows", np.int64),
        ("channels", np.int64),
        ("run", np.int64),
        ("tile_channels", np.int64),
        ("tiles", np.int64),
        ("row_parts", np.int64),
        ("part_rows", np.int64),
        ("column_parts", np.int64),
        ("part_vectors", np.int64),
        ("lanes", np.int32),
        ("row_lanes", np.int32),
        ("relu", np.int32),
        ("mask_in_map", np.int32),
    ],
    align=True,
)
"""What every kernel takes, by value; a pointer that is 0 is an array that is not given."""


class Device(NamedTuple):
    """What the choice of mode needs of a device: its processors, and the bytes of a block."""

    processors: int
    shared_per_block: int  # with the opt-in


class Access(NamedTuple):
    """How the arrays of a call lie in memory.

    adjoining: whether the runs of neighbouring channels adjoin in every array.
    rows: the longest vector, in elements, to which every row of every array is aligned.
    channels: the same for every run of every channel.
    """

    adjoining: bool
    rows: int
    channels: int


class Launch(NamedTuple):
    """One launch of an entry point of the module, one-dimensional."""

    entry: str
    grid: int
    block: int
    shared: int  # dynamic shared memory, in bytes


class Plan(NamedTuple):
    """The launches of a call, in order, and what they want.

    vector: the values of a vector; tiled: whether a tile has several channels. Both are compiled
    in, see `options`.
    workspace: bytes for partial sums, which need not be cleared.
    fields: the integers of PARAMETERS that the plan decides, by name.
    """

    mode: Literal["whole", "parts"]
    vector: int
    tiled: bool
    launches: tuple[Launch, ...]
    workspace: int
    fields: tuple[tuple[str, int], ...]


def options(dtype: str, plan: Plan) -> tuple[str, ...]:
    """Return the compiler options for the instance that a plan runs on."""
    return instance(dtype, plan.vector, plan.tiled)


def instance(dtype: str, vector: int, tiled: bool) -> tuple[str, ...]:
    """Return the options of one instance of the kernels: a module is compiled for each."""
    return (
        "--std=c++17",
        "--fmad=false",  # the kernels say which products are fused
        f"-DBNCPU_STORAGE={dtype}",
        f"-DBNCPU_VECTOR={vector}",
        f"-DBNCPU_TILED={int(tiled)}",
    )


def widths(itemsize: int, tiled: bool) -> tuple[int, ...]:
    """Return the lengths of vectors that are compiled for values of a size, longest first.

    Where a tile has several channels, every value of a vector wants coefficients and sums of its
    own: those of eight would leave registers for few threads.
    """
    return {8: (2, 1), 4: (4, 1), 2: (4, 1) if tiled else (8, 4, 1)}[itemsize]


def access(
    itemsize: int,
    rows: int,
    channels: int,
    run: int,
    arrays: Iterable[tuple[int, int, int]],
) -> Access:
    """Return how arrays lie, each given as (address, row stride, channel stride), in elements.

    Parameters
    ----------
    itemsize
        Bytes per element; the addresses are in bytes.
    rows, channels, run
        The walk; a stride over one row or one channel does not count.
    arrays
        All arrays of x's shape that the call reads or writes.
    """
    adjoining, of_rows, of_channels = True, MOST_VALUES, 0
    for address, row, channel in arrays:
        of_rows = gcd(of_rows, address // itemsize, row if rows > 1 else 0)
        if channels > 1:
            of_channels = gcd(of_channels, channel)
            adjoining = adjoining and channel == run
    return Access(adjoining, of_rows, gcd(of_rows, of_channels))


@lru_cache(maxsize=1024)
def plan(
    operation: Operation,
    itemsize: int,
    rows: int,
    channels: int,
    run: int,
    access: Access,
    device: Device,
    fills_mask: bool = False,
) -> Plan:
    """Return the launches for a walk over rows by channels by runs, none of them 0.

    Parameters
    ----------
    operation
        What is computed.
    itemsize
        Bytes per element of x.
    rows, channels, run
        K, C and S of the walk: K * S values per channel.
    access
        How the arrays lie in memory.
    device
        Where it runs.
    fills_mask
        Whether a forward fills a mask.
    """
    tiled = access.adjoining and channels > 1 and run < LONG_RUN
    vector = _vector(itemsize, channels, run, access, tiled)
    tile_channels, lanes, row_lanes, columns = (
        _short_runs(itemsize, rows, channels, run, vector)
        if tiled
        else _long_run(rows, run, vector)
    )
    tiles = -(-channels // tile_channels)
    block = -(-lanes * row_lanes // WARP) * WARP

    # Parts of rows first, then of columns, as many as fill a device.
    strides = -(-columns // lanes)  # that the lanes take along a row
    heights = -(-rows // row_lanes)
    parts = min(-(-BLOCKS // tiles), -(-heights * strides // VECTORS_PER_THREAD))
    part_heights = -(-heights // min(parts, heights))
    row_parts = -(-heights // part_heights)
    part_strides = -(-strides // min(strides, max(1, parts // row_parts)))
    column_parts = -(-strides // part_strides)

    # A tile in shared memory: a slot for every vector of a thread, of x and in backward of dy.
    arrays = 2 if operation == "backward" else 1
    shared = _shared(itemsize, vector, tiled, block, tile_channels)
    kept = heights * strides * block * vector * itemsize * arrays
    size = rows * channels * run * itemsize * arrays
    whole = (
        operation in ("train", "backward")
        and shared + kept <= device.shared_per_block
        and (tiles >= device.processors or size <= SMALL)
    )
    if whole:
        part_heights, row_parts, part_strides, column_parts = heights, 1, strides, 1
    parts = row_parts * column_parts

    # A byte of the mask has the bits of 8 / vector neighbouring lanes, which put them together.
    per_byte = MOST_VALUES // vector
    width = run * (tile_channels if tiled else 1)
    row = run * (channels if tiled else 1)
    mask_in_map = width % MOST_VALUES == 0 and row % MOST_VALUES == 0 and lanes % per_byte == 0

    grid = min(tiles * parts, GRID_LIMIT)  # blocks take turns
    launches = []

    def launch(entry: str) -> None:
        extra = kept if entry.endswith("_tile") else 0
        launches.append(Launch(entry, grid, block, shared + extra))

    merge = "merge_moments" if operation in ("moments", "train") else "merge_gradients"
    if whole:
        launch(f"{operation}_tile")
    else:
        if operation in ("moments", "train"):
            launch("sum_moments")
        elif operation == "backward":
            launch("sum_gradients")
        elif operation == "infer_backward":
            launch("frozen_backward")
        if parts > 1 and operation != "infer":
            threads = min(THREADS, max(WARP, 1 << (parts - 1).bit_length()))
            launches.append(
                Launch(merge, min(channels, GRID_LIMIT), threads, threads * STATE_BYTES)
            )
        if operation in ("train", "infer"):
            launch("map_forward")
        elif operation == "backward":
            launch("map_backward")
    if fills_mask and not mask_in_map:
        size = -(-rows * channels * run // MOST_VALUES)
        launches.append(Launch("pack_mask", min(-(-size // THREADS), BLOCKS * 8), THREADS, 0))

    fields = (
        ("rows", rows),
        ("channels", channels),
        ("run", run),
        ("tile_channels", tile_channels),
        ("tiles", tiles),
        ("row_parts", row_parts),
        ("part_rows", part_heights * row_lanes),
        ("column_parts", column_parts),
        ("part_vectors", part_strides * lanes),
        ("lanes", lanes),
        ("row_lanes", row_lanes),
        ("mask_in_map", int(mask_in_map)),
    )
    # Sums of the parts, and behind them those of the channels, which the results are made with.
    workspace = 0 if operation == "infer" else channels * (parts + 1) * STATE_BYTES
    return Plan("whole" if whole else "parts", vector, tiled, tuple(launches), workspace, fields)


def _vector(itemsize: int, channels: int, run: int, access: Access, tiled: bool) -> int:
    # The longest vector of which every row of a tile is made up, and to which it is aligned.
    for vector in widths(itemsize, tiled):
        aligned, row = (access.rows, channels * run) if tiled else (access.channels, run)
        if aligned % vector == 0 and row % vector == 0:
            return vector
    raise AssertionError("a vector of one value always fits")


def _long_run(rows: int, run: int, vector: int) -> tuple[int, int, int, int]:
    # One channel: lanes along its run, an equal share of vectors each, in whole bytes of a mask.
    columns = run // vector
    strides = -(-columns // THREADS)
    lanes = -(-columns // strides)
    lanes = min(-(-lanes // MOST_VALUES) * MOST_VALUES, THREADS) if lanes > MOST_VALUES else lanes
    return 1, lanes, min(rows, max(1, THREADS // lanes)), columns


def _short_runs(
    itemsize: int, rows: int, channels: int, run: int, vector: int
) -> tuple[int, int, int, int]:
    # Channels side by side: every lane keeps to one vector of columns.
    # Tiles begin at whole vectors, and if they can at whole bytes of a mask.
    step = MOST_VALUES // gcd(run, MOST_VALUES)
    if step * run > THREADS * vector:
        step = vector // gcd(run, vector)
    wanted = max(LINE // itemsize, -(-THREADS // rows) * vector) // run
    most = THREADS * vector // run
    tile_channels = max(step, min(wanted, most) // step * step)
    tile_channels = min(tile_channels, channels)
    lanes = tile_channels * run // vector
    return tile_channels, lanes, min(rows, THREADS // lanes), lanes


def _shared(itemsize: int, vector: int, tiled: bool, block: int, tile_channels: int) -> int:
    # Sums of every thread (of every column, where tiles have several), and the coefficients of the
    # channels.
    sums = block * (vector if tiled else 1) * STATE_BYTES
    table = -(-tile_channels * FIELDS // 4) * 4 * max(itemsize, 4)
    return sums + table
