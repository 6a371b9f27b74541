"""Augmentation: what each does to images, exactly; shifts as scipy.ndimage has them."""

import numpy as np
import pytest
from accuracy import assert_same_bits
from scipy import ndimage

from bncpu import nn

ALL = [
    nn.Flip(),
    nn.Flip(probability=1),
    nn.Shift(2),
    nn.PhotometricDistortion(),
    nn.PhotometricDistortion(brightness=0.2, contrast=0, saturation=1),
    nn.Compose(nn.Flip(), nn.Shift(3), nn.PhotometricDistortion()),
    nn.Compose(),
]


def images(rng, n=7, channels=3, height=8, width=6, dtype=np.float32):
    return rng.random((n, channels, height, width)).astype(dtype)


@pytest.mark.parametrize("augment", ALL, ids=repr)
@pytest.mark.parametrize("channels", [1, 3])
def test_what_all_keep(rng, dtype, augment, channels):
    x = images(rng, channels=channels, dtype=dtype)
    before = x.copy()
    x.flags.writeable = False
    y = augment(x, np.random.default_rng(3))
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert_same_bits(x, before)
    assert (y >= 0).all()
    assert (y <= 1).all()
    assert_same_bits(augment(x, np.random.default_rng(3)), y)
    assert augment(x[:0], np.random.default_rng(3)).shape == (0, *x.shape[1:])
    # A view of any strides is what its copy is.
    view = np.asfortranarray(x)[::-1, :, :, ::-1]
    assert_same_bits(
        np.ascontiguousarray(augment(view, np.random.default_rng(3))),
        np.ascontiguousarray(augment(view.copy(order="C"), np.random.default_rng(3))),
    )


@pytest.mark.parametrize("augment", [a for a in ALL if a not in (ALL[1], ALL[6])], ids=repr)
def test_images_are_changed_each_in_its_own_way(rng, augment):
    x = np.repeat(images(rng, n=1), 64, axis=0)
    y = augment(x, np.random.default_rng(3))
    assert not np.array_equal(y, augment(x, np.random.default_rng(4)))
    assert len({image.tobytes() for image in y}) >= 2


def test_a_flip_mirrors_left_and_right(rng):
    x = images(rng)
    flip = nn.Flip(probability=1)
    assert_same_bits(flip(x, rng), np.ascontiguousarray(x[..., ::-1]))
    assert_same_bits(flip(flip(x, rng), rng), x)
    assert_same_bits(nn.Flip(probability=0)(x, rng), x)


def test_a_flip_is_of_whole_images_and_of_the_share_asked_for():
    x = np.broadcast_to(np.arange(4.0), (10_000, 2, 3, 4))
    y = nn.Flip(0.25)(x, np.random.default_rng(0))
    flipped = y[:, 0, 0, 0] == 3
    np.testing.assert_array_equal(y[flipped], x[flipped][..., ::-1])
    np.testing.assert_array_equal(y[~flipped], x[~flipped])
    assert abs(flipped.mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 10_000)


def test_shifts_are_scipys(rng):
    """Every image is one of the 25 shifts of its original, and all 25 are there, equally often."""
    original = images(rng, n=1)[0]
    moves = {
        ndimage.shift(original, (0, down, right), order=0).tobytes(): (down, right)
        for down in range(-2, 3)
        for right in range(-2, 3)
    }
    x = np.repeat(original[None], 5000, axis=0)
    found = [moves[image.tobytes()] for image in nn.Shift(2)(x, np.random.default_rng(1))]
    counts = [found.count(move) for move in moves.values()]
    assert len(moves) == 25
    assert min(counts) > 200 - 5 * np.sqrt(200)
    assert max(counts) < 200 + 5 * np.sqrt(200)


def test_a_shift_by_nothing_is_the_identity(rng):
    x = images(rng)
    assert_same_bits(nn.Shift(0)(x, rng), x)


def test_a_distortion_without_strength_is_the_identity(rng, dtype):
    none = nn.PhotometricDistortion(brightness=0, contrast=0, saturation=0)
    for channels in (1, 3):
        x = images(rng, channels=channels, dtype=dtype)
        assert_same_bits(none(x, rng), x)


def luma(x):
    weights = [0.299, 0.587, 0.114] if x.shape[1] == 3 else [1.0]
    return np.einsum("c,nchw->nhw", weights, x)[:, None]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_one_distortion_at_a_time_is_its_equation(rng, name, channels):
    strength = 0.4
    x = 0.4 + 0.2 * images(rng, n=50, channels=channels, dtype=np.float64)  # far from the ends
    others = dict.fromkeys(("brightness", "contrast", "saturation"), 0.0)
    y = nn.PhotometricDistortion(**(others | {name: strength}))(x, rng)
    grey = luma(x)
    target = {
        "brightness": np.zeros_like(grey),
        "contrast": np.broadcast_to(grey.mean(axis=(2, 3), keepdims=True), grey.shape),
        "saturation": grey,
    }[name]
    if name == "saturation" and channels == 1:
        np.testing.assert_allclose(y, x, rtol=1e-14)
        return
    away, moved = (x - target).reshape(50, -1), (y - target).reshape(50, -1)
    factor = (away * moved).sum(axis=1) / (away * away).sum(axis=1)
    np.testing.assert_allclose(moved, factor[:, None] * away, atol=1e-13)
    assert (abs(factor - 1) <= strength).all()
    assert factor.max() - factor.min() > strength  # of [0.6, 1.4], half at least, in 50 images


def test_distortions_come_in_every_order(rng):
    """On one image the six orders of three changes, with factors held, give six results."""
    x = np.repeat(images(rng, n=1, dtype=np.float64), 600, axis=0)

    class Held:
        """A generator whose factors are always the largest."""

        def __init__(self):
            self.random = np.random.default_rng(0).random

        def uniform(self, low, high, shape):
            return np.full(shape, 0.9 * high) + 0.0 * low

    y = nn.PhotometricDistortion()(x, Held())
    assert len({image.tobytes() for image in y}) == 6


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Flip(2), ValueError, r"probability: expected a number in \[0, 1\]; got 2\.0"),
        (lambda: nn.Flip("a"), TypeError, "probability: expected a number; got 'a'"),
        (lambda: nn.Shift(-1), ValueError, "pixels: expected an integer >= 0; got -1"),
        (lambda: nn.Shift(1.5), TypeError, r"pixels: expected an integer; got 1\.5"),
        (
            lambda: nn.PhotometricDistortion(contrast=1.5),
            ValueError,
            r"contrast: expected a number in \[0, 1\]; got 1\.5",
        ),
        (
            lambda: nn.PhotometricDistortion(saturation=None),
            TypeError,
            "saturation: expected a number; got None",
        ),
        (
            lambda: nn.Compose(nn.Flip(), 3),
            TypeError,
            "augmentations: expected a callable at index 1; got 3",
        ),
    ],
)
def test_what_none_is_made_of(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("augment", [nn.Flip(), nn.Shift(1), nn.PhotometricDistortion()], ids=repr)
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([[[[0.5]]]], TypeError, "x: expected a NumPy array; got list"),
        (np.zeros((2, 3, 4, 4), int), TypeError, "x: expected float32 or float64; got int64"),
        (
            np.zeros((2, 48)),
            ValueError,
            r"x: expected images of shape \(n, C, H, W\); got \(2, 48\)",
        ),
    ],
)
def test_what_is_no_batch_of_images(rng, augment, x, error, message):
    with pytest.raises(error, match=message):
        augment(x, rng)


def test_images_that_do_not_fit(rng):
    with pytest.raises(ValueError, match=r"pixels: expected less than height and width of x \(7"):
        nn.Shift(6)(images(rng), rng)
    distort = nn.PhotometricDistortion()
    with pytest.raises(ValueError, match="x: expected 1 or 3 channels"):
        distort(images(rng, channels=2), rng)
    with pytest.raises(ValueError, match=r"x: expected values in \[0, 1\]; got -1 to 0"):
        distort(np.linspace(-1, 0, 12).reshape(1, 3, 2, 2), rng)
    with pytest.raises(ValueError, match=r"x: expected values in \[0, 1\]; got nan"):
        distort(np.full((1, 3, 2, 2), np.nan), rng)
