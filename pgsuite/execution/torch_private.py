"""The private parts of torch that compilation needs.  No other module imports them, and this module is imported for
``execution=compile`` only: the import takes a second, and another version of torch may lack them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch import _inductor as inductor
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["compile_graph", "make_fx", "tree_flatten", "tree_unflatten"]


def compile_graph(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """A graph of operations, compiled for inputs of these shapes."""
    # Without a ShapeEnv, the on-disk cache of compiled graphs is not consulted.
    with tracing(TracingContext(FakeTensorMode(shape_env=ShapeEnv(assume_static_by_default=True)))):
        made: Any = inductor.compile(graph, [*inputs])
    return made
