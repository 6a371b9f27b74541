"""PyTorch, where it is installed, as an outside judge; and its arrays and weights as guests.

PyTorch's float64 results are compared with float64 results here, so that its own float32 shortcuts
(it folds the mean into the shift) are not held against anybody.
"""

import numpy as np
import pytest
from accuracy import EPS64, assert_same_bits
from cases import normal, parameters, statistics

import bncpu

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.usefixtures("level")

SHAPES = [(9, 5), (4, 5, 7), (3, 5, 8, 9), (2, 5, 3, 4, 6)]
ALLOWED = 1e4 * EPS64  # both sides round, in a different order


def close(ours, theirs):
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    np.testing.assert_allclose(ours, theirs, rtol=ALLOWED, atol=ALLOWED)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training(rng, shape):
    x, dy = normal(rng, shape, np.float64), normal(rng, shape, np.float64)
    gamma, beta = parameters(rng, 5, np.float64)
    running_mean, running_var = np.zeros(5), np.ones(5)
    guests = [torch.tensor(a, requires_grad=True) for a in (x, gamma, beta)]
    their_mean, their_var = torch.zeros(5).double(), torch.ones(5).double()
    theirs = torch.nn.functional.batch_norm(
        guests[0], their_mean, their_var, guests[1], guests[2], training=True, momentum=0.2
    )
    theirs.backward(torch.tensor(dy))

    y, mean, invstd = bncpu.batch_norm_train(
        x, gamma, beta, running_mean=running_mean, running_var=running_var, momentum=0.2
    )
    close(y, theirs)
    close(running_mean, their_mean)
    close(running_var, their_var)
    gradients = bncpu.batch_norm_backward(dy, x, mean, invstd, gamma)
    for ours, guest in zip(gradients, guests, strict=True):
        close(ours, guest.grad)


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
    close(bncpu.batch_norm_infer(x, mean, var, gamma, beta, eps=1e-3), theirs)
    gradients = bncpu.batch_norm_infer_backward(dy, x, mean, var, gamma, eps=1e-3)
    for ours, guest in zip(gradients, guests, strict=True):
        close(ours, guest.grad)


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
        close(ours(x), theirs(torch.tensor(x)))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, a in theirs.state_dict().items():
        close(ours.state_dict()[name], a)

    back = torch.nn.BatchNorm1d(5, dtype=torch.float64)
    back.load_state_dict({name: torch.tensor(a) for name, a in ours.state_dict().items()})
    x = normal(rng, (6, 5), np.float64)
    close(ours.eval()(x), back.eval()(torch.tensor(x)))


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
    got, expected = bncpu.batch_norm_train(guest).y, bncpu.batch_norm_train(x).y
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


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
