"""The private parts of torch that compilation needs.  No other module imports them, and this module is imported for
``execution=compile`` only: the import takes a second, and another version of torch may lack them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch import _inductor as inductor
from torch._dynamo.exc import TorchDynamoException
from torch._guards import TracingContext, tracing
from torch._higher_order_ops.scan import scan_op
from torch._inductor import config
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = [
    "TorchDynamoException",
    "compile_graph",
    "compile_loop",
    "make_fx",
    "scan_op",
    "tree_flatten",
    "tree_unflatten",
]


def compile_graph(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """A graph of operations, compiled for inputs of these shapes."""
    # Without a ShapeEnv, the on-disk cache of compiled graphs is not consulted.
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with tracing(TracingContext(mode)):
        made: Any = inductor.compile(graph, [mode.from_tensor(x, static_shapes=True) for x in inputs])
    return made


def compile_loop(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """A graph with a scan, compiled so that the scan does not return to Python."""
    vars(scan_op)["_cacheable"] = True  # on disk: its body is part of the key, as that of other operators is
    with config.patch(cpp_wrapper=True):
        return compile_graph(graph, inputs)
