"""Functions as graphs: traced, cut in two where a function returns a function, compiled, known by what they are for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functionalize
from torch.fx import Graph, GraphModule, Node

from pgsuite.execution.torch_private import compile_graph, make_fx, tree_flatten, tree_unflatten
from pgsuite.types import Experience

UNWATCHED = {"EMPTY_NN_MODULE_HOOKS_DICT", "NOT_PRESENT_IN_GENERIC_DICT", "DICT_NOT_CONTAINS"}


class Staged:
    """function(*early)(*late), of nests of tensors, as two compiled graphs for each shape they meet: the first is run
    once for all calls with the same early ones, and of several functions of late ones each has its own.

    Tracing sees the operations of autograd too, so what is differentiated again and again is so in the first graph.
    """

    def __init__(self, function: Callable[..., Callable[..., Any]], alone: Callable[[], None] = lambda: None) -> None:
        """``alone`` is called before anything is traced, and returns when no other thread runs."""
        self.function, self.alone = function, alone
        self.graphs: dict[Any, tuple[Callable[..., Any], Callable[..., Any], Any]] = {}

    def __call__(self, *early: Any) -> Callable[..., Any]:
        about, given = described(early)
        kept: dict[Any, Any] = {}

        def later(*late: Any) -> Any:
            shapes, inputs = described(late)
            key = about, shapes
            if key not in self.graphs:
                self.graphs[key] = self.trace(early, late)
            first, second, nest = self.graphs[key]
            with torch.no_grad():
                if shapes not in kept:
                    kept[shapes] = first(*given)
                return tree_unflatten(second(*kept[shapes], *inputs), nest)

        return later

    def trace(self, early: Any, late: Any) -> tuple[Callable[..., Any], Callable[..., Any], Any]:
        self.alone()
        given, rest = (described(x)[1] for x in (early, late))
        with torch.enable_grad():
            graph, nest = traced(lambda early, late: self.function(*early)(*late), (early, late))
        with torch.no_grad():
            graph = make_fx(functionalize(graph))(*given, *rest)  # or the second could write to what the first has left
            first, second = cut(graph, len(rest))
            return compile_graph(first, given), compile_graph(second, [*first(*given), *rest]), nest


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as one graph.  Of what it was compiled for, its arguments and what is reached through them are looked
    at again in each call, but for hooks and for names that were not there: neither comes later, and to look for them
    and for whatever the modules of Python hold took as long as a small graph itself."""
    return torch.compile(function, dynamic=False, fullgraph=True, options={"guard_filter_fn": watched})


def watched(guards: Sequence[Any]) -> list[bool]:
    return [not guard.is_global and guard.guard_type not in UNWATCHED for guard in guards]


def described(args: Any) -> tuple[Any, list[Tensor]]:
    """All that a graph of a function of these depends on, and their tensors, on whose values it does not."""
    about: list[Any] = []
    tensors: list[Tensor] = []
    describe(args, about, tensors)
    return tuple(about), tensors


def describe(x: Any, about: list[Any], tensors: list[Tensor]) -> None:
    """In pytree's order, which takes five times as long, in every call."""
    if isinstance(x, Tensor):
        tensors.append(x)
        about += (x.shape, x.dtype, x.stride())
        return
    parts = vars(x) if isinstance(x, Experience) else x
    if isinstance(parts, dict):
        about += (type(x), *parts)
        parts = parts.values()
    elif isinstance(x, tuple | list):
        about += (type(x), len(x))
    else:
        about.append(x)
        return
    for part in parts:
        describe(part, about, tensors)


def traced(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[GraphModule, Any]:
    """The operations of a function of nests, from the tensors in them to those in what it returns, and the nest of the
    latter."""
    leaves, nest = tree_flatten(args)
    found = []

    def flat(*given: Tensor) -> list[Tensor]:
        rest = iter(given)
        inward = tree_unflatten([next(rest) if isinstance(x, Tensor) else x for x in leaves], nest)
        outputs, outward = tree_flatten(function(*inward))
        found.append(outward)
        return outputs

    return make_fx(flat)(*described(args)[1]), found[-1]


def cut(module: GraphModule, late: int) -> tuple[GraphModule, GraphModule]:
    """A graph without mutations in two: what needs none of its last inputs, ``late`` many; and the rest, of what the
    first returns and those inputs."""
    module.graph.eliminate_dead_code()
    nodes = list(module.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    needy = set(inputs[len(inputs) - late :])
    for node in nodes:
        if node.op == "output" or any(x in needy for x in node.all_input_nodes):
            needy.add(node)
    border = [x for x in nodes if x not in needy and x.op != "get_attr" and any(user in needy for user in x.users)]

    first, second = Graph(), Graph()
    copies: dict[Node, Node] = {}
    for node in nodes:
        if node not in needy:
            copies[node] = first.node_copy(node, copies.__getitem__)
    first.output([copies[x] for x in border])
    copies = {x: second.placeholder(x.name) for x in border}
    for node in nodes:
        if node in needy or node.op == "get_attr":
            copies[node] = second.node_copy(node, copies.__getitem__)
    parts = GraphModule(module, first), GraphModule(module, second)
    for part in parts:
        part.graph.eliminate_dead_code()
        part.recompile()
    return parts
