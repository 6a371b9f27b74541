"""Which BatchNorm can be one call with the ReLU behind it, and the forward that makes it so.

torch.fx reads the forward of one module at a time, its children being calls, and the same code with
fewer calls takes its place. Nothing is fused that may have another result: what is not seen through
stays as it is. Only the order of calls is known here; the classes are conversion.py's.
"""

from __future__ import annotations

import operator
import random
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.fx

from bncpu.torch.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d

if TYPE_CHECKING:
    from collections.abc import Callable, Container

_PLAIN = (BatchNorm1d, BatchNorm2d, BatchNorm3d)
_functional = torch.nn.functional
_RELU = {
    "call_function": (torch.relu, torch.relu_, _functional.relu, _functional.relu_),
    "call_method": ("relu", "relu_"),
}


def _add_in_place(a: Any, b: Any) -> Any:
    a += b
    return a


_ADD_IN_PLACE = (_add_in_place, "add_")
_ADD = {
    "call_function": (operator.add, _add_in_place, torch.add),
    "call_method": ("add", "add_"),
}


class _Pair(NamedTuple):
    norm: Any  # nodes of a graph
    relu: Any
    add: Any = None
    residual: Any = None


class FusedForward:
    """The forward of a module some of whose BatchNorm are one call with what follows.

    It stands on the module as its attribute `forward`, before that of the class. It keeps names
    and reads the class's forward again where it was copied or unpickled to.

    Parameters
    ----------
    owner : torch.nn.Module
        The module.
    pairs : dict of str to bool
        The fused children, and whether there is an addition before ReLU.
    """

    def __init__(self, owner: Any, pairs: dict[str, bool]) -> None:
        self.owner, self.pairs = owner, pairs
        self._code = _codes(owner, pairs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the fused code of the module's mode."""
        if not self._code:
            self._code = _codes(self.owner, self.pairs)
        return self._code[self.owner.training](self.owner, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {"owner": self.owner, "pairs": self.pairs, "_code": {}}


def fusible(model: Any) -> dict[Any, dict[str, bool]]:
    """Return, by module, the children that can be fused, and whether there is an addition.

    Parameters
    ----------
    model : torch.nn.Module
        With the classes of bncpu.torch, not yet fused.
    """
    owners = [module for module in model.modules() if any(True for _ in module.children())]
    graphs = {owner: [_graph(owner, trains) for trains in (True, False)] for owner in owners}
    registered = Counter(id(child) for owner in owners for child in owner._modules.values())
    reached = {
        id(module)
        for owner, both in graphs.items()
        for graph in both
        if graph is not None
        for target, module in _calls(owner, graph)
        if "." in target
    }
    found: dict[Any, dict[str, bool]] = {}
    for owner, both in graphs.items():
        plain = {
            name
            for name, child in owner.named_children()
            if type(child) in _PLAIN and registered[id(child)] == 1 and id(child) not in reached
        }
        if not plain or None in both or "forward" in vars(owner):
            continue
        trains, infers = (
            {pair.norm.target: pair.add is not None for pair in _pairs(owner, graph, plain)}
            for graph in both
        )
        if trains and trains == infers:
            found[owner] = trains
    return found


class _Proxy(torch.fx.Proxy):
    """As torch.fx's, to which `a += b` is `a = a + b`; here it is seen, and the others refused."""

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", _add_in_place, (self, other), {})

    def _refused(self, _: Any) -> Any:
        raise TypeError("written in place")

    __isub__ = __imul__ = __imatmul__ = __itruediv__ = __ifloordiv__ = __imod__ = _refused
    __ipow__ = __ilshift__ = __irshift__ = __iand__ = __ixor__ = __ior__ = _refused


class _OneLevel(torch.fx.Tracer):
    def proxy(self, node: Any) -> Any:
        return _Proxy(node, self)

    def is_leaf_module(self, m: Any, module_qualified_name: str) -> bool:  # noqa: ARG002
        return True


def _graph(owner: Any, trains: bool) -> Any:
    """Return the graph of a module's forward in one mode, None if torch.fx does not see it all.

    A forward that draws random numbers may decide by them, and one that keeps something on its
    module does more than a graph tells.
    """
    before, states = dict(vars(owner)), _random_states()
    owner.training = trains
    try:
        graph = _OneLevel().trace(owner)
    except Exception:  # whatever a forward does with what is not a tensor
        graph = None
    after = vars(owner) | {"training": before["training"]}
    seen = after.keys() == before.keys() and all(after[key] is before[key] for key in before)
    if not _same_states(states, _random_states()):
        seen = False
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002 - what other people draw from
    vars(owner).clear()
    vars(owner).update(before)
    return graph if seen else None


def _random_states() -> tuple[Any, ...]:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002


def _same_states(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    return (
        torch.equal(before[0], after[0])
        and before[1] == after[1]
        and all(np.array_equal(a, b) for a, b in zip(before[2], after[2], strict=True))
    )


def _calls(owner: Any, graph: Any) -> list[tuple[str, Any]]:
    return [
        (node.target, owner.get_submodule(node.target))
        for node in graph.nodes
        if node.op == "call_module"
    ]


def _pairs(owner: Any, graph: Any, names: Container[str]) -> list[_Pair]:
    """Return what can be one call in a graph, of the BatchNorm of these names."""
    times = Counter(id(module) for _, module in _calls(owner, graph))
    position = {node: i for i, node in enumerate(graph.nodes)}

    def is_norm(node: Any) -> bool:
        if not (isinstance(node, torch.fx.Node) and node.op == "call_module"):
            return False
        module = owner.get_submodule(node.target)
        return (
            node.target in names
            and times[id(module)] == 1
            and not _has_hooks(module)
            and len(node.users) == 1
        )

    def is_relu(node: Any) -> bool:
        if node.op == "call_module":
            module = owner.get_submodule(node.target)
            return type(module) is torch.nn.ReLU and not _has_hooks(module)
        return node.target in _RELU.get(node.op, ())

    found = []
    for relu in graph.nodes:
        if not is_relu(relu) or len(relu.args) != 1:
            continue
        (before,) = relu.args
        if not isinstance(before, torch.fx.Node):
            continue
        if is_norm(before) and len(before.args) == 1:
            found.append(_Pair(before, relu))
        elif before.target in _ADD.get(before.op, ()) and len(before.users) == 1:
            norm, residual = _operands(before, is_norm)
            if norm is not None and not _used_between(norm.args[0], norm, before, position):
                found.append(_Pair(norm, relu, before, residual))
    return found


def _operands(add: Any, is_norm: Callable[[Any], bool]) -> tuple[Any, Any]:
    # The sum of a BatchNorm and another tensor. In place it is formed in the memory of the first.
    if len(add.args) != 2 or add.kwargs:
        return None, None
    first, second = add.args
    if is_norm(first) and isinstance(second, torch.fx.Node):
        return first, second
    if is_norm(second) and isinstance(first, torch.fx.Node) and add.target not in _ADD_IN_PLACE:
        return second, first
    return None, None


def _used_between(x: Any, norm: Any, add: Any, position: dict[Any, int]) -> bool:
    # The fused call comes where the addition was; nobody may have written to x before.
    return any(position[norm] < position[user] < position[add] for user in x.users)


def _has_hooks(module: Any) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks)


def _codes(owner: Any, pairs: dict[str, bool]) -> dict[bool, Callable[..., Any]]:
    """Return a module's forward in training and in evaluation, with one call for each pair."""
    codes = {}
    for trains in (True, False):
        graph = _graph(owner, trains)
        for pair in _pairs(owner, graph, pairs):
            _replace(graph, *pair)
        code = graph.python_code("self")
        names = dict(code.globals)
        exec(code.src, names)
        codes[trains] = names["forward"]
    return codes


def _replace(graph: Any, norm: Any, relu: Any, add: Any, residual: Any) -> None:
    if add is None:
        relu.replace_all_uses_with(norm)
        graph.erase_node(relu)
        return
    with graph.inserting_before(add):
        fused = graph.call_module(norm.target, (norm.args[0], residual))
    relu.replace_all_uses_with(fused)
    for node in (relu, add, norm):
        graph.erase_node(node)
