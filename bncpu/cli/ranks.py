"""The ranks of mpiexec among which a command runs, or the one process without."""

import sys
import time
from collections.abc import Callable
from typing import Any

from bncpu import distributed

# For which a rank that has failed waits for rank 0 to tell of it, if it is the same to all.
RANK_0_SECONDS = 0.5


class Ranks:
    """The ranks among which a command runs: one, until it asks for those of mpiexec."""

    def __init__(self) -> None:
        self.comm: Any = None
        self.rank, self.size = 0, 1

    def meet(self) -> None:
        """Find the others."""
        self.comm = distributed.mpi("--distributed").COMM_WORLD
        self.rank, self.size = self.comm.Get_rank(), self.comm.Get_size()

    def from_first(self, make: Callable[[], Any]) -> Any:
        """Return on every rank what `make` returns on the first."""
        made = make() if self.rank == 0 else None
        return self.comm.bcast(made) if self.comm else made

    def say(self, text: str) -> None:
        """Print a line, on the first rank."""
        if self.rank == 0:
            print(text, flush=self.size > 1)

    def end_all_after(self, tell: Callable[[], None], status: int) -> None:
        """Tell of an error; if there are others, end them and this one.

        Others that wait for this rank would do so for ever. An error that all have is told by the
        first, which ends the rest while they wait.
        """
        if self.rank:
            time.sleep(RANK_0_SECONDS)
        tell()
        if self.size > 1:
            sys.stderr.flush()
            self.comm.Abort(status)
