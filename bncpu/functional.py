"""The public functions: docstrings, defaults, and the steps of a call in order.

A call is checked (bncpu.arguments), brought into a form that kernels can walk (bncpu.problem),
computed by the kernels for its kind of array (bncpu.backends), and only then are running statistics
updated. No mathematics here but theirs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from bncpu import arguments
from bncpu.backends import array_module, as_stored, kernels_for, on_gpu, plain_kernels
from bncpu.memory import overlap
from bncpu.moments import Moments
from bncpu.problem import problem
from bncpu.threads import threads_for_call

if TYPE_CHECKING:
    from numpy.typing import NDArray


class TrainResult(NamedTuple):
    """What batch_norm_train returns.

    Attributes
    ----------
    y : ndarray, shape and dtype of x
        The normalised batch, behind the residual and the activation if there are.
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
    dresidual : ndarray, shape and dtype of x, or None
        Gradient with respect to the residual, if it was asked for.
    """

    dx: NDArray[Any]
    dgamma: NDArray[Any]
    dbeta: NDArray[Any]
    dresidual: NDArray[Any] | None = None


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
    residual: Any = None,
    activation: Literal["relu"] | None = None,
    mask: Any = None,
    out: Any = None,
    num_threads: int | None = None,
) -> TrainResult:
    r"""Normalise a batch by its own statistics, channel by channel; add a residual, apply ReLU.

    .. math::
        z = \gamma \, \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta + \mathrm{residual},
        \quad y = \mathrm{act}(z)

    with the mean :math:`\mu` and the biased variance :math:`\sigma^2` of the channel's m values;
    act(z) is z, or max(z, 0).

    Parameters
    ----------
    x : array of float32, float64, float16 or bfloat16, any shape with the channels on `axis`
        The batch: (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W), channels-last with ``axis=-1``.
        A NumPy array, a CuPy array, or one of either memory with ``__dlpack__``; any strides,
        read-only allowed. bfloat16 is that of ml_dtypes. All arrays of a call are of x's kind, and
        so are the results.
    gamma, beta : array of float64 for float64 x, else of float32, shape (C,), optional
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
    residual : array, shape and dtype of x, optional
        Added before the activation; any strides.
    activation : None or "relu", default None
        What is applied last. ReLU of NaN is NaN.
    mask : array of uint8, shape ((x.size + 7) // 8,), optional
        With ``activation="relu"``: filled with one bit per element of x, which says whether y is
        not 0 there, and so whether the gradient passes. Contiguous memory of its own. The backward
        pass needs it if there is a residual, and otherwise saves computing the sign again with it.
    out : array, shape and dtype of x, optional
        Where y goes, any strides; residual itself is allowed. It may not overlap x, which the
        backward pass needs.
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
        itself or another, only one running statistic is given, there is a mask without an
        activation, or m = 1; or arrays are on several GPUs, or on one that is not the current.
    ImportError, RuntimeError
        If x is on a GPU, and CuPy is not installed, finds no driver, or the GPU is older than
        compute capability 7.5.

    Notes
    -----
    Sums are formed about a pivot near the mean in short runs of x's precision, flushed to float64
    and merged in an order that depends alone on the shape and on which axes of x are contiguous. A
    channel with \|mean\| / std = 1e6 is right to the input's own precision; a constant channel
    gives beta (for eps > 0).

    x and residual are read from memory once and y is written once, where a tile of channels fits
    the caches; the mask is an eighth of a byte per element more. Fused, ReLU and the residual cost
    no pass of their own. A new large result costs page faults, often more time than the arithmetic:
    `out` avoids them.

    float16 and bfloat16 are storage only: the arithmetic is float32, sums are flushed to float64,
    and y is rounded once, to nearest even (past the largest float16, to infinity). y with ReLU is
    to the last bit ReLU of y without, but for the sign of a zero: ReLU comes before rounding, so a
    tiny negative z is stored as -0 without ReLU and as +0 with it.

    Bit e % 8, the lowest first, of byte e // 8 of the mask belongs to the e-th element of x in the
    order in which x lies in memory; for a C-contiguous x the mask is
    ``numpy.packbits(y != 0, bitorder="little")``. Unused bits are 0. So it belongs to the strides
    of x, and the backward pass must get x with the same.

    Views with a contiguous innermost axis are read in place; others (a reversed or strided
    innermost axis, misaligned or non-adjacent channel axes) are copied first. A residual or an
    `out` whose strides do not line up with x's goes through a temporary array, and so do the bits
    of a mask where the channels of x lie outside several axes that do not join in memory, as those
    of a crop of the last two axes do.

    CuPy arrays are computed on their GPU, the current one, and on the current stream. Nothing waits
    there: a call returns when its kernels are queued, running statistics are updated by them, and
    `num_threads` has no meaning. Sums are formed in another order than on the CPU, as fixed: it
    follows from the shape and the strides. float32 numbers below 2**-126 count as 0 there.

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
    >>> bncpu.batch_norm_train(x, residual=x - 2, activation="relu", eps=0.25).y.round(3)
    array([[0.   , 8.   ],
           [1.894, 8.   ]])
    """
    threads = threads_for_call(num_threads)
    plain = plain_kernels().plain_train(
        x,
        gamma,
        beta,
        running_mean,
        running_var,
        momentum,
        eps,
        axis,
        residual,
        activation,
        mask,
        out,
        threads,
    )
    if plain is not None:
        return TrainResult(*plain)

    x = arguments.data("x", x)
    over = arguments.channels(x, axis)
    given = [("x", x), ("residual", residual), ("gamma", gamma), ("beta", beta)]
    gamma = arguments.affine("gamma", gamma, x, over)
    beta = arguments.affine("beta", beta, x, over)
    momentum = arguments.momentum_weight(momentum)
    eps = arguments.epsilon(eps)
    relu = arguments.is_relu(activation)
    if residual is not None:
        residual = arguments.same_as_x("residual", residual, x)
    mask = arguments.filled_mask(mask, x, relu, given)
    m = arguments.batch_values(over, x)
    near = [("x", x), ("residual", residual), ("gamma", gamma), ("beta", beta), ("mask", mask)]
    y = arguments.output(out, x, near, may_be=("residual",))
    given += [("mask", mask), ("out", y)]
    running = arguments.running(running_mean, running_var, x, over, given)

    module = array_module(x)
    if m == 0 or over.number == 0:
        var = module.zeros(over.shape)
        return TrainResult(y, module.zeros(over.shape), _invstd(var, eps))
    mean, var, invstd = (module.empty(over.number) for _ in range(3))
    walk = problem(over.axes, (x, residual), (y,), mask, fills_mask=True)
    call = (walk.geometry, *walk.arrays, relu, gamma, beta, eps, mean, var, invstd, threads)
    if running is None:
        kernels_for(x).train(*call)
        walk.finish()
    elif on_gpu(x):
        # Updated by its kernels: in place, or beside where they cannot walk there.
        beside = [arguments.vector(old) for old in running]
        if walk.bits is not None:  # to be brought into order below, for which memory may be short
            beside = [values.copy() for values in beside]
        kernels_for(x).train(*call, *beside, momentum)
        walk.finish()
        for old, new in zip(running, beside, strict=True):
            if not overlap(old, new):
                old[...] = new.reshape(over.shape)
    else:
        kernels_for(x).train(*call)
        walk.finish()
        update_running(running, momentum, mean.reshape(over.shape), var.reshape(over.shape), m)
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
    residual: Any = None,
    activation: Literal["relu"] | None = None,
    mask: Any = None,
    out: Any = None,
    num_threads: int | None = None,
) -> NDArray[Any]:
    r"""Normalise by given statistics, a linear map of each channel; add a residual, apply ReLU.

    .. math::
        z = \gamma \, \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} + \beta
        + \mathrm{residual}, \quad y = \mathrm{act}(z)

    Parameters
    ----------
    x, gamma, beta, eps, axis, residual, activation, mask, num_threads
        As for `batch_norm_train`.
    mean, var : array of float32 or float64, shape (C,)
        Population statistics; no variance may be negative. One on a GPU is not looked at, which
        would wait for it: where var + eps is negative, y is NaN.
    out : array, shape and dtype of x, optional
        Where y goes, any strides; x itself or residual itself is allowed.

    Returns
    -------
    ndarray, shape and dtype of x
        y.

    Raises
    ------
    TypeError
        If an argument is not an array of the kind or dtype it must be.
    ValueError
        If a shape, range or axis does not fit, a variance is negative, there is a mask without an
        activation, or an array that is written is read-only or overlaps another without being x
        or residual; or as `batch_norm_train` about GPUs.
    ImportError, RuntimeError
        As `batch_norm_train`.

    Notes
    -----
    One pass over memory: x and residual are read and y is written once. The difference x - mean is
    formed before it is scaled, so that large means lose nothing. Copies, half types and the order
    of the mask's bits as in `batch_norm_train`.

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

    In place, in the memory of x:

    >>> statistics = {"mean": np.array([2.0, 10.0]), "var": np.array([1.0, 4.0]), "eps": 0}
    >>> bncpu.batch_norm_infer(x, **statistics, activation="relu", out=x) is x
    True
    >>> x
    array([[0., 0.],
           [1., 2.]])
    """
    threads = threads_for_call(num_threads)
    plain: NDArray[Any] | None = plain_kernels().plain_infer(
        x, mean, var, gamma, beta, eps, axis, residual, activation, mask, out, threads
    )
    if plain is not None:
        return plain

    x = arguments.data("x", x)
    over = arguments.channels(x, axis)
    given = [("x", x), ("residual", residual), ("mean", mean), ("var", var)]
    given += [("gamma", gamma), ("beta", beta)]
    mean = arguments.statistic("mean", mean, x, over)
    var = arguments.variance("var", var, x, over)
    gamma = arguments.affine("gamma", gamma, x, over)
    beta = arguments.affine("beta", beta, x, over)
    eps = arguments.epsilon(eps)
    relu = arguments.is_relu(activation)
    if residual is not None:
        residual = arguments.same_as_x("residual", residual, x)
    mask = arguments.filled_mask(mask, x, relu, given)
    near = [("x", x), ("residual", residual), ("mean", mean), ("var", var)]
    near += [("gamma", gamma), ("beta", beta), ("mask", mask)]
    y = arguments.output(out, x, near, may_be=("x", "residual"))

    if x.size:
        walk = problem(over.axes, (x, residual), (y,), mask, fills_mask=True)
        kernels_for(x).infer(
            walk.geometry, *walk.arrays, relu, mean, var, gamma, beta, eps, threads
        )
        walk.finish()
    return y


def batch_norm_backward(
    dy: Any,
    x: Any,
    mean: Any,
    invstd: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: int | tuple[int, ...] = 1,
    activation: Literal["relu"] | None = None,
    mask: Any = None,
    residual: Any = False,
    out: Any = None,
    num_threads: int | None = None,
) -> Gradients:
    r"""Return the gradients of batch_norm_train, through the batch statistics.

    .. math::
        d\beta = \sum dz, \quad d\gamma = \sum dz\,\hat x, \quad
        dx = \gamma\,\mathrm{invstd}\left(dz - \frac{d\beta}{m} - \hat x\,\frac{d\gamma}{m}\right)

    with :math:`\hat x = (x - \mathrm{mean})\,\mathrm{invstd}`, sums over the m values of a channel.
    dz, also the residual's gradient, is dy, or with ReLU dy where y is not 0 and 0 elsewhere.

    Parameters
    ----------
    dy : array, shape and dtype of x
        Gradient of the loss with respect to y.
    x : array
        The input of the forward pass.
    mean, invstd : array of float64 or float32, shape (C,)
        As batch_norm_train returned them.
    gamma, beta : array of float64 for float64 x, else of float32, shape (C,), optional
        As they were given forward. beta is needed for the sign of z alone: with an activation and
        without a mask.
    axis, num_threads
        As for `batch_norm_train`.
    activation : None or "relu", default None
        As it was given forward.
    mask : array of uint8, optional
        With ``activation="relu"``: as the forward pass filled it, for an x of these strides.
        Without it, the sign of z is computed again from x, to the bit as it was forward, which
        takes a forward pass without a residual.
    residual : bool or array of x's shape and dtype, default False
        Whether the gradient of the forward pass's residual is wanted, or the array for it, any
        strides; dy itself is allowed if `out` is not dy. With ReLU it needs the mask.
    out : array, shape and dtype of x, optional
        Where dx goes, any strides; dy itself is allowed.

    Returns
    -------
    Gradients
        dx, dgamma, dbeta, dresidual (None if not wanted).

    Raises
    ------
    TypeError
        If an argument is not an array of the kind or dtype it must be.
    ValueError
        If a shape or axis does not fit, there is a mask without an activation, or no mask for the
        gradient of a residual before ReLU, or an array that is written is read-only or overlaps
        another without being dy; or as `batch_norm_train` about GPUs.
    ImportError, RuntimeError
        As `batch_norm_train`.

    Notes
    -----
    Accumulation, order, threads, copies, half types and the order of the mask's bits as in
    `batch_norm_train`. dy and x are each read from memory once where a tile of channels fits the
    caches; dx, and behind ReLU dresidual, are written once. Without an activation dresidual is dy
    itself, not a copy, unless it must be one: where `out` is dy, or into the array given. An empty
    batch gives dgamma = dbeta = 0.

    References
    ----------
    S. Ioffe, C. Szegedy, arXiv:1502.03167, section 3 (the chain rule below Algorithm 1).

    Examples
    --------
    >>> import numpy as np, bncpu
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> y, mean, invstd = bncpu.batch_norm_train(x, eps=0)
    >>> gradients = bncpu.batch_norm_backward(np.ones_like(x), x, mean, invstd)
    >>> bool(abs(gradients.dx).max() < 1e-15), gradients.dbeta
    (True, array([3.]))

    With a residual before ReLU, what passes is kept in a mask:

    >>> residual = np.array([[1.0], [0.0], [-1.0]])
    >>> fused = {"activation": "relu", "mask": np.empty((x.size + 7) // 8, np.uint8)}
    >>> y, mean, invstd = bncpu.batch_norm_train(x, residual=residual, **fused)
    >>> y.round(2)
    array([[0.07],
           [0.  ],
           [0.39]])
    >>> dy = np.array([[1.0], [2.0], [3.0]])
    >>> bncpu.batch_norm_backward(dy, x, mean, invstd, residual=True, **fused).dresidual
    array([[1.],
           [0.],
           [3.]])
    """
    threads = threads_for_call(num_threads)
    plain = plain_kernels().plain_backward(
        dy, x, mean, invstd, gamma, beta, axis, residual, activation, mask, out, threads
    )
    if plain is not None:
        return Gradients(*plain)

    x = arguments.data("x", x)
    dy = arguments.same_as_x("dy", dy, x)
    over = arguments.channels(x, axis)
    mean = arguments.statistic("mean", mean, x, over)
    invstd = arguments.statistic("invstd", invstd, x, over)
    gamma = arguments.affine("gamma", gamma, x, over)
    beta = arguments.affine("beta", beta, x, over)
    read = [
        ("dy", dy),
        ("x", x),
        ("mean", mean),
        ("invstd", invstd),
        ("gamma", gamma),
        ("beta", beta),
    ]
    parameters = (mean, invstd, gamma, beta)
    kernel = kernels_for(x).backward
    return _backward(kernel, over, read, parameters, activation, mask, residual, out, threads)


def batch_norm_infer_backward(
    dy: Any,
    x: Any,
    mean: Any,
    var: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    eps: float = 1e-5,
    axis: int | tuple[int, ...] = 1,
    activation: Literal["relu"] | None = None,
    mask: Any = None,
    residual: Any = False,
    out: Any = None,
    num_threads: int | None = None,
) -> Gradients:
    r"""Return the gradients of batch_norm_infer: mean and variance are constants (frozen BN).

    .. math::
        d\beta = \sum dz, \quad d\gamma = \sum dz\,\hat x, \quad
        dx = \frac{\gamma\,dz}{\sqrt{\mathrm{var} + \epsilon}}

    with dz as in `batch_norm_backward`.

    Parameters
    ----------
    dy, x, gamma, beta, axis, activation, mask, residual, out, num_threads
        As for `batch_norm_backward`.
    mean, var, eps
        As they were given to `batch_norm_infer`.

    Returns
    -------
    Gradients
        dx, dgamma, dbeta, dresidual (None if not wanted).

    Raises
    ------
    TypeError
        If an argument is not an array of the kind or dtype it must be.
    ValueError
        If a shape, range or axis does not fit, a variance is negative, there is a mask without an
        activation, or no mask for the gradient of a residual before ReLU, or an array that is
        written is read-only or overlaps another without being dy; or as `batch_norm_train` about
        GPUs.
    ImportError, RuntimeError
        As `batch_norm_train`.

    Notes
    -----
    As in `batch_norm_backward`; a variance on a GPU is not looked at.

    References
    ----------
    S. Ioffe, C. Szegedy, arXiv:1502.03167, Algorithm 2: differentiation of the linear map.

    Examples
    --------
    >>> import numpy as np, bncpu
    >>> x, dy = np.array([[1.0], [3.0]]), np.array([[1.0], [2.0]])
    >>> bncpu.batch_norm_infer_backward(dy, x, mean=np.array([1.0]), var=np.array([4.0]), eps=0)
    Gradients(dx=array([[0.5],
           [1. ]]), dgamma=array([2.]), dbeta=array([3.]), dresidual=None)
    """
    threads = threads_for_call(num_threads)
    plain = plain_kernels().plain_infer_backward(
        dy, x, mean, var, gamma, beta, eps, axis, residual, activation, mask, out, threads
    )
    if plain is not None:
        return Gradients(*plain)

    x = arguments.data("x", x)
    dy = arguments.same_as_x("dy", dy, x)
    over = arguments.channels(x, axis)
    mean = arguments.statistic("mean", mean, x, over)
    var = arguments.variance("var", var, x, over)
    gamma = arguments.affine("gamma", gamma, x, over)
    beta = arguments.affine("beta", beta, x, over)
    eps = arguments.epsilon(eps)
    read = [("dy", dy), ("x", x), ("mean", mean), ("var", var), ("gamma", gamma), ("beta", beta)]
    parameters = (mean, var, gamma, beta, eps)
    kernel = kernels_for(x).infer_backward
    return _backward(kernel, over, read, parameters, activation, mask, residual, out, threads)


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
        If x is not an array of float32, float64, float16 or bfloat16.
    ValueError
        If the axis does not fit, or x is on a GPU that is not the current one.
    ImportError, RuntimeError
        As `batch_norm_train`.

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
    threads = threads_for_call(num_threads)
    plain = plain_kernels().plain_moments(x, axis, threads)
    if plain is not None:
        return Moments(*plain)

    x = arguments.data("x", x)
    over = arguments.channels(x, axis)
    mean, m2 = _new_vectors(x, over, arguments.FLOAT64)
    if x.size:
        walk = problem(over.axes, (x,))
        kernels_for(x).moments(walk.geometry, walk.arrays[0], mean, m2, threads)
    return Moments(over.values, mean.reshape(over.shape), m2.reshape(over.shape))


def update_running(
    running: tuple[NDArray[Any], NDArray[Any]],
    momentum: float,
    mean: NDArray[np.float64],
    var: NDArray[np.float64],
    m: int,
) -> None:
    """Move checked running statistics in place towards those of a batch of m > 1 values."""
    # Statistics beyond float32 become infinite there, as IEEE arithmetic has it; no warning is
    # owed, and one that is an error must not come between the two. Nor must anything else: what
    # needs memory is done before, and an interrupt waits for a call or the next turn of a loop.
    with np.errstate(all="ignore"):
        new_mean, new_var = (
            (np.multiply(old, 1 - momentum, dtype=np.float64) + momentum * new).astype(old.dtype)
            for old, new in zip(running, (mean, var * (m / (m - 1))), strict=True)
        )
        running_mean, running_var = running
        running_mean[...] = new_mean
        running_var[...] = new_var


def _copy(array: NDArray[Any], to: NDArray[Any] | None) -> None:
    source, there = as_stored((array, to))
    there[...] = source  # type: ignore[index]  # neither is None


def _new_vectors(
    x: NDArray[Any], over: arguments.Channels, dtype: np.dtype[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    # Two sums of each channel: 0 without a value, else what kernels will fill.
    module = array_module(x)
    new = module.empty if x.size else module.zeros
    return new(over.number, dtype), new(over.number, dtype)


def _backward(
    kernel: Any,
    over: arguments.Channels,
    read: list[tuple[str, Any]],
    parameters: tuple[Any, ...],
    activation: Any,
    mask: Any,
    residual: Any,
    out: Any,
    threads: int,
) -> Gradients:
    """Do the steps that the backward functions share; what is read, dy and x first, is checked."""
    dy, x = read[0][1], read[1][1]
    relu = arguments.is_relu(activation)
    mask = arguments.mask(mask, x, relu)
    read = [*read, ("mask", mask)]
    dx = arguments.output(out, x, read, may_be=("dy",))
    dresidual = arguments.residual_gradient(residual, x, dy, dx, relu, mask, read)

    # Without an activation dresidual is dy, or a copy of it, made when all else has its memory.
    dz = dresidual if relu else None
    # The kernels of a GPU round what they return themselves: a cast would be one more launch.
    dtype = arguments.parameter_dtype(x) if on_gpu(x) else arguments.FLOAT64
    dgamma, dbeta = _new_vectors(x, over, dtype)
    if x.size:
        walk = problem(over.axes, (x, dy), (dx, dz), mask)
        copies = dresidual is not dz and dresidual is not dy
        first = copies and overlap(dx, dy)  # before dx takes the place of dy
        if first:
            _copy(dy, dresidual)
        kernel(walk.geometry, *walk.arrays, relu, *parameters, dgamma, dbeta, threads)
        walk.finish()
        if copies and not first:
            _copy(dy, dresidual)
    return _gradients(dx, dgamma, dbeta, dresidual, over)


def _gradients(
    dx: NDArray[Any],
    dgamma: NDArray[np.float64],
    dbeta: NDArray[np.float64],
    dresidual: NDArray[Any] | None,
    over: arguments.Channels,
) -> Gradients:
    dtype = arguments.parameter_dtype(dx)
    # Sums beyond float32 become infinite there, as IEEE arithmetic has it; no warning is owed.
    with np.errstate(all="ignore"):
        return Gradients(
            dx,
            dgamma.astype(dtype, copy=False).reshape(over.shape),
            dbeta.astype(dtype, copy=False).reshape(over.shape),
            dresidual,
        )


def _invstd(var: NDArray[np.float64], eps: float) -> NDArray[np.float64]:
    with np.errstate(divide="ignore"):
        return 1 / np.sqrt(var + eps)
