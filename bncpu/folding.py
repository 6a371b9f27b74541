"""Batch normalisation with fixed statistics as one linear map, alone or inside the layer before it.

Parameters only, by the operations that NumPy and CuPy share; nothing here touches a batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bncpu import arguments
from bncpu.backends import as_array

if TYPE_CHECKING:
    from numpy.typing import NDArray


class LinearMap(NamedTuple):
    """y = scale * x + shift, one value per channel.

    Attributes
    ----------
    scale, shift : ndarray of float64, shape (C,)
    """

    scale: NDArray[np.float64]
    shift: NDArray[np.float64]


def linear_map(
    mean: Any, var: Any, gamma: Any = None, beta: Any = None, eps: float = 1e-5
) -> LinearMap:
    r"""Return batch normalisation with fixed statistics as scale and shift.

    .. math:: \mathrm{scale} = \frac{\gamma}{\sqrt{\mathrm{var} + \epsilon}}, \quad
              \mathrm{shift} = \beta - \mathrm{scale}\cdot\mathrm{mean}

    Parameters
    ----------
    mean, var : array of floats, shape (C,) or the shape of several channel axes
        Population statistics; no variance may be negative (one on a GPU is not looked at).
    gamma, beta : array of floats, the shape of mean, optional
        Ones and zeros if not given.
    eps : float, default 1e-5
        In the units of var.

    Returns
    -------
    LinearMap
        scale, shift in float64.

    Raises
    ------
    TypeError
        If an argument is not an array of floats.
    ValueError
        If shapes differ, a variance is negative, or eps is.

    Notes
    -----
    ``scale * x + shift`` loses digits where \|mean\| is much larger than the standard deviation,
    since shift then cancels against scale * x; `batch_norm_infer` does not.

    References
    ----------
    S. Ioffe, C. Szegedy, arXiv:1502.03167, Algorithm 2, line 11.

    Examples
    --------
    >>> import numpy as np, bncpu
    >>> bncpu.linear_map(np.array([1.0]), np.array([4.0]), gamma=np.array([3.0]), eps=0)
    LinearMap(scale=array([1.5]), shift=array([-1.5]))
    """
    mean = arguments.floats("mean", mean)
    var = arguments.floats("var", var, mean)
    arguments.no_negative("var", var)
    eps = arguments.epsilon(eps)
    with np.errstate(all="ignore"):  # 0 variance without eps, infinite means: as IEEE has it
        scale = 1 / np.sqrt(var + eps)
        if gamma is not None:
            scale = arguments.floats("gamma", gamma, mean) * scale
        shift = -scale * mean
        if beta is not None:
            shift = arguments.floats("beta", beta, mean) + shift
    return LinearMap(scale, shift)


def fold_into_linear(
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    eps: float = 1e-5,
    axis: int = 0,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return weight and bias of the linear layer that includes the batch norm after it.

    Parameters
    ----------
    weight : array of floats, shape (out_features, in_features)
        Of the layer whose outputs are normalised; out_features on `axis`.
    bias : array of floats, shape (out_features,), or None
        None for a layer without one.
    mean, var, gamma, beta, eps
        As for `linear_map`, shape (out_features,).
    axis : int, default 0
        The axis of weight with the output features (1 for an (in, out) weight).

    Returns
    -------
    weight, bias : ndarray
        In the dtype of weight; computed in float64. The arguments are left as they were.

    Raises
    ------
    TypeError
        If an argument is not an array of floats.
    ValueError
        If weight is not 2-D, or the shapes do not fit one another.

    References
    ----------
    S. Ioffe, C. Szegedy, arXiv:1502.03167, section 3.1: at inference the linear map can be
    composed with the layer before it.

    Examples
    --------
    >>> import numpy as np, bncpu
    >>> rng = np.random.default_rng(0)
    >>> u, weight, mean, var = rng.random((5, 3)), rng.random((2, 3)), rng.random(2), rng.random(2)
    >>> folded, bias = bncpu.fold_into_linear(weight, None, mean, var)
    >>> y = bncpu.batch_norm_infer(u @ weight.T, mean, var)
    >>> np.allclose(u @ folded.T + bias, y)
    True
    """
    return _fold(weight, bias, linear_map(mean, var, gamma, beta, eps), axis, range(2, 3))


def fold_into_conv(
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    eps: float = 1e-5,
    axis: int = 0,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return weight and bias of the convolution that includes the batch norm after it.

    Parameters
    ----------
    weight : array of floats, shape (C_out, C_in / groups, ...)
        Of the convolution whose outputs are normalised, of any rank from 3 on.
    bias : array of floats, shape (C_out,), or None
        None for a convolution without one.
    mean, var, gamma, beta, eps
        As for `linear_map`, shape (C_out,).
    axis : int, default 0
        The axis of weight with the output channels (-1 for (H, W, C_in, C_out); 1 for a transposed
        convolution of one group, (C_in, C_out, ...)).

    Returns
    -------
    weight, bias : ndarray
        In the dtype of weight; computed in float64. The arguments are left as they were.

    Raises
    ------
    TypeError
        If an argument is not an array of floats.
    ValueError
        If weight has fewer than 3 dimensions, or the shapes do not fit one another.

    References
    ----------
    S. Ioffe, C. Szegedy, arXiv:1502.03167, sections 3.1 and 3.2.

    Examples
    --------
    >>> import numpy as np, bncpu
    >>> weight = np.ones((2, 3, 1, 1))
    >>> folded, bias = bncpu.fold_into_conv(weight, None, np.ones(2), np.full(2, 4.0), eps=0)
    >>> folded[0].ravel(), bias
    (array([0.5, 0.5, 0.5]), array([-0.5, -0.5]))
    """
    return _fold(weight, bias, linear_map(mean, var, gamma, beta, eps), axis, range(3, 65))


def _fold(
    weight: Any, bias: Any, linear: LinearMap, axis: int, ranks: range
) -> tuple[NDArray[Any], NDArray[Any]]:
    wide, axis = arguments.weights(weight, linear.scale, axis, ranks)
    dtype = as_array("weight", weight).dtype
    shift = linear.shift
    if bias is not None:
        shift = arguments.floats("bias", bias, linear.scale) * linear.scale + shift
    shape = [1] * wide.ndim
    shape[axis] = -1
    return (wide * linear.scale.reshape(shape)).astype(dtype), shift.astype(dtype)
