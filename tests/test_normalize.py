"""Running statistics, against those of everything at once."""

import torch
from gymnasium import spaces

from pgsuite.nn.normalize import RewardScale, RunningMoments, Standardize
from pgsuite.types import explained_variance, masked_mean, standardize


def test_moments_of_parts_are_moments_of_the_whole() -> None:
    moments, parts = RunningMoments((3,)), [torch.randn(n, 2, 3) * 5 + 100 for n in (4, 1, 30)]
    masks = [torch.rand(p.shape[:2]) < 0.6 for p in parts]
    for part, mask in zip(parts, masks, strict=True):
        moments.update(part, mask)
    seen = torch.cat([p[m] for p, m in zip(parts, masks, strict=True)])
    assert torch.allclose(moments.mean, seen.mean(0), rtol=1e-4)
    assert torch.allclose(moments.var, seen.var(0, correction=0), rtol=1e-2)


def test_masked_cells_are_not_seen_whatever_they_hold() -> None:
    x, mask = torch.randn(5, 4), torch.rand(5) < 0.5
    poisoned = x.where(mask.unsqueeze(-1), torch.nan)
    clean, dirty = RunningMoments((4,)), RunningMoments((4,))
    clean.update(x, mask)
    dirty.update(poisoned, mask)
    assert torch.equal(clean.mean, dirty.mean) and torch.equal(clean.var, dirty.var)
    assert torch.equal(masked_mean(x, mask.unsqueeze(-1)), masked_mean(poisoned, mask.unsqueeze(-1)))


def test_nothing_seen_changes_nothing() -> None:
    moments = RunningMoments((2,))
    moments.update(torch.randn(3, 2), torch.zeros(3, dtype=torch.bool))
    assert torch.equal(moments.mean, torch.zeros(2)) and torch.equal(moments.var, torch.ones(2))


def test_standardize_is_the_identity_until_update_and_clips() -> None:
    norm, x = Standardize(spaces.Box(-9, 9, (2,)), clip=5.0), torch.randn(100, 2) * 0.5
    assert torch.allclose(norm(x), x, atol=1e-6)
    norm.update(x, torch.ones(100, dtype=torch.bool))
    assert torch.allclose(norm(x).mean(0), torch.zeros(2), atol=1e-4)
    assert float(norm(torch.full((1, 2), 1e9)).max()) == 5.0
    assert torch.equal(Standardize(spaces.Box(-9, 9, (2,)), enabled=False)(x), x)


def test_reward_scale_is_the_deviation_of_discounted_returns_across_rollouts() -> None:
    reward, start = torch.randn(12, 3), torch.rand(12, 3) < 0.2
    scale, mask = RewardScale(3), torch.ones(4, 3, dtype=torch.bool)
    for i in range(0, 12, 4):
        scale.update(reward[i : i + 4], start[i : i + 4], mask, 0.9)
    sums, carry = [], torch.zeros(3)
    for r, s in zip(reward, start, strict=True):
        carry = r + 0.9 * carry * ~s
        sums.append(carry)
    deviation = torch.stack(sums).std(correction=0)
    assert torch.allclose(scale(reward, mask), reward / deviation, rtol=1e-3)
    assert not torch.allclose(scale(reward, mask), reward)


def test_standardized_advantages_have_unit_moments_over_real_cells() -> None:
    x, mask = torch.randn(50, 4) * 7 + 3, torch.rand(50, 4) < 0.5
    y = standardize(x, mask)
    assert abs(float(y[mask].mean())) < 1e-5 and abs(float(y[mask].std(correction=0)) - 1) < 1e-5
    assert (y[~mask] == 0).all()


def test_explained_variance_of_perfect_and_constant_critics() -> None:
    target, mask = torch.randn(20, 3), torch.ones(20, 3, dtype=torch.bool)
    assert float(explained_variance(target, target, mask)) == 1.0
    assert abs(float(explained_variance(torch.full_like(target, 5.0), target, mask))) < 1e-5
    assert float(explained_variance(-target, target, mask)) < -1


def test_what_is_not_to_be_clipped_is_not() -> None:
    norm, scale = Standardize(spaces.Box(-9, 9, (2,)), clip=None), RewardScale(3, clip=None)
    assert float(norm(torch.full((1, 2), 1e9)).max()) == float(scale(torch.tensor(1e9), torch.tensor(True))) == 1e9
    assert float(RewardScale(3)(torch.tensor(1e9), torch.tensor(True))) == 10
