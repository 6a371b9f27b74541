"""Errors against the exact truth, and the bounds beside them, channel by channel.

A Problem holds one channel of x for each set of adversarial values, laid out in one way, with its
exact moments. Both the test of the contract and benchmarks/accuracy.py, which prints and draws it,
measure with it. An Error comes in units of a scale by which sets can be compared: that of the mean
and of y is the standard deviation (for y: times |gamma|, and |beta| more), that of invstd is invstd
itself, and that of gradients the magnitude of the terms that they are sums of.
"""

from fractions import Fraction
from typing import NamedTuple

import adversarial
import error_bounds
import exact
import numpy as np
from cases import parameter_dtype

import bncpu

EPS = 1e-5
QUANTITIES = ("mean", "invstd", "var", "y", "dgamma", "dbeta", "dx")
MOST_ELEMENTS = 400  # of a channel whose y and dx are looked at, if it has more


class Given(NamedTuple):
    """One value per channel: what y and the gradients are computed from."""

    gamma: np.ndarray
    beta: np.ndarray
    mean: np.ndarray
    invstd: np.ndarray


def run(x, dy, given, **options):
    """Return bncpu's results for x and dy by name: of a forward, and of a backward from `given`."""
    gamma, beta, mean, invstd = given
    y, *statistics = bncpu.batch_norm_train(x, gamma, beta, eps=EPS, **options)
    var = bncpu.batch_moments(x, **options).var()
    back = bncpu.batch_norm_backward(dy, x, mean, invstd, gamma, **options)
    return dict(
        zip(QUANTITIES, (*statistics, var, y, back.dgamma, back.dbeta, back.dx), strict=True)
    )


class Layout(NamedTuple):
    """m = rows * run values per channel: (rows, C, run), or (rows, C)."""

    rows: int
    run: int

    @property
    def m(self):
        return self.rows * self.run


class Error(NamedTuple):
    """The largest error of a channel, and the largest ratio of an error to its bound."""

    error: float
    bound: float
    ratio: float


class Problem:
    """x, dy and parameters of some channels, and all that is true of them."""

    def __init__(self, rng, sets, dtype, layout, *, dy_sets=None, shift=0):
        self.dtype, self.layout, self.names = np.dtype(dtype), layout, list(sets)
        m, count = layout.m, len(self.names)
        dy_names = list(adversarial.DY if dy_sets is None else dy_sets)
        self.dy_names = [dy_names[(c + shift) % len(dy_names)] for c in range(count)]
        self.values = adversarial.channels(rng, sets, self.names, m, self.dtype)
        self.dy_values = adversarial.channels(rng, adversarial.DY, self.dy_names, m, self.dtype)
        self.x = adversarial.laid_out(self.values, layout.rows)
        self.dy = adversarial.laid_out(self.dy_values, layout.rows)
        held = parameter_dtype(self.dtype)
        gamma = (rng.choice([-1.0, 1.0], count) * rng.uniform(0.5, 2.0, count)).astype(held)
        beta = rng.standard_normal(count).astype(held)
        self.sums = error_bounds.chain(self.dtype, layout.rows, count, layout.run)

        self.whole_x = [exact.whole(x) for x in self.values]
        self.moments = [exact.moments(x, EPS) for x in self.whole_x]
        self.mean = np.array([float(t.mean) for t in self.moments])
        self.var = np.array([float(t.m2 / m) for t in self.moments])
        self.invstd = np.array([float(t.invstd) for t in self.moments])
        self.given = Given(gamma, beta, self.mean, self.invstd)
        self.chosen = [self._choose(rng, c) for c in range(count)]
        self._gradients()

    def _choose(self, rng, c):
        """Return the indices of the values of a channel whose results are looked at."""
        m = self.layout.m
        if m <= MOST_ELEMENTS:
            return np.arange(m)
        x, dy = self.values[c].astype(float), self.dy_values[c].astype(float)
        extreme = [f(a) for f in (np.argmin, np.argmax) for a in (x, dy, abs(x - self.mean[c]))]
        ends = [*range(40), *range(m - 40, m)]
        return np.unique([*extreme, *ends, *rng.integers(0, m, MOST_ELEMENTS - 120)])

    def _gradients(self):
        """Find the exact sums of the gradients, from the mean and invstd that float64 holds."""
        m = self.layout.m
        self.whole_dy = [exact.whole(dy) for dy in self.dy_values]
        pairs = list(zip(self.whole_x, self.whole_dy, strict=True))
        self.dbeta = [dy.sum() for dy in self.whole_dy]
        self.dgamma = [
            Fraction(i) * (x.sum_with(dy) - Fraction(mean) * dbeta)
            for (x, dy), i, mean, dbeta in zip(
                pairs, self.invstd, self.mean, self.dbeta, strict=True
            )
        ]
        dy = self.dy_values.astype(float)
        self.xhat = (self.values.astype(float) - self.mean[:, None]) * self.invstd[:, None]
        self.sizes = error_bounds.Sizes(
            m,
            np.array([float(t) for t in self.dbeta]),
            np.array([float(t) for t in self.dgamma]),
            np.abs(dy).sum(1),
            np.abs(dy * self.xhat).sum(1),
        )

    def scale(self, name, c, chosen=slice(None)):
        """Return what an error of a channel is measured in, of y and dx for the chosen values."""
        given, sizes, m = self.given_of(c), self.sizes_of(c), self.layout.m
        xhat, dz = np.abs(self.xhat[c][chosen]), np.abs(self.dy_values[c][chosen].astype(float))
        match name:
            case "mean":
                return 1 / given.invstd
            case "var":
                return self.var[c] + EPS
            case "invstd":
                return given.invstd
            case "y":
                return abs(given.gamma) * (xhat + 1) + abs(given.beta)
            case "dgamma":
                return sizes.abs_dz_xhat + sizes.abs_dz
            case "dbeta":
                return sizes.abs_dz
        terms = dz + (sizes.abs_dz + (xhat + 1) * sizes.abs_dz_xhat) / m
        return abs(given.gamma) * given.invstd * terms

    def errors_of(self, results, c):
        """Return the Error of every result of one channel."""
        return {name: getattr(self, f"_{name}")(got, c) for name, got in results.items()}

    def _mean(self, got, c):
        std = np.sqrt(self.var[c])
        bound = error_bounds.mean_error(self.sums, self.dtype, self.mean[c], std)
        return self._error("mean", c, exact.error(got[c], self.moments[c].mean), bound)

    def _var(self, got, c):
        truth = self.moments[c].m2 / self.layout.m
        return self._error("var", c, exact.error(got[c], truth), self._var_bound(c))

    def _invstd(self, got, c):
        bound = error_bounds.invstd_error(self._var_bound(c), self.var[c], EPS) * self.invstd[c]
        return self._error("invstd", c, exact.error(got[c], self.moments[c].invstd), bound)

    def _y(self, got, c):
        truth, chosen = self.moments[c], self.chosen[c]
        given = self.given_of(c)
        gamma, beta = Fraction(given.gamma), Fraction(given.beta)
        slope = gamma * truth.invstd
        x = self.whole_x[c].some(chosen)
        got = self._of_channel(got, c)
        errors = exact.errors_of_line(got, [x], [slope], beta - slope * truth.mean)
        xhat = self.xhat[c][chosen]
        std = np.sqrt(self.var[c])
        bound = error_bounds.y_error(
            self.dtype,
            given,
            xhat,
            given.gamma * xhat + given.beta,
            mean_error=error_bounds.mean_error(self.sums, self.dtype, self.mean[c], std),
            invstd_error=error_bounds.invstd_error(self._var_bound(c), self.var[c], EPS),
        )
        return self._error("y", c, errors, bound)

    def _dgamma(self, got, c):
        bound, _ = self._parameter_bounds(c)
        return self._error("dgamma", c, exact.error(got[c], self.dgamma[c]), bound)

    def _dbeta(self, got, c):
        _, bound = self._parameter_bounds(c)
        return self._error("dbeta", c, exact.error(got[c], self.dbeta[c]), bound)

    def _dx(self, got, c):
        m, chosen = self.layout.m, self.chosen[c]
        given = self.given_of(c)
        gamma, mean, invstd = (Fraction(a) for a in (given.gamma, given.mean, given.invstd))
        scale, slope = gamma * invstd, invstd * self.dgamma[c] / m
        x, dy = (w[c].some(chosen) for w in (self.whole_x, self.whole_dy))
        constant = scale * (mean * slope - self.dbeta[c] / m)
        got = self._of_channel(got, c)
        errors = exact.errors_of_line(got, [dy, x], [scale, -scale * slope], constant)
        dz, xhat = self.dy_values[c].astype(float)[chosen], self.xhat[c][chosen]
        sizes = self.sizes_of(c)
        dx = dz - sizes.dz / m - xhat * sizes.dz_xhat / m
        dx = given.gamma * given.invstd * dx
        bound = error_bounds.dx_error(self.sums, self.dtype, given, sizes, dz, xhat, dx)
        return self._error("dx", c, errors, bound)

    def _var_bound(self, c):
        return error_bounds.var_error(self.sums, self.dtype, self.mean[c], np.sqrt(self.var[c]))

    def given_of(self, c):
        return Given(*(float(a[c]) for a in self.given))

    def sizes_of(self, c):
        return error_bounds.Sizes(self.layout.m, *(a[c] for a in self.sizes[1:]))

    def _parameter_bounds(self, c):
        given = self.given_of(c)
        return error_bounds.parameter_gradient_errors(
            self.sums, self.dtype, given, self.sizes_of(c)
        )

    def _of_channel(self, got, c):
        return adversarial.channel_of(got, c)[self.chosen[c]]

    def _error(self, name, c, errors, bound):
        scale = self.scale(name, c, self.chosen[c])
        errors, bound, scale = (np.asarray(a, np.float64) for a in (errors, bound, scale))
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(errors == 0, 0.0, errors / bound)
            scaled = np.where(errors == 0, 0.0, errors / scale)
            return Error(float(scaled.max()), float((bound / scale).max()), float(ratio.max()))
