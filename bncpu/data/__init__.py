"""Datasets as arrays. Nothing here downloads, and nothing here knows a network.

========================  ===========================================================
dataset.py                Dataset: the four arrays that every loader returns
digits.py                 scikit-learn's embedded handwritten digits: needs no file
mnist.py                  MNIST from its IDX files
========================  ===========================================================
"""

import os

from bncpu.data.dataset import Dataset
from bncpu.data.digits import load_digits
from bncpu.data.mnist import load_mnist

NAMES = ("digits", "mnist")


def load(
    name: str, folder: str | os.PathLike[str] | None = None, *, part: int = 0, parts: int = 1
) -> Dataset:
    """Return the dataset of that name; `folder` is where its files are, if it has any.

    With `parts`, it is shard `part` of as many, numbered from 0: neighbouring rows of the training
    set and of the test set.

    Raises
    ------
    ValueError
        If there is no dataset of that name, or its files are damaged.
    FileNotFoundError, NotADirectoryError
        If its files are missing, or `folder` is not a folder.
    """
    if name == "digits":
        return load_digits(part=part, parts=parts)
    if name == "mnist":
        return load_mnist(folder, part=part, parts=parts)
    raise ValueError(f"dataset: expected one of {', '.join(NAMES)}; got {name!r}")


__all__ = ["NAMES", "Dataset", "load", "load_digits", "load_mnist"]
