"""Gradient steps: averaged over processes first, clipped second, applied in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pgsuite.functional import trust_region
from pgsuite.types import Metrics

Kind = Literal["adam", "rmsprop"]
Objective = Callable[..., tuple[Tensor, Metrics]]  # a loss to descend, and what to watch


class Optimizer:
    """One optimizer over the parameters of several modules.

    It moves them into one vector, ``flat`` [P], of which they become views: the collective, the norm, the clipping and
    the step are then one operation each, however many layers there are.  The learning rate is a tensor, so that a
    schedule may write to it and nothing is read back to the host; steps are taken at ``share`` of it, which is one
    until a run had to be slowed down.  eps 1e-5 follows baselines.  ``max_grad_norm``
    bounds the global norm of the averaged gradient; None leaves it alone.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        lr: float | Tensor,
        kind: Kind = "adam",
        max_grad_norm: float | Tensor | None = None,
    ) -> None:
        self.params = list(dict.fromkeys(p for module in modules for p in module.parameters()))
        self.max_grad_norm = max_grad_norm
        self.flat = nn.Parameter(trust_region.flatten(self.params).detach())
        for p, chunk in zip(self.params, self.flat.detach().split([p.numel() for p in self.params]), strict=True):
            p.data = chunk.view_as(p)
        self.lr = lr if isinstance(lr, Tensor) else torch.tensor(float(lr), device=self.flat.device)
        self.share = torch.ones_like(self.lr)
        self.rate = self.lr * self.share
        self.frozen: Tensor | None = None  # [] in float32: where it is one, steps of Adam change nothing
        self.inner: torch.optim.Optimizer
        capturable = self.flat.is_cuda  # into CUDA graphs; torch refuses it elsewhere
        if kind == "adam":
            self.inner = torch.optim.Adam([self.flat], lr=self.rate, eps=1e-5, fused=True, capturable=capturable)
        else:
            # RMSprop would read a tensor back to the host: it steps at rate one, and ``step`` goes lr of the way.
            self.inner = torch.optim.RMSprop([self.flat], lr=1.0, alpha=0.99, eps=1e-5, capturable=capturable)

    def descend(self, objective: Objective, *seen: Any) -> Metrics:
        """One step down the gradient of the loss that objective(*seen) begins with; the metrics that follow it, and
        the gradient's global norm before clipping.

        Raises RuntimeError if another optimizer has since taken parameters of this one.
        """
        gradient, metrics = self.gradient(objective, *seen)
        return metrics | {"grad_norm": self.step(gradient)}

    def gradient(self, objective: Objective, *seen: Any) -> tuple[Tensor, Metrics]:
        """Of the loss [P], averaged over processes, and the metrics.  Execution may put a compiled one in its place."""
        loss, metrics = objective(*seen)
        return trust_region.flat_grad(loss, self.params), metrics

    def step(self, gradient: Tensor) -> Tensor:
        """Move against a gradient [P], which is clipped in place; returns its norm before that."""
        storage = self.flat.untyped_storage().data_ptr()
        if any(p.untyped_storage().data_ptr() != storage for p in self.params):
            raise RuntimeError("a parameter has left its optimizer: it was given to another one, or moved to a device")
        self.flat.grad = gradient
        norm = gradient.norm()
        if self.max_grad_norm is not None:
            gradient.mul_((self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        torch.mul(self.lr, self.share, out=self.rate)
        if isinstance(self.inner, torch.optim.Adam):
            self.inner.found_inf = self.frozen  # pyright: ignore[reportAttributeAccessIssue]
            self.inner.step()
        else:
            start = self.flat.detach().clone()
            self.inner.step()
            torch.lerp(start, self.flat.detach(), self.rate, out=self.flat.detach())
        return norm

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict() | {"share": self.share.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict({key: x for key, x in state.items() if key != "share"})
        self.share.copy_(state["share"])
        self.inner.param_groups[0]["capturable"] = self.flat.is_cuda
        if isinstance(self.inner, torch.optim.Adam):
            self.inner.param_groups[0]["lr"] = self.rate  # which loading has put a copy in the place of
