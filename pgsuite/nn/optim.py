"""Gradient steps: averaged over processes first, clipped second, applied in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pgsuite.functional import trust_region
from pgsuite.kernel import Kernel
from pgsuite.types import Metrics

Kind = Literal["adam", "rmsprop"]
Objective = Callable[..., tuple[Tensor, Metrics]]  # a loss to descend, and what to watch
BETA1, BETA2, EPS = (
    0.9,
    {"adam": 0.999, "rmsprop": 0.99},
    1e-5,
)  # torch's defaults, but eps, which follows baselines


class Optimizer:
    """One optimizer over the parameters of several modules.

    It moves them into one vector, ``flat`` [P], of which they become views: the collective, the norm, the clipping and
    the step are then one operation each, however many layers there are.  The learning rate is a tensor, so that a
    schedule may write to it and nothing is read back to the host; steps are taken at ``share`` of it, which is one
    until a run had to be slowed down.  ``max_grad_norm`` bounds the global norm of the averaged gradient; None leaves
    it alone.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        lr: float | Tensor,
        kind: Kind = "adam",
        max_grad_norm: float | Tensor | None = None,
    ) -> None:
        self.params = list(dict.fromkeys(p for module in modules for p in module.parameters()))
        self.kind, self.max_grad_norm = kind, max_grad_norm
        self.flat = trust_region.flatten(self.params).detach()
        for p, chunk in zip(self.params, self.flat.split([p.numel() for p in self.params]), strict=True):
            p.data = chunk.view_as(p)
        self.lr = lr if isinstance(lr, Tensor) else torch.tensor(float(lr), device=self.flat.device)
        self.lr_scale = torch.ones_like(self.lr)
        self.skip_mask: Tensor | None = None  # [] bool: where it is true, steps change nothing
        self.mean, self.square = torch.zeros_like(self.flat), torch.zeros_like(self.flat)  # of gradients [P], decaying
        self.steps = torch.zeros_like(self.lr, dtype=torch.float64)  # or 1 - 0.999 would lose half its digits
        self.gradient_step = Kernel("gradient step", self._gradient_step)

    def step(self, objective: Objective, *seen: Any) -> Metrics:
        """One step down the gradient of the loss that objective(*seen) begins with; the metrics that follow it, and
        the gradient's global norm before clipping.

        Raises RuntimeError if another optimizer has since taken parameters of this one.
        """
        storage = self.flat.untyped_storage().data_ptr()
        if any(p.untyped_storage().data_ptr() != storage for p in self.params):
            raise RuntimeError("a parameter has left its optimizer: it was given to another one, or moved to a device")
        metrics, moved = self.gradient_step(objective, *seen)
        for x, new in zip((self.flat, self.mean, self.square, self.steps), moved, strict=True):
            x.copy_(new if self.skip_mask is None else x.where(self.skip_mask, new))
        return metrics

    def _gradient_step(self, objective: Objective, *seen: Any) -> tuple[Metrics, Sequence[Tensor]]:
        """Where a step would lead: the metrics, and what takes the place of flat, mean, square and steps."""
        loss, metrics = objective(*seen)
        norm, moved = self.apply_gradient(trust_region.flat_grad(loss, self.params))
        return metrics | {"grad_norm": norm}, moved

    @torch.no_grad()
    def apply_gradient(self, gradient: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Against a gradient [P], which is averaged over processes: its norm before clipping, and what takes the place
        of flat, mean, square and steps.  Torch's own optimizers could not be compiled or captured so: they count their
        steps on the host."""
        norm = gradient.norm()
        if self.max_grad_norm is not None:
            gradient = gradient * (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        memory, steps = BETA2[self.kind], self.steps + 1
        square = (self.square * memory).addcmul_(gradient, gradient, value=1 - memory)
        if self.kind == "adam":  # Kingma and Ba, 2015, algorithm 1
            mean = self.mean.lerp(gradient, 1 - BETA1)
            deviation = (square / (1 - memory**steps)).sqrt_()
            direction = mean / (1 - BETA1**steps) / deviation.add_(EPS)
        else:  # Tieleman and Hinton, 2012
            mean, direction = self.mean, gradient / square.sqrt().add_(EPS)
        return norm, (self.flat - self.lr * self.lr_scale * direction, mean, square, steps)

    @property
    def state(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("mean", "square", "steps", "lr_scale")}

    def state_dict(self) -> dict[str, Any]:
        return {name: x.clone() for name, x in self.state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, x in self.state.items():
            x.copy_(state[name])
