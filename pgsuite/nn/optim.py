"""Optimizers: gradients are averaged over processes, then clipped, then applied in place."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pgsuite import distributed
from pgsuite.components import Component, component_class, make_component
from pgsuite.functional import autodiff, trust_region
from pgsuite.kernel import Kernel
from pgsuite.settings import Fraction, Positive
from pgsuite.types import Metrics

PIECE = 2**17  # parameters that are stepped at once on a CPU, so that temporary tensors stay in its cache
DEVICE_PIECE = 2**24  # the same on a GPU, where pieces cost launches and save memory
Objective = Callable[..., tuple[Tensor, Metrics]]  # a loss to minimize, and metrics


@dataclass(frozen=True)
class Accumulated:
    """An objective over pieces (weight, seen): the weighted sum of the losses, and of the metrics, of a ``function`` of
    each.  Only one piece at a time is held for differentiation."""

    function: Objective

    def __call__(self, *pieces: Any) -> tuple[Tensor, Metrics]:
        raise NotImplementedError("Optimizer.gradient calls its function for each piece")


class Optimizer(ABC):
    """An optimizer over the parameters of several modules.

    The parameters become views of one vector, ``flat`` [P], so that all-reduce, norm, clipping and step are one
    operation each, whatever the number of layers.  The learning rate is a tensor, which a schedule may write to, so
    nothing is read back to the host.  Steps use ``lr * lr_scale``; ``lr_scale`` is one until a recovery lowers it.
    ``max_grad_norm`` bounds the global norm of the averaged gradient; None disables clipping.

    A subclass defines ``apply_gradient``.  A custom optimizer is chosen by ``algo.optim`` and constructed as
    ``cls(modules, lr, max_grad_norm, **settings)``.
    """

    state_names: tuple[str, ...] = ()  # names of its state tensors, in the order of ``apply_gradient``
    elementwise = False  # whether ``apply_gradient`` treats each parameter by itself
    host_sync_reason: str | None = None  # what a step reads back to the host; None if nothing

    def __init__(
        self, modules: Sequence[nn.Module], lr: float | Tensor, max_grad_norm: float | Tensor | None = None
    ) -> None:
        self.params = list(dict.fromkeys(p for module in modules for p in module.parameters()))
        self.max_grad_norm = max_grad_norm
        self.flat = trust_region.flatten(self.params).detach()
        for p, chunk in zip(self.params, self.chunks(self.flat), strict=True):
            p.data = chunk
        self.lr = lr if isinstance(lr, Tensor) else torch.tensor(float(lr), device=self.flat.device)
        self.lr_scale = torch.ones_like(self.lr)
        self.skip_mask: Tensor | None = None  # [] bool: if true, steps change nothing
        self.gradient_step = Kernel("gradient step", self._gradient_step)

    def step(self, objective: Objective, *seen: Any) -> Metrics:
        """Take one gradient step on the loss objective(*seen)[0].  Returns the metrics of the objective, and as
        ``grad_norm`` the global gradient norm before clipping.

        Raises RuntimeError if parameters are no longer views of ``flat``.
        """
        self.check_views()
        eager = self.gradient_step.run == self.gradient_step.function and not autodiff.among_runs()
        if self.elementwise and len(self.flat) > self.piece and eager:
            return self.step_in_pieces(objective, *seen)
        metrics, moved = self.gradient_step(objective, *seen)
        own = (self.flat, *(getattr(self, name) for name in self.state_names))
        for x, new in zip(own, moved, strict=True):
            x.copy_(new if self.skip_mask is None else x.where(self.skip_mask, new))
        return metrics

    @property
    def piece(self) -> int:
        """How many parameters are stepped at once."""
        return PIECE if self.flat.device.type == "cpu" else DEVICE_PIECE

    def step_in_pieces(self, objective: Objective, *seen: Any) -> Metrics:
        """``step``, with temporary tensors of one piece of the parameters at a time."""
        gradient, metrics = self.gradient(objective, *seen)
        with torch.no_grad():
            norm = gradient.norm()
            names = [name for name in self.state_names if getattr(self, name).ndim]
            others: list[tuple[Tensor, Tensor]] = []
            for i in range(0, len(gradient), self.piece):
                part, where = copy.copy(self), slice(i, i + self.piece)
                for name in ("flat", *names):
                    setattr(part, name, getattr(self, name)[where])
                own = [getattr(part, name) for name in ("flat", *self.state_names)]
                moved = list(zip(own, part.apply_gradient(self.clip(gradient[where], norm)[0]), strict=True))
                others = [pair for pair in moved if not pair[0].ndim]  # the same for all pieces, and so written last
                for x, new in (pair for pair in moved if pair[0].ndim):
                    x.copy_(new if self.skip_mask is None else x.where(self.skip_mask, new))
            for x, new in others:
                x.copy_(new if self.skip_mask is None else x.where(self.skip_mask, new))
        return metrics | {"grad_norm": norm}

    def _gradient_step(self, objective: Objective, *seen: Any) -> tuple[Metrics, Sequence[Tensor]]:
        """Compute a step without applying it: the metrics, and the new values of ``flat`` and of the state tensors."""
        gradient, metrics = self.gradient(objective, *seen)
        gradient, norm = self.clip(gradient)
        with torch.no_grad():
            return metrics | {"grad_norm": norm}, self.apply_gradient(gradient)

    def gradient(self, objective: Objective, *seen: Any) -> tuple[Tensor, Metrics]:
        """The gradient [P] of a loss, averaged over processes, and metrics."""
        if not isinstance(objective, Accumulated):
            loss, metrics = objective(*seen)
            return trust_region.flat_grad(loss, self.params), metrics
        total, sums = torch.zeros_like(self.flat), dict[str, Tensor]()
        for weight, piece in seen:
            loss, metrics = objective.function(*piece)
            gradients = torch.autograd.grad(weight * loss, self.params, materialize_grads=True)
            for chunk, gradient in zip(self.chunks(total), gradients, strict=True):
                chunk += gradient
            del loss, gradients  # before the next piece
            sums = {name: sums.get(name, 0.0) + weight * x for name, x in metrics.items()}
        return distributed.mean(total), sums

    @abstractmethod
    def apply_gradient(self, gradient: Tensor) -> Sequence[Tensor]:
        """The new values of ``flat`` and of the tensors of ``state_names`` after a step with a gradient [P] that is
        averaged over processes and clipped.  Pure, so that the step can be compiled."""

    @torch.no_grad()
    def clip(self, gradient: Tensor, norm: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The gradient [P], clipped to the norm ``max_grad_norm``, and its norm [] before clipping; that of the whole
        gradient may be given with a piece of it."""
        norm = gradient.norm() if norm is None else norm
        if self.max_grad_norm is not None:
            gradient = gradient * (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        return gradient, norm

    def chunks(self, flat: Tensor) -> list[Tensor]:
        """Views of a vector [P] with the shapes of the parameters."""
        parts = flat.split([p.numel() for p in self.params])
        return [chunk.view_as(p) for p, chunk in zip(self.params, parts, strict=True)]

    def check_views(self) -> None:
        if autodiff.among_runs():  # whose parameters have no storage of their own
            return
        storage = self.flat.untyped_storage().data_ptr()
        if any(p.untyped_storage().data_ptr() != storage for p in self.params):
            raise RuntimeError("a parameter has left its optimizer: it was given to another one, or moved to a device")

    @property
    def state(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in (*self.state_names, "lr_scale")}

    def state_dict(self) -> dict[str, Any]:
        return {name: x.clone() for name, x in self.state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, x in self.state.items():
            x.copy_(state[name])


class Adam(Optimizer):
    """Kingma and Ba, 2015, algorithm 1.  ``eps`` is that of OpenAI's baselines."""

    state_names, elementwise = ("mean", "square", "steps"), True

    def __init__(
        self,
        modules: Sequence[nn.Module],
        lr: float | Tensor,
        max_grad_norm: float | Tensor | None = None,
        *,
        beta1: Fraction = 0.9,
        beta2: Fraction = 0.999,
        eps: Positive = 1e-5,
    ) -> None:
        super().__init__(modules, lr, max_grad_norm)
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.mean, self.square = torch.zeros_like(self.flat), torch.zeros_like(self.flat)  # decaying means [P]
        self.steps = torch.zeros_like(self.lr, dtype=torch.float64)  # in float32, 1 - 0.999 would lose half its digits

    def apply_gradient(self, gradient: Tensor) -> Sequence[Tensor]:
        steps = self.steps + 1
        square = torch.addcmul(self.square * self.beta2, gradient, gradient, value=1 - self.beta2)
        mean = self.mean.lerp(gradient, 1 - self.beta1)
        deviation = (square / (1 - self.beta2**steps)).sqrt_()
        direction = mean / (1 - self.beta1**steps) / deviation.add_(self.eps)
        return self.flat - self.lr * self.lr_scale * direction, mean, square, steps


class RMSprop(Optimizer):
    """Tieleman and Hinton, 2012.  ``eps`` is that of OpenAI's baselines."""

    state_names, elementwise = ("square",), True

    def __init__(
        self,
        modules: Sequence[nn.Module],
        lr: float | Tensor,
        max_grad_norm: float | Tensor | None = None,
        *,
        alpha: Fraction = 0.99,
        eps: Positive = 1e-5,
    ) -> None:
        super().__init__(modules, lr, max_grad_norm)
        self.alpha, self.eps = alpha, eps
        self.square = torch.zeros_like(self.flat)  # decaying mean [P]

    def apply_gradient(self, gradient: Tensor) -> Sequence[Tensor]:
        square = torch.addcmul(self.square * self.alpha, gradient, gradient, value=1 - self.alpha)
        direction = gradient / square.sqrt().add_(self.eps)
        return self.flat - self.lr * self.lr_scale * direction, square


class MakesTorchOptimizer(Protocol):
    def __call__(self, params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer: ...


class TorchOptimizer(Optimizer):
    """An adapter for optimizers of ``torch.optim``.  Loss and gradient are a kernel, the step is not: these optimizers
    keep their step count and learning rate on the host."""

    host_sync_reason = "a torch.optim optimizer takes its learning rate from the host; adam and rmsprop do not"

    def __init__(
        self,
        modules: Sequence[nn.Module],
        lr: float | Tensor,
        max_grad_norm: float | Tensor | None,
        make: MakesTorchOptimizer,
    ) -> None:
        super().__init__(modules, lr, max_grad_norm)
        self.inner = make(self.params, float(self.lr))

    def _gradient_step(self, objective: Objective, *seen: Any) -> tuple[Metrics, Sequence[Tensor]]:
        gradient, metrics = self.gradient(objective, *seen)
        gradient, norm = self.clip(gradient)
        return metrics | {"grad_norm": norm}, (gradient,)

    def apply_gradient(self, gradient: Tensor) -> Sequence[Tensor]:
        raise NotImplementedError("the optimizer of torch steps in place")

    def step(self, objective: Objective, *seen: Any) -> Metrics:
        self.check_views()
        metrics, (gradient,) = self.gradient_step(objective, *seen)
        if self.skip_mask is not None and bool(self.skip_mask):
            return metrics
        for p, chunk in zip(self.params, self.chunks(gradient), strict=True):
            p.grad = chunk
        for group in self.inner.param_groups:
            group["lr"] = float(self.lr * self.lr_scale)
        self.inner.step()
        self.inner.zero_grad()
        return metrics

    def state_dict(self) -> dict[str, Any]:
        found = super().state_dict()
        for i, p in enumerate(self.params):
            for name, x in self.inner.state[p].items():
                if x is not None:
                    found[f"{i}.{name}"] = x.clone() if isinstance(x, Tensor) else x
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.inner.state.clear()
        for key, x in state.items():
            i, dot, name = key.partition(".")
            if dot:
                self.inner.state[self.params[int(i)]][name] = x.clone() if isinstance(x, Tensor) else x


OPTIMIZERS: dict[str, type[Optimizer]] = {"adam": Adam, "rmsprop": RMSprop}


def make_optimizer(
    modules: Sequence[nn.Module],
    lr: float | Tensor,
    optim: Component = "adam",
    max_grad_norm: float | Tensor | None = None,
    where: str = "algo.optim",
) -> Optimizer:
    """Make the optimizer that a setting chooses: adam, rmsprop, a subclass of ``Optimizer`` or of
    ``torch.optim.Optimizer`` by its dotted path, or ``{_target_: torch.optim.AdamW, weight_decay: 0.01}``.

    Raises ValueError for an unknown optimizer, for settings that it does not have, and for one that needs a closure.
    """
    cls: type[Any] = component_class(optim, OPTIMIZERS, object, where)
    if not issubclass(cls, torch.optim.Optimizer):
        return make_component(optim, OPTIMIZERS, Optimizer, where, modules, lr, max_grad_norm)
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(f"{where}: {cls.__qualname__} computes the loss again by a closure, which no method gives it")

    def make(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        return make_component(optim, {}, torch.optim.Optimizer, where, params, lr=lr)

    return TorchOptimizer(modules, lr, max_grad_norm, make)
