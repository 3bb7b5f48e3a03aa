"""Functional calls of modules, with the parameters as an argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class FunctionalCall(nn.Module):
    """Wraps a function as the forward of a module, so that ``torch.func.functional_call`` can swap parameters in it."""

    def __init__(self, module: nn.Module, fn: Callable[[], object]) -> None:
        super().__init__()
        self.module, self.fn = module, fn

    def forward(self) -> object:
        return self.fn()


def functional_in_parameters(module: nn.Module, fn: Callable[[], T]) -> Callable[[Tensor], T]:
    """fn, which calls module, as a function of the module's parameters as one vector [P].

    The vector may require gradients, be a dual tensor or be batched by ``vmap``.  The module's own parameters are
    neither read nor changed.
    """
    call = FunctionalCall(module, fn)
    params = dict(call.named_parameters())
    sizes = [p.numel() for p in params.values()]

    def at(vector: Tensor) -> T:
        chunks = zip(params.items(), vector.split(sizes), strict=True)
        return torch.func.functional_call(call, {name: x.view(p.shape) for (name, p), x in chunks}, ())

    return at
