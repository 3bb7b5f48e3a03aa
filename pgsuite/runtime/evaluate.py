"""How good a policy is: whole episodes, a fixed number per environment, on the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from pgsuite import seeding, settings
from pgsuite.envs import Gym, VectorEnv
from pgsuite.nn.policy import Policy
from pgsuite.runtime import checkpoint
from pgsuite.runtime.build import build_env, build_networks, construct, container, settings_of, versions
from pgsuite.runtime.callbacks import console
from pgsuite.runtime.schema import UserError, locate
from pgsuite.runtime.video import filming
from pgsuite.settings import Count, Natural


@dataclass(kw_only=True)
class Evaluation:
    """The settings of an evaluation."""

    run: str = ""  # a run directory, or one checkpoint of it
    episodes: Count = 20
    deterministic: bool = True
    seed: Natural = 0
    video: str | None = None  # of the first episode: a file, mp4 or GIF by its suffix, or tensorboard

    def __post_init__(self) -> None:
        settings.check(self, label="")
        if not self.run:
            raise ValueError("run must be a run directory, such as run=runs/ppo-HalfCheetah/...")


@torch.no_grad()
def play(
    policy: Policy,
    env: VectorEnv,
    generator: torch.Generator,
    *,
    deterministic: bool,
    watch: Callable[[], None] = lambda: None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return and length, each [N], of one whole episode in every environment.

    One each, rather than the first that happen to finish, so that short episodes are not favoured.  ``watch`` is
    called before each step of the first environment's.
    """
    obs, memory = env.reset(), policy.blank(env.num_envs)
    start = torch.ones(env.num_envs, dtype=torch.bool, device=env.device)
    live, returns = start.clone(), torch.zeros(env.num_envs, dtype=torch.float64, device=env.device)
    lengths = torch.zeros_like(returns)
    while bool(live.any()):
        if bool(live[0]):
            watch()
        choice = policy.act(obs, memory, start, generator, deterministic=deterministic)
        step = env.step(choice.action)
        returns += step.reward.double().where(live, 0.0)
        lengths += live
        start = step.done
        live = live & ~start
        obs, memory = step.obs, choice.memory
    return returns, lengths


def evaluate(cfg: DictConfig) -> None:
    """Play the newest checkpoint of a run and write evaluation.json beside it.  Raises UserError."""
    wanted: Evaluation = construct(container(cfg), "the evaluation")
    given = Path(wanted.run)
    path = given if given.suffix == ".pt" else checkpoint.latest(given)
    state = checkpoint.load(path)
    if missing := {"config", "steps", "algorithm"} - state.keys():
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}: it is no checkpoint of a run")
    trained = DictConfig(state["config"])
    # On a CPU, auto is the float64 back end; the seed is the evaluation's own.
    run = replace(settings_of(trained), backend="auto", seed=wanted.seed)
    torch.set_num_threads(run.torch_threads)
    cpu = torch.device("cpu")
    if wanted.video is not None and locate(trained.env._target_) is Gym and not trained.env.native:
        trained.env.workers = 0  # it draws itself in this process, if it can
        first: Any = build_env(trained, run, 1, cpu)
        if "rgb_array" in first.vec.metadata.get("render_modes", ()):
            trained.env.options.render_mode = "rgb_array"
    env = build_env(trained, run, wanted.episodes, cpu)
    policy, _ = build_networks(env, run)
    try:
        policy.load_state_dict(state["algorithm"]["policy"])
    except (RuntimeError, KeyError) as error:
        raise UserError(f"{path} does not fit the networks of its own configuration: {error}") from error
    generator = seeding.generator(wanted.seed, "acting")
    folder = path.parent.parent if path.parent.name == checkpoint.FOLDER else path.parent
    film = filming(env, wanted.video, folder, state["steps"]) if wanted.video is not None else nullcontext(lambda: None)
    with film as watch:
        returns, lengths = play(policy, env, generator, deterministic=wanted.deterministic, watch=watch)
    mean, std = float(returns.mean()), float(returns.std(correction=0))
    result: dict[str, Any] = {
        "checkpoint": path.name,
        "steps": state["steps"],
        "episodes": wanted.episodes,
        "deterministic": wanted.deterministic,
        "seed": wanted.seed,
        "return_mean": mean,
        "return_std": std,
        "returns": returns.tolist(),
        "lengths": lengths.tolist(),
        "backend": env.backend,
        "versions": versions(),
    }
    (folder / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    how = "deterministic" if wanted.deterministic else "stochastic"
    console().print(
        f"return {mean:,.1f} +- {std:,.1f} over {wanted.episodes} {how} episodes | "
        f"{float(lengths.mean()):,.1f} steps each | "
        f"{env.description} | checkpoint at {state['steps']:,} steps",
        highlight=False,
    )
