"""Collecting beside learning: one update behind, corrected, and as reproducible as one after the other."""

import copy
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import kills
import pytest
import torch
from test_cli import TINY, Cli, command  # noqa: F401
from torch import Tensor
from toys import ALL, BRIEF, PointMass, build, collector, compile_by, mostly_long, put_back_alike

from pgsuite import distributed
from pgsuite.algorithms import A2C, NPG, PPO, TRPO, Algorithm, PPOPenalty, Reinforce
from pgsuite.algorithms.estimators import GRPO, RLOO, MonteCarlo, NStep, TDLambda, VTrace
from pgsuite.envs import make
from pgsuite.envs.base import NotFiniteError
from pgsuite.execution.modes import execute
from pgsuite.rlhf.generation import GenerationCollector
from pgsuite.rollout import OverlappedCollector, StepCollector
from pgsuite.training.recovery import Recovery, clone
from pgsuite.training.trainer import Trainer
from pgsuite.types import Rollout, Step

CORRECTED: list[tuple[type[Algorithm], str]] = [
    *((cls, "none") for cls in (A2C, PPO, PPOPenalty, NPG, TRPO)),
    *((cls, "lstm") for cls in (A2C, PPO, NPG)),
]


def overlapped(algorithm: Any, env: Any, seed: int = 0) -> OverlappedCollector:
    return OverlappedCollector(collector(algorithm, env, seed=seed), algorithm.policy)


def trainer_of(cls: type[Algorithm], recurrent: str, seed: int = 0, **parts: Any) -> Trainer:
    env = PointMass(4, seed=seed)
    algorithm = build(cls, env, seed=seed, recurrent=recurrent, look={"recurrent": recurrent}, **BRIEF[cls])
    return Trainer(algorithm, overlapped(algorithm, env, seed), 10_000, **parts)


@pytest.mark.parametrize(("cls", "recurrent"), CORRECTED)
def test_two_threads_do_what_one_would_that_collects_before_it_learns(cls: type[Algorithm], recurrent: str) -> None:
    beside, env = trainer_of(cls, recurrent), PointMass(4)
    algorithm = build(cls, env, recurrent=recurrent, look={"recurrent": recurrent}, **BRIEF[cls])
    steps, actor = collector(algorithm, env), copy.deepcopy(algorithm.policy)
    ready = steps.collect(actor).map(torch.clone)
    for i in range(4):
        actor.load_state_dict(algorithm.policy.state_dict())
        following = steps.collect(actor).map(torch.clone)
        with torch.no_grad():
            logp = algorithm.policy.dist(ready).log_prob(ready.action)
        weight = (logp - ready.logp).exp()
        assert (float((weight - 1).abs().max()) < 1e-5) == (i == 0)
        algorithm.update_schedules(beside.steps / beside.total_steps)
        algorithm.train_on(replace(ready, logp=logp, extra={"weight": weight}))
        beside.step()
        assert not kills.differences(algorithm.state_dict(), beside.algorithm.state_dict())
        ready = following


@pytest.mark.parametrize("cls", [A2C, PPO, TRPO])
def test_a_seed_decides_everything(cls: type[Algorithm]) -> None:
    """On physics that has threads of its own."""
    ends = []
    for _ in range(2):
        env = make("HalfCheetah", 8, max_episode_steps=30, threads=2)
        algorithm = build(cls, env, **BRIEF[cls])
        trainer = Trainer(algorithm, overlapped(algorithm, env), 10_000)
        for _ in range(5):
            trainer.step()
        ends.append(trainer.training_state())
    assert not kills.differences(*ends)


@pytest.mark.parametrize(("cls", "recurrent"), mostly_long(CORRECTED, (PPO, "none"), (NPG, "none"), (A2C, "lstm")))
def test_a_trainer_put_back_does_what_it_would_have_done(cls: type[Algorithm], recurrent: str, tmp_path: Path) -> None:
    """Saved before anything, and with a rollout under way."""
    one, two = trainer_of(cls, recurrent, 1), trainer_of(cls, recurrent, 2)
    for turns in (0, 3):
        for _ in range(turns):
            one.step()
        put_back_alike(one, two, tmp_path / "x.pt")


@pytest.mark.long
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    assert not kills.survive("ppo-overlap", 1, tmp_path)


class Breaks(PointMass):
    """Gives up at its ``when``-th step, or lets the reward of that step be no number."""

    when, raises, steps = 0, False, 0

    def step(self, action: Tensor) -> Step:
        self.steps += 1
        step = super().step(action)
        if self.steps != self.when:
            return step
        if self.raises:
            raise NotFiniteError(f"toy broke at step {self.steps} in {threading.current_thread().name}")
        return step._replace(reward=step.reward * torch.nan)


def breaking(raises: bool, **parts: Any) -> Trainer:
    env = Breaks(4)
    env.when, env.raises = 70, raises  # in the fourth rollout
    algorithm = build(PPO, env, **BRIEF[PPO])
    return Trainer(algorithm, overlapped(algorithm, env), 10_000, **parts)


def test_what_was_raised_while_learning_is_raised_by_the_next_rollout() -> None:
    trainer = breaking(raises=True)
    for _ in range(3):
        trainer.step()
    before = clone(trainer.training_state())
    with pytest.raises(NotFiniteError, match="toy broke at step 70 in collecting"):
        trainer.step()
    assert not kills.differences(before, trainer.training_state())


@pytest.mark.parametrize("raises", [True, False])
def test_a_run_goes_back_behind_what_is_not_finite_and_on_with_other_actions(raises: bool, tmp_path: Path) -> None:
    said: list[str] = []
    failure_handler = Recovery(tmp_path, {}, 1, said.append)
    trainer = breaking(raises, failure_handler=failure_handler)
    failure_handler.on_start(trainer)
    for _ in range(3):
        trainer.step()
    before = clone(trainer.training_state())
    trainer.step()
    allowed = ["/attempts: 0 is not 1", "/collector/inner/generator differs", "/finite_iterations: 3 is not 0"]
    allowed += ["/recoveries: 0 is not 1"]
    assert sorted(kills.differences(before, trainer.training_state())) == allowed and len(said) == 1
    trainer.step()
    assert trainer.steps > before["steps"] and bool(trainer.algorithm.finite()) and len(said) == 1


@pytest.mark.parametrize("cls", [A2C, PPO, NPG, TRPO])
def test_the_ratio_is_one_before_the_first_step_and_the_step_is_around_the_policy_that_learns(cls: Any) -> None:
    trainer = trainer_of(cls, "none")
    for _ in range(3):
        trainer.step()
    algorithm = trainer.algorithm
    rollout = algorithm.preprocess(trainer.collector.collect(algorithm.policy))
    assert float(algorithm.kl_from_behavior(rollout)) < 1e-9
    assert float((rollout.extra["weight"] - 1).abs().max()) > 1e-3
    metrics = algorithm.learn(rollout)
    assert 0 < float(metrics["effective_sample_fraction"]) < 1
    if issubclass(cls, NPG):
        assert 0 < float(metrics["kl"]) < 0.02 and float(metrics["surrogate_improvement"]) > 0


def test_cells_where_nothing_happened_have_no_weight_of_their_own() -> None:
    """Not even if what lies there is no number."""
    algorithm = build(PPO, env := PointMass(4), **BRIEF[PPO])

    class Masked(StepCollector):
        def _collect(self, policy: Any) -> Rollout:
            rollout = super()._collect(policy)
            rollout.mask[5:, 0] = False
            rollout.obs[5:, 0] = torch.nan
            return rollout

    rollouts = OverlappedCollector(Masked(env, 20), algorithm.policy)
    for _ in range(2):
        rollout = rollouts.collect(algorithm.policy)
        assert bool((rollout.extra["weight"][5:, 0] == 1).all()) and bool(rollout.extra["weight"].isfinite().all())
        assert bool(algorithm.compute_advantages(algorithm.preprocess(rollout)).logp.isfinite().all())


@pytest.mark.parametrize("estimator", [NStep(), MonteCarlo(), RLOO(group=2), GRPO(group=2)])
def test_credit_that_cannot_be_corrected_is_refused(estimator: Any) -> None:
    algorithm = build(PPO, env := PointMass(4), estimator=estimator)
    with pytest.raises(ValueError, match=f"{type(estimator).__name__} counts .* take algo/estimator=gae, td_lambda or"):
        algorithm.validate(overlapped(algorithm, env))
    algorithm.validate(collector(algorithm, env))


def test_generated_texts_and_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = build(PPO, env := PointMass(4))
    texts = GenerationCollector.__new__(GenerationCollector)
    with pytest.raises(ValueError, match="env=rlhf's are not: leave it out"):
        OverlappedCollector(texts, algorithm.policy)
    monkeypatch.setattr(distributed, "size", lambda: 2)
    with pytest.raises(ValueError, match="for one process: leave torchrun"):
        overlapped(algorithm, env)


def test_whole_episodes_are_refused() -> None:
    algorithm = build(Reinforce, env := PointMass(4))
    with pytest.raises(ValueError, match="Reinforce is right only about what its own policy did: leave it out"):
        algorithm.validate(overlapped(algorithm, env))
    assert [cls for cls in ALL if not cls.supports_off_policy] == [Reinforce]


@pytest.mark.parametrize("estimator", [TDLambda(), VTrace(rho_clip=1.1)])
def test_advantages_are_weighted_up_to_the_estimators_clip(estimator: Any) -> None:
    """V-trace's rho-bar bounds the weights that the objective sees; lambda returns leave them as they are."""
    algorithm = build(A2C, env := PointMass(4), estimator=estimator)
    rollout = collector(algorithm, env).collect(algorithm.policy)
    weight = torch.linspace(0.5, 2.0, rollout.mask.numel()).view_as(rollout.reward)
    batch = algorithm.compute_advantages(replace(rollout, extra={"weight": weight}))
    assert torch.equal(batch.extra["weight"], weight.clamp(max=estimator.rho_clip))
    assert (batch.extra["weight"].max() < 1.2) == isinstance(estimator, VTrace)


@pytest.mark.parametrize("estimator", [TDLambda(lam=0.9), VTrace(lam=0.9)])
def test_where_the_ratio_is_one_the_correction_is_none(estimator: Any) -> None:
    algorithm = build(A2C, env := PointMass(4), estimator=estimator)
    rollout = collector(algorithm, env).collect(algorithm.policy)
    with torch.no_grad():
        values = algorithm.critic.values_and_next_values(rollout)
    on_policy, off_policy = (
        estimator(rollout, *values, ratio, gamma=0.9) for ratio in (None, torch.ones_like(values[0]))
    )
    for plain, corrected in zip(on_policy, off_policy, strict=True):
        assert torch.allclose(plain, corrected, atol=1e-5)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_acting_in_the_thread_is_eager_acting(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_by("aot_eager", monkeypatch)
    ends = []
    for how in ("eager", "compile"):
        env = make("Pendulum", 8, max_episode_steps=16)
        algorithm = build(PPO, env, **BRIEF[PPO])
        algorithm.minibatches = 2
        rollouts = overlapped(algorithm, env)
        execute(algorithm, rollouts, how)  # pyright: ignore[reportArgumentType]
        for i in range(6):
            algorithm.minibatches = 2 if i < 3 else 4  # other shapes, which are traced while a rollout is under way
            algorithm.iterate(rollouts)
        ends.append(torch.cat([x.flatten() for x in algorithm.policy.parameters()]))
    assert torch.allclose(*ends, atol=1e-4)


def test_what_cannot_run_beside_learning_is_refused_by_name(command: Cli) -> None:  # noqa: F811
    for arguments, said in (
        (["algo=reinforce", *TINY[2:3]], "Reinforce is right only"),
        ([*TINY, "algo/estimator=n_step"], "NStep counts"),
        ([*TINY, "execution=cuda_graph"], "overlap=true and execution=cuda_graph exclude each other"),
    ):
        code, _, err = command("train", "env=CartPole", "overlap=true", *arguments)
        assert code == 1 and said in err and err.count("\n") == 1


@pytest.mark.long
def test_a_run_says_that_it_collects_beside_learning_and_can_be_looked_into(command: Cli) -> None:  # noqa: F811
    long = ["total_steps=1600", "evaluation.every=800", "evaluation.episodes=2"]
    code, out, _ = command("train", "env=CartPole", *TINY, "overlap=true", "profile=true", *long)
    assert code == 0 and "collecting beside learning" in out and "  environments" in out
    (run,) = (command.folder / "runs" / "ppo-CartPole").iterdir()
    columns = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"time/waiting", "algorithm/effective_sample_fraction"} <= {*columns}
