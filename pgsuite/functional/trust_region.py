"""Natural gradients and trust regions: flat parameters, Fisher products, conjugate gradient, backtracking line search.

These functions involve neither policies nor rewards, and are tested against dense linear algebra.  P is the number of
parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pgsuite import distributed
from pgsuite.functional import autodiff

D = TypeVar("D")
Product = Callable[[Tensor], Tensor]  # v [P] -> A v [P]


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors to one vector [P], in their order."""
    return torch.cat([x.reshape(-1) for x in tensors])


@torch.no_grad()
def assign(params: Sequence[Tensor], vector: Tensor) -> None:
    """Write a vector [P] to the parameters in place."""
    for p, chunk in zip(params, vector.split([p.numel() for p in params]), strict=True):
        p.copy_(chunk.view_as(p))


def flat_grad(y: Tensor, params: Sequence[Tensor], *, retain_graph: bool = False) -> Tensor:
    """The gradient [P] of y, averaged over processes; zero for parameters that y does not depend on."""
    return distributed.mean(flatten(autodiff.grad(y, params, retain_graph=retain_graph)))


def fisher_product(kl: Tensor, params: Sequence[Tensor], damping: float) -> Product:
    """Fisher-vector product v [P] -> (F + damping I) v [P].  F is the Hessian of kl where kl is zero, which is the
    Fisher matrix (Schulman et al., 2015, appendix C).  Uses double backward."""
    grad = flatten(autodiff.grad(kl, params, create_graph=True))

    def product(v: Tensor) -> Tensor:
        return flat_grad(grad @ v, params, retain_graph=True) + damping * v

    return product


def map_tensors(fn: Callable[[Tensor], Tensor], x: Any) -> Any:
    """Apply fn to every tensor in x, a nest of dataclasses, tuples, lists, dictionaries and tensors."""
    if isinstance(x, Tensor):
        return fn(x)
    if isinstance(x, dict):
        twin = copy.copy(x)
        twin.update((key, map_tensors(fn, value)) for key, value in x.items())
        return twin
    if isinstance(x, tuple | list):
        parts = [map_tensors(fn, value) for value in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)  # named tuples
    if isinstance(x, type) or not is_dataclass(x):
        return x
    twin = copy.copy(x)  # copied rather than constructed: __post_init__ may compute
    for name, value in vars(x).items():
        object.__setattr__(twin, name, map_tensors(fn, value))  # works for frozen dataclasses too
    return twin


def tensors(x: Any) -> list[Tensor]:
    """Every tensor that ``map_tensors`` reaches, in its order."""
    found: list[Tensor] = []
    map_tensors(lambda y: found.append(y) or y, x)
    return found


def gauss_newton_product(
    fn: Callable[[Tensor], D], divergence: Callable[[D, D], Tensor], at: Tensor, damping: float
) -> Product:
    """Gauss-Newton product v [P] -> (F + damping I) v [P] of a model fn(parameters [P]), computed as J' M J v: forward
    mode through the model, M of the divergence, and backward through the model (Martens, 2020, section 8).

    J is the Jacobian of all tensors of fn's result, and M = -d2 divergence(p, q) / dp dq at p = q.  Unlike the Hessian
    in q, these mixed derivatives are also correct for outputs that are redundant or constrained, such as normalized
    logits, in which the divergence is linear in q.  The model is differentiated once in each mode, without double
    backward.

    Raises TypeError if fn's result depends on the parameters through anything but tensors that ``map_tensors`` reaches.
    """
    at = at.detach().requires_grad_()
    model = fn(at)
    moves = [x.requires_grad for x in tensors(model)]

    def numbers(x: D) -> list[Tensor]:
        return [y for y, moving in zip(tensors(x), moves, strict=True) if moving]

    p, q = (map_tensors(lambda x: x.detach().requires_grad_(x.requires_grad), model) for _ in range(2))
    value = divergence(p, q)
    if not any(moves) or torch.autograd.grad(value, at, retain_graph=True, allow_unused=True)[0] is not None:
        raise TypeError(f"a Gauss-Newton product needs a dataclass of tensors, which {type(model).__name__} is not")
    slopes = torch.autograd.grad(value, numbers(q), create_graph=True, materialize_grads=True)

    def product(v: Tensor) -> Tensor:
        with torch.no_grad(), forward_ad.dual_level():
            pushed = [forward_ad.unpack_dual(x) for x in numbers(fn(forward_ad.make_dual(at.detach(), v)))]
            tangents = [torch.zeros_like(x.primal) if x.tangent is None else x.tangent for x in pushed]
        across = torch.stack([(x * y).sum() for x, y in zip(slopes, tangents, strict=True)]).sum()
        curved = torch.autograd.grad(-across, numbers(p), retain_graph=True, materialize_grads=True)
        back = torch.autograd.grad(numbers(model), at, curved, retain_graph=True)
        return distributed.mean(back[0]) + damping * v

    return product


def conjugate_gradient(product: Product, b: Tensor, iters: int, tol: float = 1e-10) -> Tensor:
    """An approximate solution x [P] of A x = b from x = 0 (Hestenes and Stiefel, 1952).

    Once the squared residual is at most tol, further iterations leave x unchanged.  All ``iters`` iterations run, so
    nothing is read back to the host.
    """
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    rr = r @ r
    for _ in range(iters):
        ap = product(p)
        alpha = torch.where(rr > tol, rr / (p @ ap), 0.0)
        x, r = x + alpha * p, r - alpha * ap
        new_rr = r @ r
        p = r + torch.where(rr > tol, new_rr / rr, 0.0) * p
        rr = new_rr
    return x


def backtrack(accept: Callable[[Tensor], Tensor], fractions: Tensor) -> Tensor:
    """Backtracking line search: the first of the step fractions [K] that is accepted, or zero.  Evaluates them one at
    a time, and reads one bit back to the host for each."""
    for fraction in fractions:
        if accept(fraction):
            return fraction
    return torch.zeros_like(fractions[0])


def backtrack_at_once(accept: Callable[[Tensor], Tensor], fractions: Tensor) -> Tensor:
    """As ``backtrack``, with one call of accept for all fractions [K] and without reading anything back."""
    accepted = accept(fractions)
    return fractions.where(accepted & (accepted.cumsum(0) == 1), 0.0).sum()
