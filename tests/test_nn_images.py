"""The trainer's layers for images: gradients, PyTorch as a judge, threads, wrong input."""

import numpy as np
import pytest
from accuracy import assert_gradient, assert_same_bits, assert_same_to_rounding

import bncpu
from bncpu import nn
from bncpu.nn import workers

FLOAT64 = {"dtype": np.float64}


def conv(*sizes, rng, **options):
    return nn.Conv2d(*sizes, rng=rng, dtype=np.float64, **options)


# Each makes a layer for images of 3 channels and 6 x 7 pixels.
LAYERS = {
    "conv": lambda rng: conv(3, 4, 3, padding=1, rng=rng),
    "conv without bias": lambda rng: conv(3, 2, 3, bias=False, rng=rng),
    "conv of pixels": lambda rng: conv(3, 5, 1, rng=rng),
    "conv of uneven windows": lambda rng: conv(3, 2, (2, 3), padding=(1, 2), rng=rng),
    "strided conv": lambda rng: conv(3, 2, 3, stride=2, padding=1, rng=rng),
    "strided conv, uneven": lambda rng: conv(3, 2, (3, 2), stride=(1, 3), padding=(2, 0), rng=rng),
    "strided conv of pixels": lambda rng: conv(3, 2, 1, stride=2, rng=rng),
    "max pool": lambda _: nn.MaxPool2d(2),
    "max pool, overlapping": lambda _: nn.MaxPool2d(3, 2, 1),
    "max pool, uneven": lambda _: nn.MaxPool2d((3, 2), (1, 2), (1, 0)),
    "average pool": lambda _: nn.AvgPool2d(2),
    "average pool, overlapping": lambda _: nn.AvgPool2d(3, 1, 1),
    "average pool, uneven": lambda _: nn.AvgPool2d((2, 3), (2, 1), (0, 1)),
    "global average": lambda _: nn.GlobalAvgPool(),
    "flatten": lambda _: nn.Flatten(),
    "lrn": lambda _: nn.LocalResponseNorm(3, alpha=0.7, k=1.3),
    "lrn of even size": lambda _: nn.LocalResponseNorm(2, alpha=0.7, beta=0.5, k=2.0),
    "lrn wider than the channels": lambda _: nn.LocalResponseNorm(9, alpha=0.7),
    "concat": lambda rng: nn.Concat(
        conv(3, 2, 1, rng=rng), nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Sigmoid()), nn.Tanh()
    ),
    "residual": lambda rng: nn.Residual(conv(3, 3, 3, padding=1, rng=rng), activation=nn.Tanh()),
    "residual with shortcut": lambda rng: nn.Residual(
        nn.Sequential(conv(3, 2, 1, bias=False, rng=rng), nn.BatchNorm(2, **FLOAT64)),
        conv(3, 2, 1, rng=rng),
    ),
}


@pytest.fixture
def images(rng):
    """Return a few images whose pixels all differ by more than a difference's step reaches."""
    return rng.permutation(2 * 3 * 6 * 7).reshape(2, 3, 6, 7) / 60 - 2.0


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients(rng, images, kind):
    layer = LAYERS[kind](rng)
    dy = rng.standard_normal(layer(images).shape)

    def loss():
        return float(np.vdot(dy, layer.forward(images)))

    dx = layer.backward(dy)
    gradients = {name: value.copy() for name, value in layer.gradients().items()}
    assert dx.shape == images.shape
    assert gradients.keys() == layer.parameters().keys()
    assert_gradient(dx, loss, images)
    for name, value in layer.parameters().items():
        assert_gradient(gradients[name], loss, value, what=name)


def torch_layers(torch, layer):
    """Return PyTorch's layer of the same name, sizes and weights."""
    kind = type(layer).__name__
    if kind == "LocalResponseNorm":
        return torch.nn.LocalResponseNorm(layer.size, layer.alpha, layer.beta, layer.k)
    if kind in ("GlobalAvgPool", "Flatten"):
        pool = torch.nn.AdaptiveAvgPool2d(1) if kind == "GlobalAvgPool" else torch.nn.Identity()
        return torch.nn.Sequential(pool, torch.nn.Flatten())
    sizes = layer.windows.kernel, layer.windows.stride, layer.windows.padding
    if kind != "Conv2d":
        return getattr(torch.nn, kind)(*sizes)
    bias = layer.bias is not None
    dtype = getattr(torch, layer.weight.dtype.name)
    theirs = torch.nn.Conv2d(layer.in_channels, layer.out_channels, *sizes, bias=bias, dtype=dtype)
    theirs.load_state_dict({n: torch.from_numpy(v) for n, v in layer.state_dict().items()})
    return theirs


@pytest.mark.parametrize("shape", [(2, 3, 6, 7), (33, 3, 17, 15), (1, 3, 3, 3)])
@pytest.mark.parametrize(
    "kind", [kind for kind in LAYERS if not kind.startswith(("concat", "residual"))]
)
def test_pytorch_computes_the_same(rng, kind, shape, dtype):
    torch = pytest.importorskip("torch")
    layer = LAYERS[kind](rng)
    for name, value in layer.parameters().items():
        setattr(layer, name, value.astype(dtype))
    # Halves are equal more often than not, and so a pool has to choose.
    x = (rng.integers(-3, 4, shape) / 2).astype(dtype)
    there = torch.from_numpy(x.copy()).requires_grad_()
    expected = torch_layers(torch, layer)(there)
    y = layer(x)
    assert y.dtype == dtype
    terms, size = 200, 4.0  # of a sum over the 27 values of a window, or over all pixels
    assert_same_to_rounding(y, expected.detach().numpy(), dtype=dtype, m=terms, size=size)
    dy = rng.standard_normal(y.shape).astype(dtype)
    expected.backward(torch.from_numpy(dy))
    dx = layer.backward(dy)
    assert dx.dtype == dtype
    assert_same_to_rounding(dx, there.grad.numpy(), dtype=dtype, m=terms, size=4 * size)


@pytest.mark.parametrize("kind", LAYERS)
def test_threads_change_no_bit(rng, kind, monkeypatch):
    monkeypatch.setattr(workers, "WORTH_A_THREAD", 1)
    layer = LAYERS[kind](rng)
    x = rng.standard_normal((7, 3, 6, 7))
    results = []
    try:
        for threads in (1, 2, 3, 16):
            bncpu.set_num_threads(threads)
            y = layer(x)
            dx = layer.backward(np.cos(np.arange(y.size)).reshape(y.shape))
            results.append([y.copy(), dx.copy(), *(g.copy() for g in layer.gradients().values())])
    finally:
        bncpu.set_num_threads(None)
    for other in results[1:]:
        for i, (got, first) in enumerate(zip(other, results[0], strict=True)):
            assert_same_bits(got, first, f"result {i}")


def test_an_error_in_a_thread_is_raised(monkeypatch):
    monkeypatch.setattr(workers, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(workers, "get_num_threads", lambda: 3)
    done = []

    def work(part):
        if part.start == 2:
            raise RuntimeError("of the second thread")
        done.append(part)

    with pytest.raises(RuntimeError, match="of the second thread"):
        workers.over_images(6, work, size=6)
    assert set(map(str, done)) <= {"slice(0, 2, None)", "slice(4, 6, None)"}


def test_memory_follows_the_batch(rng):
    """Batches of other sizes, as evaluation has them, leave nothing behind."""
    layer = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, rng=rng), nn.MaxPool2d(3, 2, 1))
    batches = [rng.standard_normal((n, 3, h, 8)).astype(np.float32) for n, h in ((4, 8), (9, 5))]
    first = [layer(x).copy() for x in batches]
    for x, y in zip(batches, first, strict=True):
        assert_same_bits(layer(x), y)


def test_a_network_learns_and_is_saved(rng, tmp_path):
    x = rng.standard_normal((40, 1, 8, 8)).astype(np.float32)
    y = (x.mean(axis=(1, 2, 3)) > 0).astype(np.int64)
    x += 0.3 * (2 * y[:, np.newaxis, np.newaxis, np.newaxis] - 1)

    def make(seed):
        model = nn.inception(1, 2, dropout=0.1, lrn=True, rng=np.random.default_rng(seed))
        return model, nn.SGD(0.03, 0.9)

    model, optimizer = make(0)
    nn.fit(model, optimizer, x, y, steps=30, batch_size=20)
    assert nn.evaluate(model, x, y) > 0.9
    nn.save_checkpoint(tmp_path / "model", model, optimizer, step=30, seed=0)
    other, its = make(0)
    nn.read_checkpoint(tmp_path / "model").restore(other, its)
    for each, of in ((model, optimizer), (other, its)):
        nn.fit(each, of, x, y, steps=3, batch_size=20, start=30)
    for name, value in model.state_dict().items():
        assert_same_bits(other.state_dict()[name], value, name)


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid])
def test_inception(rng, batch_norm, activation):
    model = nn.inception(activation=activation, batch_norm=batch_norm, lrn=True, rng=rng)
    kinds = [type(layer).__name__ for layer in nn.base.layers_of(model)]
    assert kinds.count("Conv2d") == 1 + 3 * 7
    assert kinds.count("BatchNorm") == (22 if batch_norm else 0)
    # Fused into the batch normalisation where that can do it.
    alone = 0 if batch_norm and activation is nn.ReLU else 22
    assert kinds.count(activation.__name__) == alone
    assert kinds.count("LocalResponseNorm") == 1
    logits = model(rng.standard_normal((3, 3, 32, 32)).astype(np.float32))
    assert logits.shape == (3, 10)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda rng: nn.Conv2d(0, 2, 3, rng=rng), ValueError, "in_channels: expected an integer"),
        (lambda rng: nn.Conv2d(1, 2.0, 3, rng=rng), TypeError, "out_channels: expected an integer"),
        (lambda rng: nn.Conv2d(1, 2, 0, rng=rng), ValueError, "kernel_size: expected an integer"),
        (
            lambda rng: nn.Conv2d(1, 2, (3, 3, 3), rng=rng),
            ValueError,
            r"kernel_size: expected an integer or a pair; got \(3, 3, 3\)",
        ),
        (lambda rng: nn.Conv2d(1, 2, 3, stride=0, rng=rng), ValueError, "stride: expected"),
        (
            lambda rng: nn.Conv2d(1, 2, 3, padding=3, rng=rng),
            ValueError,
            r"padding: expected less than the window \(3, 3\); got \(3, 3\)",
        ),
        (lambda _: nn.Conv2d(1, 2, 3, rng=1), TypeError, "rng: expected a numpy"),
        (lambda rng: nn.Conv2d(1, 2, 3, rng=rng, dtype=int), TypeError, "dtype: expected float32"),
        (lambda rng: nn.Conv2d(1, 2, 3, rng=rng, std=-1), ValueError, "std: expected a finite"),
        (lambda rng: nn.Conv2d(1, 10**17, 9, rng=rng), ValueError, "weights: expected at most"),
        (lambda _: nn.MaxPool2d(2, 1, 2), ValueError, "padding: expected less than the window"),
        (lambda _: nn.LocalResponseNorm(0), ValueError, "size: expected an integer >= 1"),
        (lambda _: nn.LocalResponseNorm(alpha=-1), ValueError, "alpha: expected a finite number"),
        (lambda _: nn.LocalResponseNorm(k=0), ValueError, "k: expected a finite number > 0"),
        (lambda _: nn.Concat(), ValueError, "branches: expected at least one layer"),
        (lambda _: nn.Residual(3), TypeError, "layers: expected a layer at index 0; got 3"),
    ],
)
def test_layers_refuse_to_be_made(rng, make, error, message):
    with pytest.raises(error, match=message):
        make(rng)


@pytest.mark.parametrize(
    ("make", "shape", "message"),
    [
        (
            lambda rng: nn.Conv2d(3, 2, 3, rng=rng),
            (1, 2, 8, 8),
            r"x: expected shape \(N, 3, H, W\)",
        ),
        (lambda rng: nn.Conv2d(3, 2, 3, rng=rng), (3, 8, 8), r"x: expected shape \(N, 3, H, W\)"),
        (
            lambda rng: nn.Conv2d(3, 2, 3, rng=rng),
            (1, 3, 2, 8),
            r"x: expected images of at least \(3, 3\) pixels, .*; got \(2, 8\)",
        ),
        (lambda _: nn.AvgPool2d(2), (2, 8), r"x: expected shape \(N, C, H, W\); got \(2, 8\)"),
        (lambda _: nn.GlobalAvgPool(), (2, 8), r"x: expected shape \(N, C, H, W\); got \(2, 8\)"),
    ],
)
def test_layers_refuse_images(rng, make, shape, message):
    with pytest.raises(ValueError, match=message):
        make(rng)(np.zeros(shape, np.float32))


def test_a_convolution_refuses_another_dtype(rng):
    with pytest.raises(TypeError, match="x: expected float32 like the weights; got float64"):
        nn.Conv2d(1, 1, 1, rng=rng)(np.zeros((1, 1, 1, 1)))


def test_backward_needs_a_forward(rng):
    for layer in (nn.Conv2d(1, 1, 1, rng=rng), nn.MaxPool2d(1), nn.AvgPool2d(1), nn.Flatten()):
        with pytest.raises(RuntimeError, match="call forward first"):
            layer.backward(np.zeros((1, 1, 1, 1)))


def test_a_first_layer_may_leave_its_input_gradient_out(rng):
    x, how = rng.standard_normal((2, 3, 5, 5)), {"padding": 1, "rng": np.random.default_rng(3)}
    first = conv(3, 2, 3, input_gradient=False, **how)
    other = conv(3, 2, 3, **how | {"rng": np.random.default_rng(3)})
    dy = rng.standard_normal(first(x).shape)
    assert_same_bits(other(x), first(x))
    assert np.isnan(first.backward(dy)).all()
    assert np.isfinite(other.backward(dy)).all()
    for name, value in other.gradients().items():
        assert_same_bits(first.gradients()[name], value)


def test_a_result_that_is_held_stays(rng):
    """Memory is taken again from results that are gone, and from no other."""
    layers = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False, rng=rng), nn.BatchNorm(8), nn.MaxPool2d(2)
    )
    x = rng.standard_normal((6, 16, 1, 32, 32)).astype(np.float32)
    held = [layers(each) for each in x]
    views = [layers.layers[0](each)[0, :, 3] for each in x]
    copies = [y.copy() for y in (*held, *views)]
    for each in x:
        layers.backward(layers(each))
    for y, copy in zip((*held, *views), copies, strict=True):
        assert_same_bits(y, copy)


def test_a_residual_tells_a_shortcut_from_an_activation():
    assert repr(nn.Residual(nn.Tanh(), nn.ReLU())) == "Residual(Tanh(), shortcut=ReLU())"
    assert repr(nn.Residual(nn.Tanh(), activation=nn.ReLU())) == (
        "Residual(Tanh(), activation=ReLU())"
    )
