"""Returns and advantages: pure functions of [T, N] tensors.

In all of them ``next_value`` [T, N] is the value of the true successor state, so a truncated step bootstraps like any
other; ``terminated`` [T, N] sets that bootstrap to zero, ``done`` [T, N] separates episodes, and the last row of a
rollout needs no special case.  ``gamma`` is one discount factor, or one per step [T, N].
"""

from __future__ import annotations

import torch
from torch import Tensor

from pgsuite import distributed

Discount = float | Tensor


def scan(x: Tensor, decay: Tensor, first: Tensor | None = None) -> Tensor:
    """y[t] = x[t] + decay[t] * y[t - 1], of x and decay [T, ...] and y[-1] = first [...], by default zero.

    Many short rows are combined by doubling (Hillis and Steele, 1986), in log2 T operations in place of T.
    """
    steps = len(x)
    if steps < 32 or x[0].numel() > 256:  # measured on a CPU
        y, out = torch.zeros_like(x[0]) if first is None else first, []
        for now, kept in zip(x.unbind(), decay.unbind(), strict=True):
            y = torch.addcmul(now, kept, y)
            out.append(y)
        return torch.stack(out)
    if first is not None:
        x = torch.cat([torch.addcmul(x[:1], decay[:1], first.unsqueeze(0)), x[1:]])
    decay = torch.cat([torch.zeros_like(decay[:1]), decay[1:]])  # so what rolls around is multiplied by zero
    x, width = torch.addcmul(x, decay, x.roll(1, 0)), 2  # of the sums [t - width + 1, t] in x[t]
    while width < steps:
        decay = decay * decay.roll(width // 2, 0)  # the products of as many
        x, width = torch.addcmul(x, decay, x.roll(width, 0)), 2 * width
    return x


def reverse_scan(x: Tensor, decay: Tensor) -> Tensor:
    """y[t] = x[t] + decay[t] * y[t + 1], with y[T] = 0."""
    return scan(x.flip(0), decay.flip(0)).flip(0)


def reward_to_go(reward: Tensor, done: Tensor, *, gamma: Discount) -> Tensor:
    """Discounted Monte Carlo returns [T, N], from each step to the end of its episode."""
    return reverse_scan(reward, gamma * (~done).to(reward.dtype))


def monte_carlo(reward: Tensor, next_value: Tensor, terminated: Tensor, done: Tensor, *, gamma: Discount) -> Tensor:
    """Returns [T, N] to the end of the episode, bootstrapped where the time limit or the end of the rollout truncates
    it."""
    tail = next_value.where(_ends(done) & ~terminated, 0.0)
    return reward_to_go(reward + gamma * tail, done, gamma=gamma)


def n_step(reward: Tensor, next_value: Tensor, terminated: Tensor, done: Tensor, *, gamma: Discount, n: int) -> Tensor:
    """n-step returns [T, N]: n rewards and a bootstrap, or fewer rewards where the episode or the rollout ends earlier
    (Mnih et al., 2016, algorithm S3)."""
    bootstrap, ends = next_value.where(~terminated, 0.0), _ends(done)
    returns = reward + gamma * bootstrap
    for _ in range(min(n, reward.shape[0]) - 1):
        returns = reward + gamma * bootstrap.where(ends, _shift(returns))
    return returns


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    done: Tensor,
    *,
    gamma: Discount,
    lam: float,
) -> Tensor:
    """Generalized advantage estimates [T, N] (Schulman et al., 2016, equation 16)."""
    delta = reward + gamma * next_value.where(~terminated, 0.0) - value
    return reverse_scan(delta, gamma * lam * (~done).to(delta.dtype))


def td_lambda(
    reward: Tensor, next_value: Tensor, terminated: Tensor, done: Tensor, *, gamma: Discount, lam: float
) -> Tensor:
    """Lambda returns [T, N] (Sutton and Barto, 2018, equation 12.20):
    G[t] = r[t] + gamma ((1 - lam) V'[t] + lam G[t + 1]), where V'[t] replaces G[t + 1] at the end of an episode or of
    the rollout."""
    bootstrap, ends = next_value.where(~terminated, 0.0), _ends(done)
    weight = lam * (~ends).to(reward.dtype)
    return reverse_scan(reward + gamma * (1 - weight) * bootstrap, gamma * weight)


def soft_td_lambda(
    reward: Tensor, next_value: Tensor, bonus: Tensor, terminated: Tensor, done: Tensor, *, gamma: Discount, lam: float
) -> Tensor:
    """Lambda returns [T, N] with a bonus in every state reached that is not terminal, such as temperature times
    entropy (Voelcker et al., 2025): G[t] = r[t] + gamma (bonus[t] + (1 - lam) Q'[t] + lam G[t + 1]), where Q', the
    ``next_value``, and the bonus are those of the true successor."""
    paid = reward + gamma * bonus.where(~terminated, 0.0)
    return td_lambda(paid, next_value, terminated, done, gamma=gamma, lam=lam)


def vtrace(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    done: Tensor,
    ratio: Tensor,
    *,
    gamma: Discount,
    lam: float = 1.0,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
    importance_weighted: bool = True,
) -> tuple[Tensor, Tensor]:
    """Off-policy advantages and value targets [T, N] by V-trace (Espeholt et al., 2018, equation 1).

    ``ratio`` [T, N] is the importance ratio, target policy over behavior policy, of each action.  If all ratios are
    one, the targets are lambda returns and the advantages those of ``gae``.  With ``importance_weighted``, each
    advantage is multiplied by the ratio of its own action, clipped at rho_clip.
    """
    rho, c = ratio.clamp(max=rho_clip), lam * ratio.clamp(max=c_clip)
    bootstrap, ends = next_value.where(~terminated, 0.0), _ends(done)
    delta = rho * (reward + gamma * bootstrap - value)
    target = value + reverse_scan(delta, gamma * c * (~done).to(delta.dtype))
    following = bootstrap.where(ends, lam * _shift(target) + (1 - lam) * bootstrap)
    advantage = reward + gamma * following - value
    return rho * advantage if importance_weighted else advantage, target


def leave_one_out(returns: Tensor, mask: Tensor) -> Tensor:
    """The mean return [T, N] of the *other* live environments at each time: a baseline that is independent of the
    environment's own actions, hence unbiased.  Zero where no other environment is live."""
    returns, live = returns.where(mask, 0.0), mask.to(returns.dtype)
    others = distributed.total(returns.sum(1, keepdim=True)) - returns
    count = distributed.total(live.sum(1, keepdim=True)) - live
    return others / count.clamp(min=1.0)


def group_returns(reward: Tensor, mask: Tensor, group: int) -> Tensor:
    """The sum of each column's rewards [T, N] over its real cells, in groups of adjacent columns: [N / group, group].

    Raises ValueError if they do not divide into groups of at least two.
    """
    columns = reward.shape[1]
    if group < 2 or columns % group:
        raise ValueError(f"{columns} columns do not divide into groups of {group}, each of at least 2")
    return reward.where(mask, 0.0).sum(0).view(-1, group)


def leave_one_out_baseline(score: Tensor) -> Tensor:
    """Scores [..., G] minus the mean of the other scores in the group (Kool et al., 2019)."""
    return (score - score.mean(-1, keepdim=True)) * (score.shape[-1] / (score.shape[-1] - 1))


def _ends(done: Tensor) -> Tensor:
    """[T, N] bool: the last step of an episode or of the rollout."""
    last = torch.zeros_like(done)
    last[-1].fill_(True)
    return done | last


def _shift(x: Tensor) -> Tensor:
    """x[t + 1] at t; the last row is repeated."""
    return torch.cat([x[1:], x[-1:]])
