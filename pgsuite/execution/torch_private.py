"""Every part of torch that is not public and that compiling needs.  Nothing else in the suite imports them, and this
file is imported for ``execution=compile`` alone: they take a second, and a later torch may lack them."""

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
    # Without an environment of shapes, what an earlier process has compiled is not looked for.
    with tracing(TracingContext(FakeTensorMode(shape_env=ShapeEnv(assume_static_by_default=True)))):
        made: Any = inductor.compile(graph, [*inputs])
    return made
