"""Gradient steps: averaged over processes first, clipped second, applied in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pgsuite.functional import trust_region

Kind = Literal["adam", "rmsprop"]


class Optimizer:
    """One optimizer over the parameters of several modules.

    It moves them into one vector, ``flat`` [P], of which they become views: the collective, the norm, the clipping and
    the step are then one operation each, however many layers there are.  Adam is fused with its learning rate in a
    tensor, so that nothing is read back to the host; eps 1e-5 follows baselines.  ``max_grad_norm`` bounds the global
    norm of the averaged gradient; None leaves it alone.
    """

    def __init__(
        self, modules: Sequence[nn.Module], lr: float, kind: Kind = "adam", max_grad_norm: float | None = None
    ) -> None:
        self.params = list(dict.fromkeys(p for module in modules for p in module.parameters()))
        self.base_lr, self.max_grad_norm = lr, max_grad_norm
        self.flat = nn.Parameter(trust_region.flatten(self.params).detach())
        for p, chunk in zip(self.params, self.flat.detach().split([p.numel() for p in self.params]), strict=True):
            p.data = chunk.view_as(p)
        self.inner: torch.optim.Optimizer
        if kind == "adam":
            rate = torch.tensor(lr, device=self.flat.device)
            self.inner = torch.optim.Adam([self.flat], lr=rate, eps=1e-5, fused=True)
        else:
            # RMSprop reads a tensor learning rate back to the host, so it gets a number.
            self.inner = torch.optim.RMSprop([self.flat], lr=lr, alpha=0.99, eps=1e-5)
        self.factor = 1.0

    @property
    def lr(self) -> float:
        """The rate that the next step uses."""
        return self.base_lr * self.factor

    def scale_lr(self, factor: float) -> None:
        """Use factor times the initial learning rate from here on."""
        self.factor = factor
        for group in self.inner.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self.lr)
            else:
                group["lr"] = self.lr

    def step(self, loss: Tensor) -> Tensor:
        """Descend loss; returns the gradient's global norm before clipping.

        Raises RuntimeError if another optimizer has since taken parameters of this one.
        """
        storage = self.flat.untyped_storage().data_ptr()
        if any(p.untyped_storage().data_ptr() != storage for p in self.params):
            raise RuntimeError("a parameter has left its optimizer: it was given to another one, or moved to a device")
        self.flat.grad = gradient = trust_region.flat_grad(loss, self.params)
        norm = gradient.norm()
        if self.max_grad_norm is not None:
            gradient.mul_((self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        self.inner.step()
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict(), "factor": self.factor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])
        self.scale_lr(state["factor"])
