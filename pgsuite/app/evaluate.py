"""Evaluation of policies on the CPU, by one whole episode in each environment."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from gymnasium import spaces
from omegaconf import DictConfig

from pgsuite import seeding, settings
from pgsuite.app.build import build_env, instantiate, parse_run_config, to_dict, versions
from pgsuite.app.demonstrations import Recording
from pgsuite.app.policy_io import Restored, restore
from pgsuite.app.schema import Run, locate
from pgsuite.envs import Gym, VectorEnv
from pgsuite.envs.base import channels_of
from pgsuite.errors import UserError, counted
from pgsuite.files import write_text
from pgsuite.nn.policy import Policy
from pgsuite.settings import Count, Natural
from pgsuite.training import checkpoint
from pgsuite.training.callbacks import EvaluationStoppedError, Evaluator, console
from pgsuite.training.video import Gif, log_gif, open_camera, record_video
from pgsuite.trust import Trust, within
from pgsuite.types import Obs, Step

UNLIMITED = 30_000  # steps of an episode that no time limit ends, after which it is cut


@dataclass(kw_only=True)
class EvaluateConfig:
    """The settings of an evaluation."""

    run: str = ""  # a run directory, or one checkpoint of it
    episodes: Count = 20  # whole episodes, one in each of as many environments
    max_steps: Count | None = None  # steps after which an episode is cut; null is its time limit, or without one 30,000
    deterministic: bool = True  # take the mode of the policy's distributions; false samples actions
    seed: Natural = 0  # of the environments, and of sampled actions
    video: str | None = None  # video of the first episode: a file, .mp4 or .gif, or tensorboard
    record: str | None = None  # file of the episodes, .npz: observations, actions and rewards, for behavior cloning
    trust: Trust = False  # classes from outside pgsuite that a run of another user may name; true for any
    env: dict[str, Any] = field(
        default_factory=dict
    )  # settings of the environment other than the run's: env.options.x=5

    def __post_init__(self) -> None:
        settings.check(self, label="")
        if self.record is not None and not self.record.endswith(".npz"):
            raise ValueError(f"record must be the name of a .npz file, got {self.record!r}")
        if not self.run:
            raise ValueError("run must be a run directory, such as run=runs/ppo-HalfCheetah/...")


class Played(NamedTuple):
    """Episodes, one of each environment."""

    returns: torch.Tensor  # [N]
    lengths: torch.Tensor  # [N]
    cut: int  # number of episodes that had not ended after ``limit`` steps
    limit: int
    channels: dict[str, torch.Tensor]  # sums [N] of each channel

    def said(self) -> str:
        """What was cut, in words; empty if nothing was."""
        if not self.cut:
            return ""
        return f"{self.cut} of {counted(len(self.returns), 'episode')} cut at {self.limit:,} steps (max_steps)"


class Progress:
    """Prints the progress of an evaluation every few ``seconds``; one that is filmed may take long."""

    def __init__(self, what: str, say: Callable[[str], object], seconds: float = 10.0) -> None:
        self.what, self.say, self.seconds, self.last = what, say, seconds, perf_counter()

    def __call__(self, steps: int, live: torch.Tensor) -> None:
        if perf_counter() - self.last > self.seconds:
            self.say(f"{self.what}: {steps:,} steps, {int(live.sum())} of {counted(len(live), 'episode')} under way")
            self.last = perf_counter()


@torch.no_grad()
def play(
    policy: Policy,
    env: VectorEnv,
    generator: torch.Generator,
    *,
    deterministic: bool,
    max_steps: int | None = None,
    watch: Callable[[], None] = lambda: None,
    record: Callable[[Obs, torch.Tensor, Step, torch.Tensor], object] = lambda obs, action, step, live: None,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int, torch.Tensor], None] = lambda steps, live: None,
) -> Played:
    """Play one whole episode in every environment, or ``max_steps`` of its steps; None takes the time limit, or
    ``UNLIMITED`` without one.

    The first N episodes to finish would be a sample biased towards short ones.  ``watch`` is called before each step
    of the first environment's episode, ``record`` after each step with the observation, the action, the step and which
    episodes were under way, and ``progress`` before each step, with the number of steps so far and which episodes are
    under way.  Raises EvaluationStoppedError once ``stop()`` is true.
    """
    obs, hidden_state = env.reset(), policy.initial_state(env.num_envs)
    start = torch.ones(env.num_envs, dtype=torch.bool, device=env.device)
    live, returns = start.clone(), torch.zeros(env.num_envs, dtype=torch.float64, device=env.device)
    lengths, limit = torch.zeros_like(returns), max_steps or env.max_episode_steps or UNLIMITED
    channels = {name: torch.zeros_like(returns) for name in channels_of(env)}
    for steps in range(limit):
        if not bool(live.any()):
            break
        if stop():
            raise EvaluationStoppedError
        progress(steps, live)
        if bool(live[0]):
            watch()
        choice = policy.act(obs, hidden_state, start, generator, deterministic=deterministic)
        step = env.step(choice.action)
        record(obs, choice.action, step, live)
        returns += step.reward.double().where(live, 0.0)
        lengths += live
        for name, sums in channels.items():
            assert step.channels is not None
            sums += step.channels[name].double().where(live, 0.0)
        start = step.done
        live = live & ~start
        obs, hidden_state = step.obs, choice.hidden_state
    return Played(returns, lengths, int(live.sum()), limit, channels)


def make_eval_env(run: Run, episodes: int, *, film: bool) -> VectorEnv:
    """Environments of an evaluation, on the CPU, where ``auto`` is the float64 back end; able to render if they are to
    be filmed."""
    run, cpu = replace(run, backend="auto"), torch.device("cpu")
    if film and locate(run.env["_target_"], "env") is Gym and not run.env["native"]:
        run = replace(run, env=run.env | {"workers": 0})  # rendering takes place in this process
        first: Any = build_env(run, 1, cpu)
        if "rgb_array" in (first.vec.metadata.get("render_modes") or ()):
            run = replace(run, env=run.env | {"options": run.env["options"] | {"render_mode": "rgb_array"}})
    return build_env(run, episodes, cpu)


def make_evaluator(run: Run, folder: Path, show: Callable[[Gif, int], None], say: Callable[[str], object]) -> Evaluator:
    """The evaluator of a run during training; ``say`` is called with lines on its progress, and on episodes that were
    cut.  Raises UserError, before any step, if the environments cannot be made or not be rendered."""
    wanted, stream = run.evaluation, "evaluation"
    own = replace(run, seed=seeding.number(run.seed, stream))

    def place(steps: int) -> str:
        if wanted.video == "tensorboard":
            return "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder / f"{steps:012d}.{wanted.video}")

    if wanted.video_every is not None:
        open_camera(make_eval_env(own, 1, film=True), place(0))

    def play_both(policy: Policy, steps: int, film: bool, stop: Callable[[], bool]) -> dict[str, float]:
        env, generator = make_eval_env(own, wanted.episodes, film=film), seeding.generator(run.seed, stream)
        policy, found = policy.to(env.device), {}
        for prefix, deterministic in (("", True), ("stochastic_", False)):
            shot, doing = unseen(), f"evaluation at {steps:,} steps"
            if film and deterministic:
                shot, doing = record_video(env, place(steps), lambda gif: show(gif, steps), say), f"filmed {doing}"
            with shot as watch:
                modes = {"deterministic": deterministic, "max_steps": wanted.max_steps}
                progress = Progress(doing, say)
                played = play(policy, env, generator, **modes, watch=watch, stop=stop, progress=progress)
            if played.cut:
                say(f"evaluation at {steps:,} steps: {played.said()}")
            found |= {
                f"{prefix}return": float(played.returns.mean()),
                f"{prefix}return_std": float(played.returns.std(correction=0)),
                f"{prefix}length": float(played.lengths.mean()),
                f"{prefix}cut": float(played.cut),
            }
            found |= {f"{prefix}{name}": float(sums.mean()) for name, sums in played.channels.items()}
        return found

    return play_both


def merged(own: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Settings, with others in their place, at any depth."""
    both = {
        key: merged(own[key], x) for key, x in given.items() if isinstance(x, dict) and isinstance(own.get(key), dict)
    }
    return own | given | both


def numbers(space: spaces.Space[Any]) -> Any:
    """What the networks of a policy depend on in a space: not its bounds."""
    if isinstance(space, spaces.Dict):
        return {key: numbers(part) for key, part in space.items()}
    return type(space), space.shape, str(getattr(space, "n", None)), str(getattr(space, "nvec", None))


def unseen() -> nullcontext[Callable[[], None]]:
    return nullcontext(lambda: None)


def evaluate(cfg: DictConfig) -> None:
    """Evaluate the newest checkpoint of a run and write evaluation.json to the run directory.  Raises UserError."""
    say = console().print
    say(evaluate_policy(instantiate(to_dict(cfg), "the evaluation"), say, say)[1])


def evaluate_policy(
    wanted: EvaluateConfig,
    say: Callable[[str], object] = warnings.warn,
    tell: Callable[[str], object] = lambda line: None,
) -> tuple[dict[str, Any], str]:
    """Evaluate the newest checkpoint of a run and write evaluation.json to the run directory; returns its contents and
    a summary line.

    ``say`` is called with a line on each damaged checkpoint that is skipped and on a film that shows nothing, and
    ``tell`` with lines on the progress.  Raises UserError.
    """
    restored = restore(wanted.run, say, trust=wanted.trust)
    with within(restored.source):
        return _evaluate(wanted, restored, say, tell)


def _evaluate(
    wanted: EvaluateConfig, restored: Restored, say: Callable[[str], object], tell: Callable[[str], object]
) -> tuple[dict[str, Any], str]:
    run = parse_run_config(restored.config)
    run = replace(run, seed=wanted.seed, env=merged(run.env, wanted.env))
    torch.set_num_threads(int(run.torch_threads))
    env = make_eval_env(run, wanted.episodes, film=wanted.video is not None)
    trained = {"observations": restored.policy.obs_norm.space, "actions": restored.interface.action_space}
    for name, here in (("observations", env.observation_space), ("actions", env.action_space)):
        if numbers(here) != numbers(trained[name]):
            raise UserError(f"{env.name} has {name} {here}, and the policy was trained with {trained[name]}")
    generator = seeding.generator(wanted.seed, "acting")
    folder = checkpoint.run_of(restored.path)

    def show(film: Gif) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        with SummaryWriter(str(folder)) as writer:
            log_gif(writer, film, restored.steps)

    with record_video(env, wanted.video, show, say) if wanted.video is not None else unseen() as watch:
        modes = {"deterministic": wanted.deterministic, "max_steps": wanted.max_steps}
        progress = Progress("evaluation" if wanted.video is None else f"filming to {wanted.video}", tell)
        recording = None if wanted.record is None else Recording(wanted.record)
        record = recording or (lambda obs, action, step, live: None)
        played = play(restored.policy, env, generator, **modes, watch=watch, record=record, progress=progress)
    if recording is not None:
        recording.write()
    returns, lengths = played.returns, played.lengths
    mean, std = float(returns.mean()), float(returns.std(correction=0))
    result: dict[str, Any] = {
        "checkpoint": restored.path.name,
        "steps": restored.steps,
        "episodes": wanted.episodes,
        "deterministic": wanted.deterministic,
        "seed": wanted.seed,
        "env": wanted.env,
        "return_mean": mean,
        "return_std": std,
        "returns": returns.tolist(),
        "lengths": lengths.tolist(),
        "channels": {name: sums.tolist() for name, sums in played.channels.items()},
        "cut": played.cut,
        "backend": env.backend,
        "versions": versions(),
    }
    write_text(folder / "evaluation.json", json.dumps(result, indent=2) + "\n")
    how = "deterministic" if wanted.deterministic else "stochastic"
    words = [
        f"return {mean:,.1f} +- {std:,.1f} over {counted(wanted.episodes, f'{how} episode')}",
        *(f"{name} {float(sums.mean()):,.1f}" for name, sums in played.channels.items()),
        f"{float(lengths.mean()):,.1f} steps each",
        played.said(),
        env.description,
        f"checkpoint at {restored.steps:,} steps",
        f"film in {wanted.video}" if wanted.video is not None else "",
        f"episodes in {wanted.record}" if wanted.record is not None else "",
    ]
    return result, " | ".join(filter(None, words))


def main() -> None:
    """The command line."""
    from pgsuite.app import cli  # which configures Hydra

    cli.main(evaluate, "evaluate")
