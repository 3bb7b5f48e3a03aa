"""Settings that come from a recipe, named in messages if they conflict with the user's other choices."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from hydra import compose
from hydra.conf import HydraConf
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import read_write
from omegaconf.errors import OmegaConfBaseException

from pgsuite.app.build import observes_screens, to_dict
from pgsuite.app.schema import Run
from pgsuite.errors import UserError
from pgsuite.settings import closest

GROUP = re.compile(r"[+~]*tuned(@[^=]*)?(=|$)")  # overrides that select the recipe
NAMED_BARE = ("", "algo.")  # prefixes that messages leave out, as in "8 minibatches do not divide"


@contextmanager
def naming(hydra: HydraConf, config: dict[str, Any]) -> Iterator[None]:
    """Add to a UserError raised within whether the setting that it names comes from the recipe, and how to leave it
    out."""
    try:
        yield
    except UserError as error:
        message = str(error)
        if (more := _origin(message, hydra, config)) is None:
            raise
        raise UserError(f"{message.removesuffix(': leave it out')}; {more}") from error


def given_by_recipe(hydra: HydraConf, config: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings whose value comes from the recipe, by dotted name: that value, and the value without the recipe.
    Settings that the user also gave are not included.

    Raises the errors of Hydra and OmegaConf for overrides that cannot be composed without the recipe."""
    without = [override for override in hydra.overrides.task if not GROUP.match(override)]
    ours, theirs = flat(config), flat(to_dict(compose("train", [*without, "~tuned"])))
    return {name: (x, theirs.get(name)) for name, x in ours.items() if x != theirs.get(name)}


def with_one_for_images(config: dict[str, Any], hydra: HydraConf, run: Run) -> dict[str, Any]:
    """The configuration of a new run.  If it has no recipe, and none was asked for, and its observations are those of a
    screen, it is composed again with the method's recipe for images, which becomes the run's choice.

    Raises UserError for environments that cannot be made."""
    choices, fitting = hydra.runtime.choices, f"{hydra.runtime.choices['algo']}-images"
    have = {path.stem for path in available(hydra)}
    chosen = choices.get("tuned") in have or any(map(GROUP.match, hydra.overrides.task))
    chosen = chosen or config["resume"] not in (None, "auto")
    if chosen or fitting not in have or not observes_screens(run):
        return config
    with read_write(hydra):  # pyright: ignore[reportArgumentType]
        choices["tuned"] = fitting
    return to_dict(compose("train", [*hydra.overrides.task, f"tuned={fitting}"]))


def refuse_unknown(hydra: HydraConf) -> None:
    """Raise UserError for a recipe that was asked for and does not exist.  Hydra passes over it, since the group is
    optional: most methods and environments have no recipe."""
    given = [override for override in hydra.overrides.task if GROUP.match(override) and not override.startswith("~")]
    have = {path.stem for path in available(hydra)}
    if given and hydra.runtime.choices.get("tuned") not in have:
        near = closest(given[-1].partition("=")[2], have)
        raise UserError(f"{given[-1]}: the name of one recipe belongs there; {near}; ~tuned leaves the recipe out")


def available(hydra: HydraConf) -> list[Path]:
    """The files of all recipes."""
    folders = [Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file"]
    return [path for folder in folders for path in (folder / "tuned").glob("*.yaml")]


def written(value: Any) -> str:
    """A value of a setting as written on the command line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).removesuffix("...\n").strip()


def _origin(message: str, hydra: HydraConf, config: dict[str, Any]) -> str | None:
    """Which of the settings that a message names come from the recipe, and how to leave them out; None if none do."""
    recipe = hydra.runtime.choices.get("tuned")
    if recipe is None or not GlobalHydra.instance().is_initialized():
        return None
    try:
        given = given_by_recipe(hydra, config)
    except (HydraException, OmegaConfBaseException):
        return None  # the original message suffices
    found = {name: values for name, values in given.items() if _names(message, name)}
    if not found:
        return None
    gives = ", ".join(f"{name}={written(value)}" for name, (value, _) in found.items())
    instead = " ".join(f"{name}={written(default)}" for name, (_, default) in found.items())
    return f"the recipe {recipe} gives {gives}: {instead} leaves that out, and ~tuned the whole recipe"


def _names(message: str, setting: str) -> bool:
    parent, last = setting[: setting.rfind(".") + 1], setting.rpartition(".")[2]
    bare = parent in NAMED_BARE and re.search(rf"(?<![\w-]){last}(?![\w-])", message)
    return bool(bare) or re.search(rf"(?<![\w.]){re.escape(setting)}(?!\w)", message) is not None


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name; dictionaries without ``_target_``, such as schedules, are not flattened."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and "_target_" in value:
            found |= flat(value, f"{prefix}{key}.")
        elif key != "_target_":
            found[f"{prefix}{key}"] = value
    return found
