"""Credit, against sums written out, published values, and one another."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
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
    gamma = torch.as_tensor(gamma, dtype=reward.dtype).expand_as(reward)
    out = torch.zeros_like(reward)
    for n in range(envs):
        for t in range(steps):
            last = next(k for k in range(t, steps) if done[k, n] or k == steps - 1) - t + 1
            for k in range(1, last + 1):
                end = t + k - 1
                ret = sum(gamma[t : t + i, n].prod() * reward[t + i, n] for i in range(k))
                if not terminated[end, n]:
                    ret = ret + gamma[t : t + k, n].prod() * next_value[end, n]
                out[t, n] += weights(k, last) * ret
    return out


def lambdas(lam):
    return lambda k, last: lam ** (last - 1) if k == last else (1 - lam) * lam ** (k - 1)


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    """Anything that may come of a rollout: episodes of any lengths, next values that owe nothing to the values, and a
    discount for all steps or one for each."""
    steps, envs, seed = draw(st.integers(1, 7)), draw(st.integers(1, 3)), draw(st.integers(0, 2**31))
    often, never = draw(st.sampled_from([0.0, 0.2, 0.5, 1.0])), draw(st.booleans())
    g = torch.Generator().manual_seed(seed)
    reward, value, next_value, log_ratio = torch.randn(4, steps, envs, generator=g, dtype=torch.float64)
    terminated, truncated = torch.rand(2, steps, envs, generator=g) < often
    truncated &= ~terminated
    gamma: Any = draw(st.sampled_from([0.0, 0.9, 1.0]))
    if draw(st.booleans()):
        gamma = torch.rand(steps, envs, generator=g, dtype=torch.float64)
    return {
        "reward": reward,
        "value": value,
        "next_value": next_value,
        "terminated": terminated,
        "done": terminated | (truncated & never),
        "ratio": log_ratio.exp(),
        "gamma": gamma,
        "lam": draw(st.sampled_from([0.0, 0.5, 0.95, 1.0])),
    }


def consistent(case: dict[str, Any]) -> dict[str, Any]:
    """The same, with the value of a successor that of the next row, inside episodes."""
    following = torch.cat([case["value"][1:], case["next_value"][-1:]])
    last = torch.zeros_like(case["done"])
    last[-1] = True
    return case | {"next_value": case["next_value"].where(case["done"] | last, following)}


def picked(case: dict[str, Any], *names: str) -> list[Any]:
    return [case[name] for name in names]


@pytest.mark.parametrize(("steps", "row"), [(1, (2,)), (31, (2,)), (32, (3, 2)), (33, (4,)), (100, (1,)), (40, (300,))])
@pytest.mark.parametrize("begun", [False, True])
def test_a_scan_is_its_recurrence(steps: int, row: tuple[int, ...], begun: bool) -> None:
    """By loop and by doubling, with decays that are zero where an episode starts and that broadcast."""
    torch.manual_seed(steps)
    x, first = torch.randn(steps, *row, dtype=torch.float64), torch.randn(row, dtype=torch.float64)
    decay = torch.rand(steps, *row[:-1], 1, dtype=torch.float64) * (torch.rand(steps, *row[:-1], 1) > 0.1)
    y, wanted = first if begun else torch.zeros(row, dtype=torch.float64), []
    for t in range(steps):
        y = x[t] + decay[t] * y
        wanted.append(y)
    found = est.scan(x, decay, first if begun else None)
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-12, atol=1e-12)


@given(cases(), st.integers(1, 9))
def test_every_estimator_is_the_sum_it_says(case: dict[str, Any], n: int) -> None:
    r, nv, terminated, done = picked(case, "reward", "next_value", "terminated", "done")
    ends, gamma, lam = (r, nv, terminated, done), case["gamma"], case["lam"]
    assert torch.allclose(est.td_lambda(*ends, gamma=gamma, lam=lam), written_out(*ends, gamma, lambdas(lam)))
    expected = written_out(*ends, gamma, lambda k, last: float(k == min(n, last)))
    assert torch.allclose(est.n_step(*ends, gamma=gamma, n=n), expected)
    whole = written_out(*ends, gamma, lambda k, last: float(k == last))
    assert torch.allclose(est.monte_carlo(*ends, gamma=gamma), whole)
    alone = written_out(r, torch.zeros_like(r), terminated, done, gamma, lambda k, last: float(k == last))
    assert torch.allclose(est.reward_to_go(r, done, gamma=gamma), alone)


def discounts(case: dict[str, Any], factor: Tensor, t: int, n: int) -> list[tuple[int, Tensor]]:
    """Of every later step k of the episode that step t is in, the product of gamma times factor from t up to k."""
    gamma, found = torch.as_tensor(case["gamma"]).expand_as(factor), []
    weight = torch.ones((), dtype=factor.dtype)
    for k in range(t, len(factor)):
        found.append((k, weight))
        if case["done"][k, n]:
            break
        weight = weight * gamma[k, n] * factor[k, n]
    return found


@given(cases())
def test_generalized_advantages_are_the_sum_of_discounted_errors(case: dict[str, Any]) -> None:
    """Equation 16 of Schulman et al., term by term."""
    r, v, nv, terminated = picked(case, "reward", "value", "next_value", "terminated")
    error = r + case["gamma"] * nv * ~terminated - v
    expected = torch.zeros_like(r)
    for t in range(r.shape[0]):
        for n in range(r.shape[1]):
            expected[t, n] = sum(w * error[k, n] for k, w in discounts(case, torch.full_like(r, case["lam"]), t, n))
    got = est.gae(r, v, nv, terminated, case["done"], gamma=case["gamma"], lam=case["lam"])
    assert torch.allclose(got, expected)


@given(cases(), st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from([0.5, 1.0]))
def test_vtrace_is_the_sum_of_its_equation(case: dict[str, Any], rho_clip: float, c_clip: float) -> None:
    """Equation 1 of Espeholt et al., term by term, and its advantages from the targets one step later."""
    r, v, nv, terminated, done, ratio = picked(case, "reward", "value", "next_value", "terminated", "done", "ratio")
    gamma, lam, steps = case["gamma"], case["lam"], r.shape[0]
    rho, c = ratio.clamp(max=rho_clip), lam * ratio.clamp(max=c_clip)
    bootstrap = nv * ~terminated
    error = rho * (r + gamma * bootstrap - v)
    target, following = v.clone(), bootstrap.clone()
    for t in reversed(range(steps)):
        for n in range(r.shape[1]):
            target[t, n] += sum(w * error[k, n] for k, w in discounts(case, c, t, n))
            if not done[t, n] and t < steps - 1:
                following[t, n] = lam * target[t + 1, n] + (1 - lam) * bootstrap[t, n]
    options: dict[str, Any] = {"gamma": gamma, "lam": lam, "rho_clip": rho_clip, "c_clip": c_clip}
    got = est.vtrace(r, v, nv, terminated, done, ratio, **options)
    assert torch.allclose(got[0], rho * (r + gamma * following - v)) and torch.allclose(got[1], target)


@given(cases())
def test_at_their_ends_the_estimators_are_one_another_bit_for_bit(case: dict[str, Any]) -> None:
    r, v, nv, terminated, done = picked(case, "reward", "value", "next_value", "terminated", "done")
    gamma, lam, ends = case["gamma"], case["lam"], (r, nv, terminated, done)
    error = r + gamma * nv.where(~terminated, 0.0) - v
    assert torch.equal(est.gae(r, v, nv, terminated, done, gamma=gamma, lam=0.0), error)
    one_step = r + gamma * nv.where(~terminated, 0.0)
    assert torch.equal(est.n_step(*ends, gamma=gamma, n=1), one_step)
    assert torch.equal(est.td_lambda(*ends, gamma=gamma, lam=0.0), one_step)
    whole = est.monte_carlo(*ends, gamma=gamma)
    assert torch.equal(est.td_lambda(*ends, gamma=gamma, lam=1.0), whole)
    for n in (r.shape[0], r.shape[0] + 5):
        assert torch.allclose(est.n_step(*ends, gamma=gamma, n=n), whole, rtol=1e-14, atol=1e-14)
    ones = torch.ones_like(r)
    _, target = est.vtrace(r, v, nv, terminated, done, ones, gamma=gamma, lam=lam)
    assert torch.equal(target, v + est.gae(r, v, nv, terminated, done, gamma=gamma, lam=lam))


@given(cases())
def test_where_values_are_consistent_gae_is_the_others(case: dict[str, Any]) -> None:
    case = consistent(case)
    r, v, nv, terminated, done = picked(case, "reward", "value", "next_value", "terminated", "done")
    gamma, lam, ends = case["gamma"], case["lam"], (r, nv, terminated, done)
    advantage = est.gae(r, v, nv, terminated, done, gamma=gamma, lam=lam)
    assert torch.allclose(advantage + v, est.td_lambda(*ends, gamma=gamma, lam=lam))
    whole = est.gae(r, v, nv, terminated, done, gamma=gamma, lam=1.0)
    assert torch.allclose(whole + v, est.monte_carlo(*ends, gamma=gamma))
    ones = torch.ones_like(r)
    assert torch.allclose(est.vtrace(r, v, nv, terminated, done, ones, gamma=gamma, lam=lam)[0], advantage)


@given(cases(), st.integers(1, 9))
def test_no_credit_crosses_into_the_next_episode_whatever_its_pattern(case: dict[str, Any], n: int) -> None:
    """All that happens after an episode's end may change, by a lot, and no bit of its credit does."""
    after = case["done"].flip(0).int().cumsum(0).flip(0) == 0  # past the last end of each environment
    names = ("reward", "value", "next_value", "ratio")
    changed = case | {name: case[name].where(~after, 1e6 * (1 + case[name].abs())) for name in names}

    def credit(c: dict[str, Any]) -> list[Tensor]:
        r, v, nv, terminated, done, ratio = picked(c, "reward", "value", "next_value", "terminated", "done", "ratio")
        gamma, lam = c["gamma"], c["lam"]
        return [
            est.gae(r, v, nv, terminated, done, gamma=gamma, lam=lam),
            est.n_step(r, nv, terminated, done, gamma=gamma, n=n),
            est.td_lambda(r, nv, terminated, done, gamma=gamma, lam=lam),
            est.monte_carlo(r, nv, terminated, done, gamma=gamma),
            est.reward_to_go(r, done, gamma=gamma),
            *est.vtrace(r, v, nv, terminated, done, ratio, gamma=gamma, lam=lam),
        ]

    for one, other in zip(credit(case), credit(changed), strict=True):
        assert torch.equal(one[~after], other[~after])


@given(cases())
def test_no_bootstrap_is_taken_from_a_terminal_state(case: dict[str, Any]) -> None:
    """What a critic says of a state that is the end of everything is not so much as multiplied by zero."""
    r, v, nv, terminated, done, ratio = picked(case, "reward", "value", "next_value", "terminated", "done", "ratio")
    gamma, lam, poisoned = case["gamma"], case["lam"], nv.where(~terminated, torch.nan)
    for found in (
        est.gae(r, v, poisoned, terminated, done, gamma=gamma, lam=lam),
        est.n_step(r, poisoned, terminated, done, gamma=gamma, n=3),
        est.td_lambda(r, poisoned, terminated, done, gamma=gamma, lam=lam),
        est.monte_carlo(r, poisoned, terminated, done, gamma=gamma),
        *est.vtrace(r, v, poisoned, terminated, done, ratio, gamma=gamma, lam=lam),
    ):
        assert found.isfinite().all()


@given(st.integers(1, 6), st.integers(1, 5), st.floats(0, 1), st.integers(0, 2**31))
def test_leave_one_out_is_the_mean_of_the_other_live_ones_whatever_the_dead_hold(
    steps: int, envs: int, alive: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    returns, mask = torch.randn(steps, envs, generator=g).double(), torch.rand(steps, envs, generator=g) < alive
    got = est.leave_one_out(returns.where(mask, torch.nan), mask)
    for t in range(steps):
        for n in range(envs):
            others = [float(returns[t, k]) for k in range(envs) if k != n and mask[t, k]]
            assert float(got[t, n]) == pytest.approx(sum(others) / max(len(others), 1))


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


def test_leave_one_out_is_the_mean_of_the_others() -> None:
    returns = torch.tensor([[1.0, 2.0, 6.0], [3.0, 9.0, 100.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    got = est.leave_one_out(returns, mask)
    assert got[0].tolist() == [4.0, 3.5, 1.5]
    assert got[1, :2].tolist() == [9.0, 3.0]
    alone = est.leave_one_out(returns, torch.tensor([[True, False, False], [False, True, False]]))
    assert alone[0, 0] == 0 and alone[1, 1] == 0
