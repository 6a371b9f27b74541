"""Batch norm whose batch is spread over the ranks of an MPI communicator (synchronised BN).

Every rank holds a part of the batch, of any size, none included; all normalise by the moments of
the whole. One message of 2C + 1 float64 goes around in a forward, one of 2C in a backward. Both are
an Allgather, whose rows each rank then merges in the order of the ranks, and not an Allreduce:

- The parts are count, mean and m2, which merge without cancellation however large the mean. Sums
  that an Allreduce may add, of x and x^2, would lose a channel with |mean| / std = 1e6.
- An Allreduce may add in an order of its own, which changes with the number of ranks, the length
  and who comes first. Here all ranks compute the same from the same rows, so that they have the
  same statistics to the last bit, whatever the MPI does.
- It costs a rank P (2C + 1) float64 to receive where an Allreduce takes about two times 2C + 1, and
  as many steps in time: docs/scaling.md says up to which P that is no matter.

Arrays of a GPU stay there; the rows, some kB, go through host memory, which works with every MPI
and costs no more than the wait that a message is anyway. mpi4py is imported when a communicator is
looked at, not before. No kernels, no mathematics but the gradient's correction for the whole batch;
training with it is in bncpu.nn.
"""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from bncpu import arguments, functional
from bncpu.backends import array_module, as_array, to_numpy
from bncpu.functional import Gradients
from bncpu.layer import BatchNorm
from bncpu.moments import Moments

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = [
    "SyncBatchNorm",
    "SyncTrainResult",
    "batch_norm_backward",
    "batch_norm_train",
    "merge_moments",
]

_DESCRIPTION = 160  # bytes of a call's description in the check of BNCPU_DEBUG


class SyncTrainResult(NamedTuple):
    """What the synchronised batch_norm_train returns.

    Attributes
    ----------
    y : ndarray, shape and dtype of x
        This rank's part of the normalised batch.
    moments : Moments
        Of the whole batch, the same on every rank to the last bit; backward takes them.
    """

    y: NDArray[Any]
    moments: Moments


def batch_norm_train(
    x: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    comm: Any,
    running_mean: Any = None,
    running_var: Any = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    axis: int | tuple[int, ...] = 1,
    residual: Any = None,
    activation: Literal["relu"] | None = None,
    mask: Any = None,
    out: Any = None,
    num_threads: int | None = None,
    name: str = "",
) -> SyncTrainResult:
    """Normalise this rank's part of a batch by the statistics of all parts.

    The equations of `bncpu.batch_norm_train`, with mean and variance over the values of all ranks.
    Collective: every rank of `comm` makes the call, with equal arguments but for the batch.

    Parameters
    ----------
    x : array, any shape with the channels on `axis`
        This rank's part; none of its values, or one per channel, is enough where the parts together
        have more than one.
    gamma, beta, eps, axis, residual, activation, mask, out, num_threads
        As for `bncpu.batch_norm_train`.
    comm : mpi4py.MPI.Intracomm
        The ranks that share the batch.
    running_mean, running_var, momentum
        As for `bncpu.batch_norm_train`; the unbiased variance is that of the whole batch, so equal
        running statistics stay equal on all ranks.
    name : str, optional
        What the call is called in the check of ``BNCPU_DEBUG=1``.

    Returns
    -------
    SyncTrainResult
        y, moments.

    Raises
    ------
    ImportError
        If mpi4py or an MPI is not installed.
    TypeError, ValueError
        If `comm` is no intracommunicator; if all parts together have one value per channel, on
        every rank; with the environment variable ``BNCPU_DEBUG=1``, on every rank if they do not
        make the same call; otherwise as `bncpu.batch_norm_train`, on the rank whose argument it is.
        Other ranks then wait, until somebody ends them (``comm.Abort``).

    Notes
    -----
    Three steps: the moments of x (one pass over memory), the exchange, and x normalised by
    `bncpu.batch_norm_infer` (x read again, y written). Where a tile of x fits the caches,
    `bncpu.batch_norm_train` reads it once; here the exchange stands between the passes.

    Moments merge in the order of the ranks, so the result does not depend on who comes first; with
    other parts it is another rounding.

    References
    ----------
    S. Ioffe, C. Szegedy, arXiv:1502.03167, Algorithm 1; T. F. Chan, G. H. Golub, R. J. LeVeque,
    The American Statistician 37 (1983).

    Examples
    --------
    In one process the whole batch is here:

    >>> import numpy as np
    >>> from mpi4py import MPI
    >>> from bncpu import distributed
    >>> x = np.array([[1.0], [3.0]])
    >>> distributed.batch_norm_train(x, comm=MPI.COMM_SELF, eps=0)
    SyncTrainResult(y=array([[-1.],
           [ 1.]]), moments=Moments(count=2, mean=array([2.]), m2=array([2.])))
    """
    comm = communicator(comm)
    x = arguments.data("x", x)
    over = arguments.channels(x, axis)
    given = [("x", x), ("residual", residual), ("gamma", gamma), ("beta", beta), ("mask", mask)]
    arguments.affine("gamma", gamma, x, over)
    arguments.affine("beta", beta, x, over)
    momentum = arguments.momentum_weight(momentum)
    eps = arguments.epsilon(eps)
    relu = arguments.is_relu(activation)
    if residual is not None:
        residual = arguments.same_as_x("residual", residual, x)
    mask = arguments.filled_mask(mask, x, relu, given[:-1])
    read = [("x", x), ("residual", residual), ("mask", mask)]
    y = arguments.output(out, x, read, may_be=("residual",))
    running = arguments.running(running_mean, running_var, x, over, [*given, ("out", y)])

    how = {"C": over.shape, "dtype": x.dtype, "eps": eps, "activation": activation}
    check_agreement(comm, "batch_norm_train", name, momentum=momentum, **how)
    local = functional.batch_moments(x, axis=axis, num_threads=num_threads)
    moments = _pooled(local, comm)
    if moments.count == 1 and over.number:
        raise ValueError(
            "x: expected more than one value per channel to train on; got one on all ranks "
            "together; use batch_norm_infer with known statistics, or a larger batch"
        )
    if moments.count == 0 or over.number == 0:
        return SyncTrainResult(y, moments)
    mean, var = moments.mean, moments.var()
    functional.batch_norm_infer(
        x,
        mean,
        var,
        gamma,
        beta,
        eps=eps,
        axis=axis,
        residual=residual,
        activation=activation,
        mask=mask,
        out=y,
        num_threads=num_threads,
    )
    if running is not None:
        functional.update_running(running, momentum, mean, var, moments.count)
    return SyncTrainResult(y, moments)


def batch_norm_backward(
    dy: Any,
    x: Any,
    moments: Moments,
    gamma: Any = None,
    beta: Any = None,
    *,
    comm: Any,
    eps: float = 1e-5,
    axis: int | tuple[int, ...] = 1,
    activation: Literal["relu"] | None = None,
    mask: Any = None,
    residual: Any = False,
    out: Any = None,
    num_threads: int | None = None,
    name: str = "",
) -> Gradients:
    r"""Return the gradients of the synchronised batch_norm_train, for this rank's part.

    .. math::
        dx = \gamma\,\mathrm{invstd}
             \left(dz - \frac{\sum dz}{m} - \hat x\,\frac{\sum dz\,\hat x}{m}\right)

    with both sums, and m, over all ranks; dz is the gradient behind the activation. Collective.

    Parameters
    ----------
    dy, x, gamma, beta, axis, activation, mask, residual, out, num_threads
        As for `bncpu.batch_norm_backward`, of this rank's part.
    moments : Moments
        As the forward returned them.
    comm, eps
        As they were given forward.
    name : str, optional
        What the call is called in the check of ``BNCPU_DEBUG=1``.

    Returns
    -------
    Gradients
        dx, by the loss of all ranks together. dgamma and dbeta are this rank's share: like the
        gradients of all other parameters they are to be added up (or averaged) over the ranks.

    Raises
    ------
    ImportError
        If mpi4py or an MPI is not installed.
    TypeError, ValueError
        As the forward, and as `bncpu.batch_norm_backward`.

    Notes
    -----
    `bncpu.batch_norm_infer_backward` makes the sums and writes gamma invstd dz where dx goes, the
    sums go around, and `bncpu.batch_norm_infer` adds the map of x that is missing, in place: x is
    read twice, dy once, dx written twice and read once, twice what the fused
    `bncpu.batch_norm_backward` moves at its best. In half types this is done on copies of x and dz
    in float32, so that dx is rounded once. The shares that go around have dgamma's precision,
    float32 for x of less than float64; they add up in float64, in the order of the ranks.

    References
    ----------
    S. Ioffe, C. Szegedy, arXiv:1502.03167, section 3 (the chain rule below Algorithm 1).

    Examples
    --------
    >>> import numpy as np
    >>> from mpi4py import MPI
    >>> from bncpu import distributed
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> y, moments = distributed.batch_norm_train(x, comm=MPI.COMM_SELF, eps=0)
    >>> ones = np.ones_like(x)
    >>> gradients = distributed.batch_norm_backward(ones, x, moments, comm=MPI.COMM_SELF, eps=0)
    >>> bool(abs(gradients.dx).max() < 1e-15), gradients.dbeta
    (True, array([3.]))
    """
    comm = communicator(comm)
    x = arguments.data("x", x)
    over = arguments.channels(x, axis)
    if not isinstance(moments, Moments):
        raise TypeError(
            f"moments: expected the Moments that the forward returned; got {type(moments).__name__}"
        )
    how = {"C": over.shape, "dtype": x.dtype, "eps": eps, "activation": activation}
    check_agreement(comm, "batch_norm_backward", name, **how)
    mean, m = moments.mean, moments.count
    var = moments.m2 / max(m, 1)
    map_of_x: dict[str, Any] = {"eps": eps, "axis": axis, "num_threads": num_threads}
    half = x.dtype.itemsize == 2
    with_residual = residual
    if half and residual is False:
        with_residual = True  # dz, of which the gradient is made in float32
        if activation is not None and mask is None:
            mask = array_module(x).empty((x.size + 7) // 8, np.uint8)
            functional.batch_norm_infer(
                x, mean, var, gamma, beta, activation=activation, mask=mask, **map_of_x
            )
    gradients = functional.batch_norm_infer_backward(
        dy,
        x,
        mean,
        var,
        gamma,
        beta,
        activation=activation,
        mask=mask,
        residual=with_residual,
        out=out,
        **map_of_x,
    )
    dx = gradients.dx
    if half and gradients.dresidual is not None:
        x, dx = x.astype(np.float32), gradients.dresidual.astype(np.float32)
        functional.batch_norm_infer_backward(dx, x, mean, var, gamma, out=dx, **map_of_x)
    shares = array_module(dx).concatenate(
        [d.ravel().astype(np.float64) for d in (gradients.dbeta, gradients.dgamma)]
    )
    # Infinite sums and invstd make NaN, as IEEE arithmetic has it; no warning is owed.
    with np.errstate(all="ignore"):
        dbeta, dgamma = _gathered(shares, comm).sum(axis=0).reshape(2, *over.shape)
        if x.size:
            scale = -1 / np.sqrt(var + eps)
            if gamma is not None:
                scale *= as_array("gamma", gamma)
            dtype = arguments.parameter_dtype(x)
            by_xhat, constant = ((scale * (d / m)).astype(dtype) for d in (dgamma, dbeta))
            functional.batch_norm_infer(
                x, mean, var, by_xhat, constant, residual=dx, out=dx, **map_of_x
            )
        if half:
            gradients.dx[...] = dx
    return gradients if residual is not False else gradients._replace(dresidual=None)


def merge_moments(moments: Moments, *, comm: Any) -> Moments:
    """Return the moments of the values of all ranks, from those of each rank's own.

    Collective. What population statistics of data that is spread over ranks are made of.

    Parameters
    ----------
    moments : Moments
        Of this rank's values; a count of 0 is allowed.
    comm : mpi4py.MPI.Intracomm
        The ranks.

    Returns
    -------
    Moments
        The same on every rank to the last bit.

    Raises
    ------
    ImportError
        If mpi4py or an MPI is not installed.
    TypeError, ValueError
        If `comm` is no intracommunicator, or with ``BNCPU_DEBUG=1`` on every rank if they do not
        have the same channels.

    Examples
    --------
    >>> import bncpu, numpy as np
    >>> from mpi4py import MPI
    >>> from bncpu import distributed
    >>> distributed.merge_moments(bncpu.batch_moments(np.eye(2)), comm=MPI.COMM_SELF)
    Moments(count=2, mean=array([0.5, 0.5]), m2=array([0.5, 0.5]))
    """
    comm = communicator(comm)
    check_agreement(comm, "merge_moments", C=moments.mean.shape)
    return _pooled(moments, comm)


class SyncBatchNorm(BatchNorm):
    """`bncpu.BatchNorm` over a batch that is spread over the ranks of a communicator.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, axis, activation, dtype
        As for `bncpu.BatchNorm`.
    comm : mpi4py.MPI.Intracomm
        The ranks that share each batch.

    Attributes
    ----------
    gamma, beta, dresidual, running_mean, running_var, num_batches_tracked, training
        As in `bncpu.BatchNorm`.
    dgamma, dbeta : ndarray, shape (C,), or None without affine
        This rank's share of the gradients: add up (or average) over the ranks, as the gradients of
        all other parameters.

    Raises
    ------
    ImportError
        If mpi4py or an MPI is not installed.
    TypeError, ValueError
        As `bncpu.BatchNorm`, or if `comm` is no intracommunicator.

    Notes
    -----
    With the batch's own statistics `forward` and `backward` are collective. State, and so the files
    of the trainer, are those of a plain layer. With ``BNCPU_DEBUG=1`` the layers of a process are
    counted as they are made, and ranks that call them in different orders are told.

    Examples
    --------
    >>> import numpy as np
    >>> from mpi4py import MPI
    >>> from bncpu.distributed import SyncBatchNorm
    >>> layer = SyncBatchNorm(3, comm=MPI.COMM_SELF)
    >>> x = np.random.default_rng(0).normal(5, 2, (8, 3, 4, 4)).astype(np.float32)
    >>> y = layer(x)
    >>> dx = layer.backward(np.ones_like(y))
    >>> layer.eval()(x).shape, layer.num_batches_tracked
    ((8, 3, 4, 4), 1)
    """

    _numbers = itertools.count()

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        comm: Any,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        axis: int | tuple[int, ...] = 1,
        activation: Literal["relu"] | None = None,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.comm = communicator(comm)
        super().__init__(
            num_features,
            eps=eps,
            momentum=momentum,
            affine=affine,
            track_running_stats=track_running_stats,
            axis=axis,
            activation=activation,
            dtype=dtype,
        )
        self._name = f"layer {next(self._numbers)}"

    def __repr__(self) -> str:
        return f"Sync{super().__repr__()}"

    def _forward_batch(
        self, x: Any, how: dict[str, Any]
    ) -> tuple[NDArray[Any], tuple[Any, ...], int]:
        y, moments = batch_norm_train(
            x, self.gamma, self.beta, comm=self.comm, name=self._name, **how
        )
        return y, (moments,), moments.count

    def _backward_batch(
        self, dy: Any, x: Any, statistics: tuple[Any, ...], how: dict[str, Any]
    ) -> Gradients:
        (moments,) = statistics
        return batch_norm_backward(
            dy,
            x,
            moments,
            self.gamma,
            self.beta,
            comm=self.comm,
            eps=self.eps,
            name=self._name,
            **how,
        )


def mpi(what: str) -> Any:
    """Return mpi4py.MPI, which starts MPI; `what` needs it.

    Raises
    ------
    ImportError
        If mpi4py is not installed, or finds no MPI.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # the latter where mpi4py finds no library
        reason = " ".join(str(error).split())
        raise ImportError(
            f'{what}: needs mpi4py and an MPI; pip install "bncpu[mpi]" brings both, pip install '
            f"mpi4py takes the system's ({reason:.200})"
        ) from error
    return MPI


def communicator(comm: Any) -> Any:
    """Return a checked intracommunicator."""
    MPI = mpi("comm")  # noqa: N806  its own name
    if not isinstance(comm, MPI.Intracomm):
        raise TypeError(
            f"comm: expected an intracommunicator of mpi4py; got {type(comm).__name__}; "
            "pass mpi4py.MPI.COMM_WORLD for all ranks"
        )
    if comm == MPI.COMM_NULL:
        raise ValueError("comm: expected a communicator that this rank is in; got COMM_NULL")
    return comm


def debugging() -> bool:
    """Return whether BNCPU_DEBUG asks for checks that take messages."""
    return os.environ.get("BNCPU_DEBUG", "0") not in ("", "0")


def check_agreement(comm: Any, call: str, name: str = "", **details: Any) -> None:
    """With BNCPU_DEBUG=1, refuse on every rank a collective call that is not the same on all.

    Where ranks disagree, MPI would wait for ever or take one's numbers for another's. This costs
    one more small message per call, and so is left out otherwise. A rank that makes no call at all
    is still waited for.

    Raises
    ------
    ValueError
        With each rank's description of the call.
    """
    if not debugging():
        return
    text = ", ".join(f"{key}={value}" for key, value in details.items() if value is not None)
    called = f"{call}({text})" + (f" of {name}" if name else "")
    row = np.frombuffer(called.encode()[:_DESCRIPTION].ljust(_DESCRIPTION), np.uint8)
    rows = np.empty((comm.Get_size(), _DESCRIPTION), np.uint8)
    comm.Allgather(row, rows)
    if (rows != rows[0]).any():
        texts = [bytes(each).decode(errors="replace").rstrip() for each in rows]
        told = "; ".join(f"rank {rank}: {each}" for rank, each in enumerate(texts))
        raise ValueError(f"comm: expected the same call on every rank; got {told}")


def _pooled(local: Moments, comm: Any) -> Moments:
    """Return the moments of the values of all ranks, merged in the order of the ranks."""
    module = array_module(local.mean)
    count = module.full(1, float(local.count))
    row = module.concatenate([count, local.mean.ravel(), local.m2.ravel()])
    shape = local.mean.shape
    first, *others = (
        Moments(int(each[0]), *each[1:].reshape(2, *shape)) for each in _gathered(row, comm)
    )
    return first.merge(*others)


def _gathered(row: NDArray[np.float64], comm: Any) -> NDArray[np.float64]:
    """Return the rows of all ranks, in their order."""
    rows = np.empty((comm.Get_size(), row.size))
    comm.Allgather(to_numpy(row), rows)
    gathered: NDArray[np.float64] = array_module(row).asarray(rows)
    return gathered
