"""Each test is one claim about responses: how they are sampled, and what a rollout of them holds."""

import copy
from typing import Any

import pytest
import torch
from lm_worlds import Letters, build, collector, speaker, vowels, world

from pgsuite.algorithms import A2C, NPG, PPO, TRPO, Algorithm, PPOPenalty, Reinforce
from pgsuite.rlhf.env import LanguageEnv
from pgsuite.rollout import EpisodeTracker
from pgsuite.testing import check_vector_env
from pgsuite.types import Rollout

ALL: list[type[Algorithm]] = [Reinforce, A2C, PPO, PPOPenalty, NPG, TRPO]


def collected(env: LanguageEnv | None = None, **look: Any) -> tuple[Any, Rollout]:
    env = env or world()
    policy = speaker(len(env.tokens), **look)
    return policy, collector(env).collect(policy)


def test_a_rollout_holds_texts_and_its_mask_what_was_chosen() -> None:
    env = world(64)
    _, r = collected(env)
    stop, width = env.stop, env.width
    assert r.obs.shape == (width + env.length - 1, 64) and not r.hidden_state
    assert not r.mask[: width - 1].any() and r.mask[width - 1].all()
    assert (r.start.sum(0) == 1).all() and (r.obs[r.start] != env.pad).all()
    assert (r.start.long().argmax(0) == width - torch.tensor([len(env.texts[i]) for i in env.chosen])).all()
    assert torch.equal(r.obs[1:], r.next_obs[:-1]) and torch.equal(r.action, r.next_obs)
    last = r.mask & r.terminated
    assert (last.sum(0) == 1).all() and torch.equal(last, r.terminated) and not r.truncated.any()
    ended = r.action[last] == stop
    assert 0 < ended.sum() < 64 and (r.mask.sum(0)[~ended[last.nonzero()[:, 1].argsort()]] == env.length).all()
    assert not ((r.action == stop) & r.mask & ~last).any()
    said = env.tokens.decode(r.action[width - 1 :])
    scores = vowels([env.texts[i] for i in env.chosen], said)
    assert torch.equal(r.reward.sum(0), scores) and not r.reward[~last].any()


def test_the_tracker_counts_the_tokens_of_responses() -> None:
    _, r = collected()
    returns, lengths = EpisodeTracker(16, r.reward.device).finished(r)
    assert torch.equal(lengths, r.mask.sum(0)[(r.mask & r.terminated).nonzero()[:, 1]].double()) and len(returns) == 16


@pytest.mark.parametrize("look", [{}, {"temperature": 0.6}, {"top_p": 0.7}, {"temperature": 1.3, "top_p": 0.9}])
def test_log_probabilities_while_sampling_are_those_of_one_pass(look: dict[str, Any]) -> None:
    policy, r = collected(world(64), **look)
    logp = policy.dist(r).log_prob(r.action)
    assert (logp - r.logp)[r.mask].abs().max() < 1e-5


def test_a_nucleus_is_the_least_set_of_tokens_of_its_probability_and_its_likelihoods_sum_to_one() -> None:
    policy, r = collected(top_p=0.6)
    plain = copy.deepcopy(policy)
    plain.head.top_p = 1.0
    whole, cut = plain.dist(r).logits.exp(), policy.dist(r).logits.exp()
    inside = cut > 0
    assert torch.allclose(cut.sum(-1), torch.ones(())) and 1 < inside.sum(-1).float().mean() < whole.shape[-1]
    kept = (whole * inside).sum(-1)
    assert (kept >= 0.6).all() and (kept - whole.where(inside, 2.0).amin(-1) < 0.6).all()
    assert torch.allclose(cut, whole * inside / kept.unsqueeze(-1), atol=1e-6)


def test_samples_of_one_prompt_stand_side_by_side_and_differ() -> None:
    env = world(32, samples=4)
    _, r = collected(env)
    assert (env.chosen.view(8, 4) == env.chosen.view(8, 4)[:, :1]).all() and len(set(env.chosen.tolist())) > 1
    first = r.action[env.width - 1 :, :4]
    assert not (first == first[:, :1]).all()


def test_padding_changes_not_a_bit_of_what_is_learned() -> None:
    """In a batch of one shape: whatever stands before a prompt and after a stop token."""
    env = world(16)
    algorithm, twin = (build(PPO, env, coef=0.1) for _ in range(2))
    r = collector(env).collect(algorithm.policy)
    real = r.start.cumsum(0) > 0
    after = real & ~r.mask & (torch.arange(len(real)).unsqueeze(-1) >= env.width)
    noise = torch.randint(9, r.obs.shape)
    obs = torch.where(~real | (after & (r.obs == env.pad)), noise, r.obs)
    assert (obs != r.obs).sum() > 20
    fields: dict[str, Any] = vars(r) | {"obs": obs, "action": torch.where(r.mask, r.action, noise)}
    for each, rollout in ((algorithm, r), (twin, Rollout(**fields))):
        each.train_on(rollout)
    pairs = zip(algorithm.policy.parameters(), twin.policy.parameters(), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


def test_the_number_of_columns_and_the_width_of_the_prompts_change_no_more_than_rounding() -> None:
    policy, r = collected()
    wide = LanguageEnv([*world().texts, "abcdefgh"], Letters(), [vowels], num_envs=16, length=5, seed=1)
    extra = wide.width - 3
    pad = torch.full((extra, 16), wide.pad)
    padded: dict[str, Any] = {
        "obs": torch.cat([pad, r.obs]),
        "start": torch.cat([torch.zeros_like(pad).bool(), r.start]),
    }
    wider = Rollout(**(vars(r) | padded))
    alone = policy.dist(r[:, :1]).logits
    both = policy.dist(r).logits
    assert torch.allclose(policy.dist(wider).logits[extra:][r.mask], both[r.mask], atol=1e-5)
    assert torch.allclose(alone, both[:, :1], atol=1e-5)


@pytest.mark.parametrize("cls", ALL)
def test_the_ratio_is_one_before_the_first_step_of_the_third_iteration(cls: type[Algorithm]) -> None:
    env = world()
    algorithm = build(cls, env, coef=0.1, look={"temperature": 0.8, "top_p": 0.9})
    rollouts = collector(env)
    for _ in range(2):
        algorithm.iterate(rollouts)
    r = rollouts.collect(algorithm.policy)
    ratio = (algorithm.policy.dist(r).log_prob(r.action) - r.logp).exp()
    assert (ratio[r.mask] - 1).abs().max() < 1e-5


@pytest.mark.parametrize("shared", [True, False])
def test_critics_see_the_true_successor_of_every_token(shared: bool) -> None:
    env = world()
    algorithm = build(A2C, env, shared=shared)
    r = collector(env).collect(algorithm.policy)
    value, following = algorithm.critic.values_and_next_values(r)
    real = r.start.cumsum(0) > 0
    assert torch.allclose(value, algorithm.critic(r), atol=1e-5)
    assert torch.allclose(following[:-1][real[:-1]], value[1:][real[:-1]], atol=1e-5)
    hidden_state, cells = algorithm.critic.body.initial_state(16), []
    for t in range(len(r.obs)):
        features, hidden_state = algorithm.critic.body.step(r.obs[t], hidden_state, r.start[t])
        cells.append(algorithm.critic.read(features))
    last, _ = algorithm.critic.body.step(r.next_obs[-1], hidden_state, torch.zeros(16, dtype=torch.bool))
    assert torch.allclose(torch.stack(cells)[real], value[real], atol=1e-5)
    assert torch.allclose(algorithm.critic.read(last), following[-1], atol=1e-5)


def test_a_collector_restored_from_its_state_goes_on_identically() -> None:
    policy = speaker(10)
    one, two = collector(world()), collector(world(seed=5), seed=6)
    one.collect(policy)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    a, b = one.collect(policy), two.collect(policy)
    assert torch.equal(a.obs, b.obs) and torch.equal(a.reward, b.reward) and torch.equal(a.logp, b.logp)


def test_token_by_token_it_is_an_environment_like_others() -> None:
    check_vector_env(lambda seed: world(4, seed=seed))


def test_ensembles_are_as_doubtful_as_asked_and_unfinished_responses_pay() -> None:
    def constant(x: float) -> Any:
        return lambda prompts, responses: torch.full((len(prompts),), x)

    for ensemble, worth in (("mean", 2.0), ("minimum", 1.0)):
        options: Any = {"num_envs": 8, "length": 3, "ensemble": ensemble, "truncation_penalty": 0.5}
        env = LanguageEnv(["a", "bb"], Letters(), [constant(1.0), constant(3.0)], **options)
        _, r = collected(env)
        ended = ((r.action == env.stop) & r.mask).any(0)
        assert torch.equal(r.reward.sum(0), torch.where(ended, worth, worth - 0.5)) and 0 < ended.sum() < 8


def test_rewards_may_be_given_token_by_token() -> None:
    env = LanguageEnv(["a"], Letters(), [lambda p, r: torch.arange(12.0).view(3, 4)], num_envs=4, length=3)
    _, r = collected(env)
    assert torch.equal(r.reward, torch.arange(12.0).view(3, 4).where(r.mask, 0.0))
