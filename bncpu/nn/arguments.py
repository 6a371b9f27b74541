"""The numbers that the trainer is given: checked here once, refused by name.

Not the door of the public functions, which is bncpu.arguments: the trainer is written as anybody
could write it, against what the package offers to all.
"""

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
