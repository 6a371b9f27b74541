"""Full whitening of a layer's inputs: the alternative that section 2 of the paper turns down.

The gradient goes through covariance, eigendecomposition and inverse square root, as in decorrelated
batch normalisation (Huang et al. 2018). Not for training anything but the comparison.
"""

from typing import NamedTuple

import numpy as np

from bncpu import nn


class Whitened(NamedTuple):
    """What `whiten` returns.

    Attributes
    ----------
    y : ndarray, shape (n, d)
        The whitened batch.
    mean : ndarray, shape (d,)
        Its mean before.
    cov : ndarray, shape (d, d)
        Its covariance before, by n, with eps on the diagonal.
    values, vectors : ndarray, shapes (d,) and (d, d)
        Eigenvalues and eigenvectors of it.
    """

    y: nn.Array
    mean: nn.Array
    cov: nn.Array
    values: nn.Array
    vectors: nn.Array


def whiten(x: nn.Array, eps: float = 1e-5) -> Whitened:
    r"""Return y = (x - E[x]) (Cov[x] + eps I)^{-1/2}, whose covariance is the identity.

    Parameters
    ----------
    x : array, shape (n, d), floating
        The batch; with n <= d some directions have no variance, and stay at zero.
    eps : float
        Added to the variances, in their units.

    Notes
    -----
    Of all matrices that whiten, the symmetric one (ZCA): y is as near to x - E[x] as can be.

    Examples
    --------
    >>> import numpy as np
    >>> from bncpu.experiments.whitened import whiten
    >>> mixing = np.array([[1, 2, 0], [0, 1, 5], [0, 0, 1]])
    >>> x = np.random.default_rng(0).normal(size=(100, 3)) @ mixing
    >>> y = whiten(x, eps=0).y
    >>> bool(np.allclose(y.T @ y / 100, np.eye(3)))
    True
    """
    mean = x.mean(axis=0)
    centred = x - mean
    cov = centred.T @ centred / len(x)
    cov[np.diag_indices_from(cov)] += eps
    values, vectors = eigen(cov)
    return Whitened(centred @ inverse_root(values, vectors), mean, cov, values, vectors)


def eigen(matrix: nn.Array) -> tuple[nn.Array, nn.Array]:
    """Return eigenvalues and eigenvectors of a symmetric matrix."""
    from scipy import linalg  # bncpu[train] brings it, and the package is imported without

    if not np.isfinite(matrix).all():
        raise FloatingPointError("covariance: expected finite values; the training diverged")
    values, vectors = linalg.eigh(matrix)
    return values, vectors


def inverse_root(values: nn.Array, vectors: nn.Array) -> nn.Array:
    """Return the inverse square root of a symmetric matrix from its eigendecomposition."""
    root: nn.Array = (vectors / np.sqrt(values)) @ vectors.T
    return root


def whiten_backward(dy: nn.Array, x: nn.Array, forward: Whitened) -> nn.Array:
    r"""Return dx of `whiten`.

    Notes
    -----
    With :math:`C = V \mathrm{diag}(\lambda) V^T`, a change of C changes :math:`V^T C^{-1/2} V` by
    that of :math:`V^T C V`, element by element times the divided difference

    .. math::
        \frac{\lambda_i^{-1/2} - \lambda_j^{-1/2}}{\lambda_i - \lambda_j}
        = \frac{-1}{\sqrt{\lambda_i \lambda_j} (\sqrt{\lambda_i} + \sqrt{\lambda_j})}

    (Daleckii & Krein 1965), which in this form is right for equal eigenvalues too.
    """
    centred, v, roots = x - forward.mean, forward.vectors, np.sqrt(forward.values)
    product = centred.T @ dy
    differences = -1 / (np.outer(roots, roots) * np.add.outer(roots, roots))
    dcov = v @ (differences * (v.T @ ((product + product.T) / 2) @ v)) @ v.T
    dx: nn.Array = dy @ inverse_root(forward.values, v) + centred @ dcov * (2 / len(x))
    dx -= dx.mean(axis=0)
    return dx


class WhiteningLayer(nn.Layer):
    """y = gamma x_whitened + beta, with moving averages of mean and covariance for inference.

    Parameters
    ----------
    features : int
        d.
    eps, momentum : float
        As for `BatchNorm`.

    Attributes
    ----------
    gamma, beta : ndarray, shape (d,)
        Ones and zeros at first.
    running_mean, running_cov : ndarray, shapes (d,) and (d, d)
        Zeros and the identity at first; the covariance is that by n, with eps.
    """

    def __init__(self, features: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        self.eps, self.momentum = eps, momentum
        self.gamma, self.beta = np.ones(features, np.float32), np.zeros(features, np.float32)
        self.running_mean = np.zeros(features, np.float32)
        self.running_cov = np.eye(features, dtype=np.float32)
        self._gradients: dict[str, nn.Array] = {}
        self._last: tuple[nn.Array, Whitened] | None = None

    def forward(self, x: nn.Array) -> nn.Array:
        """Return y; in training by the batch's own mean and covariance."""
        if not self.training:
            root = inverse_root(*eigen(self.running_cov))
            return (x - self.running_mean) @ root * self.gamma + self.beta
        result = whiten(x, self.eps)
        self._last = x, result
        for running, new in ((self.running_mean, result.mean), (self.running_cov, result.cov)):
            running += self.momentum * (new - running)
        return result.y * self.gamma + self.beta

    def backward(self, dy: nn.Array) -> nn.Array:
        """Return dx of the last forward in training, and keep the gradients of gamma and beta."""
        if self._last is None:
            raise RuntimeError(
                "backward: nothing to differentiate; call forward first, in training"
            )
        x, result = self._last
        self._gradients = {"weight": (dy * result.y).sum(axis=0), "bias": dy.sum(axis=0)}
        return whiten_backward(dy * self.gamma, x, result)

    def parameters(self) -> dict[str, nn.Array]:
        """Return gamma and beta, under BatchNorm's names."""
        return {"weight": self.gamma, "bias": self.beta}

    def gradients(self) -> dict[str, nn.Array]:
        """Return their gradients."""
        return self._gradients
