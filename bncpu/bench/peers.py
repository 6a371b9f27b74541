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
def using(names: Iterable[str], threads: int) -> Iterator[Found]:
    """Import peers and set their threads inside a with statement.

    Parameters
    ----------
    names : iterable of str
        Out of PEERS.
    threads : int
        As many as bncpu uses.
    """
    found = Found({}, {})
    with contextlib.ExitStack() as stack:
        for name in names:
            try:
                module = importlib.import_module(PEERS[name].module)
                if hasattr(module, "threads"):
                    stack.enter_context(module.threads(threads))
            except ImportError:
                found.absent[name] = f"not installed; pip install {PEERS[name].install}"
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
