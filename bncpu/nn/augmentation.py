"""Augmentation: random changes of training images that leave their class as it is.

Each is called with a batch and a random generator, and returns a new batch of the same shape and
dtype; all it does is a function of the two, so that `fit`, which makes the generator of its seed
and the number of the step, resumes exactly. Batches are NumPy arrays.
No interpolation: pixels are moved whole, which needs no more than NumPy for a whole batch at once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bncpu.nn.arguments import fraction, integer
from bncpu.nn.base import Array

Augmentation = Callable[[Array, np.random.Generator], Array]

# Of red, green and blue in the brightness that an eye sees: ITU-R BT.601, as image programs use.
LUMA = (0.299, 0.587, 0.114)


class Compose:
    """Apply augmentations one after another, all with the same generator.

    Parameters
    ----------
    *augmentations : callables
        Each takes (x, rng) and returns an array like x.

    Raises
    ------
    TypeError
        If one cannot be called.

    Examples
    --------
    >>> import numpy as np
    >>> from bncpu.nn import Compose, Flip, Shift
    >>> augment = Compose(Flip(), Shift(4))
    >>> augment(np.zeros((8, 3, 32, 32), np.float32), np.random.default_rng(0)).shape
    (8, 3, 32, 32)
    """

    def __init__(self, *augmentations: Augmentation) -> None:
        for i, augmentation in enumerate(augmentations):
            if not callable(augmentation):
                raise TypeError(
                    f"augmentations: expected a callable at index {i}; got {augmentation!r:.60}"
                )
        self.augmentations = augmentations

    def __repr__(self) -> str:
        """List the augmentations."""
        return f"Compose({', '.join(map(repr, self.augmentations))})"

    def __call__(self, x: Array, rng: np.random.Generator) -> Array:
        """Return x changed by each in turn; x itself if there is none."""
        for augmentation in self.augmentations:
            x = augmentation(x, rng)
        return x


@dataclass(frozen=True)
class Flip:
    """Mirror images left to right, each with the same probability.

    Parameters
    ----------
    probability : float
        In [0, 1].

    Raises
    ------
    TypeError, ValueError
        If it is no number, or out of range.

    Examples
    --------
    >>> import numpy as np
    >>> from bncpu.nn import Flip
    >>> Flip(probability=1)(np.array([[[[1.0, 2.0, 3.0]]]]), np.random.default_rng(0))
    array([[[[3., 2., 1.]]]])
    """

    probability: float = 0.5

    def __post_init__(self) -> None:
        fraction("probability", self.probability)

    def __call__(self, x: Array, rng: np.random.Generator) -> Array:
        """Return the images, some of them mirrored.

        Parameters
        ----------
        x : ndarray, shape (n, C, H, W), floating
            Not changed.
        rng : numpy.random.Generator
            One number is drawn for each image.

        Raises
        ------
        TypeError, ValueError
            If x is no such array.
        """
        _check_images(x)
        mirrored = rng.random(len(x)) < self.probability
        y = x.copy()
        y[mirrored] = x[mirrored, :, :, ::-1]
        return y


@dataclass(frozen=True)
class Shift:
    """Move each image by whole pixels along both axes; what comes in from outside is zero.

    Parameters
    ----------
    pixels : int
        The largest distance, >= 0 and less than height and width; all distances from -pixels to
        pixels are equally likely.

    Raises
    ------
    TypeError, ValueError
        If it is no integer, or negative.

    Notes
    -----
    The same as ``scipy.ndimage.shift(image, (0, down, right), order=0)``.

    Examples
    --------
    >>> import numpy as np
    >>> from bncpu.nn import Shift
    >>> Shift(1)(np.arange(1.0, 10.0).reshape(1, 1, 3, 3), np.random.default_rng(2))
    array([[[[0., 4., 5.],
             [0., 7., 8.],
             [0., 0., 0.]]]])
    """

    pixels: int

    def __post_init__(self) -> None:
        integer("pixels", self.pixels, 0)

    def __call__(self, x: Array, rng: np.random.Generator) -> Array:
        """Return the images, each moved.

        Parameters
        ----------
        x : ndarray, shape (n, C, H, W), floating
            Not changed.
        rng : numpy.random.Generator
            Two numbers are drawn for each image.

        Raises
        ------
        TypeError, ValueError
            If x is no such array, or not larger than `pixels`.
        """
        _check_images(x)
        n, channels, height, width = x.shape
        p = self.pixels
        if p >= min(height, width):
            raise ValueError(f"pixels: expected less than height and width of x {x.shape}; got {p}")
        padded = np.zeros((n, channels, height + 2 * p, width + 2 * p), x.dtype)
        padded[:, :, p : p + height, p : p + width] = x
        y = np.empty_like(x, order="C")
        for i, (down, right) in enumerate(rng.integers(0, 2 * p + 1, (n, 2)).tolist()):
            y[i] = padded[i, :, down : down + height, right : right + width]
        return y


@dataclass(frozen=True)
class PhotometricDistortion:
    """Change brightness, contrast and colour of each image, in an order drawn for each.

    A change by a factor f moves a pixel v away from t, or towards it: v <- t + f (v - t), cut to
    [0, 1]. For brightness t is black, for contrast the mean brightness of the image, for saturation
    the brightness of the pixel itself. An image of one channel has no colour to change.

    Parameters
    ----------
    brightness, contrast, saturation : float
        The strength s of each, in [0, 1]: f is uniform in [1 - s, 1 + s]. Howard's is 0.5 for all.

    Raises
    ------
    TypeError, ValueError
        If one is no number, or out of range.

    Notes
    -----
    Brightness is that of ITU-R BT.601, 0.299 red + 0.587 green + 0.114 blue. With all strengths at
    0 the images stay as they are, bit for bit.

    References
    ----------
    A. G. Howard, "Some improvements on deep convolutional neural network based image
    classification", arXiv:1312.5402 (2013), section 2.2; the source that Ioffe & Szegedy name.

    Examples
    --------
    >>> import numpy as np
    >>> from bncpu.nn import PhotometricDistortion
    >>> x = np.full((2, 3, 2, 2), 0.5, np.float32)
    >>> y = PhotometricDistortion(brightness=0.5, contrast=0, saturation=0)(
    ...     x, np.random.default_rng(0)
    ... )
    >>> bool((y != x).all()), bool((y >= 0.25).all() and (y <= 0.75).all())
    (True, True)
    """

    brightness: float = 0.5
    contrast: float = 0.5
    saturation: float = 0.5

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            fraction(name, getattr(self, name))

    def __call__(self, x: Array, rng: np.random.Generator) -> Array:
        """Return the images, each distorted.

        Parameters
        ----------
        x : ndarray, shape (n, C, H, W), floating, values in [0, 1]
            C is 1, or 3 for red, green, blue. Not changed.
        rng : numpy.random.Generator
            Six numbers are drawn for each image.

        Raises
        ------
        TypeError, ValueError
            If x is no such array.
        """
        _check_images(x)
        n, channels = x.shape[:2]
        if channels not in (1, 3):
            raise ValueError(f"x: expected 1 or 3 channels, grey or red-green-blue; got {x.shape}")
        if not n:
            return x.copy()
        if not (x.min() >= 0 and x.max() <= 1):
            raise ValueError(f"x: expected values in [0, 1]; got {x.min():g} to {x.max():g}")
        strengths = np.array([self.brightness, self.contrast, self.saturation])
        gains = strengths * rng.uniform(-1, 1, (n, 3))  # f - 1
        order = rng.random((n, 3)).argsort(axis=1)
        rows = np.arange(n)
        y = np.ascontiguousarray(x)  # sums over a view would be in another order
        for kind in order.T:
            # v + (f - 1)(v - t) is t + f (v - t), and v itself where f is 1.
            gain = gains[rows, kind].astype(x.dtype)[:, None, None, None]
            changed = y - _target(y, kind)
            changed *= gain
            changed += y
            y = np.clip(changed, 0, 1, out=changed)
        return y


def _target(x: Array, kind: Array) -> Array:
    """Return the t of each image: black, its mean brightness, or that of each of its pixels."""
    channels = x.shape[1]
    weights = LUMA if channels == 3 else (1.0,)
    target = weights[0] * x[:, :1]
    for c in range(1, channels):
        target += weights[c] * x[:, c : c + 1]
    target[kind == 1] = target[kind == 1].mean(axis=(1, 2, 3), keepdims=True)
    target[kind == 0] = 0
    return target


def _check_images(x: Array) -> None:
    if not isinstance(x, np.ndarray):
        raise TypeError(f"x: expected a NumPy array; got {type(x).__name__}")
    if x.dtype not in (np.float32, np.float64):
        raise TypeError(f"x: expected float32 or float64; got {x.dtype}")
    if x.ndim != 4:
        raise ValueError(f"x: expected images of shape (n, C, H, W); got {x.shape}")
