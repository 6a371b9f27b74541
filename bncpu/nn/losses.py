"""The loss of a classifier: softmax and cross-entropy in one, because together they are stable.

Not a collection of losses. The gradient of the pair, p - onehot, is Bridle's (1990).
"""

import numpy as np

from bncpu.backends import array_module
from bncpu.nn.base import Array, kept


class SoftmaxCrossEntropy:
    """L = mean over n of -log softmax(logits)[n, labels[n]], in nats.

    Examples
    --------
    >>> import numpy as np
    >>> from bncpu.nn import SoftmaxCrossEntropy
    >>> loss = SoftmaxCrossEntropy()
    >>> round(loss.forward(np.zeros((2, 10), np.float32), np.array([3, 7])), 6)  # log(10)
    2.302585
    >>> loss.backward().shape
    (2, 10)
    """

    _gradient: Array | None = None

    def forward(self, logits: Array, labels: Array) -> float:
        """Return the loss.

        Parameters
        ----------
        logits : array, shape (n, classes), floating
            The network's output; no softmax has been applied.
        labels : array, shape (n,), integer
            The right class of each row, from 0 to classes - 1.

        Raises
        ------
        TypeError
            If the labels are not integers.
        ValueError
            If the shapes do not fit, there is no row, or a label is out of range.
        """
        module = array_module(logits)
        labels = module.asarray(labels)
        if logits.ndim != 2 or not logits.size:
            raise ValueError(f"logits: expected shape (n, classes), not empty; got {logits.shape}")
        n, classes = logits.shape
        if labels.shape != (n,):
            raise ValueError(f"labels: expected shape ({n},), one per row; got {labels.shape}")
        if labels.dtype.kind not in "iu":
            raise TypeError(f"labels: expected integers; got {labels.dtype}")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            raise ValueError(f"labels: expected 0 to {classes - 1}; got {low} to {high}")
        rows = module.arange(n)
        # Softmax is the same for logits - constant, and with the largest at 0 no exp overflows.
        shifted = logits - logits.max(axis=1, keepdims=True)
        exp = np.exp(shifted)
        total = exp.sum(axis=1, keepdims=True)
        gradient = exp / total
        gradient[rows, labels] -= 1
        gradient /= n
        self._gradient = gradient
        return float(np.mean(np.log(total[:, 0]) - shifted[rows, labels], dtype=np.float64))

    def backward(self) -> Array:
        """Return dL/dlogits = (softmax(logits) - onehot(labels)) / n of the last forward."""
        return kept(self._gradient)
