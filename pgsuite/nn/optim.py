"""Gradient steps: averaged over processes first, clipped second, applied in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pgsuite import parallel

Kind = Literal["adam", "rmsprop"]


class Optimizer:
    """One optimizer over the parameters of several modules.

    Adam is fused with its learning rate in a tensor, so that nothing is read back to the host; eps 1e-5 follows
    baselines.  ``max_grad_norm`` bounds the global norm of the averaged gradient; None leaves it alone.
    """

    def __init__(
        self, modules: Sequence[nn.Module], lr: float, kind: Kind = "adam", max_grad_norm: float | None = None
    ) -> None:
        self.params = list(dict.fromkeys(p for module in modules for p in module.parameters()))
        self.base_lr, self.max_grad_norm = lr, max_grad_norm
        self.inner: torch.optim.Optimizer
        if kind == "adam":
            rate = torch.tensor(lr, device=self.params[0].device)
            self.inner = torch.optim.Adam(self.params, lr=rate, eps=1e-5, fused=True)
        else:
            # RMSprop reads a tensor learning rate back to the host, so it gets a number.
            self.inner = torch.optim.RMSprop(self.params, lr=lr, alpha=0.99, eps=1e-5)
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
        """Descend loss; returns the gradient's global norm before clipping."""
        self.inner.zero_grad()
        loss.backward()
        parallel.average_gradients(self.params)
        grads = [p.grad for p in self.params if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        if self.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self.params, self.max_grad_norm, norm)
        self.inner.step()
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict(), "factor": self.factor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])
        self.scale_lr(state["factor"])
