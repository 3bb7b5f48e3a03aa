"""Games report their own score, whatever a method learns from."""

import itertools
from typing import Any

import pytest
import torch
from test_cli import Cli, command  # noqa: F401
from toys import PointMass, build, collector

from pgsuite.algorithms import PPO
from pgsuite.envs import Atari, make
from pgsuite.nn.normalize import ClipReward
from pgsuite.rollout import EpisodeTracker, StepCollector

pytest.importorskip("ale_py", reason="needs the atari extra")


def play(env: Any, steps: int, seed: int = 0) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    env.reset()
    return [
        env.step(torch.randint(0, int(env.action_space.n), (env.num_envs,), generator=generator)) for _ in range(steps)
    ]


def test_rewards_are_the_score_and_games_end_at_their_limit() -> None:
    env = make(Atari(game="MsPacman", max_episode_steps=120), 4, seed=1)
    assert env.max_episode_steps == 120 and env.observation_space.shape == (4, 84, 84)
    steps = play(env, 120)
    assert set(torch.stack([x.reward for x in steps]).unique().tolist()) >= {0.0, 10.0}  # a dot is ten points
    assert not any(bool(x.done.any()) for x in steps[:-1]) and bool(steps[-1].truncated.all())


@pytest.mark.long
def test_actions_stick_or_do_not() -> None:
    """Without sticky actions and random starts, games with equal actions are equal."""

    def end(sticky: float, seed: int) -> torch.Tensor:
        return play(make(Atari(game="Breakout", sticky=sticky, noop_max=0), 2, seed=seed), 60)[-1].obs

    assert torch.equal(end(0.0, 1), end(0.0, 9))
    assert torch.equal(end(0.25, 1), end(0.25, 1)) and not torch.equal(end(0.25, 1), end(0.25, 9))


def test_a_lost_life_is_terminal_to_what_learns_and_to_nothing_else() -> None:
    """Of Breakout's five lives the last one ends the game."""
    env = make(Atari(game="Breakout", terminal_on_life_loss=True, sticky=0.0), 2, seed=1)
    algorithm = build(PPO, env, scale=False)
    rollout = StepCollector(env, 300).collect(algorithm.policy)
    lost, done = rollout.extra["life_lost"], rollout.done
    assert done.any() and not (lost & done).any() and not rollout.truncated.any()
    for world in range(2):
        ends = [0, *(done[:, world].nonzero().flatten() + 1).tolist()]
        assert all(lost[a:b, world].sum() == 4 for a, b in itertools.pairwise(ends))
    assert torch.equal(rollout.start[1:], done[:-1])
    assert torch.equal(algorithm.preprocess(rollout).terminated, rollout.terminated | lost)
    returns, lengths = EpisodeTracker(2, torch.device("cpu")).finished_episodes(rollout)
    assert len(returns) == done.sum() and lengths.min() > 60
    assert "life_lost" not in StepCollector(make(Atari(game="Breakout"), 2), 3).collect(algorithm.policy).extra


def test_an_unknown_game_is_answered_with_those_that_are_near() -> None:
    with pytest.raises(ValueError, match="no environment 'ALE/Qbertt-v5'; did you mean ALE/Qbert-v5"):
        make(Atari(game="Qbertt"), 1)


def test_a_method_learns_from_clipped_rewards_and_returns_are_not_clipped() -> None:
    env = PointMass(4, max_episode_steps=5)
    algorithm = build(PPO, env, scale=False, reward_scale=ClipReward(4, 0.25))
    rollout = collector(algorithm, env).collect(algorithm.policy)
    assert rollout.reward.abs().max() > 0.25
    learned = algorithm.preprocess(rollout).reward
    torch.testing.assert_close(learned, rollout.reward.clamp(-0.25, 0.25), rtol=0, atol=0)
    returns, lengths = EpisodeTracker(4, torch.device("cpu")).finished_episodes(rollout)
    assert (lengths == 5).all() and returns[0] == rollout.reward[:5, 0].double().sum()


def test_the_recipe_is_that_of_games_and_their_evaluation_is_of_whole_ones(command: Cli) -> None:  # noqa: F811
    small = ["num_envs=4", "horizon=8", "total_steps=64", "env.max_episode_steps=40", "algo.minibatches=1"]
    code, out, err = command("train", "env=atari", "env.game=MsPacman", *small, "hydra.run.dir=run")
    assert code == 0, err
    assert "recipe ppo-atari\n" in out and "rewards clipped to +-1" in out and "critic on the same body" in out
    code, out, err = command("evaluate", "run=run", "episodes=2", "deterministic=false")
    assert code == 0 and "40.0 steps each" in out, err
