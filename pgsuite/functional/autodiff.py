"""Derivatives that also work under ``torch.vmap`` over independent runs, where ``torch.autograd`` does not see through.

Outside of ``over_runs`` every function is torch's own.  Within it, tensors have a hidden leading axis of runs, and
``outside`` calls a function on the tensors with that axis.  The runs are independent, so the gradient of the sum of
their losses is the gradient of each loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_levels: list[None] = []


@contextmanager
def over_runs() -> Iterator[None]:
    """Within the context, tensors are those of several runs, by ``torch.vmap``."""
    _levels.append(None)
    try:
        yield
    finally:
        _levels.pop()


def among_runs() -> bool:
    """Whether tensors are those of several runs."""
    return bool(_levels)


class _Outside(torch.autograd.Function):
    @staticmethod
    def forward(function: Any, *tensors: Tensor) -> Any:
        raise RuntimeError("only under torch.vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        function, *tensors = args
        given = [
            x.expand(info.batch_size, *x.shape) if dim is None else x if dim == 0 else x.movedim(dim, 0)
            for x, dim in zip(tensors, in_dims[1:], strict=True)
        ]
        found = function(*given)
        return found, (0,) * len(found)


def outside(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """function(*tensors) on tensors with their leading axis of runs, which those that it returns have too.

    Only within ``over_runs``; at least one of the tensors must have such an axis.
    """
    return _Outside.apply(function, *tensors)  # pyright: ignore[reportReturnType]


def grad(
    y: Tensor, params: Sequence[Tensor], *, retain_graph: bool = False, create_graph: bool = False
) -> tuple[Tensor, ...]:
    """The gradients of y [] with respect to params; zero for those that it does not depend on."""

    def of_sum(y: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            y.sum(),
            params,
            retain_graph=retain_graph or create_graph,
            create_graph=create_graph,
            materialize_grads=True,
        )

    return outside(of_sum, y, *params) if _levels else of_sum(y, *params)


def leaf(x: Tensor) -> Tensor:
    """A copy of x with respect to which gradients are computed."""

    def copied(x: Tensor) -> tuple[Tensor]:
        return (x.detach().clone().requires_grad_(),)

    return outside(copied, x)[0] if _levels else copied(x)[0]
