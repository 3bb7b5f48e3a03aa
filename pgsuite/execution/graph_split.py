"""Functions as graphs: traced, split in two if they return a function, compiled, and cached by input signature."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functionalize
from torch.fx import Graph, GraphModule, Node

from pgsuite.errors import place
from pgsuite.execution.torch_private import (
    TorchDynamoException,
    compile_graph,
    make_fx,
    tree_flatten,
    tree_unflatten,
)
from pgsuite.types import Experience

UNWATCHED = {"EMPTY_NN_MODULE_HOOKS_DICT", "NOT_PRESENT_IN_GENERIC_DICT", "DICT_NOT_CONTAINS"}


class Graphs:
    """The compiled graphs of a function by input signature.  Once torch could not make one there are none, and the
    function runs as it is written, with a warning that names it as ``what``."""

    def __init__(self, what: str) -> None:
        self.what, self.made, self.possible = what, dict[Any, Any](), True

    def find(self, key: Any, make: Callable[[], Any]) -> Any:
        """The graph of a signature, which ``make()`` makes if it is new; None if the function runs as written."""
        if key not in self.made and self.possible:
            try:
                self.made[key] = make()
            except Exception as error:  # of whatever kind the user's parts, a tracer or a compiler raises
                warn_of(error, f"{self.what}, which runs as written")
                self.possible = False
        return self.made[key] if self.possible else None


class TwoStageGraph:
    """``function(*early)(*late)``, of nests of tensors, as two compiled graphs per pair of signatures.

    The first graph computes everything that depends on the early arguments only, and runs once for all calls with the
    same early arguments; the second runs in each call.  Tracing records the operations of autograd too, so
    differentiation that needs no late argument happens in the first graph.
    """

    def __init__(
        self, function: Callable[..., Callable[..., Any]], what: str, exclusive: Callable[[], None] = lambda: None
    ) -> None:
        """``what`` is for ``Graphs``; ``exclusive`` is called before a trace, and returns once no other thread runs."""
        self.function, self.graphs, self.exclusive = function, Graphs(what), exclusive

    def __call__(self, *early: Any) -> Callable[..., Any]:
        about, given = signature(early)
        kept: dict[Any, Any] = {}

        def later(*late: Any) -> Any:
            shapes, inputs = signature(late)
            made = self.graphs.find((about, shapes), lambda: self.trace(early, late))
            if made is None:
                with torch.enable_grad():
                    if None not in kept:
                        kept[None] = self.function(*early)
                    return kept[None](*late)
            first, second, nest = made
            with torch.no_grad():
                if shapes not in kept:
                    kept[shapes] = first(*given)
                return tree_unflatten(second(*kept[shapes], *inputs), nest)

        return later

    def trace(self, early: Any, late: Any) -> tuple[Callable[..., Any], Callable[..., Any], Any]:
        self.exclusive()
        given, rest = (signature(x)[1] for x in (early, late))
        with torch.enable_grad():
            graph, nest = traced(lambda early, late: self.function(*early)(*late), (early, late))
        with torch.no_grad():
            # Without mutations, or the second graph could overwrite results of the first.
            graph = make_fx(functionalize(graph))(*given, *rest)
            first, second = split_graph(graph, len(rest))
            return compile_graph(first, given), compile_graph(second, [*first(*given), *rest]), nest


def compiled(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    """A function compiled to one graph; if torch cannot, as it is written, with a warning that names it as ``what``.

    Guards on its arguments, and on what is reached through them, are kept; guards on global variables, on hooks and on
    absent names are dropped: evaluating them took as long as a small graph, and none of these changes during a run.
    """
    graph = torch.compile(function, dynamic=False, fullgraph=True, options={"guard_filter_fn": watched})

    def call(*args: Any) -> Any:
        nonlocal graph
        try:
            return graph(*args)
        except TorchDynamoException as error:  # before anything was computed
            warn_of(error, f"{what}, which runs as written")
            graph = function
            return function(*args)

    return call


def warn_of(error: Exception, what: str) -> None:
    """Warn that torch cannot compile something, with the user's own line that is in the way, if there is one."""
    first, _, rest = str(error).strip().partition("\n")
    words = rest.partition("Explanation: ")[2].partition("\n")[0] or first
    reads = "_local_scalar_dense" in words or "data-dependent" in words
    why = "a tensor is read back to the host" if reads else f"{type(error).__name__}: {words}"
    warnings.warn(f"{place(error)}torch cannot compile {what}: {why}", stacklevel=4)


def watched(guards: Sequence[Any]) -> list[bool]:
    return [not guard.is_global and guard.guard_type not in UNWATCHED for guard in guards]


def signature(args: Any) -> tuple[Any, list[Tensor]]:
    """The key of a graph for these arguments: structure, constants, and the shape, dtype and stride of each tensor.
    Also the tensors themselves, in the order of the graph's inputs."""
    about: list[Any] = []
    tensors: list[Tensor] = []
    add_to_signature(args, about, tensors)
    return tuple(about), tensors


def add_to_signature(x: Any, about: list[Any], tensors: list[Tensor]) -> None:
    """Append the key and tensors of x, in the order of torch's pytree, which is five times slower per call."""
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
        add_to_signature(part, about, tensors)


def traced(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[GraphModule, Any]:
    """The graph of a function of nests, from the tensors in its arguments to those in its result; and the structure of
    the result, for ``tree_unflatten``."""
    leaves, nest = tree_flatten(args)
    found = []

    def flat(*given: Tensor) -> list[Tensor]:
        rest = iter(given)
        inward = tree_unflatten([next(rest) if isinstance(x, Tensor) else x for x in leaves], nest)
        outputs, outward = tree_flatten(function(*inward))
        found.append(outward)
        return outputs

    graph = make_fx(flat)(*signature(args)[1])
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.view.default:  # the compiler may lay its input out in another way
            node.target = torch.ops.aten.reshape.default
    graph.recompile()
    return graph, found[-1]


def split_graph(module: GraphModule, late: int) -> tuple[GraphModule, GraphModule]:
    """Split a graph without mutations in two.  The first part computes everything that needs none of the last ``late``
    inputs; the second takes the results of the first, followed by those inputs."""
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
