"""``--help``: every setting of a command with its value, type and description.

The description of a setting is the comment beside its field.
"""

from __future__ import annotations

import ast
import functools
import inspect
import io
import os
import re
import shutil
import sys
import textwrap
import tokenize
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from inspect import isabstract
from itertools import zip_longest
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from pgsuite.app.recipes import written
from pgsuite.app.schema import locate
from pgsuite.components import is_component
from pgsuite.errors import UserError, command
from pgsuite.nn.schedules import Scheduled

FLAGS = {"-h", "--help"}
COMMANDS = {  # description and examples of each command
    "train": (
        "Train a policy.",
        "env=CartPole",
        "algo=trpo env=HalfCheetah algo.max_kl=0.02 seed=1",
        "resume=runs/ppo-CartPole/<run> total_steps=2_000_000",
    ),
    "evaluate": (
        "Evaluate the policy of a run.",
        "run=runs/ppo-CartPole/<run>",
        "run=runs/ppo-CartPole/<run> episodes=100 video=film.mp4",
    ),
    "export": (
        "Export the policy of a run as one file.",
        "run=runs/ppo-CartPole/<run>",
        "run=runs/ppo-CartPole/<run> format=torch to=policy.pt2",
    ),
    "replay": (
        "Repeat the update that a run failed at, and say where numbers are lost.",
        "crash=runs/ppo-CartPole/<run>/crash.pt",
        "crash=runs/ppo-CartPole/<run>",
    ),
    "pretrain": (
        "Pretrain a language model on generated reviews.",
        "reviews=20_000",
        "size.width=128 size.layers=4 hydra.run.dir=runs/language/large",
    ),
    "reward_model": (
        "Make preference pairs and train a reward model on them.",
        "members=3",
        "pairs=preferences.jsonl model=runs/language/large",
    ),
}
GROUPS = {
    "algo": "the method",
    "algo/estimator": "the advantage estimator of the method",
    "env": "the environment",
    "policy": "the policy and its network",
    "sweep": "how the runs of a sweep (-m) are started, or a search or a population over settings",
    "sweep/space": "the settings that a search or a population varies",
    "tuned": "a measured recipe, by default that of the method and environment; ~tuned leaves it out",
}
SCHEDULED = (
    "A number of the method or its estimator may be a schedule over the run: {linear: [3e-4, 0]}, {cosine: [3e-4, 0]}, "
    "{piecewise: {0: 0, 0.1: 3e-4, 1: 0}} or {adaptive: {start: 3e-4, kl: 0.01}}."
)
MORE = "--cfg job prints the configuration, -m starts a sweep, --hydra-help describes the other options."
NAME, VALUE = 34, 22  # maximum widths of the first two columns
KINDS = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "null", Any: "anything"}


class Setting(NamedTuple):
    """One setting of a composed configuration."""

    name: str  # dotted
    value: Any
    kind: str  # its type in words
    description: str  # empty where the field has no comment


@dataclass(frozen=True)
class Section:
    """The settings of one class."""

    name: str  # dotted; empty for the settings of the command itself
    cls: type
    chosen: bool  # whether a group or ``_target_`` selects the class
    settings: list[Setting]


def asked() -> bool:
    """Whether the command line contains a help flag."""
    return not FLAGS.isdisjoint(sys.argv[1:])


def composed(config: str, folder: str) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """A named configuration of a folder with the overrides of the command line, and the choices of each of its groups.
    Raises Hydra's errors for a command line that it cannot compose."""
    given = get_args_parser().parse_args([x for x in sys.argv[1:] if x not in FLAGS])
    overrides = list(given.overrides)
    if given.config_dir is not None:
        overrides.append(f"hydra.searchpath=['file://{os.path.abspath(given.config_dir)}']")
    GlobalHydra.instance().clear()
    with initialize_config_dir(folder, job_name=config, version_base="1.3"):
        cfg = compose(given.config_name or config, overrides, return_hydra_config=True)
        loader = GlobalHydra.instance().config_loader()
        groups = sorted(
            {str(x).partition("@")[0] for x in cfg.hydra.runtime.choices if not str(x).startswith("hydra/")}
        )
        choices = {group: loader.get_group_options(group) for group in groups}
    plain = OmegaConf.to_container(DictConfig({x: cfg._get_node(x) for x in cfg if x != "hydra"}), resolve=True)
    assert isinstance(plain, dict)
    return {str(key): x for key, x in plain.items()}, choices


def render(config: str, plain: Mapping[str, Any], choices: Mapping[str, Sequence[str]], width: int) -> str:
    """The help of a command, in lines of at most ``width`` characters, from its composed configuration and the choices
    of each group."""
    start, parts = command(config.replace("_", "-")), list(sections(plain))
    purpose, *examples = COMMANDS[config]
    lines = [f"usage: {start} [setting=value ...]", "", purpose, "", *(f"  {start} {x}" for x in examples)]
    if choices:
        lines += ["", "Groups: a choice brings settings with it"]
        lines += columns(
            [(f"{name}=", *_choices(name, options)) for name, options in choices.items()], (NAME, 0), width
        )
    for part in parts:
        lines += ["", *textwrap.wrap(_title(part), width)]
        rows = [(x.name, written(x.value), f"{x.description} ({x.kind})".strip()) for x in part.settings]
        lines += columns(rows, (NAME, VALUE), width)
    if any(issubclass(part.cls, Scheduled) for part in parts):
        lines += ["", *textwrap.wrap(SCHEDULED, width)]
    return "\n".join([*lines, "", *textwrap.wrap(MORE, width)])


def show(config: str, plain: Mapping[str, Any], choices: Mapping[str, Sequence[str]]) -> None:
    """Print the help of a command, in the width of the terminal."""
    width = max(60, shutil.get_terminal_size((100, 24)).columns)
    try:
        print(render(config, plain, choices, width), flush=True)
    except BrokenPipeError:  # the reader, such as a pager or head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # prevents an error message at exit


def sections(plain: Mapping[str, Any], name: str = "", *, chosen: bool = False) -> Iterator[Section]:
    """The settings of a composed configuration: its own first, then those of each nested configuration.

    Raises UserError for a configuration without ``_target_``.
    """
    if "_target_" not in plain:
        raise UserError(f"{name or 'the configuration'} names no class in _target_, so its settings are not known")
    cls, prefix = locate(plain["_target_"], name), f"{name}." if name else ""
    hints = get_type_hints(cls, include_extras=True)
    parts = {
        key: x
        for key, x in plain.items()
        if isinstance(x, dict) and "_target_" in x and not is_component(hints.get(key))
    }
    inner = {key: x for key, x in plain.items() if isinstance(x, dict) and _holds_parts(x)}
    own: list[Setting] = []
    for key in plain.keys() - parts.keys() - inner.keys() - {"_target_"}:
        field = key if key in hints else f"{key}_"  # for keywords of Python, such as import
        kind = words(hints[field]) if field in hints else "anything"
        own.append(Setting(f"{prefix}{key}", plain[key], kind, describe(cls, field)))
    order = list(plain)
    own.sort(key=lambda x: order.index(x.name.removeprefix(prefix)))
    if own:
        yield Section(name, cls, chosen, own)
    for key, x in parts.items():
        yield from sections(x, f"{prefix}{key}", chosen=not is_dataclass(hints.get(key)) or isabstract(hints[key]))
    for key, x in inner.items():
        for each, part in x.items():
            yield from sections(part, f"{prefix}{key}.{each}", chosen=True)


def _holds_parts(x: Mapping[str, Any]) -> bool:
    """Whether a dictionary contains nested configurations by name, as ``callbacks`` does."""
    return "_target_" not in x and bool(x) and all(isinstance(y, dict) and "_target_" in y for y in x.values())


def _title(part: Section) -> str:
    if not part.name:
        return "Settings, with their values as this command has them"
    name = f"{part.name} ({part.cls.__name__})" if part.chosen else part.name
    return f"{name}: {said}" if (said := first_sentence(part.cls)) else name


def words(hint: Any) -> str:
    """A type in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{words(args[0])} {args[1]}"
    if origin is Literal:
        choices = ", ".join(map(str, args))
        return f"one of {choices}" if len(args) > 1 else choices
    if origin in (Union, types.UnionType):
        return ", ".join(map(words, args[:-1])) + f" or {words(args[-1])}"
    if origin is dict:
        return "settings by name"
    if origin in (list, tuple, Sequence):
        return f"list of {', '.join(dict.fromkeys(words(x) for x in args if x is not ...))}"
    if isinstance(hint, type) and (is_dataclass(hint) or isabstract(hint)):
        return f"of class {hint.__name__}"
    return KINDS.get(hint, "anything")


def describe(cls: type, field: str) -> str:
    """The comment beside a field, from the first class in the MRO of cls that has one; empty if there is none."""
    return next((found for base in cls.__mro__ if (found := comments(base).get(field))), "")


@functools.cache
def comments(cls: type) -> dict[str, str]:
    """The comments beside the fields that a class itself declares, by field name; empty if its source is not
    available."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return {}
    (declared,) = ast.parse(source).body
    if not isinstance(declared, ast.ClassDef):
        return {}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    beside = {x.start[0]: _said(x.string) for x in tokens if x.type == tokenize.COMMENT}
    found: dict[str, str] = {}
    for node in declared.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            found[node.target.id] = " ".join(filter(None, (beside.get(line) for line in lines)))
    return found


def _said(comment: str) -> str:
    """A comment without directives for tools."""
    return re.split(r"#\s*(?:pyright|type|noqa|ruff)\b", comment)[0].strip("# ")


def first_sentence(cls: type) -> str:
    """First sentence of the docstring of a class; empty if it has none of its own."""
    if not (text := vars(cls).get("__doc__")) or text.startswith(f"{cls.__name__}("):  # generated for a dataclass
        return ""
    paragraph = " ".join(inspect.cleandoc(text).split("\n\n")[0].split())
    return re.split(r"(?<=[a-z)])\. ", paragraph)[0].rstrip(".") + "."


def _choices(group: str, options: Sequence[str]) -> tuple[str]:
    """Description and choices of a group; for recipes, which are many, their number, methods and environments."""
    said = f"{GROUPS[group]}: " if group in GROUPS else ""
    if group != "tuned":
        return (f"{said}{', '.join(options)}",)
    recipes = [option.partition("-") for option in options if "-" in option]
    methods, envs = (", ".join(sorted({part[i] for part in recipes})) for i in (0, 2))
    return (f"{said[:-2]}. {len(options)} recipes <algo>-<env>, of algo {methods} and env {envs}",)


def columns(rows: Sequence[tuple[str, ...]], limits: Sequence[int], width: int) -> list[str]:
    """Rows of wrapped columns.  Each column but the last is as wide as its longest text, at most its limit and a third
    of the width; the last takes the rest."""
    widths = [min(max((len(row[i]) for row in rows), default=0), most or 10**6) for i, most in enumerate(limits)]
    widths = [min(most, width // 3) for most in widths[: len(rows[0]) - 1]]
    widths.append(width - sum(widths) - 2 * len(widths) - 2)
    lines: list[str] = []
    for row in rows:
        name, *others = row
        alone = len(name) > widths[0]
        wrapped = [textwrap.wrap(x, size) for x, size in zip((" " if alone else name, *others), widths, strict=True)]
        lines += [f"  {name}"] if alone else []
        for parts in zip_longest(*wrapped, fillvalue=""):
            cells = (part.ljust(size) for part, size in zip(parts, widths, strict=True))
            lines.append(f"  {'  '.join(cells)}".rstrip())
    return lines
