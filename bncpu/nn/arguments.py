"""The numbers that the trainer is given: checked here once, refused by name.

Not the door of the public functions, which is bncpu.arguments: the trainer is written as anybody
could write it, against what the package offers to all.
"""

import math
import operator
from typing import Any


def integer(name: str, value: Any, low: int) -> int:
    """Return an integer >= low as an int.

    Raises
    ------
    TypeError
        If it is no integer; a bool is none.
    ValueError
        If it is less than `low`.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer; got {value!r:.60}") from None
    if number < low:
        raise ValueError(f"{name}: expected an integer >= {low}; got {number}")
    return number


def real(name: str, value: Any) -> float:
    """Return a real number as a float.

    Raises
    ------
    TypeError
        If it is none.
    ValueError
        If no float can hold it.
    """
    try:
        if isinstance(value, bool | str | bytes):
            raise TypeError
        return float(value)
    except TypeError:
        raise TypeError(f"{name}: expected a number; got {value!r:.60}") from None
    except OverflowError:
        raise ValueError(f"{name}: expected a number that a float can hold; got more") from None


def nonnegative(name: str, value: Any) -> float:
    """Return a finite number >= 0 as a float.

    Raises
    ------
    TypeError, ValueError
        If it is not one.
    """
    number = real(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name}: expected a finite number >= 0; got {number}")
    return number


def positive(name: str, value: Any) -> float:
    """Return a finite number > 0 as a float.

    Raises
    ------
    TypeError, ValueError
        If it is not one.
    """
    number = real(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name}: expected a finite number > 0; got {number}")
    return number


def fraction(name: str, value: Any, *, below_one: bool = False) -> float:
    """Return a number in [0, 1] as a float, or in [0, 1) with `below_one`.

    Raises
    ------
    TypeError, ValueError
        If it is not one.
    """
    number = real(name, value)
    if not 0 <= number <= 1 or (below_one and number == 1):
        end = ")" if below_one else "]"
        raise ValueError(f"{name}: expected a number in [0, 1{end}; got {number}")
    return number
