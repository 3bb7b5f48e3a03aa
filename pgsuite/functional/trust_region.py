"""Natural gradient steps: flat parameters, Fisher products, conjugate gradient, backtracking.

Nothing here knows of policies or rewards, so each piece is tested against linear algebra.  P is the number of
parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pgsuite import parallel


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """[P], one vector in parameter order."""
    return torch.cat([x.reshape(-1) for x in tensors])


@torch.no_grad()
def assign(params: Sequence[Tensor], vector: Tensor) -> None:
    """Write [P] back in place, so that nothing that holds the parameters is left behind."""
    for p, chunk in zip(params, vector.split([p.numel() for p in params]), strict=True):
        p.copy_(chunk.view_as(p))


def flat_grad(y: Tensor, params: Sequence[Tensor], *, retain_graph: bool = False) -> Tensor:
    """[P], the gradient of y averaged over processes; zero for parameters that y does not depend on."""
    return parallel.mean(flatten(torch.autograd.grad(y, params, retain_graph=retain_graph, materialize_grads=True)))


def fisher_product(kl: Tensor, params: Sequence[Tensor], damping: float) -> Callable[[Tensor], Tensor]:
    """v [P] -> (F + damping I) v [P], with F the Hessian of kl at the point where kl is zero, which is the Fisher
    matrix (Schulman et al., 2015, appendix C).  Uses double backward."""
    grad = flatten(torch.autograd.grad(kl, params, create_graph=True))

    def product(v: Tensor) -> Tensor:
        return flat_grad(grad @ v, params, retain_graph=True) + damping * v

    return product


def conjugate_gradient(product: Callable[[Tensor], Tensor], b: Tensor, iters: int, tol: float = 1e-10) -> Tensor:
    """An approximate solution x [P] of A x = b from x = 0 (Hestenes and Stiefel, 1952).

    Iterations after the squared residual has fallen to tol change nothing, so none is skipped and nothing is read back
    to the host.
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


def backtrack(accept: Callable[[float], bool], shrink: float, tries: int) -> float:
    """The first of 1, shrink, shrink^2, ... (tries of them) that is acceptable, or zero."""
    for i in range(tries):
        if accept(fraction := shrink**i):
            return fraction
    return 0.0
