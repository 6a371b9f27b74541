"""Sizes of the caches, as the operating system reports them; defaults where it does not."""

from pathlib import Path
from typing import NamedTuple

# Where nothing is reported: a small core of the last ten years, so that tiles fit everywhere.
DEFAULT_L2 = 512 * 1024
DEFAULT_L3 = 8 * 1024 * 1024

_SYSFS = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1024, "M": 1024**2, "G": 1024**3}


class CacheSizes(NamedTuple):
    """Bytes of one core's L2, and of the L3 that its cores share."""

    l2: int
    l3: int


def cache_sizes(folder: Path = _SYSFS) -> CacheSizes:
    """Return the cache sizes of the first core, read from Linux' sysfs."""
    found: dict[int, int] = {}
    try:
        for index in sorted(folder.glob("index[0-9]*")):
            if (index / "type").read_text().strip() in ("Unified", "Data"):
                found[int((index / "level").read_text())] = _bytes((index / "size").read_text())
    except (OSError, ValueError):
        found = {}
    l2 = found.get(2) or DEFAULT_L2
    return CacheSizes(l2, max(found.get(3) or DEFAULT_L3, l2))


def _bytes(text: str) -> int:
    text = text.strip()
    return int(text[:-1]) * _UNITS[text[-1]] if text[-1:] in _UNITS else int(text)
