"""Running statistics, against those of everything at once."""

import pytest
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
    assert torch.allclose(moments.mean, seen.double().mean(0), rtol=1e-12)
    assert torch.allclose(moments.var, seen.double().var(0, correction=0), rtol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5, 1e6, 1e7, -1e7])
def test_a_unit_deviation_around_any_offset_is_standardized_to_one(offset: float) -> None:
    """Float32 itself rounds numbers near 1e7 to whole ones, which adds a twelfth to the variance."""
    norm, mask = Standardize(spaces.Box(-1, 1, (2,)), clip=None), torch.ones(64, 32, dtype=torch.bool)
    obs = torch.randn(64, 32, 2) + offset
    for _ in range(20):
        norm.update(obs, mask)
        obs = torch.randn(64, 32, 2) + offset
    found = norm(obs)
    assert torch.allclose(found.std((0, 1)), torch.ones(2), atol=0.05)
    assert torch.allclose(found.mean((0, 1)), torch.zeros(2), atol=0.1)
    exact = (obs.double() - obs.double().mean((0, 1))) / obs.double().std((0, 1), correction=0)
    first = Standardize(spaces.Box(-1, 1, (2,)), clip=None)
    first.update(obs, mask)
    assert torch.allclose(first(obs).double(), exact, atol=1e-5), "the first batch is taken as it is"


def test_what_never_changes_is_standardized_to_zero_and_what_then_does_is_finite() -> None:
    norm, mask = Standardize(spaces.Box(-1, 1, (1,)), clip=None), torch.ones(8, dtype=torch.bool)
    norm.update(torch.full((8, 1), 0.1), mask)
    assert torch.equal(norm(torch.full((8, 1), 0.1)), torch.zeros(8, 1))
    assert float(norm(torch.full((1, 1), 1.1))) == pytest.approx(1.0)


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
    assert not moments.mean.any() and not moments.count and (moments.var == 1).all() and (moments.scale == 1).all()


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
    assert torch.allclose(scale(reward, mask), reward / deviation, rtol=1e-6)
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
