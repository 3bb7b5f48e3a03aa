"""Dataclasses as Hydra configurations: ``/schema/package.module.Class`` in a defaults list is replaced by its fields.

The fields of a class, the suite's or a user's, are both its constructor arguments and its configuration schema, so a
typo or a wrong type fails while the configuration is composed.
"""

from __future__ import annotations

import functools
import inspect
import types
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf, open_dict

from pgsuite import settings
from pgsuite.algorithms.reference import Penalty
from pgsuite.components import Component, is_component
from pgsuite.errors import UserError
from pgsuite.execution.modes import Execution, Precision
from pgsuite.nn.configs import CriticConfig, MLPPolicyConfig, PolicyConfig
from pgsuite.nn.schedules import Scheduled
from pgsuite.settings import (
    Checked,
    Count,
    Natural,
    NonNegative,
    Positive,
    TorchThreads,
    WorldThreads,
    closest,
    number,
    plain,
)
from pgsuite.training.callbacks import Checkpoint, Evaluation
from pgsuite.training.loggers import Wandb
from pgsuite.trust import Trust, imported

GROUP = "schema/"


@dataclass(kw_only=True)
class Reference(Checked):
    """A KL penalty with respect to a reference, the policy at the start of the run."""

    coef: NonNegative | None = None  # coefficient of KL(policy || reference), per nat; null has no reference
    penalty: Penalty = "reward"  # subtracted from the reward of each action, or from the policy objective
    target: Positive | None = None  # target KL per episode of an adaptive coefficient, in nats; null keeps coef
    horizon: Count = 10_000  # episodes in which an adaptive coefficient changes by a fifth at most


@dataclass(kw_only=True)
class Symmetry(Checked):
    """A mirror symmetry of the task, for every method."""

    augment: bool = False  # train on each rollout and on its mirror image
    coef: NonNegative = 0.0  # coefficient of the mirror loss of the policy
    mirror: Component = "task"  # the symmetry: that of the task, {_target_: table, ...}, or a class by its dotted path


@dataclass(kw_only=True)
class Recover(Checked):
    """Recovery from non-finite numbers."""

    attempts: Natural = 3  # times to restore the last finite state, counted anew after 100 finite iterations


@dataclass(kw_only=True)
class Logging(Checked):
    points: Count = 500  # logged points per run
    wandb: Wandb = field(default_factory=Wandb)


@dataclass(kw_only=True)
class Run:
    """The settings of a run other than those of the method and the environment."""

    seed: Natural = 0  # of environments, initial weights, actions and minibatches
    seeds: Count | None = None  # as many runs at once, with seed and the numbers after it; null trains one run
    batch: dict[str, Any] = field(
        default_factory=dict
    )  # of runs at once: values of settings, as algo.lr=batch(1,2) sets
    total_steps: Count = 1_000_000  # environment steps of the run, over all environments
    num_envs: Count = 64  # environments that step in parallel
    horizon: Count | None = None  # steps per rollout; null takes the time limit of the environment
    device: str = "auto"  # auto, cpu, cuda or cuda:1; auto takes CUDA if available
    backend: str = "auto"  # of the environment, such as mujoco or warp; auto takes the best for the device
    env_threads: WorldThreads = 0  # CPU threads of the physics; 0 takes every core
    torch_threads: TorchThreads | Literal["measure"] = 1  # CPU threads of torch; more than one slows small networks
    execution: Execution = "eager"  # of rollouts and updates: eager, compiled, or replayed as CUDA graphs
    overlap: bool = False  # collect the next rollout during the update, with the policy before that update
    precision: Precision = "float32"  # of convolutions, hidden layers and transformers; the rest stays float32
    standardize_obs: bool = True  # by their running mean and standard deviation
    clip_obs: Positive | None = 10.0  # standardized observations are clipped to +- this; null does not clip
    scale_reward: bool = True  # divide rewards by the running standard deviation of the discounted return
    clip_reward: Positive | Literal["auto"] | None = (
        "auto"  # the method learns from rewards clipped to +- this; auto is 10 for scaled rewards and null for others
    )
    whiten_reward: bool = False  # divide the rewards of each rollout by their standard deviation instead
    resume: str | None = None  # a run directory to resume, or auto for the newest run of this configuration
    trust: Trust = False  # classes from outside pgsuite that a run to resume may name; true for any
    sweep: dict[str, Any] | None = None  # a search or a population over runs; null trains this one
    init: str | None = None  # a run directory or checkpoint, whose policy, critic and statistics the run begins with
    teacher: str | None = None  # a run directory or checkpoint, whose policy algo=distill imitates
    demonstrations: str | None = None  # recorded episodes that algo=bc imitates: .npz, or .hdf5 of a Minari dataset
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    profile: bool = False  # print the time of each phase of an iteration, and write a Chrome trace
    recover: Recover = field(default_factory=Recover)
    evaluation: Evaluation = field(default_factory=Evaluation)
    logging: Logging = field(default_factory=Logging)
    channels: dict[str, Any] = field(default_factory=dict)  # to learn from beside the reward, by name: settings of each
    callbacks: dict[str, Any] = field(default_factory=dict)  # further callbacks by name, each settings with a _target_
    loggers: dict[str, Any] = field(default_factory=dict)  # further loggers by name, each settings with a _target_
    policy: PolicyConfig = field(default_factory=MLPPolicyConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    reference: Reference = field(default_factory=Reference)
    symmetry: Symmetry = field(default_factory=Symmetry)
    algo: Any = None
    env: Any = None

    def __post_init__(self) -> None:
        settings.check(self, label="")


def locate(path: str, where: str = "a setting") -> type:
    """The dataclass at a dotted path, which the setting ``where`` names.  Raises UserError if there is none that
    is trusted."""
    module_name, _, name = str(path).rpartition(".")
    if not module_name.strip("."):
        raise UserError(f"{path!r} is no dotted path of a class, such as pgsuite.algorithms.PPO")
    try:
        module = imported(module_name, name, where)
    except ImportError as error:
        raise UserError(f"cannot import {module_name!r}, which a configuration names: {error}") from error
    cls = getattr(module, name, None)
    if not (isinstance(cls, type) and is_dataclass(cls)):
        options = [key for key, value in vars(module).items() if isinstance(value, type) and is_dataclass(value)]
        raise UserError(f"{module_name} has no dataclass {name!r}; {closest(name, options)}")
    for base in cls.__mro__[:-1]:
        own = [name for name, hint in inspect.get_annotations(base).items() if "ClassVar" not in str(hint)]
        if own and is_dataclass(base) and "__dataclass_fields__" not in vars(base):
            raise UserError(
                f"{base.__module__}.{base.__qualname__} declares {', '.join(own)} but is no dataclass itself: write "
                "@dataclass(kw_only=True, eq=False) above it"
            )
    return cls


def _is_part(hint: Any) -> bool:
    """Whether a field takes an object that the runtime supplies, such as a policy, or None."""
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    return get_origin(hint) in (None, Union, types.UnionType) and all(
        isinstance(kind, type) and get_origin(kind) is None and kind.__module__ != "builtins" for kind in kinds
    )


@functools.cache
def schema(cls: type) -> type:
    """A dataclass for OmegaConf with the settings of cls and its path as ``_target_``.

    Fields of objects that the runtime supplies, such as a policy, are left out; so are fields whose name ends in an
    underscore, which ``SchemaSource`` adds without it.  A field whose type is an abstract dataclass, such as an
    estimator, accepts any configuration: a group supplies it, and null is the default of the class.

    Raises UserError for a field of a type that settings cannot have.
    """
    options: list[Any] = [("_target_", str, field(default=f"{cls.__module__}.{cls.__qualname__}"))]
    hints, unused = get_type_hints(cls, include_extras=True), getattr(cls, "unused_settings", ())
    for f in filter(lambda f: f.init and not f.name.endswith("_") and f.name not in unused, fields(cls)):
        hint, simple = hints[f.name], plain(hints[f.name])
        if get_origin(hint) is list and is_component(get_args(hint)[0]):
            options.append((f.name, list[Any], field(default_factory=list)))
        elif is_component(hint) or hint == Trust:
            options.append((f.name, Any, field(default=f.default)))
        elif hint is Any or any(map(inspect.isabstract, (hint, *get_args(hint)))):
            options.append((f.name, Any, field(default=None)))
        # A number may be a schedule instead; cls validates both.
        elif issubclass(cls, Scheduled) and (number(hint) or get_origin(hint) is dict):
            options.append((f.name, Any, field(default=f.default, default_factory=f.default_factory)))  # pyright: ignore
        elif is_dataclass(hint) and isinstance(hint, type):
            nested = schema(hint)
            options.append((f.name, nested, field(default_factory=nested)))
        elif simple is not Any and (Any not in get_args(simple) or get_origin(simple) is dict):
            options.append((f.name, simple, field(default=f.default, default_factory=f.default_factory)))  # pyright: ignore
        elif not _is_part(hint):
            raise UserError(
                f"{cls.__module__}.{cls.__qualname__}.{f.name} is of type {hint}, which no setting can have: take "
                "bool, int, float, str, Literal, a list or Sequence of these, dict, a dataclass, or a union with None"
            )
    return make_dataclass(cls.__name__, options)


class SchemaSource(ConfigSource):
    """Hydra config source of ``schema/<dotted path>``."""

    @staticmethod
    def scheme() -> str:
        return "pgsuite"

    def load_config(self, config_path: str) -> ConfigResult:
        path = config_path.removeprefix(GROUP).removesuffix(".yaml")
        cls = locate(path)
        config = OmegaConf.structured(schema(cls))
        for f in fields(cls):
            if f.name.endswith("_"):
                with open_dict(config):
                    config[f.name.removesuffix("_")] = f.default
            elif isinstance(config.get(f.name), DictConfig) and f.default_factory is dict:
                OmegaConf.set_struct(config[f.name], False)  # takes any key
        return ConfigResult(
            config=config,
            path=self.full_path(),
            provider=self.provider,
            header={"package": None},
        )

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return config_path.rstrip("/") == GROUP.rstrip("/")

    def is_config(self, config_path: str) -> bool:
        return config_path.startswith(GROUP)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return ["schema"] if not config_path and results_filter is not ObjectType.CONFIG else []


class SchemaSearchPath(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("pgsuite", f"{SchemaSource.scheme()}://")


def register() -> None:
    """Register the config source of schemas with Hydra; required before a configuration is composed."""
    Plugins.instance().register(SchemaSource)
    Plugins.instance().register(SchemaSearchPath)
