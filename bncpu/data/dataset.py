"""What every dataset is once it is loaded: four arrays and a name."""

from typing import Any, NamedTuple

from numpy.typing import NDArray


class Dataset(NamedTuple):
    """A labelled dataset, split for training and test.

    x has shape (n, features), float32 in [0, 1]; y has shape (n,), int64 from 0.
    """

    name: str
    x_train: NDArray[Any]
    y_train: NDArray[Any]
    x_test: NDArray[Any]
    y_test: NDArray[Any]


def shard(n: int, part: int, parts: int) -> slice:
    """Return the rows of one of several neighbouring parts of n rows, as equal as can be."""
    return slice(n * part // parts, n * (part + 1) // parts)
