"""Where the batch of a step is: all in this process, or shared by the ranks of a communicator.

Data-parallel training: every rank holds a shard of the examples and the whole model. Not a
scheduler and no parameter server; the training loop itself is `fit`. Gradients go around once a
step, in one message after backward. Sending each layer's as soon as it is there, while backward
goes on, was measured and does not pay at the size of these networks (docs/scaling.md).
"""

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bncpu.distributed import check_agreement, communicator, debugging, mpi
from bncpu.nn.base import Array, Layer
from bncpu.nn.losses import SoftmaxCrossEntropy
from bncpu.nn.optimizers import SGD


class Process:
    """All examples and every batch are in this process.

    Parameters
    ----------
    examples : int
        How many there are.
    """

    def __init__(self, examples: int) -> None:
        self.examples = examples
        self._loss = SoftmaxCrossEntropy()

    def begin(self, model: Layer, optimizer: SGD) -> None:
        """Give all processes the same state of model and optimizer."""

    def own(self, batch: NDArray[np.intp]) -> NDArray[np.intp]:
        """Return the rows of a batch that are here, as rows of the examples that are here."""
        return batch

    def loss(self, logits: Array, labels: NDArray[Any], n: int) -> float:  # noqa: ARG002
        """Return the mean loss of a batch of n examples, from the logits of those here."""
        return self._loss.forward(logits, labels)

    def loss_gradient(self) -> Array:
        """Return the gradient of that mean with respect to the logits of the examples here."""
        return self._loss.backward()

    def add_up(self, gradients: Mapping[str, Array]) -> None:
        """Turn gradients by the examples here into those by the batch, in place."""

    def fraction(self, right: int, n: int) -> float:
        """Return how many of all examples are right, from the n here of which `right` are."""
        return right / n


class Ranks(Process):
    """The examples are the shards of all ranks, in the order of the ranks.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        The ranks.
    examples : int
        How many are here; the attribute is how many there are.

    Raises
    ------
    ImportError
        If mpi4py or an MPI is not installed.
    TypeError, ValueError
        If `comm` is no intracommunicator, or no rank has an example.
    """

    def __init__(self, comm: Any, examples: int) -> None:
        self.comm = communicator(comm)
        counts = self.comm.allgather(examples)
        super().__init__(sum(counts))
        if not self.examples:
            raise ValueError("x: expected at least one example on one of the ranks; got none")
        self.first = sum(counts[: self.comm.Get_rank()])
        self.last = self.first + examples
        self._gradient: Array | None = None
        self._flat = np.empty(0)

    def begin(self, model: Layer, optimizer: SGD) -> None:
        """Take over rank 0's state of model and optimizer."""
        check_agreement(self.comm, "fit", layers=len(model.parameters()), n=self.examples)
        mine = self.comm.Get_rank() == 0
        state = (model.state_dict(), optimizer.state_dict()) if mine else None
        of_model, of_optimizer = self.comm.bcast(state)
        if not mine:
            model.load_state_dict(of_model)
            optimizer.load_state_dict(of_optimizer, model)

    def own(self, batch: NDArray[np.intp]) -> NDArray[np.intp]:
        """Return the rows of a batch that are here, as rows of the examples that are here."""
        own: NDArray[np.intp] = batch[(self.first <= batch) & (batch < self.last)] - self.first
        return own

    def loss(self, logits: Array, labels: NDArray[Any], n: int) -> float:
        """Return the mean loss of a batch of n examples, the same on every rank."""
        share = len(labels) / n
        total = np.zeros(1)
        self._gradient = np.zeros_like(logits)
        if share:
            total[0] = self._loss.forward(logits, labels) * share
            np.multiply(self._loss.backward(), share, out=self._gradient)
        self._sum(total)
        return float(total[0])

    def loss_gradient(self) -> Array:
        """Return the gradient of that mean with respect to the logits of the examples here."""
        assert self._gradient is not None, "loss comes first"
        return self._gradient

    def add_up(self, gradients: Mapping[str, Array]) -> None:
        """Add up each gradient over the ranks, in place, all in one message."""
        arrays = list(gradients.values())
        if not arrays:
            return
        size, dtype = sum(array.size for array in arrays), np.result_type(*arrays)
        check_agreement(self.comm, "add_up", names=len(arrays), size=size, dtype=dtype)
        if self._flat.shape != (size,) or self._flat.dtype != dtype:
            self._flat = np.empty(size, dtype)
        np.concatenate([array.ravel() for array in arrays], out=self._flat)
        self._sum(self._flat)
        at = 0
        for array in arrays:
            array[...] = self._flat[at : at + array.size].reshape(array.shape)
            at += array.size

    def fraction(self, right: int, n: int) -> float:
        """Return how many of all examples are right, from the n here of which `right` are."""
        counts = np.array([right, n], np.int64)
        self._sum(counts)
        if not counts[1]:
            raise ValueError("test: expected at least one example on one of the ranks; got none")
        return int(counts[0]) / int(counts[1])

    def _sum(self, array: Array) -> None:
        # MPI's own sum, whose cost does not grow with the ranks. That all ranks get the same bits,
        # so that their parameters stay equal, MPI recommends and Open MPI and MPICH do.
        self.comm.Allreduce(mpi("comm").IN_PLACE, array)
        if debugging():
            check_agreement(self.comm, "sum", crc=zlib.crc32(array.data))
