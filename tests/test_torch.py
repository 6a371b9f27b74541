"""PyTorch, where it is installed, as an outside judge; and its arrays and weights as guests.

PyTorch's float64 results are compared with float64 results here, so that its own float32 shortcuts
(it folds the mean into the shift) are not held against anybody.
"""

import numpy as np
import pytest
from accuracy import (
    assert_backward,
    assert_infer_backward,
    assert_running,
    assert_same_bits,
    assert_same_to_rounding,
    assert_train,
)
from cases import HALVES, normal, parameters, statistics
from forms import EVERYTHING, RELU, problem, run_and_check

import bncpu
from bncpu import reference

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.usefixtures("level")

SHAPES = [(9, 5), (4, 5, 7), (3, 5, 8, 9), (2, 5, 3, 4, 6)]


def close(ours, theirs, *, m, size, what="result"):
    """Compare two float64 results for sums over m values; both sides round, in their own order."""
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    assert_same_to_rounding(ours, theirs, dtype=np.float64, m=m, size=size, what=what)


def tall(values, x):
    """Let one value per channel broadcast against x."""
    return np.reshape(values, (-1,) + (1,) * (x.ndim - 2))


def folded_size(x, mean, var, gamma, beta, eps):
    """Return the size of the terms of scale * x + shift, which is PyTorch's way to infer."""
    scale = np.abs(gamma) / np.sqrt(var + eps)
    return tall(scale, x) * (np.abs(x) + tall(np.abs(mean), x)) + tall(np.abs(beta), x)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training(rng, shape):
    """PyTorch is held to the tolerance of this package, by the same truth."""
    x, dy = normal(rng, shape, np.float64), normal(rng, shape, np.float64)
    gamma, beta = parameters(rng, 5, np.float64)
    running_mean, running_var = np.zeros(5), np.ones(5)
    guests = [torch.tensor(a, requires_grad=True) for a in (x, gamma, beta)]
    their_mean, their_var = torch.zeros(5).double(), torch.ones(5).double()
    theirs = torch.nn.functional.batch_norm(
        guests[0], their_mean, their_var, guests[1], guests[2], training=True, momentum=0.2
    )
    theirs.backward(torch.tensor(dy))

    ours = bncpu.batch_norm_train(
        x, gamma, beta, running_mean=running_mean, running_var=running_var, momentum=0.2
    )
    batch = ours.mean, ours.invstd
    gradients = bncpu.batch_norm_backward(dy, x, *batch, gamma)
    their_gradients = bncpu.Gradients(*(guest.grad.numpy() for guest in guests), None)
    for y in (ours.y, theirs.detach().numpy()):
        assert_train(ours._replace(y=y), x, gamma, beta)
    for mean, var in [(running_mean, running_var), (their_mean.numpy(), their_var.numpy())]:
        assert_running(mean, var, x, momentum=0.2)
    for either in (gradients, their_gradients):
        assert_backward(either, dy, x, *batch, gamma)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inference(rng, shape):
    x, dy = normal(rng, shape, np.float64), normal(rng, shape, np.float64)
    mean, var = statistics(rng, 5)
    gamma, beta = parameters(rng, 5, np.float64)
    guests = [torch.tensor(a, requires_grad=True) for a in (x, gamma, beta)]
    theirs = torch.nn.functional.batch_norm(
        guests[0], torch.tensor(mean), torch.tensor(var), guests[1], guests[2], eps=1e-3
    )
    theirs.backward(torch.tensor(dy))
    close(
        bncpu.batch_norm_infer(x, mean, var, gamma, beta, eps=1e-3),
        theirs,
        m=1,
        size=folded_size(x, mean, var, gamma, beta, eps=1e-3),
    )
    ours = bncpu.batch_norm_infer_backward(dy, x, mean, var, gamma, eps=1e-3)
    their_gradients = bncpu.Gradients(*(guest.grad.numpy() for guest in guests), None)
    for either in (ours, their_gradients):
        assert_infer_backward(either, dy, x, mean, var, gamma, eps=1e-3)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fused(rng, shape, with_residual, trains):
    """relu(batch_norm(x) + residual), and what autograd makes of it."""
    p = problem(rng, shape, np.dtype(np.float64))
    names = ["x", "gamma", "beta", *(["residual"] if with_residual else [])]
    guests = {name: torch.tensor(getattr(p, name), requires_grad=True) for name in names}
    theirs = torch.nn.functional.batch_norm(
        guests["x"],
        *(None if trains else torch.tensor(a) for a in (p.mean, p.var)),
        *(guests["gamma"], guests["beta"]),
        training=trains,
    )
    theirs = torch.relu(theirs + guests["residual"] if with_residual else theirs)
    theirs.backward(torch.tensor(p.dy))
    form = EVERYTHING if with_residual else RELU
    ours = run_and_check(form, p)
    which = "train" if trains else "infer"
    their_gradients = bncpu.Gradients(
        *(guests[name].grad.numpy() for name in ("x", "gamma", "beta")),
        guests["residual"].grad.numpy() if with_residual else None,
    )
    # Both sides against the truth, by the one tolerance; nobody's z is near enough to 0 to differ.
    passes = theirs.detach().numpy() != 0
    np.testing.assert_array_equal(ours[f"{which} y"] != 0, passes)
    forward = {"residual": p.residual if with_residual else None, "activation": "relu"}
    their_y = theirs.detach().numpy()
    if trains:
        batch = ours["train mean"], ours["train invstd"]
        assert_train(bncpu.TrainResult(their_y, *batch), p.x, p.gamma, p.beta, **forward)
        assert_backward(their_gradients, p.dy, p.x, *batch, p.gamma, passes=passes)
    else:
        size = folded_size(p.x, p.mean, p.var, p.gamma, p.beta, 1e-5) + np.abs(p.residual)
        close(ours["infer y"], their_y, m=1, size=size)
        assert_infer_backward(their_gradients, p.dy, p.x, p.mean, p.var, p.gamma, passes=passes)


def test_half_tensors_are_viewed(rng):
    """NumPy and PyTorch both have float16."""
    x = normal(rng, (4, 5, 7), np.float16)
    got = bncpu.batch_norm_train(torch.tensor(x), activation="relu")
    assert_same_bits(got.y, bncpu.batch_norm_train(x, activation="relu").y)
    assert got.y.dtype == np.float16


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_conversions(rng, half):
    """PyTorch's rounding of float32 to its half types is that of the kernels."""
    bits = rng.integers(0, 2**32, 20_000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    ones, zeros = np.ones((1, len(values), 1), half), np.zeros(len(values))
    got = bncpu.batch_norm_infer(ones, zeros, zeros + 1.0, values, eps=0.0)
    theirs = torch.tensor(values).to(getattr(torch, half.name))
    np.testing.assert_array_equal(got.reshape(-1).astype(np.float32), theirs.float().numpy())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_layer_and_its_weights_both_ways(rng, momentum):
    theirs = torch.nn.BatchNorm1d(5, momentum=momentum, dtype=torch.float64)
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(rng.standard_normal(5)))
        theirs.bias.copy_(torch.tensor(rng.standard_normal(5)))
    ours = bncpu.BatchNorm(5, momentum=momentum, dtype=np.float64)
    ours.load_state_dict({name: a.numpy() for name, a in theirs.state_dict().items()})
    for n in (6, 9, 4):
        x = normal(rng, (n, 5), np.float64)
        ours_y, theirs_y = ours(x), theirs(torch.tensor(x))
        moments = reference.batch_moments(x)
        size = folded_size(x, moments.mean, moments.m2 / n, ours.gamma, ours.beta, ours.eps)
        close(ours_y, theirs_y, m=n, size=size, what="y")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, a in theirs.state_dict().items():
        close(ours.state_dict()[name], a, m=19, size=np.abs(a.numpy()) + 1.0, what=name)

    back = torch.nn.BatchNorm1d(5, dtype=torch.float64)
    back.load_state_dict({name: torch.tensor(a) for name, a in ours.state_dict().items()})
    x = normal(rng, (6, 5), np.float64)
    fixed = ours.running_mean, ours.running_var, ours.gamma, ours.beta
    size = folded_size(x, *fixed, ours.eps)
    close(ours.eval()(x), back.eval()(torch.tensor(x)), m=1, size=size)


def test_tensors_are_viewed_through_dlpack(rng, dtype):
    x, dy = normal(rng, (4, 5, 7), dtype), normal(rng, (4, 5, 7), dtype)
    gamma, beta = parameters(rng, 5, dtype)
    guests = [torch.tensor(a) for a in (x, gamma, beta)]
    expected = bncpu.batch_norm_train(x, gamma, beta)
    got = bncpu.batch_norm_train(*guests)
    for a, b in zip(got, expected, strict=True):
        assert isinstance(a, np.ndarray)
        assert_same_bits(a, b)
    gradients = bncpu.batch_norm_backward(torch.tensor(dy), guests[0], *expected[1:], guests[1])
    for a, b in zip(gradients, bncpu.batch_norm_backward(dy, x, *expected[1:], gamma), strict=True):
        assert_same_bits(a, b)


def test_tensors_are_updated_in_place(rng):
    """A view without a copy: what is written is written to the tensor's own memory."""
    x = normal(rng, (4, 5, 7), np.float32)
    running_mean, running_var = torch.zeros(5), torch.ones(5)
    out = torch.zeros(4, 5, 7)
    result = bncpu.batch_norm_train(x, running_mean=running_mean, running_var=running_var, out=out)
    assert_same_bits(out.numpy(), result.y)
    assert_same_bits(result.y, bncpu.batch_norm_train(x).y)
    assert running_mean.abs().min() > 0.0
    assert (running_var - 1.0).abs().min() > 0.0


def test_channels_last_memory_format(rng):
    x = normal(rng, (3, 5, 8, 9), np.float32)
    guest = torch.tensor(x).to(memory_format=torch.channels_last)
    assert not guest.is_contiguous()
    got = bncpu.batch_norm_train(guest)
    assert got.y.strides == guest.numpy().strides
    assert_train(got, x)


@pytest.mark.parametrize("ratio", [1e3, 1e6])
def test_at_least_as_accurate(rng, ratio):
    """A channel far from zero: the error against float64 is not larger than PyTorch's."""
    x = normal(rng, (32, 4, 784), np.float32, mean=ratio, std=1.0)
    theirs = torch.nn.functional.batch_norm(torch.tensor(x), None, None, training=True).numpy()
    truth = torch.nn.functional.batch_norm(
        torch.tensor(x.astype(np.float64)), None, None, training=True
    ).numpy()
    our_error = np.abs(bncpu.batch_norm_train(x).y - truth).max()
    assert our_error <= np.abs(theirs - truth).max()


def test_tensors_that_record_gradients_are_refused(rng):
    """PyTorch will not export them; the message names the argument."""
    x = torch.tensor(normal(rng, (4, 5), np.float32), requires_grad=True)
    with pytest.raises(TypeError, match=r"^x: "):
        bncpu.batch_norm_train(x)
