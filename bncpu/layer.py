"""BatchNorm: the public functions with parameters, running statistics and the last batch.

The one layer that is useful without the trainer (bncpu.nn), so it stands below it. It computes
nothing itself.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from bncpu import arguments, functional
from bncpu.backends import array_module, as_array, module_on, on_gpu, to_numpy
from bncpu.memory import overlap

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import DTypeLike, NDArray


class _Forward(NamedTuple):
    # What backward needs of a forward; the statistics are the batch's own, or with `batch` false
    # the running mean and variance.
    x: Any
    statistics: tuple[Any, ...]
    batch: bool
    residual: bool
    mask: NDArray[np.uint8] | None


class BatchNorm:
    """Batch normalisation with learnable scale and shift and running statistics.

    Parameters
    ----------
    num_features : int or tuple of ints
        C, or the sizes of several channel axes (the per-activation form).
    eps : float, default 1e-5
        Added to the variance, in its units.
    momentum : float or None, default 0.1
        Weight of the new value in the running statistics, within [0, 1]. None averages all batches
        so far with equal weight, as in PyTorch.
    affine : bool, default True
        Whether there are gamma and beta.
    track_running_stats : bool, default True
        Whether there are running statistics. Without them evaluation uses the batch's own.
    axis : int or tuple of ints, default 1
        The channel axes of the input.
    activation : None or "relu", default None
        What is applied last, in the same pass over memory.
    dtype : dtype, default float32
        Of parameters and running statistics: float64 for inputs of float64, or float32 for inputs
        of float32, float16 or bfloat16.
    device : "cpu" or "cuda", default "cpu"
        Where parameters and statistics are, and so the input must be: NumPy arrays, or CuPy arrays
        on the GPU that is current now.

    Attributes
    ----------
    gamma, beta, dgamma, dbeta : ndarray, shape (C,), or None without affine
        Parameters, ones and zeros at first, and their gradients after `backward`.
    dresidual : ndarray or None
        The gradient of the last forward's residual after `backward`, if it had one.
    running_mean, running_var : ndarray, shape (C,), or None
        Zeros and ones at first; the variance is unbiased.
    num_batches_tracked : int
        Training batches seen.
    training : bool
        Whether `forward` uses the batch's own statistics; True at first.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind or out of range.
    ImportError, RuntimeError
        If the device is "cuda" and CuPy is not installed, or finds no GPU.

    References
    ----------
    S. Ioffe, C. Szegedy, arXiv:1502.03167, Algorithms 1 and 2.

    Examples
    --------
    >>> import numpy as np, bncpu
    >>> layer = bncpu.BatchNorm(3)
    >>> x = np.random.default_rng(0).normal(5, 2, (8, 3, 4, 4)).astype(np.float32)
    >>> y = layer(x)
    >>> dx = layer.backward(np.ones_like(y))
    >>> layer.eval()(x).shape, layer.num_batches_tracked
    ((8, 3, 4, 4), 1)

    The end of a residual block, relu(BN(x) + residual):

    >>> layer = bncpu.BatchNorm(3, activation="relu")
    >>> y = layer(x, residual=-x)
    >>> dx = layer.backward(np.ones_like(y))
    >>> bool((layer.dresidual == (y > 0)).all())
    True
    """

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        axis: int | tuple[int, ...] = 1,
        activation: Literal["relu"] | None = None,
        dtype: DTypeLike = np.float32,
        device: Literal["cpu", "cuda"] = "cpu",
    ) -> None:
        self.shape = _shape(num_features, axis)
        self.eps = arguments.epsilon(eps)
        self.momentum = None if momentum is None else arguments.momentum_weight(momentum)
        self.axis = axis
        arguments.is_relu(activation)
        self.activation = activation
        self.dtype = np.dtype(dtype)
        if self.dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
            raise TypeError(f"dtype: expected float32 or float64; got {self.dtype}")
        ones, zeros, empty = (getattr(module_on(device), f) for f in ("ones", "zeros", "empty"))
        self.device = device
        self.gamma = ones(self.shape, self.dtype) if affine else None
        self.beta = zeros(self.shape, self.dtype) if affine else None
        self.dgamma: NDArray[Any] | None = None
        self.dbeta: NDArray[Any] | None = None
        self.dresidual: NDArray[Any] | None = None
        self.running_mean = zeros(self.shape, self.dtype) if track_running_stats else None
        self.running_var = ones(self.shape, self.dtype) if track_running_stats else None
        self.num_batches_tracked = 0
        self.training = True
        self._last: _Forward | None = None
        self._mask: NDArray[np.uint8] = empty(0, np.uint8)  # kept from batch to batch of one size

    def __call__(self, x: Any, *, residual: Any = None, out: Any = None) -> NDArray[Any]:
        """Return `forward` of x."""
        return self.forward(x, residual=residual, out=out)

    def __repr__(self) -> str:
        features = self.shape[0] if len(self.shape) == 1 else self.shape
        return (
            f"BatchNorm({features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.gamma is not None}, "
            f"track_running_stats={self.running_mean is not None}, axis={self.axis}, "
            f"activation={self.activation!r})"
        )

    def train(self, mode: bool = True) -> BatchNorm:
        """Use the batch's own statistics from now on (or not, with mode=False); return self."""
        self.training = bool(mode)
        return self

    def eval(self) -> BatchNorm:
        """Use the running statistics from now on; return self."""
        return self.train(False)

    def forward(self, x: Any, *, residual: Any = None, out: Any = None) -> NDArray[Any]:
        """Return y, and remember x for `backward`.

        Parameters
        ----------
        x : array, channels on the layer's axis
            Of float64 for a layer of float64, else of float32, float16 or bfloat16. Kept, not
            copied: leave it as it is until backward.
        residual : array, shape and dtype of x, optional
            Added before the activation. Not kept: with an activation the layer has a bit for each
            of its elements.
        out : array, shape and dtype of x, optional
            Where y goes; residual itself is allowed, and in evaluation x itself, after which there
            is no backward.

        Raises
        ------
        TypeError, ValueError
            As `batch_norm_train` and `batch_norm_infer`.
        """
        self._check(x)
        mask = None
        if residual is not None and self.activation is not None:
            mask = self._mask_for(x)
        how = {
            "eps": self.eps,
            "axis": self.axis,
            "residual": residual,
            "activation": self.activation,
            "mask": mask,
            "out": out,
        }
        with_residual = residual is not None
        if not self.training and self.running_mean is not None and self.running_var is not None:
            mean, var = self.running_mean, self.running_var
            y = functional.batch_norm_infer(x, mean, var, self.gamma, self.beta, **how)
            # In place there is no x left to differentiate at.
            in_place = out is not None and overlap(y, as_array("x", x))
            self._last = None if in_place else _Forward(x, (mean, var), False, with_residual, mask)
            return y
        update = self.training and self.running_mean is not None
        momentum = self.momentum
        if momentum is None:
            momentum = 1 / (self.num_batches_tracked + 1)
        how |= {
            "running_mean": self.running_mean if update else None,
            "running_var": self.running_var if update else None,
            "momentum": momentum,
        }
        y, statistics, m = self._forward_batch(x, how)
        # A batch without values has changed nothing and must not weigh in the average.
        self.num_batches_tracked += update and m > 0
        self._last = _Forward(x, statistics, True, with_residual, mask)
        return y

    def backward(self, dy: Any, *, out: Any = None) -> NDArray[Any]:
        """Return dx for the last forward; the other gradients are kept as attributes.

        Parameters
        ----------
        dy : array, shape and dtype of y
            Without an activation it is the residual's gradient, and kept as such.
        out : array, shape and dtype of dy, optional
            Where dx goes; dy itself is allowed.

        Raises
        ------
        RuntimeError
            If there was no forward, or the last one wrote its result over x.
        TypeError, ValueError
            As `batch_norm_backward`.
        """
        if self._last is None:
            raise RuntimeError(
                "backward: call forward first, and not with out=x; it keeps what the gradients need"
            )
        x, statistics, batch, residual, mask = self._last
        how = {
            "axis": self.axis,
            "activation": self.activation,
            "mask": mask,
            "residual": residual,
            "out": out,
        }
        if batch:
            gradients = self._backward_batch(dy, x, statistics, how)
        else:
            mean, var = statistics
            gradients = functional.batch_norm_infer_backward(
                dy, x, mean, var, self.gamma, self.beta, eps=self.eps, **how
            )
        if self.gamma is not None:
            self.dgamma, self.dbeta = gradients.dgamma, gradients.dbeta
        self.dresidual = gradients.dresidual
        return gradients.dx

    def _forward_batch(
        self, x: Any, how: dict[str, Any]
    ) -> tuple[NDArray[Any], tuple[Any, ...], int]:
        # y, what backward needs of the batch's statistics, and whether the batch had values (> 0).
        y, mean, invstd = functional.batch_norm_train(x, self.gamma, self.beta, **how)
        return y, (mean, invstd), y.size

    def _backward_batch(
        self, dy: Any, x: Any, statistics: tuple[Any, ...], how: dict[str, Any]
    ) -> functional.Gradients:
        mean, invstd = statistics
        return functional.batch_norm_backward(dy, x, mean, invstd, self.gamma, self.beta, **how)

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return NumPy copies of parameters and statistics under PyTorch's names."""
        return {name: np.array(to_numpy(array)) for name, array in self._state().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over parameters and statistics, PyTorch's names; nothing changes if one is wrong.

        Parameters
        ----------
        state : mapping of names to arrays
            weight, bias (with affine), running_mean, running_var, num_batches_tracked (with
            track_running_stats), in any real dtype of NumPy; on the CPU or a GPU.

        Raises
        ------
        TypeError
            If a value is not an array of numbers.
        ValueError
            If a name is missing or unknown, a shape is wrong, or a variance or the count negative.
        """
        own = self._state()
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unknown:
            raise ValueError(f"state: missing {missing}, unknown {unknown}")
        new = {}
        for name, array in own.items():
            value = to_numpy(as_array(name, state[name]))
            if value.shape != array.shape:
                raise ValueError(f"{name}: expected shape {array.shape}; got {value.shape}")
            if value.dtype.kind not in "iuf":
                raise TypeError(f"{name}: expected an array of numbers; got dtype {value.dtype}")
            if name == "running_var" and (value < 0).any():
                raise ValueError(f"{name}: expected no negative variance; got {value.min()}")
            if name == "num_batches_tracked" and not (0 <= value < 2**63 and value % 1 == 0):
                raise ValueError(f"{name}: expected a count; got {value}")
            new[name] = value
        count = int(new.pop("num_batches_tracked", 0))
        # Converted before anything is taken over: numbers beyond float32 become infinite there,
        # and a warning that is an error must not come between two arrays.
        with np.errstate(all="ignore"):
            new = {
                name: array_module(own[name]).asarray(value, dtype=own[name].dtype)
                for name, value in new.items()
            }
        for name, value in new.items():
            own[name][...] = value
        self.num_batches_tracked = count

    def _check(self, x: Any) -> None:
        # The functions would blame gamma or the running statistics, which nobody passed.
        array = arguments.data("x", x)
        if on_gpu(array) != (self.device == "cuda"):
            kind, device = ("CuPy", "cuda") if on_gpu(array) else ("NumPy", "cpu")
            raise TypeError(
                f"x: expected an array on the layer's device, {self.device}; got a {kind} array; "
                f'make the layer with device="{device}"'
            )
        dtype = arguments.parameter_dtype(array)
        if dtype != self.dtype:
            expected = "float64" if self.dtype == np.float64 else "float32, float16 or bfloat16"
            raise TypeError(
                f"x: expected dtype {expected} for a layer of {self.dtype}; got {array.dtype}; "
                f"cast it, or make the layer with dtype=numpy.{dtype}"
            )
        over = arguments.channels(array, self.axis)
        if over.shape != self.shape:
            raise ValueError(
                f"x: expected {self.shape} channels on axis {self.axis}; got {over.shape} in "
                f"shape {array.shape}"
            )

    def _mask_for(self, x: Any) -> NDArray[np.uint8]:
        size = (as_array("x", x).size + 7) // 8
        if self._mask.size != size:
            self._mask = array_module(self._mask).empty(size, np.uint8)
        return self._mask

    def _state(self) -> dict[str, NDArray[Any]]:
        # The layer's own arrays, save for the count.
        state = {
            "weight": self.gamma,
            "bias": self.beta,
            "running_mean": self.running_mean,
            "running_var": self.running_var,
            "num_batches_tracked": (
                None if self.running_mean is None else np.array(self.num_batches_tracked, np.int64)
            ),
        }
        return {name: array for name, array in state.items() if array is not None}


def _shape(num_features: int | tuple[int, ...], axis: int | tuple[int, ...]) -> tuple[int, ...]:
    sizes = num_features if isinstance(num_features, tuple) else (num_features,)
    try:
        shape = tuple(operator.index(n) for n in sizes)
    except TypeError:
        raise TypeError(
            f"num_features: expected an int or a tuple of ints; got {num_features!r}"
        ) from None
    if not shape or min(shape) < 1:
        raise ValueError(f"num_features: expected sizes of at least 1; got {num_features!r}")
    axes = arguments.axis_numbers(axis)
    if len(shape) != len(axes):
        raise ValueError(
            f"num_features: expected one size per channel axis {axes}; got {num_features!r}"
        )
    return shape
