"""What every dataset is once it is loaded: four arrays, a name and the shape of an image."""

from typing import Any, NamedTuple

from numpy.typing import NDArray


class Dataset(NamedTuple):
    """A labelled dataset of images, split for training and test.

    Attributes
    ----------
    name : str
        One of `bncpu.data.NAMES`.
    x_train, x_test : ndarray (n, features)
        Images as rows of float32 in [0, 1].
    y_train, y_test : ndarray (n,)
        Their classes, int64 from 0.
    image_shape : (int, int, int)
        Channels, height and width, whose product is `features`.

    Examples
    --------
    >>> import numpy as np
    >>> x, y = np.zeros((20, 12), np.float32), np.arange(20) % 10
    >>> data = Dataset("digits", x, y, x[:5], y[:5], (3, 2, 2))
    >>> data.images("test").shape
    (5, 3, 2, 2)
    >>> validation = data.held_out(0.1)
    >>> len(validation.x_train), len(validation.x_test), validation.y_test
    (18, 2, array([8, 9]))
    >>> [len(part) for part in data.subset(7)[1:5]]
    [7, 7, 5, 5]
    """

    name: str
    x_train: NDArray[Any]
    y_train: NDArray[Any]
    x_test: NDArray[Any]
    y_test: NDArray[Any]
    image_shape: tuple[int, int, int]

    def images(self, part: str) -> NDArray[Any]:
        """Return x of "train" or "test" as a view of shape (n, channels, height, width).

        Raises
        ------
        ValueError
            If `part` is neither.
        """
        if part not in ("train", "test"):
            raise ValueError(f'part: expected "train" or "test"; got {part!r}')
        x = self.x_train if part == "train" else self.x_test
        return x.reshape(len(x), *self.image_shape)

    def held_out(self, fraction: float = 0.1) -> "Dataset":
        """Return the training part alone, its last `fraction` in the place of the test part.

        That is what a choice, such as that of a learning rate, may look at. The arrays are views.

        Raises
        ------
        ValueError
            If one of the two would be empty.
        """
        n = len(self.x_train)
        held = round(fraction * n) if 0 < fraction < 1 else 0
        if not 0 < held < n:
            raise ValueError(
                f"fraction: expected one that leaves images on both sides; got {fraction} of {n}"
            )
        return self._replace(
            x_train=self.x_train[: n - held],
            y_train=self.y_train[: n - held],
            x_test=self.x_train[n - held :],
            y_test=self.y_train[n - held :],
        )

    def subset(self, n_train: int, n_test: int | None = None) -> "Dataset":
        """Return the first images of both parts, all if there are fewer; `n_test` None is all.

        The arrays are views.

        Raises
        ------
        ValueError
            If a number is negative.
        """
        for name, n in (("n_train", n_train), ("n_test", n_test)):
            if n is not None and n < 0:
                raise ValueError(f"{name}: expected a number of images >= 0; got {n}")
        return self._replace(
            x_train=self.x_train[:n_train],
            y_train=self.y_train[:n_train],
            x_test=self.x_test[:n_test],
            y_test=self.y_test[:n_test],
        )


def shard(n: int, part: int, parts: int) -> slice:
    """Return the rows of one of several neighbouring parts of n rows, as equal as can be."""
    return slice(n * part // parts, n * (part + 1) // parts)
