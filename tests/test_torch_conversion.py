"""bncpu.torch.convert and restore: models that compute the same, with fewer calls."""

import copy
import pickle
import random

import pytest
from accuracy import assert_same_bits
from test_torch_module import close

torch = pytest.importorskip("torch")
bt = pytest.importorskip("bncpu.torch")
nn = torch.nn

pytestmark = pytest.mark.usefixtures("seeded_torch")


class Block(nn.Module):
    """The end of a residual block in one of many ways to write it."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(4) for _ in range(3))
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.relu, self.in_place = nn.ReLU(), nn.ReLU(inplace=True)
        self.how = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return globals()[self.how](self, x)


def functions(s, x):
    return torch.nn.functional.relu(s.bn1(s.conv(x)))


def in_place_function(s, x):
    return torch.nn.functional.relu(s.bn1(s.conv(x)), inplace=True)


def method(s, x):
    return s.bn1(s.conv(x)).relu_() + x


def shared_module(s, x):
    return s.in_place(s.bn2(s.conv(s.in_place(s.bn1(s.conv(x))))))


def residual(s, x):
    out = s.bn1(s.conv(x))
    out += x
    return s.in_place(out)


def residual_first(s, x):
    return s.relu(torch.add(x, s.bn1(s.conv(x))))


def two_norms(s, x):
    return torch.relu(s.bn1(s.conv(x)).add_(s.bn2(x)))


def number_added(s, x):
    return torch.relu(s.bn1(s.conv(x)) + x.size(1))


def by_mode(s, x):
    if s.training:
        x = x * 2
    return nn.functional.dropout(s.relu(s.bn1(s.conv(x))), 0.0, s.training)


def result_used_twice(s, x):
    z = s.bn1(x)
    return s.relu(z) + z


def norm_called_twice(s, x):
    return s.relu(s.bn1(s.relu(s.bn1(x))))


def added_in_the_other(s, x):
    x = s.conv(x)
    x += s.bn1(x)
    return s.relu(x) + x


def sum_in_the_other_s_memory(s, x):
    y = z = s.conv(x)
    y += s.bn1(x)
    return s.relu(y) + z


def input_written_between(s, x):
    x = s.conv(x)
    z = s.bn1(x)
    x = x.relu_() if not s.training else x
    return s.relu(z + x)


def scaled_addition(s, x):
    return s.relu(torch.add(s.bn1(x), x, alpha=2))


def relu_in_one_mode(s, x):
    z = s.bn1(x)
    return s.relu(z) if s.training else z


def by_values(s, x):
    return s.relu(s.bn1(x)) if x.sum() > 0 else x


def by_chance(s, x):
    return s.relu(s.bn1(x)) if random.random() >= 0.0 else x


def by_torchs_chance(s, x):
    return s.relu(s.bn1(x)) * (torch.rand(()) >= 0.0)


def scaled_in_place(s, x):
    y = z = s.conv(x)
    y *= 2
    return s.relu(s.bn1(y)) + z


def keeps_something(s, x):
    s.kept = x
    return s.relu(s.bn1(x))


FUSED = {
    "functions": {"bn1": "BatchNormReLU2d"},
    "in_place_function": {"bn1": "BatchNormReLU2d"},
    "method": {"bn1": "BatchNormReLU2d"},
    "shared_module": {"bn1": "BatchNormReLU2d", "bn2": "BatchNormReLU2d"},
    "residual": {"bn1": "BatchNormAddReLU2d"},
    "residual_first": {"bn1": "BatchNormAddReLU2d"},
    "two_norms": {"bn1": "BatchNormAddReLU2d"},
    "number_added": {"bn1": "BatchNormAddReLU2d"},
    "by_mode": {"bn1": "BatchNormReLU2d"},
}
LEFT = [
    "result_used_twice",
    "norm_called_twice",
    "scaled_addition",
    "relu_in_one_mode",
    "by_values",
    "by_chance",
    "by_torchs_chance",
    "keeps_something",
    "scaled_in_place",
]


def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        Block("shared_module"),
        Block("residual"),
        nn.Flatten(),
        nn.Linear(4 * 6 * 6, 5),
        nn.BatchNorm1d(5),
    ).double()


def images(*shape):
    return torch.randn(*(shape or (4, 3, 8, 8)), dtype=torch.float64)


def step(model, x, mode=True):
    """Return what a training step, or an evaluation, gives, all of it."""
    model.train(mode).zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_same_steps(a, b, x):
    for mode in (True, True, False):
        for left, right in zip(step(a, x, mode), step(b, x, mode), strict=True):
            close(left, right, m=1e4)
    assert list(a.state_dict()) == list(b.state_dict())
    for left, right in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        close(left.double(), right.double())


def kinds(model):
    return {name: type(m).__name__ for name, m in model.named_children() if "Norm" in repr(m)}


@pytest.mark.parametrize("fuse", [False, True])
def test_there_and_back(fuse):
    model = network()
    before = {name: (module, type(module)) for name, module in model.named_modules()}
    parameters = list(model.parameters())
    untouched = copy.deepcopy(model)
    assert bt.convert(model, fuse=fuse) is model
    assert all(type(m).__module__ == "bncpu.torch.modules" for m in model.modules() if is_norm(m))
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert all(model.get_submodule(name) is module for name, (module, _) in before.items())
    assert_same_steps(model, untouched, images())
    bt.convert(model, fuse=fuse)  # again: nothing more
    assert_same_steps(model, untouched, images())
    assert bt.restore(model) is model
    assert {name: (m, type(m)) for name, m in model.named_modules()} == before
    assert not any("forward" in vars(module) for module in model.modules())
    assert_same_steps(model, untouched, images())


def is_norm(module):
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def test_all_dimensions_and_the_model_itself():
    for n in (1, 2, 3):
        norm = getattr(nn, f"BatchNorm{n}d")(4)
        assert type(bt.convert(norm)) is getattr(bt, f"BatchNorm{n}d")
        assert type(bt.restore(norm)) is getattr(nn, f"BatchNorm{n}d")
        model = nn.Sequential(norm, nn.ReLU()).double()
        untouched = copy.deepcopy(model)
        bt.convert(model, fuse=True)
        assert type(model[0]) is getattr(bt, f"BatchNormReLU{n}d")
        assert_same_steps(model, untouched, images(3, 4, *[3] * n))


@pytest.mark.parametrize("how", FUSED)
def test_what_is_fused(how):
    model = Block(how).double()
    untouched = copy.deepcopy(model)
    bt.convert(model, fuse=True)
    expected = dict.fromkeys(("bn1", "bn2", "bn3"), "BatchNorm2d") | FUSED[how]
    assert kinds(model) == expected
    assert_same_steps(model, untouched, images(3, 4, 5, 5))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_steps(other, copy.deepcopy(untouched), images(3, 4, 5, 5))
        assert other.forward.owner is other
    bt.restore(model)
    assert_same_steps(model, untouched, images(3, 4, 5, 5))


@pytest.mark.parametrize("how", LEFT)
def test_what_is_left(how):
    model = Block(how).double()
    untouched = copy.deepcopy(model)
    bt.convert(model, fuse=True)
    assert set(kinds(model).values()) == {"BatchNorm2d"}
    assert "kept" not in vars(model)
    state = torch.get_rng_state(), random.getstate()
    bt.convert(model, fuse=True)
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == random.getstate()
    assert_same_steps(model, untouched, images(3, 4, 5, 5))


@pytest.mark.parametrize(
    "how", ["added_in_the_other", "sum_in_the_other_s_memory", "input_written_between"]
)
def test_an_input_that_is_written_to(how):
    model = Block(how).double()
    untouched = copy.deepcopy(model)
    bt.convert(model, fuse=True)
    assert kinds(model)["bn1"] == "BatchNorm2d"
    with torch.no_grad():
        x = images(3, 4, 5, 5)
        close(model.eval()(x), untouched.eval()(x))


def test_hooks_shared_modules_and_subclasses_are_left():
    class Mine(nn.BatchNorm2d):
        pass

    hooked = Block("functions")
    seen = []
    hooked.bn1.register_forward_hook(lambda *args: seen.append(args[-1]))
    shared = Block("functions")
    model = nn.Sequential(
        hooked, shared, nn.Sequential(shared.bn1), Block("functions", bn1=Mine(4))
    )
    model = model.double()
    untouched = copy.deepcopy(model)
    bt.convert(model, fuse=True)
    assert [type(block.bn1).__name__ for block in (model[0], model[1], model[3])] == [
        "BatchNorm2d",
        "BatchNorm2d",
        "Mine",
    ]
    assert_same_steps(model, untouched, images(3, 4, 5, 5))
    assert any((z < 0).any() for z in seen)


def test_a_norm_that_another_module_reaches_for_is_left():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Block("functions")

        def forward(self, x):
            return self.inner(x) + self.inner.bn1(x)

    model = Outer().double()
    untouched = copy.deepcopy(model)
    bt.convert(model, fuse=True)
    assert_same_steps(model, untouched, images(3, 4, 5, 5))


def test_an_author_s_own_fused_module_stays():
    model = nn.Sequential(bt.BatchNormReLU2d(4), nn.BatchNorm2d(4), nn.ReLU())
    bt.restore(bt.convert(model, fuse=True))
    assert [type(m) for m in model] == [bt.BatchNormReLU2d, nn.BatchNorm2d, nn.ReLU]


def test_memory_format_and_autocast_in_a_fused_network():
    model = network().float()
    untouched = copy.deepcopy(model)
    bt.convert(model, fuse=True)
    x = images().float().to(memory_format=torch.channels_last)
    with torch.no_grad():
        close(model(x), untouched(x), m=1e4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, expected = model[:5](x), untouched[:5](x)
    assert got.dtype is expected.dtype


def test_only_modules():
    for function in (bt.convert, bt.restore):
        with pytest.raises(TypeError, match=r"^model: expected a torch.nn.Module; got list"):
            function([nn.BatchNorm2d(3)])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's own look
def test_compiled_with_breaks_of_the_graph():
    model = nn.Sequential(Block("shared_module"), Block("residual"), nn.BatchNorm2d(4))
    model = pickle.loads(pickle.dumps(bt.convert(model, fuse=True)))
    same = copy.deepcopy(model)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    x = torch.randn(3, 4, 5, 5)
    for mode in (True, True, False):
        for a, b in zip(step(compiled, x, mode), step(same, x, mode), strict=True):
            assert_same_bits(a.detach().numpy(), b.detach().numpy())
    assert len(graphs) > 1
    assert not any("batch_norm" in str(graph.graph) for graph in graphs)
