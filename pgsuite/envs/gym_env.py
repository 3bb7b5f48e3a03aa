"""Environments of gymnasium's registry as a VectorEnv."""

from __future__ import annotations

import importlib.util
import math
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from torch import Tensor

from pgsuite import seeding, settings
from pgsuite.components import Component, component_class, make_component
from pgsuite.envs.base import BrokenEnvError, NotFiniteError, VectorEnvConfig, broken_env
from pgsuite.envs.spaces import mismatch, native_action, shown, tensor_space, tensors, to_device
from pgsuite.envs.workers import Workers, info_of, named_infos
from pgsuite.errors import counted, install, place, place_of, reason
from pgsuite.settings import Count, Positive, WorldThreads, closest
from pgsuite.transfer import HostLink
from pgsuite.trust import imported
from pgsuite.types import ACTION_MASK, Obs, Step, map_obs, write_obs

TIMEOUT = 600.0  # seconds
HOST = torch.device("cpu")


@dataclass(kw_only=True, eq=False)
class Gym(VectorEnvConfig):
    """An environment of gymnasium's registry, and its vectorization."""

    backends = ("gymnasium",)

    id: str = ""  # such as LunarLander-v3, or my_package:MyEnv-v0
    import_: str | None = None  # a package that registers it
    workers: WorldThreads = 0  # processes that step the environments, for slow ones; 0 steps them in this process
    timeout: Positive | None = None  # seconds that a worker may take to make, reset or step its share; null is 600
    native: bool = False  # the environment's own vectorization, where it registers one
    action_mask: bool = False  # the environment's info has a mask of allowed discrete actions
    channels: list[str] = field(default_factory=list)  # costs, or rewards beside the reward, in its info: [cost]
    max_episode_steps: Count | None = None  # time limit; null takes the registered one
    options: dict[str, Any] = field(default_factory=dict)  # the environment's own keyword arguments
    wrappers: list[Component] = field(
        default_factory=list
    )  # dotted paths, or {path: {option: value}}; inner ones first

    def __post_init__(self) -> None:
        settings.check(self, label="env.")
        if not self.id:
            raise ValueError("env.id must name an environment, such as env.id=LunarLander-v3")
        if self.native and self.wrappers:
            raise ValueError("env.wrappers are for single environments, and env.native=true makes none: leave one out")
        if self.timeout is not None and not self.workers:
            raise ValueError("env.timeout needs env.workers=1 or more: what hangs in this process cannot be ended")
        if repeated := [name for i, name in enumerate(self.channels) if name in self.channels[:i]]:
            raise ValueError(f"env.channels names {repeated[0]!r} twice")

    def build(self, num_envs: int, *, device: torch.device, dtype: torch.dtype, seed: int) -> GymEnv:
        vec = self.vectorize(num_envs)
        limit = self.max_episode_steps or time_limit(vec)
        about = {"name": self.id, "max_episode_steps": limit, "channels": self.channels}
        return GymEnv(vec, device=device, dtype=dtype, seed=seed, **about)

    def peek(self) -> spaces.Space[Any]:
        vec = self.vectorize(1)
        try:
            return tensor_space(vec.single_observation_space)
        finally:
            vec.close()

    def vectorize(self, num_envs: int) -> VectorEnv:
        """Make the vector environment.  Raises ValueError for an unknown id, or if gymnasium fails to make it."""
        self.register()
        for path, _ in map(wrapper, self.wrappers):  # here, where it is known whose settings these are
            component_class(path, {}, gymnasium.Wrapper, "env.wrappers")
        known = gymnasium.registry.keys()
        if ":" not in self.id and self.id not in known:
            raise ValueError(f"gymnasium has no environment {self.id!r}; {closest(self.id, known)}")
        try:
            if self.native:
                limit = {} if self.max_episode_steps is None else {"max_episode_steps": self.max_episode_steps}
                return gymnasium.make_vec(self.id, num_envs, "vector_entry_point", **limit, **self.options)
            makers = [Maker(self, index) for index in range(num_envs)]
            if self.workers:
                return Workers(makers, min(self.workers, num_envs), self.timeout or TIMEOUT)
            return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
        except BrokenEnvError as error:  # of a Maker, here or in a worker
            raise ValueError(str(error)) from error
        except (Exception, SystemExit) as error:
            raise ValueError(self.unmade(error)) from error

    def register(self) -> None:
        """Import the packages that register the environment; that of ``id`` before gymnasium would, which does not ask
        whose it is.  Raises ValueError if that fails."""
        for where, name in (("env.import", self.import_), ("env.id", self.id.rpartition(":")[0])):
            if not name:
                continue
            look_here(name)
            try:
                imported(name, where=where)
            except ImportError as error:
                remedy = f": {install('atari')}" if name == "ale_py" else ""
                raise ValueError(f"{where}={name} cannot be imported: {error}{remedy}") from error

    def unmade(self, error: BaseException) -> str:
        """Message for an environment whose construction raised an error."""
        given = ", ".join(f"{key}={value}" for key, value in self.options.items())
        words = " ".join(str(error).split()) if isinstance(error, gymnasium.error.Error) else reason(error)
        options = f", with env.options {given}" if given else ""
        return f"{place(error)}gymnasium cannot make {self.id}: {words}{options}"


def look_here(name: str) -> None:
    """Let a module be imported that is a file or a package in the working directory, unless another has its name."""
    top = name.partition(".")[0]
    with suppress(ImportError, ValueError):  # of names that are none
        if importlib.util.find_spec(top) is not None:
            return
    here = Path.cwd()
    if here.joinpath(f"{top}.py").is_file() or here.joinpath(top, "__init__.py").is_file():
        sys.path.append(str(here))


def time_limit(vec: VectorEnv) -> int | None:
    """The time limit of a vector environment's episodes, as registered or set by a wrapper; None if there is none."""
    if isinstance(vec, Workers):
        return vec.max_episode_steps
    spec = vec.envs[0].spec if isinstance(vec, SyncVectorEnv) else vec.spec  # a SyncVectorEnv has no spec of its own
    return spec.max_episode_steps if spec is not None else None


@dataclass
class Maker:
    """Makes one environment, wrapped in Watch; a class, so that it can be pickled."""

    gym: Gym
    index: int

    def __call__(self) -> gymnasium.Env[Any, Any]:
        gym = self.gym
        gym.register()
        try:
            # Watch makes the checks of gymnasium's own checker, and names the file and line.
            env = gymnasium.make(
                gym.id, max_episode_steps=gym.max_episode_steps, disable_env_checker=True, **gym.options
            )
        except (Exception, SystemExit) as error:
            raise BrokenEnvError(gym.unmade(error)) from error
        for choice in gym.wrappers:
            env = wrapped(env, choice)
        env = MaskInObservation(env) if gym.action_mask else env
        return Watch(env, f"{gym.id} (environment {self.index})", gym.channels)


def wrapper(choice: Component) -> tuple[str, dict[str, Any]]:
    """The dotted path and the options of a wrapper, given as a dotted path or as {path: {option: value}}.  Raises
    ValueError for anything else."""
    path, options = (*choice.items(),)[0] if isinstance(choice, dict) and len(choice) == 1 else (choice, None)
    if not (isinstance(path, str) and isinstance(options, dict | None)):
        raise ValueError(f"env.wrappers must each be a dotted path or {{path: {{option: value}}}}, got {choice}")
    return path, options or {}


def wrapped(env: gymnasium.Env[Any, Any], choice: Component) -> gymnasium.Env[Any, Any]:
    """The environment in a wrapper.  Raises BrokenEnvError if there is none, or it does not take the environment or the
    options."""
    path, options = wrapper(choice)
    try:
        given = with_arrays(component_class(path, {}, gymnasium.Wrapper, "env.wrappers"), options)
        return make_component({"_target_": path, **given}, {}, gymnasium.Wrapper, "env.wrappers", env)
    except (Exception, SystemExit) as error:
        words = " ".join(str(error).split())
        own = isinstance(error, ValueError) and "env.wrappers" in words  # not of the wrapper's constructor
        raise BrokenEnvError(words if own else f"{place(error)}env.wrappers={path}: {reason(error)}") from error


def with_arrays(cls: type[gymnasium.Wrapper[Any, Any, Any, Any]], options: dict[str, Any]) -> dict[str, Any]:
    """The options, lists as arrays where the constructor annotates an array."""
    try:
        hints = get_type_hints(cls.__init__)
    except NameError:  # of a name that is imported for type checkers only
        return options
    arrays = {key for key, hint in hints.items() if np.ndarray in {get_origin(x) or x for x in (hint, *get_args(hint))}}
    return {key: np.asarray(x) if key in arrays and isinstance(x, list) else x for key, x in options.items()}


class MaskInObservation(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Moves ``action_mask`` from an environment's info to its observation, where policies expect it."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        size = spaces.flatdim(env.action_space)
        own = env.observation_space
        parts = dict(own.spaces) if isinstance(own, spaces.Dict) else {"observation": own}
        self.observation_space = spaces.Dict({**parts, ACTION_MASK: spaces.MultiBinary(size)})

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(**kwargs)
        return self.join(obs, info), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        return self.join(obs, info), reward, terminated, truncated, info

    def join(self, obs: Any, info: dict[str, Any]) -> dict[str, Any]:
        parts = obs if isinstance(obs, dict) else {"observation": obs}
        if ACTION_MASK not in info:
            raise BrokenEnvError(f"gave no {ACTION_MASK} in its info, which env.action_mask=true takes it from")
        allowed = info[ACTION_MASK]
        mask = np.concatenate(allowed) if isinstance(allowed, tuple) else np.asarray(allowed)
        return {**parts, ACTION_MASK: mask.astype(np.int8)}


class Watch(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Checks what an environment does: raises BrokenEnvError for exceptions and for results that do not follow
    gymnasium's interface, and NotFiniteError for non-finite ones, with environment, step, and the user's file and line.

    Of infos only the ``channels`` are kept, since nothing reads the rest and a vector environment would merge it in
    each step.  A step of six values, with the cost after the reward as in Safety-Gymnasium, has it as info["cost"].
    """

    def __init__(self, env: gymnasium.Env[Any, Any], name: str, channels: Sequence[str] = ()) -> None:
        super().__init__(env)
        self.name, self.steps, self.channels = name, 0, tuple(channels)
        required = {"observation_space": spaces.Space, "action_space": spaces.Space, "metadata": Mapping}
        for attribute, kind in required.items():
            if not isinstance(found := getattr(env, attribute, None), kind):
                at, wanted = self.source("__init__"), "dictionary" if kind is Mapping else "gymnasium space"
                raise BrokenEnvError(f"{at}{name} must have a {wanted} as its {attribute}, and it is {shown(found)}")

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        when = "at its reset"
        try:
            result = self.env.reset(**kwargs)
        except (Exception, SystemExit) as error:
            raise self.broken(error, when, "reset") from error
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
            raise self.wrong(when, f"{shown(result)}; {INTERFACE['reset']}", "reset")
        self.check(result[0], when, "reset")
        return result[0], {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self.steps += 1
        when = f"at its step {self.steps}"
        try:
            result: Any = self.env.step(action)
        except (Exception, SystemExit) as error:
            raise self.broken(error, when, "step") from error
        if isinstance(result, tuple) and len(result) == 6 and isinstance(result[5], Mapping):
            obs, reward, cost, *ends, info = result
            result = obs, reward, *ends, {**info, "cost": cost}
        if not (isinstance(result, tuple) and len(result) == 5):
            raise self.wrong(when, f"{shown(result)}; {INTERFACE['step']}", "step")
        obs, reward, *ends, info = result
        if (number := scalar(reward)) is None:
            shape = np.shape(reward) if isinstance(reward, np.ndarray | list | tuple | Tensor) else ()
            what = f"a reward of shape {shape}" if shape else f"the reward {shown(reward)}"
            raise self.wrong(when, f"{what}; it must be one number", "step", "reward")
        if not math.isfinite(number):
            raise self.wrong(when, f"the reward {number}", "step", "reward", kind=NotFiniteError)
        for name, value in zip(("terminated", "truncated"), ends, strict=True):
            if scalar(value) not in (0, 1):
                raise self.wrong(when, f"{name}={shown(value)}; it must be true or false", "step")
        self.check(obs, when, "step")
        return obs, number, bool(ends[0]), bool(ends[1]), {x: self.channel(info, x, when) for x in self.channels}

    def channel(self, info: Any, name: str, when: str) -> float:
        """The value of a channel in the info of a step."""
        if not isinstance(info, Mapping) or name not in info:
            known = ", ".join(map(str, info)) if isinstance(info, Mapping) and info else "nothing"
            text = f"no {name!r} in its info, which env.channels takes it from; it has {known}"
            raise self.wrong(when, text, "step")
        if (number := scalar(info[name])) is None:
            raise self.wrong(when, f"{shown(info[name])} as info[{name!r}]; it must be one number", "step")
        if not math.isfinite(number):
            raise self.wrong(when, f"{number} as info[{name!r}]", "step", kind=NotFiniteError)
        return number

    def check(self, obs: Any, when: str, method: str) -> None:
        if (found := mismatch(self.observation_space, obs)) is not None:
            raise self.wrong(when, found, method, "observation")
        if not finite(obs):
            text = f"an observation that is not finite: {shown(obs)}"
            raise self.wrong(when, text, method, "observation", kind=NotFiniteError)

    def wrong(self, when: str, what: str, *methods: str, kind: type[BrokenEnvError] = BrokenEnvError) -> BrokenEnvError:
        return kind(f"{self.source(*methods)}{self.name} {when} gave {what}")

    def broken(self, error: BaseException, when: str, method: str) -> BrokenEnvError:
        if isinstance(error, BrokenEnvError):  # of MaskInObservation
            return type(error)(f"{self.source(method)}{self.name} {when} {error}")
        frames = traceback.extract_tb(error.__traceback__)
        # Raised by what calls the method, it is about the arguments or the results.
        remedy = f"; {INTERFACE[method]}" if frames[-1].filename.startswith(CALLERS) else ""
        at = place(error) or self.source(method)
        return BrokenEnvError(f"{at}{self.name} {when} raised {reason(error)}{remedy}")

    def source(self, method: str, part: str = "") -> str:
        """The place of the outermost method of the user's own that gave a result: ``method``, or in a wrapper the
        ``part`` that changes only observations or rewards."""
        env = self.env
        while True:
            names = (part, method) if part and isinstance(env, gymnasium.Wrapper) else (method,)
            if found := next(filter(None, (place_of(getattr(type(env), name, None)) for name in names)), ""):
                return found
            if not isinstance(env, gymnasium.Wrapper):
                return ""
            env = env.env


INTERFACE = {
    "reset": "reset(seed=, options=) must return an observation and a dictionary",
    "step": "step(action) must return observation, reward, terminated, truncated and a dictionary",
}
CALLERS = (*(str(Path(gymnasium.__file__).with_name(name)) for name in ("wrappers", "core.py")), __file__)


def scalar(x: Any) -> float | None:
    """A single number or truth value as a float; None for anything else."""
    if isinstance(x, float | int):
        return float(x)
    try:
        array = np.asarray(x)
    except (ValueError, TypeError, RuntimeError):  # of lists of unequal lengths, for example
        return None
    return float(array) if array.shape == () and array.dtype.kind in "biuf" else None


def finite(obs: Any) -> bool:
    """Whether every number of an observation is finite."""
    if isinstance(obs, Mapping):
        return all(map(finite, obs.values()))
    if isinstance(obs, tuple):
        return all(map(finite, obs))
    return bool(np.isfinite(obs).all())


class GymEnv:
    """A gymnasium vector environment in any of the three autoreset modes; see ``spaces`` for the conversion of
    observations."""

    backend = "gymnasium"
    is_resumable = False

    def __init__(
        self,
        vec: VectorEnv,
        *,
        name: str,
        max_episode_steps: int | None,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        channels: Sequence[str] = (),
    ) -> None:
        self.vec, self.name, self.num_envs, self.device, self.dtype = vec, name, vec.num_envs, device, dtype
        self.max_episode_steps, self.channels = max_episode_steps, tuple(channels)
        self.link = HostLink(device)
        self.space, self.action_space = vec.single_observation_space, vec.single_action_space
        self.observation_space: spaces.Space[Any] = tensor_space(self.space)
        mode = vec.metadata.get("autoreset_mode")
        if mode is None:
            raise ValueError(f"{name} does not say how it restarts: its metadata needs an autoreset_mode")
        self.mode = AutoresetMode(mode)
        how = f"{type(vec).__name__}, {'none' if self.mode is AutoresetMode.DISABLED else self.mode.value} autoreset"
        self.description = (
            f"{name} | {how} | {counted(self.num_envs, 'environment')} | is gymnasium {gymnasium.__version__}'s"
        )
        # Every vector environment accepts an integer, and seeds its environments with it and the integers after it.
        self.origin = seeding.number(seed, "environment")
        self.seed: int | None = self.origin
        self.restarting = np.zeros(self.num_envs, dtype=bool)  # environments whose next step only restarts them
        self.info: dict[str, Any] = {}  # of the last step

    def reset(self) -> Obs:
        seed, self.seed = self.seed, None  # for the first reset only; later ones continue the environments' generators
        with broken_env(f"{self.name} failed to reset:"):
            obs, self.info = self.vec.reset(seed=seed)
            self.last = self._obs(obs)
        self.restarting[:] = False
        return self.link.to_device(self.last)

    def step(self, action: Tensor) -> Step:
        action = self.link.to_host(action)
        with broken_env(f"{self.name} raised"):
            step = self._step(action)
        return self.link.step_to_device(step)

    def _step(self, action: Tensor) -> Step:
        """A step on the host."""
        obs, reward, terminated, truncated, self.info = self.vec.step(native_action(self.action_space, action))
        terminated, truncated = (np.array(x, dtype=bool) for x in (terminated, truncated))
        truncated &= ~terminated
        done, idle = terminated | truncated, self.restarting.copy()
        if self.mode is AutoresetMode.NEXT_STEP:
            # In a step that restarts an environment, termination and truncation refer to no action.
            terminated, truncated = terminated & ~idle, truncated & ~idle
            self.restarting = terminated | truncated
            new = next_obs = self._obs(obs)
        elif self.mode is AutoresetMode.DISABLED:
            new = next_obs = self._obs(obs)
            if done.any():
                new = self._obs(self.vec.reset(options={"reset_mask": done})[0])
        else:
            new = next_obs = self._obs(obs)
            if done.any():
                next_obs = self._final(new, done, self.info)
        self.last = new
        channels = {name: self._channel(name, done, idle) for name in self.channels} or None
        return Step(
            obs=new,
            next_obs=next_obs,
            reward=torch.tensor(reward, dtype=self.dtype),
            terminated=torch.from_numpy(terminated),
            truncated=torch.from_numpy(truncated),
            mask=torch.from_numpy(~idle) if self.mode is AutoresetMode.NEXT_STEP else None,
            channels=channels,
        )

    def _channel(self, name: str, done: np.ndarray, idle: np.ndarray) -> Tensor:
        """A channel [N] of the last step, in which environments that are ``idle`` [N] only restarted."""
        found = info_of(self.info, name, done)
        if found is None and not idle.all():
            known = ", ".join(named_infos(self.info)) or "nothing"
            raise BrokenEnvError(
                f"{self.name} gave no {name!r} in its infos, which env.channels takes it from; they have {known}"
            )
        return torch.tensor(np.zeros(self.num_envs) if found is None else found, dtype=self.dtype)

    def _final(self, obs: Obs, done: np.ndarray, info: dict[str, Any]) -> Obs:
        """True successor states; gymnasium returns those of finished environments separately."""
        worlds = np.flatnonzero(done)
        successors = map_obs(torch.clone, obs)
        finals = info.get("final_obs")
        if finals is None:
            warnings.warn(
                f"{self.name} restarts within a step and gives no final_obs: values after a time limit are taken from "
                "the observation before it",
                stacklevel=3,
            )
            write_obs(successors, worlds, map_obs(lambda x: x[worlds], self.last))
        else:
            batch = [finals[i] for i in worlds]
            empty = gymnasium.vector.utils.create_empty_array(self.space, n=len(worlds))
            write_obs(successors, worlds, self._obs(gymnasium.vector.utils.concatenate(self.space, batch, empty)))
        return successors

    def _obs(self, obs: Any) -> Obs:
        return to_device(tensors(self.space, obs), HOST, self.dtype)

    def state_dict(self) -> dict[str, Any]:
        """A seed for the next reset: gymnasium's environments cannot be saved."""
        return {"seed": seeding.number(self.origin, "resumed")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.origin = self.seed = state["seed"]
