"""Loops as one graph, which repeats its body without Python: the gradient steps of a fit, the steps of a rollout."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.func import functionalize
from torch.fx import Graph, GraphModule, Node

from pgsuite.algorithms.base import Algorithm
from pgsuite.execution.graph_split import signature, traced, warn_of
from pgsuite.execution.torch_private import compile_loop, make_fx, scan_op, tree_unflatten
from pgsuite.kernel import Kernel
from pgsuite.nn.optim import Objective, Optimizer
from pgsuite.rollout.minibatches import check_split, partition, select
from pgsuite.types import Batch, Metrics

aten: Any = torch.ops.aten
WHAT = "an epoch as a whole, and compiles its steps"  # where the loop cannot be made
SPREAD = 64  # how many times larger a result is than an operand that is stored before
NARROW = 8  # columns of a product
CONTIGUOUS: dict[str, Any] = {"memory_format": torch.contiguous_format}
Seen = tuple[tuple[Any, ...], Batch, Tensor | None]  # what is given beside a batch [T, N], the batch, a mask of steps


def has_memory(algorithm: Algorithm) -> bool:
    """Whether policy or critics have memory, so that a gradient step as a graph would be unrolled through time."""
    return any(network.body.carries for network in (algorithm.policy, *algorithm.critics))


def loops(algorithm: Algorithm, device: torch.device) -> bool:
    """Whether the fits of an algorithm can be loops: not with memory, nor if a step reads from the host, which also
    launches what a GPU does."""
    reads = any(x.host_sync_reason for x in algorithm.optimizers)
    return device.type == "cpu" and not has_memory(algorithm) and not reads


class CompiledFit:
    """``Algorithm.fit`` as one graph per input signature: a loop over minibatches whose body is a gradient step.

    The first fit of a signature runs as written, and its first step is traced as it runs.  Minibatches are drawn
    outside of the graph, from the same generator and in the same order as in ``Algorithm.fit``.  If torch cannot
    compile the loop, gradient steps are called one by one, with a warning.

    ``exclusive`` is called before a trace and returns once no other thread runs.  For several runs, ``over`` calls a
    function of the algorithm's objects on tensors with a leading axis of runs, and ``around`` makes a function of such
    tensors one that is called with those of a single run.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        exclusive: Callable[[], None] = lambda: None,
        over: Callable[..., Any] = lambda function, *args: function(*args),
        around: Callable[[Callable[..., Metrics]], Callable[..., Metrics]] = lambda function: function,
    ) -> None:
        self.algorithm, self.exclusive, self.over, self.columns = algorithm, exclusive, over, algorithm.sequential
        self.loops: dict[Any, Loop | None] = {}
        self.call = around(self._call)

    def __call__(
        self, optimizer: Optimizer, objective: Objective, given: tuple[Any, ...], batch: Batch, epochs: int, parts: int
    ) -> Metrics:
        """As ``Algorithm.fit``."""
        if self.algorithm.micro_batches > 1:  # of sizes that are read from tensors
            return self.algorithm.fit.function(optimizer, objective, given, batch, epochs, parts)
        return self.call(optimizer, objective, epochs, parts, (given, batch, optimizer.skip_mask))

    @torch.no_grad()
    def _call(self, optimizer: Optimizer, objective: Objective, epochs: int, parts: int, seen: Seen) -> Metrics:
        about, inputs = signature(seen)
        key = optimizer, objective, epochs, parts, about
        indices = self.indices(seen[1], epochs, parts)
        if loop := self.loops.get(key):
            return loop([indices], inputs)

        def step(index: Tensor, seen: Any) -> Metrics:
            given, batch, optimizer.skip_mask = seen
            return self.step(optimizer, objective, given, batch, index if parts > 1 else None)

        def over(index: Tensor, seen: Any = seen) -> Metrics:
            return self.over(step, index, seen)

        before, loop, new = optimizer.skip_mask, None, key not in self.loops
        try:
            # The first fit is neither compiled nor taken in pieces.
            with torch.enable_grad(), as_written(*([optimizer.gradient_step] if new else [])):
                if new:
                    loop = self.loop(over, indices, seen)
                taken = [loop.first] if loop else []
                found = mean([*taken, *(over(index) for index in indices[len(taken) :])])
        finally:
            optimizer.skip_mask = before
        if new:
            self.loops[key] = loop if loop and loop.compiles(WHAT) else None
        return found

    def loop(self, step: Callable[..., Metrics], indices: Tensor, seen: Seen) -> MeanLoop | None:
        """The loop of a gradient step, which is taken; None, with a warning, if it cannot be traced."""
        self.exclusive()
        try:
            return MeanLoop(step, [indices], seen)
        except Exception as error:  # of whatever kind the user's parts or a tracer raises
            warn_of(error, WHAT)
            return None

    def indices(self, batch: Batch, epochs: int, parts: int) -> Tensor:
        """The indices of each minibatch, in the order of the steps [epochs parts, ...]; without meaning for one part,
        which is the whole batch."""
        device, columns = batch.logp.device, self.columns

        def draw(logp: Tensor) -> Tensor:
            if parts == 1:
                return torch.zeros(epochs, 1, dtype=torch.long, device=device)
            horizon, num_envs = logp.shape
            check_split(horizon, num_envs, parts, columns=columns)
            size = num_envs if columns else horizon * num_envs
            drawn = [partition(size, parts, device, self.algorithm.generator) for _ in range(epochs)]
            return torch.stack([index for each in drawn for index in each], -2)

        found = self.over(draw, batch.logp)
        return found.movedim(-2, 0).contiguous()

    def step(
        self, optimizer: Optimizer, objective: Objective, given: Sequence[Any], batch: Batch, index: Tensor | None
    ) -> Metrics:
        a = self.algorithm
        batch = batch if self.columns else batch.map(lambda x: x.flatten(0, 1))
        part = batch if index is None else select(batch, index, columns=self.columns)
        return a.gradient_step(optimizer, objective, *given, a.prepared(part))


def mean(steps: Sequence[Metrics]) -> Metrics:
    """The mean of each metric over gradient steps."""
    return {name: torch.stack([step[name] for step in steps]).mean(0) for name in steps[0]}


@contextmanager
def as_written(*kernels: Kernel[..., Any]) -> Iterator[None]:
    """Within the context, kernels run their functions, as they are written."""
    before = [kernel.run for kernel in kernels]
    for kernel in kernels:
        kernel.run = lambda *args, kernel=kernel: kernel.function(*args)
    try:
        yield
    finally:
        for kernel, run in zip(kernels, before, strict=True):
            kernel.run = run


class Loop:
    """``step(*x, seen)`` for x from each row of ``rows`` [K, ...], as one graph that writes what the step writes.

    The constructor runs the first step, whose result is ``first``, a nest of tensors.  A call returns the results of
    all steps, each [K, ...].
    """

    def __init__(self, step: Callable[..., Any], rows: Sequence[Tensor], seen: Any) -> None:
        self.rows, found = [*rows], []

        def noted(*args: Any) -> Any:
            found.append(step(*args))
            return found[-1]

        graph, self.nest = traced(noted, (*(x[0] for x in rows), seen))
        self.inputs = signature(seen)[1]
        self.first: Any = found[-1]
        self.graph, self.held = with_inputs(graph)

    def compile(self) -> None:
        body, carried, results = pure(self.graph, [x[0] for x in self.rows], self.inputs, self.held)
        store_what_spreads(body)
        add_apart(body)
        transpose_narrow(body)
        self.held = [self.held[i] for i in carried] + [x for i, x in enumerate(self.held) if i not in carried]
        graph = repeated(body, len(carried), len(self.rows), len(self.held) - len(carried) + len(self.inputs), results)
        self.run = compile_loop(graph, [*self.rows, *self.held, *self.inputs])
        del self.graph, self.inputs, self.rows

    def compiles(self, what: str) -> bool:
        """Compile; without success, warn that torch cannot compile ``what``."""
        try:
            self.compile()
            return True
        except Exception as error:  # of whatever kind a compiler raises
            warn_of(error, what)
            return False

    def __call__(self, rows: Sequence[Tensor], inputs: Sequence[Tensor] = ()) -> Any:
        return tree_unflatten(self.run(*rows, *self.held, *inputs), self.nest)


class MeanLoop(Loop):
    """A loop whose steps return metrics, and which returns their means over the steps."""

    def __init__(self, step: Callable[..., Metrics], rows: Sequence[Tensor], seen: Any) -> None:
        names: list[str] = []

        def stacked(*args: Any) -> Tensor:
            found = step(*args)
            names[:] = found
            return torch.stack(list(found.values()))

        super().__init__(stacked, rows, seen)
        self.names = names
        self.first = self.named(self.first)

    def named(self, values: Tensor) -> Metrics:
        return dict(zip(self.names, values.detach().unbind(), strict=True))

    def __call__(self, rows: Sequence[Tensor], inputs: Sequence[Tensor] = ()) -> Metrics:
        return self.named(super().__call__(rows, inputs).mean(0))


def with_inputs(module: GraphModule) -> tuple[GraphModule, list[Tensor]]:
    """A graph whose tensors are inputs of it, after the others: one for each storage, of which the others with this
    memory are views.  Also these tensors.  So a write to one of them is seen by all that share its memory."""
    graph = module.graph
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    nodes = [x for x in graph.nodes if x.op == "get_attr" and isinstance(getattr(module, x.target), Tensor)]
    held = {node: getattr(module, node.target).detach() for node in nodes}
    owners: dict[Any, Tensor] = {}
    for x in held.values():
        storage = x.untyped_storage()
        size = storage.nbytes() // x.element_size()
        if x.is_contiguous() and x.numel() == size:
            owners[home_key(x)] = x
        else:
            owners.setdefault(home_key(x), x.as_strided((size,), (1,), 0))
    homes: dict[Any, Node] = {}
    for node, x in held.items():
        key = home_key(x)
        if key not in homes:
            with graph.inserting_after(last):
                homes[key] = last = graph.placeholder(f"held_{len(homes)}")
        owner, view = owners[key], homes[key]
        with graph.inserting_before(node):
            if x.shape != owner.shape or x.stride() != owner.stride():
                view = graph.call_function(aten.view.default, (view, [-1]))
                if x.is_contiguous():
                    first = x.storage_offset()
                    view = graph.call_function(aten.slice.Tensor, (view, 0, first, first + x.numel()))
                    view = graph.call_function(aten.view.default, (view, list(x.shape)))
                else:
                    about = (list(x.shape), list(x.stride()), x.storage_offset())
                    view = graph.call_function(aten.as_strided.default, (view, *about))
        node.replace_all_uses_with(view)
        graph.erase_node(node)
    module.recompile()
    return module, [owners[key] for key in homes]


def home_key(x: Tensor) -> Any:
    """What tensors have in common that share memory as numbers of one type."""
    return x.untyped_storage().data_ptr() or id(x), x.dtype


def pure(
    module: GraphModule, row: list[Tensor], inputs: list[Tensor], held: list[Tensor]
) -> tuple[GraphModule, list[int], int]:
    """A graph that writes to some of the tensors ``held``, as one without writes: (*row, *inputs, *held) -> results.

    Returns a graph of (*written, *row, *others, *inputs) -> (*new values of the written ones, *results), which of the
    held tensors are written, and the number of results.
    """
    given = [*row, *inputs]

    def copied(*flat: Tensor) -> list[Tensor]:
        own = [x.clone() for x in flat[len(given) :]]
        return [*own, *module(*flat[: len(given)], *own)]

    whole = make_fx(functionalize(copied))(*given, *held)
    whole.graph.eliminate_dead_code()
    nodes = list(whole.graph.nodes)
    places = [node for node in nodes if node.op == "placeholder"]
    homes = places[len(given) :]
    outputs = nodes[-1].args[0]
    ends, results = outputs[: len(held)], outputs[len(held) :]
    clones = {node: node.args[0] for node in nodes if node.target is aten.clone.default and node.args[0] in homes}
    written = [i for i, end in enumerate(ends) if end not in clones]
    order = [homes[i] for i in written] + places[: len(row)]
    order += [home for i, home in enumerate(homes) if i not in written] + places[len(row) : len(given)]

    graph, copies = Graph(), dict[Node, Node]()
    for node in order:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in nodes[len(places) : -1]:
        copies[node] = copies[clones[node]] if node in clones else graph.node_copy(node, copies.__getitem__)
    # Two ends may be copies of one tensor, as of a state that is also the observation.  Torch would take the copies out
    # and move the tensor to two places, so each end is computed.
    new = [graph.call_function(aten.maximum.default, (copies[ends[i]],) * 2) for i in written]
    graph.output([*new, *(copies[x] for x in results)])
    return GraphModule(whole, graph), written, len(results)


def store_what_spreads(body: GraphModule) -> None:
    """Have what is computed for few numbers and used for many computed once and stored.  The compiler would compute it
    for each of the many: Adam's corrections of its means, which are powers, for every parameter."""
    for node in body.graph.nodes:
        many = size(node) if node.op == "call_function" else 0
        for x in node.all_input_nodes:
            if x.op == "call_function" and 0 < SPREAD * size(x) <= many:
                with body.graph.inserting_before(node):
                    node.replace_input_with(x, stored(body.graph, x))
    body.recompile()


def stored(graph: Graph, x: Node) -> Node:
    """The same tensor, which the compiler computes apart from what uses it."""
    value = x.meta["val"]
    found = graph.call_function(aten.as_strided.default, (x, list(value.shape), list(value.stride())))
    found.meta = dict(x.meta)
    return found


def add_apart(body: GraphModule) -> None:
    """Have biases added after products of matrices, where the compiler fuses the sum with what follows.  As a part of
    the product it begins with a copy of the bias, which takes half the time of a small one."""
    graph = body.graph
    for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
        bias, a, b = node.args
        if node.kwargs:
            continue
        with graph.inserting_before(node):
            product = graph.call_function(aten.mm.default, (a, b))
            product.meta = dict(node.meta)
            total = graph.call_function(aten.add.Tensor, (stored(graph, product), bias))
            total.meta = dict(node.meta)
        node.replace_all_uses_with(total)
        graph.erase_node(node)
    body.recompile()


def transpose_narrow(body: GraphModule) -> None:
    """Have products of several runs' matrices with few columns computed as their transposes, with few rows.  For the
    gradient of weights from few observations, a CPU's library then takes a sixth of the time."""
    graph = body.graph
    for node in graph.find_nodes(op="call_function", target=aten.bmm.default):
        _, rows, columns = node.meta["val"].shape
        if columns <= NARROW < rows:
            with graph.inserting_before(node):
                a, b = (graph.call_function(aten.transpose.int, (x, 1, 2)) for x in node.all_input_nodes)
                product = graph.call_function(aten.transpose.int, (graph.call_function(aten.bmm.default, (b, a)), 1, 2))
                found = graph.call_function(aten.clone.default, (product,), CONTIGUOUS)  # what follows may view it
            node.replace_all_uses_with(found)
            graph.erase_node(node)
    body.recompile()


def size(node: Node) -> int:
    """The number of elements of a tensor in a graph; 0 for what is none."""
    value = node.meta.get("val")
    return value.numel() if isinstance(value, Tensor) else 0


def repeated(body: GraphModule, carried: int, rows: int, rest: int, results: int) -> GraphModule:
    """A graph of (*rows [K, ...], *state, *rest) that writes to the state what K calls of the body make of it, and
    returns the results of all calls."""
    graph = Graph()
    xs, state, others = (
        [graph.placeholder(f"{name}_{i}") for i in range(count)]
        for name, count in (("row", rows), ("state", carried), ("other", rest))
    )
    found = graph.call_function(scan_op, (graph.get_attr("body"), state, xs, tuple(others)))
    ends = [graph.call_function(operator.getitem, (found, i)) for i in range(carried + results)]
    for x, end in zip(state, ends[:carried], strict=True):
        graph.call_function(aten.copy_.default, (x, end))
    graph.output(tuple(ends[carried:]))
    return GraphModule({"body": body}, graph)
