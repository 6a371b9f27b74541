"""The peers by name: which there are, which are installed, and why not.

A peer is a module with `contenders(problem, operation)`, imported when it is asked for, and with
`threads(number)`, if threads are something it has.
"""

from __future__ import annotations

import contextlib
import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from bncpu.bench.measure import Contender
    from bncpu.bench.operations import Operation, Problem


class Peer(NamedTuple):
    """Where a peer's contenders are, and how it is installed."""

    title: str
    module: str
    install: str


PEERS = {
    "numpy": Peer("NumPy", "bncpu.bench.textbook", "numpy"),
    "torch": Peer("PyTorch", "bncpu.bench.pytorch", "torch"),
    "jax": Peer("JAX", "bncpu.bench.xla", "jax"),
}

GPU_PEERS = {
    "cupy": Peer("CuPy", "bncpu.bench.textbook", "cupy-cuda13x"),
    "torch": PEERS["torch"],
}


def known(device: str) -> dict[str, Peer]:
    """Return the peers on a device, by name."""
    return PEERS if device == "cpu" else GPU_PEERS


class Found(NamedTuple):
    """The peers that can be measured, as modules by name, and why others cannot."""

    modules: dict[str, Any]
    absent: dict[str, str]

    def contenders(self, problem: Problem, operation: Operation) -> dict[str, Contender]:
        """Return the contenders of every peer, by name."""
        return {
            name: contender
            for module in self.modules.values()
            for name, contender in module.contenders(problem, operation).items()
        }


@contextlib.contextmanager
def using(names: Iterable[str], threads: int, device: str = "cpu") -> Iterator[Found]:
    """Import peers and set their threads inside a with statement.

    Parameters
    ----------
    names : iterable of str
        Out of those that are known on the device.
    threads : int
        As many as bncpu uses.
    device : {"cpu", "cuda"}
        Where the arrays are.
    """
    found = Found({}, {})
    with contextlib.ExitStack() as stack:
        for name in names:
            try:
                module = importlib.import_module(known(device)[name].module)
                if device == "cuda" and hasattr(module, "check_gpu"):
                    module.check_gpu()
                if hasattr(module, "threads"):
                    stack.enter_context(module.threads(threads))
            except ImportError:
                found.absent[name] = f"not installed; pip install {known(device)[name].install}"
            except ValueError as error:
                found.absent[name] = f"skipped: {error}"
            else:
                found.modules[name] = module
        yield found


def version(name: str) -> str | None:
    """Return the version of a peer's package, None where it is not installed."""
    try:
        return metadata.version(PEERS[name].install)
    except metadata.PackageNotFoundError:
        return None
