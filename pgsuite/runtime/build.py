"""From a composed configuration to a trainer."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

import pgsuite
from pgsuite.algorithms.base import Algorithm
from pgsuite.envs import VectorEnv, make
from pgsuite.nn.normalize import RewardScale, Standardize
from pgsuite.nn.policy import Critic, Policy
from pgsuite.runtime.schema import Network, Run, UserError, locate
from pgsuite.runtime.trainer import Trainer
from pgsuite.settings import closest


@dataclass
class Seeds:
    """Independent streams for a run's sources of randomness, from its one seed."""

    init: int
    minibatches: int
    acting: int
    env: int

    @classmethod
    def of(cls, seed: int) -> Seeds:
        generator = torch.Generator().manual_seed(seed)
        return cls(*torch.randint(2**62, (4,), generator=generator).tolist())


def settings_of(cfg: DictConfig) -> Run:
    """The settings outside method and environment, checked.  Raises UserError."""
    try:
        nodes = {key: instantiate(cfg[key], _convert_="all") for key in ("policy", "critic")}
        plain = {str(key): value for key, value in container(cfg).items() if key != "_target_"}
        for key in plain.keys() - Run.__dataclass_fields__.keys():
            raise UserError(f"no setting {key!r}; {closest(key, Run.__dataclass_fields__)}")
        return Run(**plain | nodes)
    except Exception as error:
        raise user_error(error) from error


def container(cfg: DictConfig) -> dict[Any, Any]:
    """A configuration as plain dictionaries, lists, words and numbers."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    return plain


def user_error(error: Exception) -> Exception:
    """What Hydra wraps around a complaint of ours about a value, taken off; anything else as it is."""
    cause = error.__cause__ if error.__cause__ is not None else error
    return UserError(str(cause)) if isinstance(cause, ValueError) else error


def pick_device(name: str) -> torch.device:
    """auto is CUDA where there is one.  Raises UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"no device {name!r}: auto, cpu, cuda or cuda:<number>") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"no device {name!r}: auto, cpu, cuda or cuda:<number>")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={name}, but torch {torch.__version__} sees no CUDA device: use device=cpu or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={name}, but there are only {torch.cuda.device_count()} CUDA devices")
    return device


def build_env(cfg: DictConfig, run: Run, num_envs: int, device: torch.device, seed: int) -> VectorEnv:
    """The environments of a configuration.  Raises UserError for options that make no sense."""
    try:
        task = instantiate(cfg.env, _convert_="all")
        return make(task, num_envs, device=device, backend=run.backend, threads=run.env_threads, seed=seed)
    except Exception as error:
        raise user_error(error) from error


def build_networks(env: VectorEnv, run: Run, seed: int) -> tuple[Policy, Critic]:
    """Policy and critic, on the environments' device, sharing their observation statistics."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device starts alike
    norm = Standardize(env.observation_space.shape or (), enabled=run.standardize_obs)
    try:
        policy = Policy(
            norm,
            env.action_space,
            hidden=run.policy.hidden,
            activation=run.policy.activation,
            log_sigma=run.policy.log_sigma,
            generator=generator,
        )
    except ValueError as error:
        raise UserError(f"{env.name}: {error}") from error
    critic = Critic(norm, hidden=run.critic.hidden, activation=run.critic.activation, generator=generator)
    return policy.to(env.device), critic.to(env.device)


def build(cfg: DictConfig) -> Trainer:
    """A trainer without callbacks.  Raises UserError for what cannot work, before any step is made."""
    run = settings_of(cfg)
    torch.set_num_threads(run.torch_threads)
    seeds, device = Seeds.of(run.seed), pick_device(run.device)
    env = build_env(cfg, run, run.num_envs, device, seeds.env)
    policy, critic = build_networks(env, run, seeds.init)
    try:
        make_algorithm = instantiate(cfg.algo, _partial_=True, _convert_="all")
        parts: dict[str, Any] = {
            "policy": policy,
            "critic": critic,
            "generator": torch.Generator(device).manual_seed(seeds.minibatches),
        }
        if run.scale_reward:
            parts["reward_scale"] = RewardScale(run.num_envs, cfg.algo.gamma).to(device)
        wanted = locate(cfg.algo._target_).__dataclass_fields__  # pyright: ignore[reportAttributeAccessIssue]
        algorithm: Algorithm = make_algorithm(**{name: part for name, part in parts.items() if name in wanted})
        horizon = env.max_episode_steps if run.horizon is None else run.horizon
        collector = algorithm.collector(env, horizon, seeds.acting)
        return Trainer(algorithm, collector, run.total_steps)
    except Exception as error:
        raise user_error(error) from error


def describe(trainer: Trainer, run: Run) -> tuple[str, str]:
    """One line on the environment, one on the networks."""
    policy, env = trainer.algorithm.policy, trainer.collector.env
    size = (env.observation_space.shape or (0,))[0]

    def chain(network: Network, out: int) -> str:
        return "-".join(map(str, (size, *network.hidden, out))) + f" {network.activation}"

    out = next(m for m in reversed(list(policy.net)) if isinstance(m, nn.Linear)).out_features
    head = type(policy.head).__name__.removesuffix("Head").lower()
    modules = {
        id(p): p.numel()
        for part in vars(trainer.algorithm).values()
        if isinstance(part, nn.Module)
        for p in part.parameters()
    }
    extras = [
        name
        for name, on in (
            ("observations standardized", run.standardize_obs),
            ("rewards scaled", run.scale_reward),
        )
        if on
    ]
    networks = f"policy {chain(run.policy, out)}, {head}"
    if getattr(trainer.algorithm, "critic", None) is not None:
        networks += f" | critic {chain(run.critic, 1)}"
    return f"env {env.description}", " | ".join(
        [networks, f"{sum(modules.values()):,} parameters on {env.device}", *extras]
    )


def versions() -> dict[str, str]:
    """Of everything that a result depends on."""
    found = {"python": platform.python_version(), "pgsuite": pgsuite.__version__}
    for package in ("torch", "gymnasium", "mujoco", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found
