"""The handwritten digits that come inside scikit-learn: 1797 images of 8 x 8, no download.

They are the test part of the UCI set of Alpaydin & Kaynak (1998), here split anew.
"""

import numpy as np

from bncpu.data.dataset import Dataset, shard

TEST_FRACTION = 0.2
PUBLISHED: tuple[str, ...] = (
    "scikit-learn (inside it; no file is needed)",
    "archive.ics.uci.edu/dataset/80 (Optical Recognition of Handwritten Digits)",
)
SPLIT_SEED = 0  # the split is part of the dataset: it does not move with the seed of a training


def load_digits(*, part: int = 0, parts: int = 1) -> Dataset:
    """Return the digits, a fifth of every class as the test set, or one of several shards of both.

    Raises
    ------
    ImportError
        If scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError('digits: need scikit-learn; pip install "bncpu[train]"') from error
    pixels, labels = datasets.load_digits(return_X_y=True)
    x, y = (pixels / 16).astype(np.float32), labels.astype(np.int64)  # pixels are 0 to 16
    test = np.zeros(len(y), bool)
    rng = np.random.default_rng(SPLIT_SEED)
    for label in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == label))
        test[rows[: round(TEST_FRACTION * len(rows))]] = True
    arrays = (x[~test], y[~test], x[test], y[test])
    x_train, y_train, x_test, y_test = (rows[shard(len(rows), part, parts)] for rows in arrays)
    return Dataset("digits", x_train, y_train, x_test, y_test, (1, 8, 8))
