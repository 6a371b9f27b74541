"""Types of arguments: numbers that are refused where they make no sense."""

import argparse
import math
from collections.abc import Callable
from typing import Any


def number(text: str, kind: Callable[[str], Any], ok: Callable[[Any], bool], what: str) -> Any:
    """Return the number that `text` is, or refuse it as not being `what`."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not ok(value):
        raise argparse.ArgumentTypeError(f"expected {what}; got {text!r:.60}")
    return value


def positive(text: str) -> Any:
    """Read an integer of at least 1."""
    return number(text, int, lambda n: n >= 1, "a positive integer")


def natural(text: str) -> Any:
    """Read an integer of at least 0."""
    return number(text, int, lambda n: n >= 0, "an integer >= 0")


def rate(text: str) -> Any:
    """Read a finite positive number."""
    return number(text, float, lambda x: 0 < x < math.inf, "a positive number")


def fraction(text: str) -> Any:
    """Read a number from 0 to less than 1."""
    return number(text, float, lambda x: 0 <= x < 1, "a number >= 0 and < 1")


def axes(text: str) -> Any:
    """Read the number of an axis, or several between commas."""
    what = "an axis, or several as 1,2,3"
    numbers = tuple(number(part, int, lambda _: True, what) for part in text.split(","))
    return numbers[0] if len(numbers) == 1 else numbers
