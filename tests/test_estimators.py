"""Credit, against sums written out, published values, and one another."""

import torch
from torch import Tensor

from pgsuite.functional import estimators as est


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


def random_rollout(steps: int = 13, envs: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Reward, value, next value (consistent inside episodes), terminated, truncated."""
    g = torch.Generator().manual_seed(0)
    reward, value, next_value = (torch.randn(steps, envs, generator=g, dtype=torch.float64) for _ in range(3))
    terminated = torch.rand(steps, envs, generator=g) < 0.15
    truncated = (torch.rand(steps, envs, generator=g) < 0.15) & ~terminated
    done = terminated | truncated
    next_value[:-1] = torch.where(done[:-1], next_value[:-1], value[1:])
    return reward, value, next_value, terminated, truncated


def written_out(reward, next_value, terminated, done, gamma, weights):
    """Per cell, a weighted mean of the k-step returns: weights(k, last) for k = 1 ... last."""
    steps, envs = reward.shape
    out = torch.zeros_like(reward)
    for n in range(envs):
        for t in range(steps):
            last = next(k for k in range(t, steps) if done[k, n] or k == steps - 1) - t + 1
            for k in range(1, last + 1):
                end = t + k - 1
                ret = sum(gamma**i * reward[t + i, n] for i in range(k))
                ret = ret + gamma**k * next_value[end, n] * (not terminated[end, n])
                out[t, n] += weights(k, last) * ret
    return out


def test_every_estimator_is_the_sum_it_says() -> None:
    r, v, nv, term, trunc = random_rollout()
    done, gamma, lam = term | trunc, 0.97, 0.9

    def lambdas(k, last):
        return lam ** (last - 1) if k == last else (1 - lam) * lam ** (k - 1)

    returns = written_out(r, nv, term, done, gamma, lambdas)
    assert torch.allclose(est.td_lambda(r, nv, term, done, gamma=gamma, lam=lam), returns)
    assert torch.allclose(est.gae(r, v, nv, term, done, gamma=gamma, lam=lam) + v, returns)
    for n in (1, 2, 5, 100):
        expected = written_out(r, nv, term, done, gamma, lambda k, last, n=n: float(k == min(n, last)))
        assert torch.allclose(est.n_step(r, nv, term, done, gamma=gamma, n=n), expected)
    whole = written_out(r, nv, term, done, gamma, lambda k, last: float(k == last))
    assert torch.allclose(est.monte_carlo(r, nv, term, done, gamma=gamma), whole)


def test_reward_to_go_stops_at_the_end_of_the_episode() -> None:
    done = torch.tensor([[False], [True], [False]])
    assert est.reward_to_go(column(1, 2, 4), done, gamma=0.5).squeeze(1).tolist() == [2.0, 2.0, 4.0]


def test_gae_agrees_with_rlax() -> None:
    r, v = column(0, 0, 1, 0, -0.5), column(1, 4, -3, -2, -1, -1)
    never = torch.zeros(5, 1, dtype=torch.bool)
    expected = {
        1.0: [-1.45118805, -4.45574551, 2.539651, 0.5249, -0.49],
        0.7: [-0.6769795, -5.24816666, 2.48460799, 0.67043, -0.49],
        0.4: [0.56731873, -6.04212442, 2.34312016, 0.81596, -0.49],
    }
    for lam, values in expected.items():
        got = est.gae(r, v[:-1], v[1:], never, never, gamma=0.99, lam=lam)
        assert torch.allclose(got, column(*values), atol=1e-7), lam


def test_gae_agrees_with_rsl_rl() -> None:
    never = torch.zeros(3, 1, dtype=torch.bool)
    got = est.gae(column(1, 2, 3), column(0.5, 1, 1.5), column(1, 1.5, 2), never, never, gamma=0.99, lam=0.95)
    assert torch.allclose(got, column(6.90534257, 5.75794, 3.48), atol=1e-7)


def test_lambda_returns_agree_with_rlax() -> None:
    never = torch.zeros(5, 1, dtype=torch.bool)
    got = est.td_lambda(
        column(1, 0, -1, 0, 1),
        column(3, 1, 5, -5, 3),
        never,
        never,
        gamma=column(0.5, 0.9, 1, 0.5, 0.8),
        lam=0.75,
    )
    assert torch.allclose(got, column(1.6460547, 0.72281253, 0.7375001, 0.6500001, 3.4), atol=1e-6)


def test_discounted_returns_agree_with_rlax() -> None:
    never = torch.zeros(5, 1, dtype=torch.bool)
    discount = column(0.5, 0.9, 1, 0.5, 0.8)
    got = est.monte_carlo(column(1, 0, -1, 0, 1), column(0, 0, 0, 0, 3), never, never, gamma=discount)
    assert torch.allclose(got, column(1.315, 0.63, 0.7, 1.7, 3.4), atol=1e-7)


def test_vtrace_agrees_with_rlax() -> None:
    behaviour = torch.tensor(
        [[[8.9, 0.7], [5.0, 1.0], [0.6, 0.1], [-0.9, -0.1]], [[0.3, -5.0], [1.0, -8.0], [0.3, 1.7], [4.7, 3.3]]]
    )
    target = torch.tensor(
        [[[0.4, 0.5], [9.2, 8.8], [0.7, 4.4], [7.9, 1.4]], [[1.0, 0.9], [1.0, -1.0], [-4.3, 8.7], [0.8, 0.3]]]
    )
    action = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 1]]).unsqueeze(-1)
    logs = (x.log_softmax(-1).gather(-1, action).squeeze(-1).T for x in (target, behaviour))
    ratio = (next(logs) - next(logs)).exp()
    reward = torch.tensor([[-1.3, -1.3, 2.3, 42.0], [1.3, 5.3, -3.3, -5.0]]).T
    discount = torch.tensor([[0.0, 0.89, 0.85, 0.99], [0.88, 1.0, 0.83, 0.95]]).T
    value = torch.tensor([[2.1, 1.1, -3.1, 0.0, 8.4], [3.1, 0.1, -1.1, 7.4, -1.2]]).T
    never = torch.zeros(4, 2, dtype=torch.bool)
    advantage, targets = est.vtrace(reward, value[:-1], value[1:], never, never, ratio, gamma=discount)
    expected = torch.tensor(
        [[-1.6155143, -3.4973226, 1.8670533, 50.316002], [1.4662437, 3.6116405, -8.3327293e-5, -13.54]]
    ).T
    assert torch.allclose(targets - value[:-1], expected, rtol=1e-3)
    assert torch.allclose(advantage, expected, rtol=1e-3)


def test_vtrace_at_ratio_one_is_gae() -> None:
    r, v, nv, term, trunc = random_rollout()
    done = term | trunc
    advantage, target = est.vtrace(r, v, nv, term, done, torch.ones_like(r), gamma=0.97, lam=0.8)
    expected = est.gae(r, v, nv, term, done, gamma=0.97, lam=0.8)
    assert torch.allclose(advantage, expected) and torch.allclose(target, expected + v)


def test_no_credit_crosses_into_the_next_episode() -> None:
    r, v, nv, term, trunc = random_rollout()
    trunc[5] = ~term[5]
    done = term | trunc
    later = r.clone()
    later[6:] += 3.0
    for credit in (
        lambda x: est.gae(x, v, nv, term, done, gamma=0.97, lam=0.9),
        lambda x: est.n_step(x, nv, term, done, gamma=0.97, n=4),
        lambda x: est.td_lambda(x, nv, term, done, gamma=0.97, lam=0.9),
        lambda x: est.monte_carlo(x, nv, term, done, gamma=0.97),
        lambda x: est.vtrace(x, v, nv, term, done, torch.ones_like(x), gamma=0.97)[0],
    ):
        assert torch.equal(credit(r)[:6], credit(later)[:6])
        assert not torch.equal(credit(r)[6:], credit(later)[6:])


def test_leave_one_out_is_the_mean_of_the_others() -> None:
    returns = torch.tensor([[1.0, 2.0, 6.0], [3.0, 9.0, 100.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    got = est.leave_one_out(returns, mask)
    assert got[0].tolist() == [4.0, 3.5, 1.5]
    assert got[1, :2].tolist() == [9.0, 3.0]
    alone = est.leave_one_out(returns, torch.tensor([[True, False, False], [False, True, False]]))
    assert alone[0, 0] == 0 and alone[1, 1] == 0
