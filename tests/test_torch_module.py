"""bncpu.torch: modules that do what those of torch.nn do, on the kernels."""

import copy
import io
import pickle
from functools import partial

import ml_dtypes
import numpy as np
import pytest
from accuracy import assert_same_bits, assert_same_to_rounding

import bncpu

torch = pytest.importorskip("torch")
bt = pytest.importorskip("bncpu.torch")

pytestmark = pytest.mark.usefixtures("seeded_torch")


SHAPES = {1: (6, 5, 4), 2: (4, 5, 3, 6), 3: (3, 5, 2, 3, 4)}
FORMS = ("BatchNorm", "BatchNormReLU", "BatchNormAddReLU")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture
def calls(monkeypatch):
    """Record what the public functions are given."""
    seen = []
    names = ("train", "infer", "backward", "infer_backward")
    for name in names:
        function = getattr(bncpu, f"batch_norm_{name}")

        def recorded(*args, _name=name, _function=function, **kwargs):
            seen.append((_name, args, kwargs))
            return _function(*args, **kwargs)

        monkeypatch.setattr(f"bncpu.torch.autograd.batch_norm_{name}", recorded)
    return seen


def array(tensor):
    tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def close(ours, theirs, m=72):
    """Compare two computations of sums over m values in one dtype, with terms of size 1 or so."""
    if theirs is None:
        assert ours is None
        return
    assert ours.dtype == theirs.dtype
    ours, theirs = array(ours), array(theirs)
    size = 10.0 * max(1.0, np.abs(theirs.astype(np.float64)).max(initial=0.0))
    dtype = theirs.dtype
    if dtype.itemsize == 2:
        size *= float(ml_dtypes.finfo(dtype).eps) / np.finfo(np.float32).eps
        ours, theirs = ours.astype(np.float32), theirs.astype(np.float32)
    assert_same_to_rounding(ours, theirs, dtype=dtype, m=m, size=size)


def pair(ndim=2, channels=5, **options):
    """Return a module of torch.nn with parameters that are not its first ones, and ours."""
    theirs = getattr(torch.nn, f"BatchNorm{ndim}d")(channels, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(channels))
    ours = getattr(bt, f"BatchNorm{ndim}d")(channels, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def same_state(ours, theirs):
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        close(ours.state_dict()[name].double(), value.double())


def leaf(*shape, dtype=torch.float64, **options):
    return torch.randn(*shape, dtype=torch.float64, **options).to(dtype).requires_grad_()


def plain(form, norm, x, residual):
    """Return what a fused module does, by PyTorch's operations."""
    z = norm(x) if residual is None else norm(x) + residual
    return z if form == "BatchNorm" else torch.relu(z)


@pytest.mark.parametrize("ndim", SHAPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"momentum": 0.3, "eps": 0.1},
        {"momentum": 0.0},
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
    ],
    ids=str,
)
def test_same_as_torch_nn(ndim, options):
    ours, theirs = pair(ndim, dtype=torch.float64, **options)
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)
    for mode in (True, True, False, True, False):
        ours.train(mode)
        theirs.train(mode)
        x = leaf(*SHAPES[ndim])
        dy = torch.randn(x.shape, dtype=x.dtype)
        gradients = []
        for module in (ours, theirs):
            module.zero_grad()
            x.grad = None
            y = module(x)
            y.backward(dy)
            gradients.append([y, x.grad, *(p.grad for p in module.parameters())])
        for a, b in zip(*gradients, strict=True):
            close(a, b)
        same_state(ours, theirs)


def test_tracking_that_is_switched_off():
    """PyTorch then leaves the running statistics alone in training, and uses them in evaluation."""
    ours, theirs = pair(dtype=torch.float64)
    for mode in (True, False):
        x = leaf(*SHAPES[2])
        for module in (ours, theirs):
            module.track_running_stats = False
            module.train(mode)
        close(ours(x), theirs(x))
        same_state(ours, theirs)
    assert ours.num_batches_tracked == 0


def test_vectors():
    ours, theirs = pair(1, dtype=torch.float64)
    x = leaf(7, 5)
    close(ours(x), theirs(x))
    same_state(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("trains", [True, False])
def test_kernels_in_place(form, dtype, last, trains, calls):
    """The functions get the tensors' own memory, and what they return is what comes out."""
    layer = getattr(bt, f"{form}2d")(5, dtype=torch.float64 if dtype is torch.float64 else None)
    layer.running_mean.normal_()
    running = [array(layer.running_mean).copy(), array(layer.running_var).copy()]
    layer.train(trains)
    laid = {"memory_format": torch.channels_last if last else torch.contiguous_format}
    x, residual, dy = (torch.randn(4, 5, 3, 6).to(dtype).to(**laid) for _ in range(3))
    x.requires_grad_()
    adds = form == "BatchNormAddReLU"
    given = (x, residual.requires_grad_()) if adds else (x,)
    y = layer(*given)
    y.backward(dy)
    assert y.dtype is x.grad.dtype is dtype
    assert y.is_contiguous(**laid)
    assert x.grad.is_contiguous(**laid)

    (_, forward, options), (_, backward, _) = calls
    assert [name for name, *_ in calls] == (
        ["train", "backward"] if trains else ["infer", "infer_backward"]
    )
    for got, tensor in ((forward[0], x), (backward[0], dy), (backward[1], x)):
        assert got.ctypes.data == tensor.data_ptr()
    if trains:
        assert options["running_mean"].ctypes.data == layer.running_mean.data_ptr()
    if adds:
        assert options["residual"].ctypes.data == residual.data_ptr()

    how = {"activation": None if form == "BatchNorm" else "relu"}
    mask = np.empty((x.numel() + 7) // 8, np.uint8) if adds else None
    parameters = array(layer.weight), array(layer.bias)
    before = {"residual": array(residual) if adds else None, "mask": mask, **how}
    behind = {"residual": adds, "mask": mask, **how}
    if trains:
        expected, *batch = bncpu.batch_norm_train(array(x), *parameters, **before)
        gradients = bncpu.batch_norm_backward(array(dy), array(x), *batch, *parameters, **behind)
    else:
        expected = bncpu.batch_norm_infer(array(x), *running, *parameters, **before)
        gradients = bncpu.batch_norm_infer_backward(
            array(dy), array(x), *running, *parameters, **behind
        )
    assert_same_bits(array(y), expected)
    got = (x.grad, layer.weight.grad, layer.bias.grad, residual.grad if adds else None)
    for a, b in zip(got, gradients, strict=True):
        assert_same_bits(None if a is None else array(a), b)


@pytest.mark.parametrize("ndim", SHAPES)
@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("trains", [True, False])
def test_fused_modules(ndim, form, trains):
    _, norm = pair(ndim, dtype=torch.float64)
    fused = getattr(bt, f"{form}{ndim}d")(5, dtype=torch.float64)
    fused.load_state_dict(norm.state_dict())
    for module in (fused, norm):
        module.train(trains)
    adds = form == "BatchNormAddReLU"
    inputs = [leaf(*SHAPES[ndim]) for _ in range(1 + adds)]
    dy = torch.randn(SHAPES[ndim], dtype=torch.float64)
    expected = plain(form, norm, inputs[0], inputs[1] if adds else None)
    wanted = torch.autograd.grad(expected, [*inputs, *norm.parameters()], dy)
    y = fused(*inputs)
    close(y, expected)
    for a, b in zip(
        torch.autograd.grad(y, [*inputs, *fused.parameters()], dy), wanted, strict=True
    ):
        close(a, b)
    same_state(fused, norm)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("options", [{}, {"affine": False}], ids=str)
@pytest.mark.parametrize("shape", [(3, 2, 2, 2), (4, 2, 1, 1)], ids=str)
def test_gradients_and_their_gradients(form, trains, options, shape):
    layer = getattr(bt, f"{form}2d")(2, dtype=torch.float64, eps=0.1, **options).train(trains)
    names = [name for name, _ in layer.named_parameters()]
    x = leaf(*shape).to(memory_format=torch.channels_last)
    inputs = [x, *(leaf(2) for _ in names)]
    if form == "BatchNormAddReLU":
        # Away from the corner of ReLU, where there is no derivative.
        inputs.append(torch.where(torch.rand(shape) < 0.5, -9.0, 9.0).double().requires_grad_())
    elif form == "BatchNormReLU":
        with torch.no_grad():
            z = torch.func.functional_call(layer, dict(zip(names, inputs[1:], strict=True)), (x,))
        near = z[z != 0].abs().min() if (z != 0).any() else 1.0
        assert near > 1e-9

    def call(x, *rest):
        state = dict(zip(names, rest, strict=False))
        return torch.func.functional_call(layer, state, (x, *rest[len(names) :]))

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("trains", [True, False])
def test_composed_gradients_are_those_of_the_kernels(form, dtype, trains):
    layer = getattr(bt, f"{form}2d")(5, dtype=torch.float64 if dtype is torch.float64 else None)
    layer.train(trains)
    adds = form == "BatchNormAddReLU"
    inputs = [leaf(4, 5, 3, 6, dtype=dtype) for _ in range(1 + adds)]
    wanted = [*inputs, *layer.parameters()]
    dy = torch.randn(4, 5, 3, 6).to(dtype)
    one, two = (
        torch.autograd.grad(layer(*inputs), wanted, dy, create_graph=graph)
        for graph in (False, True)
    )
    assert two[0].requires_grad
    assert not one[0].requires_grad
    for a, b in zip(one, two, strict=True):
        close(a, b)
    if adds:  # the same elements pass
        assert torch.equal(one[1] == 0, two[1] == 0)


def test_penalty_on_a_gradient():
    """What double backward is for, in two layers, against PyTorch's own."""
    norms = pair(dtype=torch.float64)
    conv = torch.nn.Conv2d(5, 5, 3, dtype=torch.float64)
    x = leaf(3, 5, 6, 6)
    found = []
    for norm in norms:
        (dx,) = torch.autograd.grad(norm(conv(x)).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), [x, *norm.parameters()]))
    for a, b in zip(*found, strict=True):
        close(a, b, m=1000)


def test_without_gradients(calls):
    layer = bt.BatchNormAddReLU2d(5)
    x = torch.randn(4, 5, 3, 3)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            y = layer(x, x)
        assert not y.requires_grad
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    assert not layer(x, x).requires_grad
    assert {options["mask"] for *_, options in calls} == {None}
    # Only what is wanted.
    x.requires_grad_()
    layer(x, torch.randn(4, 5, 3, 3)).sum().backward()
    assert calls[-1][2]["residual"] is False
    assert layer.weight.grad is None
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("trains", [True, False])
def test_autocast_to_bfloat16(trains, calls):
    ours, theirs = pair()
    conv = torch.nn.Conv2d(3, 5, 3)
    x = torch.randn(4, 3, 8, 8)
    found = []
    for norm in (ours, theirs):
        norm.train(trains)
        conv.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = norm(conv(x))
            loss = y.float().square().sum()
        loss.backward()
        found.append((y, conv.weight.grad.clone(), norm.weight.grad, norm.bias.grad))
    assert [call[1][0].dtype.name for call in calls][:1] == ["bfloat16"]
    assert found[0][0].dtype is torch.bfloat16
    close(found[0][0], found[1][0])
    for a, b in zip(found[0][1:], found[1][1:], strict=True):
        assert a.dtype is b.dtype is torch.float32
        close(a.bfloat16(), b.bfloat16(), m=1000)


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_models_of_half_types(dtype, calls):
    ours, theirs = (module.to(dtype) for module in pair())
    x = leaf(4, 5, 3, 6, dtype=dtype)
    for mode in (True, False):
        found = []
        for module in (ours, theirs):
            module.train(mode).zero_grad()
            x.grad = None
            y = module(x)
            y.backward(torch.ones_like(y))
            found.append((y, module.weight.grad, module.bias.grad, x.grad))
        for a, b in zip(*found, strict=True):
            close(a, b)
        for name, value in theirs.state_dict().items():
            if value.is_floating_point():
                close(ours.state_dict()[name], value)
    assert len(calls) == 4


def test_threads_are_those_of_torch(calls):
    layer, x = bt.BatchNorm2d(5), torch.randn(4, 5, 3, 3)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        x.grad = None
        y = layer(x.requires_grad_())
        y.backward(torch.ones_like(y))
        results.append((array(y), array(x.grad)))
        assert [options["num_threads"] for *_, options in calls[-2:]] == [threads] * 2
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("form", FORMS)
def test_copies_and_pickles(form):
    layer = getattr(bt, f"{form}2d")(5, momentum=None)
    adds = form == "BatchNormAddReLU"
    inputs = [torch.randn(4, 5, 3, 3)] * (1 + adds)
    layer(*inputs)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    copies.append(torch.load(file, weights_only=False))
    y = layer(*inputs)
    for other in copies:
        assert type(other) is type(layer)
        assert_same_bits(array(other(*inputs)), array(y))
        for a, b in zip(other.state_dict().values(), layer.state_dict().values(), strict=True):
            assert_same_bits(array(a), array(b))


def test_running_statistics_may_move_on():
    """Evaluation, then training, then the gradients of the evaluation: by what it was run with."""
    layer = bt.BatchNorm2d(5, dtype=torch.float64).eval()
    x = leaf(4, 5, 3, 3)
    y = layer(x)
    (expected,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    layer.train()(torch.randn(4, 5, 3, 3, dtype=torch.float64))
    (got,) = torch.autograd.grad(y.sum(), x)
    assert_same_bits(array(got), array(expected))


def test_an_input_that_was_written_to_is_noticed():
    layer = bt.BatchNorm2d(5)
    x = torch.randn(4, 5, 3, 3)
    y = layer(x)
    x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_strided_and_negated_tensors():
    ours, theirs = pair(dtype=torch.float64)
    wide = torch.randn(4, 10, 6, 6, dtype=torch.float64)
    negated = torch.complex(wide, wide).conj().imag[:, ::2]
    assert negated.is_neg()
    for x in (wide[:, ::2, 1:, ::2], wide.transpose(2, 3)[:, :5], negated):
        close(ours(x), theirs(x))


# What is PyTorch's own.


def test_another_device():
    """Nothing but a shape lies on "meta"; PyTorch's forward makes another of it."""
    layer = bt.BatchNormAddReLU2d(5, device="meta")
    x = torch.randn(4, 5, 3, 3, device="meta", requires_grad=True)
    y = layer(x, x)
    assert y.device.type == "meta"
    y.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("form", FORMS)
def test_a_tensor_on_another_device_than_the_module(form):
    layer = getattr(bt, f"{form}2d")(5)
    inputs = [torch.randn(4, 5, 3, 3, device="meta")] * (1 + (form == "BatchNormAddReLU"))
    with pytest.raises(RuntimeError, match=r"^input: expected a tensor on cpu, .* on meta; move"):
        layer(*inputs)
    assert layer.num_batches_tracked == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    ours, theirs = (module.cuda() for module in pair())
    x = torch.randn(4, 5, 3, 6, device="cuda")
    assert torch.equal(ours(x), theirs(x))
    with pytest.raises(RuntimeError, match=r"^input: expected a tensor on cpu"):
        bt.BatchNorm2d(5)(x)
    with pytest.raises(TypeError, match=r"^x: expected an array in CPU memory"):
        bncpu.batch_norm_train(x)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # within PyTorch's own jvp
@pytest.mark.parametrize("trains", [True, False])
def test_transforms_are_left_to_torch(trains, calls):
    ours, theirs = (module.train(trains) for module in pair(track_running_stats=False))
    ours.train(trains)
    x, tangent = torch.randn(2, 4, 5, 3, 3)

    def loss(module, x):
        return module(x).square().sum()

    for f in (torch.func.grad, lambda g: lambda x: torch.func.jvp(g, (x,), (tangent,))[1]):
        got, expected = (f(partial(loss, module))(x) for module in (ours, theirs))
        assert torch.equal(got, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        got, expected = (
            torch.autograd.forward_ad.unpack_dual(module(dual)).tangent for module in (ours, theirs)
        )
    assert torch.equal(got, expected)
    assert not calls


def test_subclasses_are_left_to_torch(calls):
    class Mine(torch.Tensor):
        pass

    ours, theirs = pair()
    x = torch.randn(4, 5, 3, 3).as_subclass(Mine)
    y = ours(x)
    assert type(y) is Mine
    assert torch.equal(y, theirs(x))
    assert not calls


def test_export_has_torchs_operation():
    layer, x = bt.BatchNormReLU2d(5).eval(), torch.randn(4, 5, 3, 3)
    exported = torch.export.export(layer, (x,))
    assert "batch_norm" in str(exported.graph)
    close(exported.module()(x), layer(x))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_trace_has_torchs_operation():
    layer, x = bt.BatchNorm2d(5).eval(), torch.randn(4, 5, 3, 3)
    traced = torch.jit.trace(layer, x)
    assert "aten::batch_norm" in str(traced.inlined_graph)
    close(traced(x), layer(x))


def test_a_momentum_beyond_one(calls):
    ours, theirs = pair(momentum=1.5, dtype=torch.float64)
    x = leaf(4, 5, 3, 3)
    close(ours(x), theirs(x))
    same_state(ours, theirs)
    assert not calls


@pytest.mark.parametrize("shape", [(0, 5, 3, 3), (4, 5, 0, 3)], ids=str)
def test_empty_batches(shape):
    for mode in (True, False):
        ours, theirs = (module.train(mode) for module in pair())
        x = torch.randn(shape)
        assert ours(x).shape == theirs(x).shape
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            assert_same_bits(array(a), array(b))


@pytest.mark.parametrize(
    ("x", "options"),
    [
        (torch.zeros(1, 5, 1, 1), {}),  # m = 1
        (torch.zeros(2, 4, 3, 3), {}),
        (torch.zeros(2, 5, 3), {}),
        (torch.zeros(2, 5, 3, 3, dtype=torch.float64), {}),
        (torch.zeros(2, 5, 3, 3, dtype=torch.int64), {}),
    ],
    ids=["m = 1", "channels", "dimensions", "dtype", "integers"],
)
def test_errors_are_those_of_torch(x, options):
    ours, theirs = pair(**options)
    found = []
    for module in (ours, theirs):
        with pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError)) as raised:
            module(x)
        found.append((raised.type, str(raised.value)))
    assert found[0] == found[1]


def test_a_residual_that_is_broadcast():
    layer, norm = bt.BatchNormAddReLU2d(5), bt.BatchNorm2d(5)
    x = torch.randn(4, 5, 3, 3)
    for residual in (torch.randn(4, 5, 1, 1), torch.randn(4, 5, 3, 3).double(), 1.5):
        expected = torch.relu(norm(x) + residual)
        close(layer(x, residual).float(), expected.float())
    assert layer.num_batches_tracked == 3


# Memory of results, from step to step.

LARGE = (4, 4, 256, 256)


def address(tensor):
    return tensor.untyped_storage().data_ptr()


def test_memory_is_used_again_once_nobody_holds_it():
    layer = bt.BatchNorm2d(4)
    x, dy = torch.randn(2, *LARGE)
    x.requires_grad_()
    y = layer(x)
    first, values = address(y), y.detach().clone()
    second = layer(x)
    assert address(second) != first  # y is here
    assert torch.equal(y, values)
    held = [second.detach().numpy()[1:]]
    first = address(second)
    del second
    third = layer(x)
    assert address(third) != first  # it is held
    first = address(third)
    third.backward(dy)
    assert address(x.grad) != first
    held.clear()
    y = values = third = x.grad = None

    y = layer(x)
    first = address(y)
    z = y * 1  # does not keep y
    (dx,) = torch.autograd.grad(z, x, dy, retain_graph=True)
    assert address(dx) != first  # y is here
    del y
    (again,) = torch.autograd.grad(z, x, dy)
    assert address(again) == first
    assert torch.equal(again, dx)
    del again
    assert address(layer(x)) == first


def test_memory_of_another_kind_is_left_alone():
    layer = bt.BatchNorm2d(4)
    x = torch.randn(LARGE)
    last = x.to(memory_format=torch.channels_last)
    for given in (x, x[:2], x.bfloat16(), last, last, x[:, :, :8, :8]):
        y = layer(given)
        assert y.dtype is given.dtype
        assert y.stride() == torch.empty_like(given).stride()
        assert_same_bits(array(y), bncpu.batch_norm_train(array(given)).y)
        del y


def test_no_memory_is_kept_but_for_gradients(monkeypatch):
    layer = bt.BatchNorm2d(4)
    x = torch.randn(LARGE)
    kept = bt.memory.kept_for(layer)._last
    with torch.no_grad():
        layer(x)
    assert not kept
    layer(x)
    assert len(kept) == 1
    assert len(pickle.dumps(layer)) < 1 << 16
    assert not bt.memory.kept_for(copy.deepcopy(layer))._last
    layer(x[:, :, :8, :8])
    assert not kept
    layer(x)
    bt.restore(layer)
    assert not bt.memory.kept_for(layer)._last
    monkeypatch.setattr(bncpu.cpu.pool, "limit", lambda: 0)
    layer = bt.convert(layer)
    layer(x)
    assert not bt.memory.kept_for(layer)._last
