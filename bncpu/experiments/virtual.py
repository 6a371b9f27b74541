"""Batch normalisation of a small batch by the statistics of a larger, virtual one.

An experiment, not a layer of the trainer: what it has pooled is not in its state, so that a run
cannot be resumed bit by bit. Yao et al. (2021) go further and correct the earlier batches'
statistics for what the weights have changed since; here they are as they were.
"""

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

import bncpu
from bncpu import Moments, nn


class VirtualBatchNorm(nn.BatchNorm):
    """Normalises a batch by the moments of `batches` to twice as many, the last of them its own.

    The moments of earlier batches are constants to the gradient, which flows through the batch and
    through its own share of the pooled mean and variance. In inference it is a `BatchNorm`, whose
    running statistics are to come from `nn.population_statistics`: training leaves them alone.

    Parameters
    ----------
    num_features : int
        C, of inputs (n, C).
    batches : int
        In a virtual batch, >= 1. The one before is pooled with what there is of the present one.
    dtype : dtype
        As for `BatchNorm`.

    Examples
    --------
    >>> import numpy as np
    >>> from bncpu.experiments.virtual import VirtualBatchNorm
    >>> layer = VirtualBatchNorm(1, batches=2)
    >>> for x in (0, 1, 2):
    ...     y = layer.forward(np.full((1, 1), x, np.float32))
    >>> layer.pooled.count, layer.pooled.mean.item()
    (3, 1.0)
    """

    def __init__(self, num_features: int, batches: int, dtype: DTypeLike = np.float32) -> None:
        super().__init__(num_features, dtype=dtype)
        self.batches, self.seen = batches, 0
        nothing = Moments(0, np.zeros(num_features), np.zeros(num_features))
        self.before = self.now = self.nothing = nothing
        self.pooled, self.x = nothing, np.empty((0, num_features), self.dtype)

    def forward(self, x: Any, *, residual: Any = None, out: Any = None) -> nn.Array:
        """Return y, in training with pooled statistics."""
        if not self.training:
            return super().forward(x, residual=residual, out=out)
        if self.seen % self.batches == 0:
            self.before, self.now = self.now, self.nothing
        self.seen += 1
        self.now = self.now.merge(bncpu.batch_moments(x))
        self.x, self.pooled = x, self.before.merge(self.now)
        mean, var = self.pooled.mean, self.pooled.var()
        return bncpu.batch_norm_infer(x, mean, var, self.gamma, self.beta, eps=self.eps)

    def backward(self, dy: Any, *, out: Any = None) -> nn.Array:
        """Return dx: that of constant statistics, less what flows through the batch's own share.

        Of n pooled values x is one, so d mean / dx = 1 / n and d var / dx = 2 (x - mean) / n. Where
        the batch is all there is, this is the gradient of Algorithm 1.
        """
        if not self.training:
            return super().backward(dy, out=out)
        assert self.gamma is not None
        mean, var = self.pooled.mean, self.pooled.var()
        constant = bncpu.batch_norm_infer_backward(
            dy, self.x, mean, var, self.gamma, self.beta, eps=self.eps
        )
        self.dgamma, self.dbeta = constant.dgamma, constant.dbeta
        invstd = 1 / np.sqrt(var + self.eps)
        xhat = (self.x - mean) * invstd
        share = self.gamma * invstd * (self.dbeta + xhat * self.dgamma) / self.pooled.count
        dx: nn.Array = (constant.dx - share).astype(self.x.dtype)
        return dx
