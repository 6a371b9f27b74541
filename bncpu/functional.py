"""The public functions: docstrings, defaults, and the steps of a call in order.

A call is checked (bncpu.arguments), computed by the kernels for its kind of array (bncpu.backends),
and only then are running statistics updated. No mathematics here but theirs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bncpu import arguments
from bncpu.backends import kernels_for
from bncpu.moments import Moments
from bncpu.threads import threads_for_call

if TYPE_CHECKING:
    from numpy.typing import NDArray


class TrainResult(NamedTuple):
    """What batch_norm_train returns.

    Attributes
    ----------
    y : ndarray, shape and dtype of x
        The normalised batch.
    mean : ndarray of float64, shape (C,)
        The mean of each channel over the batch.
    invstd : ndarray of float64, shape (C,)
        1 / sqrt(var + eps) of each channel, var the biased variance; for the backward pass.
    """

    y: NDArray[Any]
    mean: NDArray[np.float64]
    invstd: NDArray[np.float64]


class Gradients(NamedTuple):
    """What the backward functions return.

    Attributes
    ----------
    dx : ndarray, shape and dtype of x
        Gradient with respect to x.
    dgamma, dbeta : ndarray, shape (C,)
        Gradients with respect to gamma and beta, whether or not these were given; float64 for
        float64 x, else float32.
    """

    dx: NDArray[Any]
    dgamma: NDArray[Any]
    dbeta: NDArray[Any]


def batch_norm_train(
    x: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    running_mean: Any = None,
    running_var: Any = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    axis: int | tuple[int, ...] = 1,
    out: Any = None,
    num_threads: int | None = None,
) -> TrainResult:
    r"""Normalise a batch by its own statistics, channel by channel.

    .. math:: y = \gamma \, \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    with the mean :math:`\mu` and the biased variance :math:`\sigma^2` of the channel's m values.

    Parameters
    ----------
    x : array_like of float32 or float64, any shape with the channels on `axis`
        The batch: (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W), channels-last with ``axis=-1``.
        A NumPy array, or a CPU array with ``__dlpack__``; any strides, read-only allowed.
    gamma, beta : array of x's dtype, shape (C,), optional
        Scale and shift; ones and zeros if not given.
    running_mean, running_var : array of float32 or float64, shape (C,), optional
        Both or neither. Updated in place, whatever their strides:
        ``new = (1 - momentum) * old + momentum * batch``, the variance unbiased, m / (m - 1).
    momentum : float, default 0.1
        Weight of the new value, within [0, 1] (PyTorch's convention; Keras' is 1 minus this).
    eps : float, default 1e-5
        Added to the variance, in its units (the squared units of x).
    axis : int or tuple of ints, default 1
        The channel axes. A tuple, as ``axis=(1, 2, 3)`` for (N, C, H, W), is the paper's
        per-activation form; gamma, beta and the statistics then have the shape of these axes.
    out : array, shape and dtype of x, optional
        Where y goes, any strides. It may not overlap x, which the backward pass needs.
    num_threads : int, optional
        Threads for this call; otherwise what `get_num_threads` says. Results are bitwise the same
        for every number.

    Returns
    -------
    TrainResult
        y, mean, invstd.

    Raises
    ------
    TypeError
        If an argument is not an array of the kind or dtype it must be.
    ValueError
        If a shape, range or axis does not fit, an array that is written is read-only or overlaps
        itself or another, only one running statistic is given, or m = 1.

    Notes
    -----
    Sums are formed about a pivot near the mean in short runs of x's precision, flushed to float64
    and merged in an order that depends alone on the shape and on which axes of x are contiguous. A
    channel with \|mean\| / std = 1e6 is right to the input's own precision; a constant channel
    gives beta (for eps > 0).

    x is read from memory once where a tile of channels fits the caches. Views with a contiguous
    innermost axis are read in place; others (a reversed or strided innermost axis, misaligned or
    non-adjacent channel axes) are copied first, and an `out` whose strides do not line up with x's
    is filled through a temporary array.

    An empty batch gives an empty y, mean 0, invstd 1 / sqrt(eps) and no update.

    References
    ----------
    S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
    Internal Covariate Shift", arXiv:1502.03167, Algorithm 1 and section 3.1.

    Examples
    --------
    >>> import numpy as np, bncpu
    >>> x = np.array([[1.0, 10.0], [3.0, 10.0]])
    >>> y, mean, invstd = bncpu.batch_norm_train(x, beta=np.array([0.0, 5.0]), eps=0.25)
    >>> mean
    array([ 2., 10.])
    >>> y.round(3)
    array([[-0.894,  5.   ],
           [ 0.894,  5.   ]])
    """
    x = arguments.data("x", x)
    over = arguments.channels(x, axis)
    scale = arguments.affine("gamma", gamma, x, over)
    shift = arguments.affine("beta", beta, x, over)
    momentum = arguments.momentum_weight(momentum)
    eps = arguments.epsilon(eps)
    threads = threads_for_call(num_threads)
    m = arguments.batch_values(over, x)
    y = arguments.output(out, x, [("x", x), ("gamma", scale), ("beta", shift)], may_be=None)
    others = [("x", x), ("gamma", gamma), ("beta", beta), ("out", y)]
    running = arguments.running(running_mean, running_var, x, over, others)

    if m == 0 or over.number == 0:
        var = np.zeros(over.shape)
        return TrainResult(y, np.zeros(over.shape), _invstd(var, eps))
    mean, var, invstd = np.empty((3, over.number))
    problem = arguments.problem(over, x, out=y)
    kernels_for(x).train(
        problem.geometry, *problem.arrays, scale, shift, eps, mean, var, invstd, threads
    )
    problem.finish()
    if running is not None:
        # Statistics beyond float32 become infinite there, as IEEE arithmetic has it; no warning is
        # owed, and one that is an error must not come between the two.
        with np.errstate(all="ignore"):
            for old, new in zip(running, (mean, var * (m / (m - 1))), strict=True):
                old[...] = (1 - momentum) * old + momentum * new.reshape(over.shape)
    return TrainResult(y, mean.reshape(over.shape), invstd.reshape(over.shape))


def batch_norm_infer(
    x: Any,
    mean: Any,
    var: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    eps: float = 1e-5,
    axis: int | tuple[int, ...] = 1,
    out: Any = None,
    num_threads: int | None = None,
) -> NDArray[Any]:
    r"""Normalise by given statistics: a linear map of each channel.

    .. math:: y = \gamma \, \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} + \beta

    Parameters
    ----------
    x, gamma, beta, eps, axis, num_threads
        As for `batch_norm_train`.
    mean, var : array of float32 or float64, shape (C,)
        Population statistics; no variance may be negative.
    out : array, shape and dtype of x, optional
        Where y goes, any strides; x itself is allowed.

    Returns
    -------
    ndarray, shape and dtype of x
        y.

    Raises
    ------
    TypeError
        If an argument is not an array of the kind or dtype it must be.
    ValueError
        If a shape, range or axis does not fit, a variance is negative, or out is read-only or
        overlaps x without being x.

    Notes
    -----
    One pass over memory. The difference x - mean is formed before it is scaled, so that large
    means lose nothing. Copies are made as in `batch_norm_train`.

    References
    ----------
    S. Ioffe, C. Szegedy, arXiv:1502.03167, Algorithm 2.

    Examples
    --------
    >>> import numpy as np, bncpu
    >>> x = np.array([[1.0, 10.0], [3.0, 14.0]])
    >>> bncpu.batch_norm_infer(x, mean=np.array([2.0, 10.0]), var=np.array([1.0, 4.0]), eps=0)
    array([[-1.,  0.],
           [ 1.,  2.]])
    """
    x = arguments.data("x", x)
    over = arguments.channels(x, axis)
    mean = arguments.statistic("mean", mean, x, over)
    var = arguments.variance("var", var, x, over)
    gamma = arguments.affine("gamma", gamma, x, over)
    beta = arguments.affine("beta", beta, x, over)
    eps = arguments.epsilon(eps)
    threads = threads_for_call(num_threads)
    read = [("x", x), ("mean", mean), ("var", var), ("gamma", gamma), ("beta", beta)]
    y = arguments.output(out, x, read, may_be="x")

    if x.size:
        problem = arguments.problem(over, x, out=y)
        kernels_for(x).infer(
            problem.geometry, *problem.arrays, mean, var, gamma, beta, eps, threads
        )
        problem.finish()
    return y


def batch_norm_backward(
    dy: Any,
    x: Any,
    mean: Any,
    invstd: Any,
    gamma: Any = None,
    *,
    axis: int | tuple[int, ...] = 1,
    out: Any = None,
    num_threads: int | None = None,
) -> Gradients:
    r"""Return the gradients of batch_norm_train, through the batch statistics.

    .. math::
        d\beta = \sum dy, \quad d\gamma = \sum dy\,\hat x, \quad
        dx = \gamma\,\mathrm{invstd}\left(dy - \frac{d\beta}{m} - \hat x\,\frac{d\gamma}{m}\right)

    with :math:`\hat x = (x - \mathrm{mean})\,\mathrm{invstd}`, sums over the m values of a channel.

    Parameters
    ----------
    dy : array, shape and dtype of x
        Gradient of the loss with respect to y.
    x : array
        The input of the forward pass.
    mean, invstd : array of float64 or float32, shape (C,)
        As batch_norm_train returned them.
    gamma : array of x's dtype, shape (C,), optional
        As it was given forward.
    axis, num_threads
        As for `batch_norm_train`.
    out : array, shape and dtype of x, optional
        Where dx goes, any strides; dy itself is allowed.

    Returns
    -------
    Gradients
        dx, dgamma, dbeta.

    Raises
    ------
    TypeError
        If an argument is not an array of the kind or dtype it must be.
    ValueError
        If a shape or axis does not fit, or out is read-only or overlaps an input without being dy.

    Notes
    -----
    Accumulation, order, threads and copies as in `batch_norm_train`; dy and x are each read from
    memory once where a tile of channels fits the caches. An empty batch gives dgamma = dbeta = 0.

    References
    ----------
    S. Ioffe, C. Szegedy, arXiv:1502.03167, section 3 (the chain rule below Algorithm 1).

    Examples
    --------
    >>> import numpy as np, bncpu
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> y, mean, invstd = bncpu.batch_norm_train(x, eps=0)
    >>> dx, dgamma, dbeta = bncpu.batch_norm_backward(np.ones_like(x), x, mean, invstd)
    >>> bool(abs(dx).max() < 1e-15), dbeta
    (True, array([3.]))
    """
    x = arguments.data("x", x)
    dy = arguments.same_as_x("dy", dy, x)
    over = arguments.channels(x, axis)
    mean = arguments.statistic("mean", mean, x, over)
    invstd = arguments.statistic("invstd", invstd, x, over)
    gamma = arguments.affine("gamma", gamma, x, over)
    threads = threads_for_call(num_threads)
    read = [("dy", dy), ("x", x), ("mean", mean), ("invstd", invstd), ("gamma", gamma)]
    dx = arguments.output(out, x, read, may_be="dy")

    dgamma, dbeta = np.zeros((2, over.number))
    if x.size:
        problem = arguments.problem(over, x, dy, dx)
        kernels_for(x).backward(
            problem.geometry, *problem.arrays, mean, invstd, gamma, dgamma, dbeta, threads
        )
        problem.finish()
    return _gradients(dx, dgamma, dbeta, over.shape)


def batch_norm_infer_backward(
    dy: Any,
    x: Any,
    mean: Any,
    var: Any,
    gamma: Any = None,
    *,
    eps: float = 1e-5,
    axis: int | tuple[int, ...] = 1,
    out: Any = None,
    num_threads: int | None = None,
) -> Gradients:
    r"""Return the gradients of batch_norm_infer: mean and variance are constants (frozen BN).

    .. math::
        d\beta = \sum dy, \quad d\gamma = \sum dy\,\hat x, \quad
        dx = \frac{\gamma\,dy}{\sqrt{\mathrm{var} + \epsilon}}

    Parameters
    ----------
    dy, x, gamma, axis, out, num_threads
        As for `batch_norm_backward`.
    mean, var, eps
        As they were given to `batch_norm_infer`.

    Returns
    -------
    Gradients
        dx, dgamma, dbeta.

    Raises
    ------
    TypeError
        If an argument is not an array of the kind or dtype it must be.
    ValueError
        If a shape, range or axis does not fit, a variance is negative, or out is read-only or
        overlaps an input without being dy.

    Notes
    -----
    Accumulation, order, threads and copies as in `batch_norm_train`.

    References
    ----------
    S. Ioffe, C. Szegedy, arXiv:1502.03167, Algorithm 2: differentiation of the linear map.

    Examples
    --------
    >>> import numpy as np, bncpu
    >>> x, dy = np.array([[1.0], [3.0]]), np.array([[1.0], [2.0]])
    >>> bncpu.batch_norm_infer_backward(dy, x, mean=np.array([1.0]), var=np.array([4.0]), eps=0)
    Gradients(dx=array([[0.5],
           [1. ]]), dgamma=array([2.]), dbeta=array([3.]))
    """
    x = arguments.data("x", x)
    dy = arguments.same_as_x("dy", dy, x)
    over = arguments.channels(x, axis)
    mean = arguments.statistic("mean", mean, x, over)
    var = arguments.variance("var", var, x, over)
    gamma = arguments.affine("gamma", gamma, x, over)
    eps = arguments.epsilon(eps)
    threads = threads_for_call(num_threads)
    read = [("dy", dy), ("x", x), ("mean", mean), ("var", var), ("gamma", gamma)]
    dx = arguments.output(out, x, read, may_be="dy")

    dgamma, dbeta = np.zeros((2, over.number))
    if x.size:
        problem = arguments.problem(over, x, dy, dx)
        kernels_for(x).infer_backward(
            problem.geometry, *problem.arrays, mean, var, gamma, eps, dgamma, dbeta, threads
        )
        problem.finish()
    return _gradients(dx, dgamma, dbeta, over.shape)


def batch_moments(
    x: Any, *, axis: int | tuple[int, ...] = 1, num_threads: int | None = None
) -> Moments:
    """Return count, mean and sum of squared deviations of each channel.

    Parameters
    ----------
    x, axis, num_threads
        As for `batch_norm_train`.

    Returns
    -------
    Moments
        count (an int), mean and m2 (float64, one value per channel); parts merge exactly.

    Raises
    ------
    TypeError
        If x is not an array of float32 or float64.
    ValueError
        If the axis does not fit.

    Notes
    -----
    Accumulation, order, threads and copies as in `batch_norm_train`; one pass over memory. One
    value per channel is enough; an empty batch gives a count of 0.

    References
    ----------
    T. F. Chan, G. H. Golub, R. J. LeVeque, The American Statistician 37 (1983).

    Examples
    --------
    >>> import numpy as np, bncpu
    >>> count, mean, m2 = bncpu.batch_moments(np.array([[1.0, 5.0], [3.0, 5.0]]))
    >>> count, mean, m2
    (2, array([2., 5.]), array([2., 0.]))
    """
    x = arguments.data("x", x)
    over = arguments.channels(x, axis)
    threads = threads_for_call(num_threads)
    mean, m2 = np.zeros((2, over.number))
    if x.size:
        problem = arguments.problem(over, x)
        kernels_for(x).moments(problem.geometry, *problem.arrays, mean, m2, threads)
    return Moments(over.values, mean.reshape(over.shape), m2.reshape(over.shape))


def _gradients(
    dx: NDArray[Any],
    dgamma: NDArray[np.float64],
    dbeta: NDArray[np.float64],
    shape: tuple[int, ...],
) -> Gradients:
    # Sums beyond float32 become infinite there, as IEEE arithmetic has it; no warning is owed.
    with np.errstate(all="ignore"):
        return Gradients(
            dx,
            dgamma.astype(dx.dtype, copy=False).reshape(shape),
            dbeta.astype(dx.dtype, copy=False).reshape(shape),
        )


def _invstd(var: NDArray[np.float64], eps: float) -> NDArray[np.float64]:
    with np.errstate(divide="ignore"):
        return 1 / np.sqrt(var + eps)
