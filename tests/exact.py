"""Batch normalisation without rounding errors: the truth that even float64 results are held to.

Every finite float is a whole number of some power of two, so sums, means and sums of squares of
floats are exact in Python's integers and fractions, and invstd, which is irrational, is found to
some 200 bits. One channel at a time and slow; bncpu.reference, in float64, is the truth for all
tests that do not look at its last digits. NumPy alone is imported.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np

BITS = 200  # to which what is irrational is known, beyond its leading one


class Whole(NamedTuple):
    """Values as whole numbers of 53 bits, each of a power of two."""

    mantissa: np.ndarray
    exponent: np.ndarray

    def some(self, indices):
        return Whole(self.mantissa[indices], self.exponent[indices])

    def numbers(self):
        """Return the values as integers, and the power of two that they are numbers of."""
        used = self.exponent[self.mantissa != 0]
        unit = int(used.min()) if used.size else 0
        shifts = np.where(self.mantissa != 0, self.exponent - unit, 0)
        pairs = zip(self.mantissa.tolist(), shifts.tolist(), strict=True)
        return [n << shift for n, shift in pairs], unit

    def sum(self):
        # In halves, of which 2^36 can be added in 64 bits.
        low = self.mantissa & (2**27 - 1)
        return _sum_of_powers([low, self.mantissa >> 27], self.exponent, 27)

    def sum_with(self, other):
        """Return the sum of products with other values."""
        # In thirds, of whose products 2^24 can be added in 64 bits.
        a, b = (
            (w.mantissa & (2**18 - 1), w.mantissa >> 18 & (2**18 - 1), w.mantissa >> 36)
            for w in (self, other)
        )
        products = [sum(a[i] * b[k - i] for i in range(3) if 0 <= k - i < 3) for k in range(5)]
        return _sum_of_powers(products, self.exponent + other.exponent, 18)


class Moments(NamedTuple):
    """Count, mean, m2 and invstd of one channel, as fractions."""

    count: int
    mean: Fraction
    m2: Fraction
    invstd: Fraction


def whole(values):
    """Return finite values of any float dtype as whole numbers."""
    mantissa, exponent = np.frexp(np.asarray(values, np.float64).reshape(-1))
    return Whole(np.ldexp(mantissa, 53).astype(np.int64), exponent.astype(np.int64) - 53)


def moments(x, eps):
    """Return the moments of one channel, whose values are Whole."""
    m = x.mantissa.size
    total = x.sum()
    m2 = x.sum_with(x) - total * total / m
    return Moments(m, total / m, m2, inverse_root(m2 / m + Fraction(eps)))


def inverse_root(value):
    """Return 1 / sqrt(value); 0 for infinity's sake where the value is 0."""
    if value == 0:
        return Fraction(0)
    inverse = 1 / value
    shift = BITS + (inverse.denominator.bit_length() - inverse.numerator.bit_length()) // 2
    shift = max(shift, 0)
    root = math.isqrt((inverse.numerator << (2 * shift)) // inverse.denominator)
    return Fraction(root, 1 << shift)


def errors_of_line(got, values, slopes, constant):
    """Return |got - (sum of slope * values + constant)|, element by element, as float64.

    values are Whole, slopes and the constant fractions: y and dx are such lines in x and dy.
    """
    got, got_unit = whole(got).numbers()
    terms = [(*v.numbers(), s) for v, s in zip(values, slopes, strict=True) if s]
    units = [got_unit, *(v_unit + _exponent(s) for _, v_unit, s in terms)]
    unit = min([*units, _exponent(constant) if constant else 0]) - BITS
    line = [_round(constant, unit)] * len(got)
    for numbers, v_unit, s in terms:
        slope = _round(s, unit - v_unit)
        line = [a + slope * n for a, n in zip(line, numbers, strict=True)]
    pairs = zip(line, got, strict=True)
    return np.array([_as_float(abs(a - (b << (got_unit - unit))), unit) for a, b in pairs])


def error(got, truth):
    """Return |got - truth| of one number as a float."""
    return float(abs(Fraction(float(got)) - truth))


def _sum_of_powers(digits, exponents, bits):
    """Return the sum of values whose digits, lowest first, stand `bits` bits apart."""
    order = np.argsort(exponents, kind="stable")
    exponents = exponents[order]
    begins = np.flatnonzero(np.diff(exponents, prepend=exponents[0] - 1))
    total = Fraction(0)
    for i, digit in enumerate(digits):
        sums = np.add.reduceat(digit[order], begins).tolist()
        for number, exponent in zip(sums, exponents[begins].tolist(), strict=True):
            total += _times_power(number, exponent + i * bits)
    return total


def _times_power(number, exponent):
    return Fraction(number << exponent) if exponent >= 0 else Fraction(number, 1 << -exponent)


def _exponent(fraction):
    """Return about the exponent of a fraction's leading bit."""
    return fraction.numerator.bit_length() - fraction.denominator.bit_length()


def _round(fraction, unit):
    """Return a fraction in whole numbers of 2^unit, rounded down."""
    return math.floor(fraction * _times_power(1, -unit))


def _as_float(number, unit):
    extra = max(number.bit_length() - 64, 0)
    return math.ldexp(number >> extra, unit + extra)
