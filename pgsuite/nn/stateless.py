"""A module's parameters as an argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class FunctionalCall(nn.Module):
    """``torch.func`` swaps parameters for the length of a forward; this makes one of any function."""

    def __init__(self, module: nn.Module, fn: Callable[[], object]) -> None:
        super().__init__()
        self.module, self.fn = module, fn

    def forward(self) -> object:
        return self.fn()


def functional_in_parameters(module: nn.Module, fn: Callable[[], T]) -> Callable[[Tensor], T]:
    """fn, which calls module, as a function of the module's parameters in one vector [P] in their order.

    The vector may require gradients, be a dual number or be one of many under ``vmap``.  The module's own parameters
    stay where and as they are.
    """
    call = FunctionalCall(module, fn)
    params = dict(call.named_parameters())
    sizes = [p.numel() for p in params.values()]

    def at(vector: Tensor) -> T:
        chunks = zip(params.items(), vector.split(sizes), strict=True)
        return torch.func.functional_call(call, {name: x.view(p.shape) for (name, p), x in chunks}, ())

    return at
