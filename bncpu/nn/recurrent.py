"""RNN: the simple recurrent network of Elman (1990), plain or batch-normalised.

The gradient goes back through all time steps, and is written out. Batch-normalised after Cooijmans
et al. (2016) and Laurent et al. (2015): what comes from the input and what comes from the state
before are normalised apart, with statistics of their own at every time step and scales that all
time steps share. Not an LSTM, not stacked, no sequences of different lengths.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import DTypeLike

from bncpu.layer import BatchNorm
from bncpu.nn.arguments import integer, real
from bncpu.nn.base import Array, Layer, kept
from bncpu.nn.initialization import gaussian

# What a batch normalisation has of its own at a time step, by PyTorch's names.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class RNN(Layer):
    r"""The last state of a recurrent network, for x of shape (n, steps, in_features).

    .. math::
        h_t = \tanh(W x_t + U h_{t-1} + b), \quad t = 1 \ldots T, \quad h_0 = 0

    and with batch normalisation, whose statistics at step t are those of the batch at step t,

    .. math::
        h_t = \tanh(\mathrm{BN}_t(W x_t) + \mathrm{BN}'_t(U h_{t-1}) + b).

    Parameters
    ----------
    in_features, hidden : int
        The sizes of the input of a time step and of the state.
    steps : int
        T, the number of time steps.
    batch_norm : bool
        Whether it is normalised.
    rng : numpy.random.Generator
        Draws W, Gaussian of standard deviation 1 / sqrt(in_features), then U, orthogonal. b starts
        at zero. From the same `rng` a normalised and a plain network start with the same weights.
    scale : float
        With batch normalisation: where gamma of U h_{t-1} starts. Near 1, the tanh of every step
        is in its flat part for many units, and gradients vanish; Cooijmans et al. found 0.1 good.
    eps : float
        Of all batch normalisations, in the units of their variances.
    dtype : dtype
        float32 or float64, the dtype of x and of the parameters.

    Attributes
    ----------
    input_norms, state_norms : tuple of BatchNorm
        One for each time step, with its running statistics; the state's begin at the second step,
        since h_0 is the same for all. Those of a kind have one gamma, the same array, and no beta,
        whose part is b's. Empty without batch normalisation.
    dz : array, shape (steps, n, hidden), or None
        The gradient of the argument of tanh, of the last `backward`: how far gradients reach back.

    Raises
    ------
    TypeError
        If a size is not an integer, `scale` or `eps` not a number, `rng` not a Generator, or
        `dtype` neither float32 nor float64.
    ValueError
        If a size is not positive, `scale` not finite, or `eps` negative.

    Notes
    -----
    W x is one product for all time steps, and so is the gradient of each weight. What backward
    needs of every time step is kept until the next forward: memory grows with n, steps and hidden.

    References
    ----------
    T. Cooijmans et al., "Recurrent Batch Normalization", arXiv:1603.09025.
    C. Laurent et al., "Batch Normalized Recurrent Neural Networks", arXiv:1510.01378.

    Examples
    --------
    >>> import numpy as np
    >>> from bncpu.nn import RNN
    >>> layer = RNN(8, 16, 5, rng=np.random.default_rng(0))
    >>> layer(np.ones((2, 5, 8), np.float32)).shape
    (2, 16)
    >>> list(layer.parameters())
    ['weight_ih', 'weight_hh', 'bias', 'gamma_ih', 'gamma_hh']
    """

    def __init__(
        self,
        in_features: int,
        hidden: int,
        steps: int,
        *,
        batch_norm: bool = True,
        rng: np.random.Generator,
        scale: float = 0.1,
        eps: float = 1e-5,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.in_features = integer("in_features", in_features, 1)
        self.hidden = integer("hidden", hidden, 1)
        self.steps = integer("steps", steps, 1)
        scale = real("scale", scale)
        if not np.isfinite(scale):
            raise ValueError(f"scale: expected a finite number; got {scale}")
        shape = (self.hidden, self.in_features)
        weight = gaussian(shape, rng=rng, std=None, dtype=dtype)
        orthogonal, upper = np.linalg.qr(rng.standard_normal((self.hidden, self.hidden)))
        # With the signs of R's diagonal taken out, Q is uniform over the orthogonal matrices.
        orthogonal *= np.copysign(1.0, np.diag(upper))
        self._parameters: dict[str, Array] = {
            "weight_ih": weight,
            "weight_hh": orthogonal.astype(dtype),
            "bias": np.zeros(self.hidden, dtype),
        }
        self.input_norms: tuple[BatchNorm, ...] = ()
        self.state_norms: tuple[BatchNorm, ...] = ()
        if batch_norm:
            self._parameters["gamma_ih"] = np.ones(self.hidden, dtype)
            self._parameters["gamma_hh"] = np.full(self.hidden, scale, dtype)
            self.input_norms, self.state_norms = (
                tuple(BatchNorm(self.hidden, eps=eps, affine=False, dtype=dtype) for _ in range(n))
                for n in (self.steps, self.steps - 1)
            )
            for kind, norms in self._kinds():
                for norm in norms:
                    norm.gamma = self._parameters[f"gamma_{kind}"]
        self.dz: Array | None = None
        self._gradients: dict[str, Array] = {}
        self._x: Array | None = None
        self._h: Array | None = None

    def __repr__(self) -> str:
        """Name the layer with its sizes, and where it is plain."""
        plain = "" if self.input_norms else ", batch_norm=False"
        return f"RNN({self.in_features}, {self.hidden}, {self.steps}{plain})"

    def inside(self) -> tuple[Layer | BatchNorm, ...]:
        """Return the batch normalisations, those of the input first, by time step."""
        return (*self.input_norms, *self.state_norms)

    def train(self, mode: bool = True) -> None:
        """Set the mode of every batch normalisation."""
        self.training = mode
        for norm in (*self.input_norms, *self.state_norms):
            norm.train(mode)

    def forward(self, x: Array) -> Array:
        """Return the state after the last time step, shape (n, hidden)."""
        own = self._parameters
        if x.ndim != 3 or x.shape[1:] != (self.steps, self.in_features):
            raise ValueError(
                f"x: expected shape (n, {self.steps}, {self.in_features}); got {x.shape}"
            )
        if x.dtype != own["bias"].dtype:
            raise TypeError(f"x: expected {own['bias'].dtype} like the weights; got {x.dtype}")
        self._x = np.ascontiguousarray(x.swapaxes(0, 1))  # time steps outermost: each is contiguous
        z = self._x @ own["weight_ih"].T
        h = np.zeros((self.steps + 1, len(x), self.hidden), x.dtype)
        for t in range(self.steps):
            step = self.input_norms[t].forward(z[t]) if self.input_norms else z[t]
            if t:
                recurrent = h[t] @ own["weight_hh"].T
                step += (
                    self.state_norms[t - 1].forward(recurrent) if self.input_norms else recurrent
                )
            step += own["bias"]
            np.tanh(step, out=h[t + 1])
        self._h = h
        last: Array = h[-1]
        return last

    def backward(self, dy: Array) -> Array:
        """Return dx, shape (n, steps, in_features), from the gradient of the last state."""
        x, h, own = kept(self._x), kept(self._h), self._parameters
        dz = np.empty_like(h[1:])
        du = np.zeros_like(dz)  # of W x and of U h, which differ from dz by their normalisation
        dv = np.zeros_like(dz)
        dh = dy
        for t in reversed(range(self.steps)):
            dz[t] = dh * (1 - h[t + 1] * h[t + 1])
            du[t] = self.input_norms[t].backward(dz[t]) if self.input_norms else dz[t]
            if t:
                dv[t] = self.state_norms[t - 1].backward(dz[t]) if self.state_norms else dz[t]
                dh = dv[t] @ own["weight_hh"]
        self._gradients = {
            "weight_ih": np.tensordot(du, x, ((0, 1), (0, 1))),
            "weight_hh": np.tensordot(dv, h[:-1], ((0, 1), (0, 1))),
            "bias": dz.sum(axis=(0, 1)),
        }
        for kind, norms in self._kinds():
            total = np.zeros(self.hidden, dz.dtype)
            for norm in norms:
                total += kept(norm.dgamma)
            self._gradients[f"gamma_{kind}"] = total
        self.dz = dz
        return (du @ own["weight_ih"]).swapaxes(0, 1)

    def parameters(self) -> dict[str, Array]:
        """Return weight_ih (W), weight_hh (U), bias, and with normalisation gamma_ih, gamma_hh."""
        return dict(self._parameters)

    def gradients(self) -> dict[str, Array]:
        """Return the gradients of the parameters."""
        return dict(self._gradients)

    def state_dict(self) -> dict[str, Array]:
        """Return copies of parameters and running statistics, those with a row per time step."""
        state = super().state_dict()
        for kind, norms in self._kinds():
            for name in STATISTICS if norms else ():
                rows = [norm.state_dict()[name] for norm in norms]
                state[f"{name}_{kind}"] = np.stack(rows)
        return state

    def _take(self, state: Mapping[str, Array]) -> None:
        for name, value in self._parameters.items():
            value[...] = state[name]
        for kind, norms in self._kinds():
            for t, norm in enumerate(norms):
                own = {name: np.asarray(state[f"{name}_{kind}"][t]) for name in STATISTICS}
                norm.load_state_dict({"weight": state[f"gamma_{kind}"], **own})

    def _kinds(self) -> tuple[tuple[str, tuple[BatchNorm, ...]], ...]:
        # By what they normalise: W x, then U h. None without batch normalisation.
        if not self.input_norms:
            return ()
        return (("ih", self.input_norms), ("hh", self.state_norms))
