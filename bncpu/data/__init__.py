"""Datasets as arrays. Nothing here downloads, and nothing here knows a network.

========================  ===========================================================
dataset.py                Dataset: the four arrays that every loader returns
digits.py                 scikit-learn's embedded handwritten digits: needs no file
mnist.py                  MNIST from its IDX files
cifar10.py                CIFAR-10 from its binary files
files.py                  where files are, and how they are opened
inventory.py              what is found in a folder: files, checksums, shapes, damage
========================  ===========================================================
"""

import os

from bncpu.data.cifar10 import load_cifar10
from bncpu.data.dataset import Dataset
from bncpu.data.digits import load_digits
from bncpu.data.files import find, named_folder
from bncpu.data.inventory import SOURCES
from bncpu.data.mnist import load_mnist

NAMES = ("digits", "mnist", "cifar10")


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
    if name == "cifar10":
        return load_cifar10(folder, part=part, parts=parts)
    raise ValueError(f"dataset: expected one of {', '.join(NAMES)}; got {name!r}")


def available(folder: str | os.PathLike[str] | None = None) -> list[str]:
    """Return the names of the datasets whose files are all in `folder`, and digits, which has none.

    `folder` is by default the value of the environment variable BNCPU_DATA. The files are not
    opened: what is damaged is found out by `load`.

    Raises
    ------
    FileNotFoundError, NotADirectoryError
        If a folder is named that is not there, or that is something other than a folder.
    """
    base = named_folder(folder)
    if base is None:
        return ["digits"]
    complete = (
        name
        for name, source in SOURCES.items()
        if not source.missing(find(base, source.SUBFOLDERS, source.NAMES))
    )
    return ["digits", *complete]


__all__ = ["NAMES", "Dataset", "available", "load", "load_cifar10", "load_digits", "load_mnist"]
