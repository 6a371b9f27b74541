"""Sizes of caches from Linux' sysfs, from folders that stand in for those of other machines."""

from pathlib import Path

import pytest

import bncpu.cpu
from bncpu.cpu.caches import DEFAULT_L2, DEFAULT_L3, cache_sizes

# Level, type and size of each index folder, as machines report them.
MACHINES = {
    "server with a shared L3": (
        [(1, "Data", "48K"), (1, "Instruction", "32K"), (2, "Unified", "2048K"),
         (3, "Unified", "33792K")],
        (2 << 20, 33 << 20),
    ),
    "older server": (
        [(1, "Data", "32K"), (1, "Instruction", "32K"), (2, "Unified", "256K"),
         (3, "Unified", "20480K")],
        (256 << 10, 20 << 20),
    ),
    "sizes in megabytes and gigabytes": (
        [(1, "Data", "32K"), (2, "Unified", "1M"), (3, "Unified", "1G")],
        (1 << 20, 1 << 30),
    ),
    "sizes in bytes": (
        [(1, "Data", "32768"), (2, "Unified", "524288"), (3, "Unified", "16777216")],
        (512 << 10, 16 << 20),
    ),
    "split L2": (
        [(1, "Data", "32K"), (2, "Data", "256K"), (2, "Instruction", "1024K"),
         (3, "Unified", "6144K")],
        (256 << 10, 6 << 20),
    ),
    "another order": (
        [(3, "Unified", "8192K"), (2, "Unified", "512K"), (1, "Data", "32K")],
        (512 << 10, 8 << 20),
    ),
    "an L3 smaller than the L2": (
        [(1, "Data", "32K"), (2, "Unified", "4096K"), (3, "Unified", "2048K")],
        (4 << 20, 4 << 20),
    ),
    "nothing but an L1": ([(1, "Data", "32K")], (DEFAULT_L2, DEFAULT_L3)),
}  # fmt: skip


def sysfs(folder, indexes):
    """Write what Linux would have under /sys/devices/system/cpu/cpu0/cache."""
    for i, (level, kind, size) in enumerate(indexes):
        index = folder / f"index{i}"
        index.mkdir()
        for name, text in [("level", level), ("type", kind), ("size", size)]:
            (index / name).write_text(f"{text}\n")
        (index / "shared_cpu_list").write_text("0\n")
    (folder / "uevent").write_text("")
    return folder


@pytest.mark.parametrize("name", MACHINES)
def test_machines(tmp_path, name):
    indexes, expected = MACHINES[name]
    sizes = cache_sizes(sysfs(tmp_path, indexes))
    assert (sizes.l2, sizes.l3) == expected


@pytest.mark.parametrize(
    "spoil",
    [
        lambda index: (index / "size").write_text("lots\n"),
        lambda index: (index / "size").write_text(""),
        lambda index: (index / "size").unlink(),
        lambda index: (index / "level").write_text("two\n"),
        lambda index: (index / "type").unlink(),
    ],
    ids=["no number", "empty", "no size", "no level", "no type"],
)
def test_what_cannot_be_read_gives_the_defaults(tmp_path, spoil):
    indexes, _ = MACHINES["server with a shared L3"]
    spoil(sysfs(tmp_path, indexes) / "index2")
    sizes = cache_sizes(tmp_path)
    assert (sizes.l2, sizes.l3) == (DEFAULT_L2, DEFAULT_L3)


def test_no_folder_gives_the_defaults(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        sizes = cache_sizes(folder)
        assert (sizes.l2, sizes.l3) == (DEFAULT_L2, DEFAULT_L3)


def test_a_size_of_nothing_gives_the_default(tmp_path):
    """Some virtual machines report caches of no size."""
    sizes = cache_sizes(sysfs(tmp_path, [(2, "Unified", "0K"), (3, "Unified", "0K")]))
    assert (sizes.l2, sizes.l3) == (DEFAULT_L2, DEFAULT_L3)


def test_this_machine():
    sizes = bncpu.cpu.cache_sizes()
    assert sizes.l2 > 0
    assert sizes.l3 >= sizes.l2
    if Path("/sys/devices/system/cpu/cpu0/cache/index2/size").exists():
        assert sizes.l2 % 1024 == 0
