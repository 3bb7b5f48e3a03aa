"""Construction of a trainer from a composed configuration."""

from __future__ import annotations

import hashlib
import keyword
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import MISSING, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from gymnasium import spaces
from omegaconf import DictConfig, OmegaConf
from torch import nn

from pgsuite import distributed, seeding
from pgsuite.algorithms.base import ActorCritic, Algorithm
from pgsuite.algorithms.channels import Channel, Channels
from pgsuite.algorithms.reference import Reference
from pgsuite.algorithms.symmetry import Symmetry
from pgsuite.app.schema import Run, locate
from pgsuite.components import is_component, make_component
from pgsuite.envs import VectorEnv, make
from pgsuite.envs.base import VectorEnvConfig
from pgsuite.envs.mirrors import MIRRORS, Mirror
from pgsuite.envs.spaces import to_data
from pgsuite.envs.tasks import Task
from pgsuite.errors import UserError, counted
from pgsuite.execution.modes import execute
from pgsuite.execution.precision import lower
from pgsuite.nn.network import Body, Features, Network
from pgsuite.nn.normalize import ClipReward, RewardScale, Standardize, WhitenReward, is_screen
from pgsuite.nn.policy import Critic, Policy
from pgsuite.rollout import OverlappedCollector
from pgsuite.settings import closest
from pgsuite.training.run_dir import Logger
from pgsuite.training.trainer import Callback, Trainer
from pgsuite.version import __version__


def to_dict(cfg: DictConfig) -> dict[str, Any]:
    """A configuration as plain dictionaries, lists, strings and numbers, with interpolations resolved."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def instantiate(settings: Any, where: str, base: Any = object, **parts: Any) -> Any:
    """Construct the dataclass that settings name in ``_target_``, which is a ``base``, from the settings and from the
    ``parts`` for which it has fields.

    Null is replaced by the default of fields with a default factory, such as an estimator.  Raises UserError for
    another class, unknown settings, and in place of a ValueError of the class.
    """
    if not isinstance(settings, dict):
        raise UserError(f"{where} must be settings by name, such as {where}.<name>=..., got {settings!r}")
    if "_target_" not in settings:
        raise UserError(f"{where} names no class: its configuration needs /schema/<package.Class> in its defaults list")
    cls, bases = locate(settings["_target_"], where), _classes(base)
    if not issubclass(cls, bases):
        names = " or ".join(f"{x.__module__}.{x.__qualname__}" for x in bases)
        raise UserError(f"{where}: {settings['_target_']} is no {names}")
    known, arguments, hints = {f.name: f for f in fields(cls) if f.init}, {}, get_type_hints(cls, include_extras=True)
    for key, value in settings.items():
        name = f"{key}_" if keyword.iskeyword(key) else key
        if isinstance(value, dict) and "_target_" in value and not is_component(hints.get(name)):
            arguments[name] = instantiate(value, f"{where}.{key}", hints.get(name, object))
        elif name in known and not (value is None and known[name].default_factory is not MISSING):
            arguments[name] = value
        elif name not in known and key != "_target_":
            raise UserError(f"no setting {key!r} in {where}; {closest(key, known.keys() - parts.keys())}")
    try:
        return cls(**arguments, **{name: part for name, part in parts.items() if name in known})
    except ValueError as error:
        raise UserError(str(error)) from error


def _classes(hint: Any) -> tuple[type, ...]:
    """The classes of a field of this type, without None; any for a type that is none."""
    found = tuple(x for x in get_args(hint) or (hint,) if isinstance(x, type) and x is not type(None))
    return found or (object,)


def parse_run_config(config: dict[str, Any]) -> Run:
    """Parse and validate the settings of a run.  Those of method and environment stay dictionaries until they are
    built.  Raises UserError."""
    plain = dict(config)
    parts = [f.name for f in fields(Run) if f.default_factory not in (MISSING, dict) and f.name in plain]
    hints = get_type_hints(Run)
    nodes = {name: instantiate(plain.pop(name), name, hints[name]) for name in parts}
    for group, base in (("callbacks", Callback), ("loggers", Logger)):
        nodes[group] = {
            name: instantiate(x, f"{group}.{name}", base) for name, x in (plain.pop(group, None) or {}).items()
        }
    run: Run = instantiate(plain | {"algo": None, "env": None}, "the configuration", Run, **nodes)
    return replace(run, algo=config["algo"], env=config["env"])


def pick_device(name: str) -> torch.device:
    """The device of this process.  ``auto`` is CUDA if available, else the CPU; of several processes on a machine, each
    takes another CUDA device.  Raises UserError for a device that is not available."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"no device {name!r}: auto, cpu, cuda or cuda:<number>") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"no device {name!r}: auto, cpu, cuda or cuda:<number>")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={name}, but torch {torch.__version__} sees no CUDA device: use device=cpu or auto")
    processes, devices = distributed.local_size(), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= devices:
        raise UserError(f"device={name}, but there are only {devices} CUDA devices")
    if device.type == "cuda" and processes > 1:
        if device.index is not None:
            raise UserError(f"device={name} is one device, and {processes} processes want one each: use device=cuda")
        if processes > devices:
            raise UserError(
                f"{processes} processes want a CUDA device each, and there are {devices}: use "
                f"--nproc-per-node={devices}, or device=cpu"
            )
        device = torch.device("cuda", distributed.local_rank())
        torch.cuda.set_device(device)
    return device


def share(num_envs: int) -> int:
    """Number of environments of this process.  Raises UserError if the number of processes does not divide them."""
    processes = distributed.size()
    if num_envs % processes:
        near = [n for n in (num_envs - num_envs % processes, num_envs + -num_envs % processes) if n]
        raise UserError(
            f"num_envs={num_envs}, which counts those of all {processes} processes, does not divide among them; "
            f"near ones that do: {', '.join(map(str, near))}"
        )
    return num_envs // processes


def build_env(run: Run, num_envs: int, device: torch.device) -> VectorEnv:
    """The environments of a run.  Raises UserError for invalid options."""
    task = instantiate(run.env, "env", Task | VectorEnvConfig)
    try:
        seed = seeding.of_process(run.seed, distributed.rank())
        return make(task, num_envs, device=device, backend=run.backend, threads=run.env_threads, seed=seed)
    except ValueError as error:
        raise UserError(str(error)) from error


def observes_screens(run: Run) -> bool:
    """Whether observations are those of a screen or camera, or have such parts, where that can be seen without the
    environments of the run.  Raises UserError for invalid options."""
    task = instantiate(run.env, "env", Task | VectorEnvConfig)
    try:
        space = None if isinstance(task, Task) else task.peek()
    except ValueError as error:
        raise UserError(str(error)) from error
    parts = space.values() if isinstance(space, spaces.Dict) else [space] if space is not None else []
    return any(map(is_screen, parts))


def build_policy(
    observation_space: spaces.Space[Any], action_space: spaces.Space[Any], run: Run, generator: torch.Generator
) -> Policy:
    """A policy for these spaces of tensors.  Raises ValueError for settings that the spaces do not support."""
    obs_norm = Standardize(observation_space, run.clip_obs, run.standardize_obs)
    return run.policy.build(obs_norm, action_space, generator)


def spaces_of(env: VectorEnv) -> dict[str, Any]:
    """Spaces of observations, before they become tensors, and of actions, in the format of checkpoints."""
    return {"observation": to_data(getattr(env, "space", env.observation_space)), "action": to_data(env.action_space)}


def build_networks(env: VectorEnv, run: Run) -> tuple[Policy, Critic]:
    """Policy and critic with common observation statistics, on the environments' device."""
    generator = seeding.generator(run.seed, "networks")  # on the CPU, for equal initial parameters on every device
    try:
        policy = build_policy(env.observation_space, env.action_space, run, generator)
        of_actions = locate(run.algo["_target_"], "algo").action_values
        space = env.action_space if of_actions else None
        critic = run.critic.like(run.policy).build(policy, env.num_envs, generator, space)
    except ValueError as error:
        raise UserError(f"{env.name}: {error}") from error
    return policy.to(env.device), critic.to(env.device)


def build_channels(run: Run) -> Channels:
    """The channels from which a method learns beside the reward.  Raises UserError."""
    found = Channels()
    for name, settings in run.channels.items():
        if not isinstance(settings, dict):
            raise UserError(f"channels.{name} must be settings, such as channels.{name}.weight=0.5, got {settings!r}")
        settings = {"_target_": f"{Channel.__module__}.Channel"} | settings
        generator = seeding.generator(run.seed, f"channels.{name}")  # on the CPU, as those of the networks
        found[name] = instantiate(settings, f"channels.{name}", Channel, generator=generator)
    return found


def build_symmetry(env: VectorEnv, run: Run, bodies: Sequence[Body]) -> Symmetry | None:
    """What a run with networks of these bodies makes of a mirror symmetry; None if nothing.  Raises UserError for one
    that does not exist or fit."""
    wanted = run.symmetry
    if not wanted.augment and not wanted.coef:
        return None
    mirror = wanted.mirror
    if mirror == "task":
        tables = getattr(instantiate(run.env, "env", Task | VectorEnvConfig), "mirror", None)
        if tables is None:
            raise UserError(
                f"{env.name} has no known mirror symmetry: give symmetry.mirror={{_target_: table, observation: [...], "
                "action: [...]}, or a class by its dotted path"
            )
        mirror = {"_target_": "table", "observation": list(tables.observation), "action": list(tables.action)}
    spaces = (env.observation_space, env.action_space)
    try:
        found = make_component(mirror, MIRRORS, Mirror, "symmetry.mirror", *spaces)
        how: dict[str, Any] = {"augment": wanted.augment, "coef": wanted.coef}
        return Symmetry(found, env.action_space, **how, bodies=bodies, num_envs=env.num_envs).to(env.device)
    except ValueError as error:
        raise UserError(f"{env.name}: {error}") from error


def imitated(env: VectorEnv, run: Run) -> dict[str, Any]:
    """The teacher and the demonstrations that a run names, as parts of its method.  Raises UserError if they cannot be
    read, or if the method has no use for them."""
    from pgsuite.app import demonstrations, policy_io  # which import this module

    taken = {f.name for f in fields(locate(run.algo["_target_"], "algo"))}
    for name, algo in (("teacher", "distill"), ("demonstrations", "bc")):
        if getattr(run, name) is not None and name not in taken:
            raise UserError(f"{name}= is for algo={algo}: leave it out")
    found: dict[str, Any] = {}
    if run.teacher is not None:
        teacher = policy_io.restore(run.teacher, trust=run.trust)
        if to_data(teacher.interface.action_space) != to_data(env.action_space):
            raise UserError(
                f"{env.name} has actions {env.action_space}, and {run.teacher} was trained with "
                f"{teacher.interface.action_space}"
            )
        found["teacher"] = teacher.policy.to(env.device)
    if run.demonstrations is not None:
        found["demonstrations"] = demonstrations.load(run.demonstrations, env)
    return found


def check_memory(env: VectorEnv, horizon: int) -> None:
    """Raise UserError if the observations of a rollout would take more than all memory of the device."""
    space = env.observation_space
    parts = [part for part in (space.values() if isinstance(space, spaces.Dict) else [space]) if part.shape is not None]
    numbers = sum(math.prod(part.shape or ()) for part in parts)
    size = sum(math.prod(part.shape or ()) * (1 if part.dtype == "uint8" else 4) for part in parts)
    if env.device.type == "cuda":
        memory = torch.cuda.mem_get_info(env.device)[1]
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = 2 * size * horizon * env.num_envs  # every observation and its successor
    if needed > memory:
        raise UserError(
            f"{env.name}: a rollout of {horizon:,} steps in {counted(env.num_envs, 'environment')} has "
            f"{needed / 2**30:,.0f} GB of observations, {numbers:,} numbers each, and {env.device} has "
            f"{memory / 2**30:,.0f} GB: take a smaller "
            "num_envs= or horizon=, or smaller observations by env.wrappers="
        )


def build(run: Run, env: VectorEnv | None = None) -> Trainer:
    """A trainer without callbacks, in the given environments or those of the settings.  Raises UserError for settings
    that exclude each other, before any step."""
    torch.set_num_threads(int(run.torch_threads))
    device = pick_device(run.device)
    env = env or build_env(run, share(run.num_envs), device)
    horizon = run.horizon or env.max_episode_steps
    if horizon is None:
        raise UserError(
            f"{env.name} has no time limit: give env.max_episode_steps=, or horizon= where the method allows"
        )
    check_memory(env, horizon)
    seed = seeding.of_process(run.seed, distributed.rank())
    policy, critic = build_networks(env, run)
    scaled = run.scale_reward or run.whiten_reward
    clip = (10.0 if scaled else None) if run.clip_reward == "auto" else run.clip_reward
    kind = WhitenReward if run.whiten_reward else RewardScale if run.scale_reward else ClipReward
    reward_scale = kind(env.num_envs, clip).to(device) if scaled or clip is not None else None
    reference = dict(vars(run.reference))
    channels = build_channels(run)
    algorithm: Algorithm = instantiate(
        run.algo,
        "algo",
        Algorithm,
        policy=policy,
        critic=critic,
        generator=seeding.generator(seed, "minibatches", device),
        reward_scale=reward_scale,
        reference=None if reference["coef"] is None else Reference(policy, **reference),
        channels=channels,
        symmetry=build_symmetry(env, run, [policy.body, critic.body]),
        **imitated(env, run),
    )
    if channels and not isinstance(algorithm, ActorCritic):
        raise UserError(
            f"channels are for methods with a critic of states, and {type(algorithm).__name__} has none: leave them out"
        )
    try:
        lower(algorithm, env.device, run.precision)
        collector = getattr(env, "collector", algorithm.make_collector)(env, horizon, seed)
        collector = OverlappedCollector(collector, policy) if run.overlap else collector
        execution = execute(algorithm, collector, run.execution)
        trainer = Trainer(algorithm, collector, run.total_steps, execution=execution)
    except ValueError as error:
        each = f" (in each of {distributed.size()} processes)" if distributed.size() > 1 else ""
        raise UserError(f"{error}{each}") from error
    if execution.endswith("cuda_graph"):
        from pgsuite.execution.cuda_graphs import capture

        capture(trainer)
    return trainer


# Names of tensors that differ by environment, and so between processes.
BY_ENVIRONMENT = ("hidden_state", "discounted_return", "running_length")


def check_alike(trainer: Trainer, config: dict[str, Any]) -> None:
    """Raise UserError unless all processes start with equal settings, number of steps, and bitwise equal parameters and
    statistics."""
    if distributed.size() == 1:
        return
    digest = hashlib.sha256()
    for module in trainer.algorithm.parts.values():
        for name, x in module.state_dict().items():
            if name.split(".")[-1] not in BY_ENVIRONMENT:
                digest.update(name.encode() + x.cpu().numpy().tobytes())
    mine = {"settings": config, "steps": trainer.steps, "parameters": digest.hexdigest()}
    theirs = distributed.broadcast(mine)
    for what, value in mine.items():
        if distributed.any_of(value != theirs[what]):
            raise UserError(
                f"the {what} of {distributed.size()} processes differ at the start: give each the same command, the "
                "same run to resume, and the same versions of python, torch and pgsuite"
            )


GRAPHS, COMPILED = "replayed as CUDA graphs after a few iterations", "compiled, which makes the first iteration long"
MODES = {"eager": "eager", "compile": COMPILED, "cuda_graph": GRAPHS}
MODES["compile_cuda_graph"] = f"{COMPILED}, and {GRAPHS}"


def describe(trainer: Trainer, run: Run) -> tuple[str, str]:
    """Two lines that are printed at the start of a run: the environment, and the networks and modes."""
    policy, env = trainer.algorithm.policy, trainer.collector.env
    critic = getattr(trainer.algorithm, "critic", None)
    head = type(policy.head).__name__.removesuffix("Head").lower()
    count = sum(p.numel() for p in nn.ModuleList(trainer.algorithm.parts.values()).parameters() if p.requires_grad)
    words = [f"policy {policy.shape}{_activation(policy, run.policy)}, {head}"]
    if critic is not None:
        own = f"critic {critic.shape}{_activation(critic, run.critic)}"
        words.append("critic on the same body" if critic.shared else own)
    words.append(f"{count:,} parameters on {env.device}")
    channels = ", ".join(getattr(trainer.algorithm, "channels", ()))
    words += [f"learns from {channels} too"] if channels else []
    words += ["observations standardized"] if run.standardize_obs else []
    words += ["rewards scaled"] if run.scale_reward else []
    words += [f"rewards clipped to +-{run.clip_reward:g}"] if isinstance(run.clip_reward, float | int) else []
    words += [f"layers in {run.precision}"] if run.precision != "float32" else []
    words += ["collecting beside learning"] if run.overlap else []
    words += ["rollouts mirrored"] if run.symmetry.augment else []
    words += [MODES[trainer.execution]]
    words += [f"{run.torch_threads} torch thread{'s' * (run.torch_threads != 1)}"] if env.device.type == "cpu" else []
    each = f" | so in each of {distributed.size()} processes" if distributed.size() > 1 else ""
    return f"env {env.description}{each}", " | ".join(words)


def _activation(network: Network, settings: Any) -> str:
    return f" {settings.activation}" if isinstance(network.body, Features) and hasattr(settings, "activation") else ""


def versions() -> dict[str, str]:
    """Versions of the packages on which results depend."""
    found = {"python": platform.python_version(), "pgsuite": __version__}
    others = ("mujoco-warp", "warp-lang", "envpool", "ale-py", "transformers")
    for package in ("torch", "gymnasium", "mujoco", "numpy", *others):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def commit() -> str | None:
    """Commit of the git checkout that this code runs from, with a plus if the code differs from it; None if this is not
    a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # installed, perhaps inside another repository
        return None
    git = ["git", "-C", str(root)]
    with suppress(OSError, subprocess.CalledProcessError):
        described = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/results"], check=False)
        return described.stdout.strip() + "+" * bool(changed.returncode)
    return None
