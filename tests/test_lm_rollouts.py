"""Each test is one claim about responses: how they are sampled, and what a rollout of them holds."""

import copy
from dataclasses import replace
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


def test_a_rollout_holds_responses_and_behind_each_its_prompt() -> None:
    env = world(64)
    _, r = collected(env)
    stop, texts = env.stop, [env.texts[i] for i in env.chosen]
    assert r.obs.shape == (env.length, 64) and r.start[0].all() and not r.start[1:].any() and r.mask[0].all()
    before, real = r.hidden_state["prompt"], r.hidden_state["prompt.real"]
    assert before.shape == real.shape == (env.length, 64, env.width - 1) and before.stride(0) == 0
    whole = torch.cat([before[0].where(real[0], env.pad), r.obs[0].unsqueeze(-1)], 1)
    assert env.tokens.decode(whole.T) == texts and torch.equal(real[0].sum(1) + 1, torch.tensor([*map(len, texts)]))
    assert torch.equal(r.obs[1:], r.next_obs[:-1]) and torch.equal(r.action, r.next_obs)
    last = r.mask & r.terminated
    assert (last.sum(0) == 1).all() and torch.equal(last, r.terminated) and not r.truncated.any()
    ended = r.action[last] == stop
    assert 0 < ended.sum() < 64 and (r.mask.sum(0)[~ended[last.nonzero()[:, 1].argsort()]] == env.length).all()
    assert not ((r.action == stop) & r.mask & ~last).any()
    scores = vowels(texts, env.tokens.decode(r.action))
    assert torch.equal(r.reward.sum(0), scores) and not r.reward[~last].any()


def test_a_rollout_is_as_wide_as_its_own_longest_prompt_and_response() -> None:
    """With the same likelihoods, rewards and random numbers as one of the widest, which is of use where what is
    compiled must fit them all."""
    rollouts = []
    for fixed_shape in (False, True):
        env = LanguageEnv(["b", "ab", "abcdefgh" * 3], Letters(), [vowels], num_envs=2, length=40, seed=7)
        policy = speaker(len(env.tokens))
        with torch.no_grad():
            policy.out.bias[env.stop] += 3.0  # short responses
        responses = collector(env)
        responses.fixed_shape = fixed_shape
        rollouts.append([responses.collect(policy) for _ in range(8)])
    shapes = {(len(r.obs), r.hidden_state["prompt"].shape[-1]) for r in rollouts[0]}
    assert {width for _, width in shapes} == {0, 1, 23} and max(rows for rows, _ in shapes) < 40
    for own, widest in zip(*rollouts, strict=True):
        assert widest.obs.shape == (40, 2) and widest.hidden_state["prompt"].shape == (40, 2, 23)
        rows = len(own.obs)
        assert torch.equal(own.action, widest.action[:rows]) and torch.equal(own.reward, widest.reward[:rows])
        assert torch.equal(own.mask, widest.mask[:rows]) and not widest.mask[rows:].any()
        assert torch.allclose(own.logp, widest.logp[:rows], atol=1e-5)
        for r in (own, widest):
            logp = policy.dist(r).log_prob(r.action)[:rows]
            assert torch.allclose(logp[own.mask], own.logp[own.mask], atol=1e-5)


def test_the_tracker_counts_the_tokens_of_responses() -> None:
    _, r = collected()
    returns, lengths = EpisodeTracker(16, r.reward.device).finished_episodes(r)
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
    first = r.action[:, :4]
    assert not (first == first[:, :1]).all()


def test_padding_changes_not_a_bit_of_what_is_learned() -> None:
    """In a batch of one shape: whatever stands before a prompt and after a stop token."""
    env = world(16)
    algorithm, twin = (build(PPO, env, coef=0.1) for _ in range(2))
    r = collector(env).collect(algorithm.policy)
    after = ~torch.cat([torch.ones_like(r.mask[:1]), r.mask[:-1]])  # observations after the stop token
    noise, obs = torch.randint(9, r.obs.shape), torch.where(after, torch.randint(9, r.obs.shape), r.obs)
    prompt, real = (r.hidden_state[name] for name in ("prompt", "prompt.real"))
    read = {"prompt": torch.where(real, prompt, torch.randint(9, prompt.shape)), "prompt.real": real}
    assert (obs != r.obs).sum() + (read["prompt"] != prompt)[0].sum() > 20
    fields: dict[str, Any] = vars(r) | {
        "obs": obs,
        "hidden_state": read,
        "action": torch.where(r.mask, r.action, noise),
    }
    for each, rollout in ((algorithm, r), (twin, Rollout(**fields))):
        each.train_on(rollout)
    pairs = zip(algorithm.policy.parameters(), twin.policy.parameters(), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


def test_the_number_of_columns_and_the_width_of_the_prompts_change_no_more_than_rounding() -> None:
    policy, r = collected()
    wide = LanguageEnv([*world().texts, "abcdefgh"], Letters(), [vowels], num_envs=16, length=5, seed=1)
    extra = wide.width - 3
    blank = torch.full((len(r.obs), 16, extra), wide.pad)
    state = {"prompt": blank, "prompt.real": torch.zeros_like(blank).bool()}
    wider = replace(r, hidden_state={name: torch.cat([x, r.hidden_state[name]], -1) for name, x in state.items()})
    alone = policy.dist(r[:, :1]).logits
    both = policy.dist(r).logits
    assert torch.allclose(policy.dist(wider).logits[r.mask], both[r.mask], atol=1e-5)
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
    assert torch.allclose(value, algorithm.critic(r), atol=1e-5)
    assert torch.allclose(following[:-1], value[1:], atol=1e-5)
    body, cells = algorithm.critic.body, []
    hidden_state = body.read(*(r.hidden_state[name][0].T for name in ("prompt", "prompt.real")))
    for t in range(len(r.obs)):
        features, hidden_state = body.step(r.obs[t], hidden_state, torch.zeros_like(r.start[t]))
        cells.append(algorithm.critic.read(features))
    last, _ = body.step(r.next_obs[-1], hidden_state, torch.zeros_like(r.start[0]))
    assert torch.allclose(torch.stack(cells), value, atol=1e-5)
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


def test_a_prompt_of_several_columns_is_computed_once_and_learns_from_all() -> None:
    policy, r = collected(world(16))
    weight, found = torch.randn(r.logp.shape), []
    prompts = r.hidden_state["prompt"][0].where(r.hidden_state["prompt.real"][0], -1)
    width, rows, few = prompts.shape[1], len(r.obs), len(prompts.unique(dim=0))
    for shared, expected in ((True, few * width + 16 * rows), (False, 16 * (width + rows))):
        policy.body.fixed_shape, count = not shared, []
        hook = policy.body.transformer.embed.register_forward_hook(lambda *x: count.append(x[1][0].numel()))  # noqa: B023
        logp = policy.dist(r).log_prob(r.action)
        hook.remove()
        assert few <= 4 and sum(count) == expected
        grads = torch.autograd.grad((weight * logp)[r.mask].sum(), list(policy.parameters()))
        found.append((logp.detach()[r.mask], *grads))
    assert all(x.abs().max() > 0 for x in found[0])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_generation_begins_from_each_prompt_computed_once() -> None:
    env = world(16, samples=4)
    policy: Any = speaker(len(env.tokens))
    count: list[int] = []
    policy.body.transformer.embed.register_forward_hook(lambda *x: count.append(x[1][0].numel()))
    r = collector(env).collect(policy)
    prompts = r.hidden_state["prompt"][0].where(r.hidden_state["prompt.real"][0], -1)
    few, width = len(prompts.unique(dim=0)), prompts.shape[1]
    assert few <= 4 and count[0] == few * width and set(count[1:]) == {16}


def test_prompts_of_few_columns_each_are_computed_with_their_responses() -> None:
    policy, r = collected(world(4))
    alone = replace(
        r,
        hidden_state={"prompt": r.hidden_state["prompt"] * 0 + torch.arange(4).view(4, 1)}
        | {"prompt.real": torch.ones_like(r.hidden_state["prompt.real"])},
    )
    count: list[int] = []
    policy.body.transformer.embed.register_forward_hook(lambda *x: count.append(x[1][0].numel()))
    policy.dist(alone)
    assert count == [4 * (r.hidden_state["prompt"].shape[-1] + len(r.obs))]
