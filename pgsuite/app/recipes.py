"""What a measured recipe gives, said where it and the user's other choices exclude each other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml
from hydra import compose
from hydra.conf import HydraConf
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pgsuite.errors import UserError

GROUP = re.compile(r"[+~]*tuned(@[^=]*)?(=|$)")  # an override that chooses the recipe
NAMED_BARE = ("", "algo.")  # settings that messages call by their last name, as in "8 minibatches do not divide"


@contextmanager
def naming(hydra: HydraConf) -> Iterator[None]:
    """A UserError that is raised within, about a setting that the recipe and not the user gave, says so."""
    try:
        yield
    except UserError as error:
        message = str(error)
        if (more := _origin(message, hydra)) is None:
            raise
        raise UserError(f"{message.removesuffix(': leave it out')}; {more}") from error


def given_by_recipe(hydra: HydraConf) -> dict[str, tuple[Any, Any]]:
    """The settings that are as they are because of the recipe, by their dotted names: what it gives, and what they
    would be without it.  Those that the user gave as well are not among them.

    Raises what Hydra and OmegaConf raise for overrides that cannot be composed again."""
    task = list(hydra.overrides.task)
    without = [override for override in task if not GROUP.match(override)]
    ours, theirs = (_flat(OmegaConf.to_container(compose("train", x))) for x in (task, [*without, "~tuned"]))
    return {name: (x, theirs.get(name)) for name, x in ours.items() if x != theirs.get(name)}


def written(value: Any) -> str:
    """A value of a setting as it is given on the command line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).removesuffix("...\n").strip()


def _origin(message: str, hydra: HydraConf) -> str | None:
    """That the recipe gives the settings that a message names, and how to leave them out; None if it gives none."""
    recipe = hydra.runtime.choices.get("tuned")
    if recipe is None or not GlobalHydra.instance().is_initialized():
        return None
    try:
        given = given_by_recipe(hydra)
    except (HydraException, OmegaConfBaseException):
        return None  # what was wrong is said, and that is what counts
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


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names; one that is a schedule or another dictionary without a class is whole."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and "_target_" in value:
            flat |= _flat(value, f"{prefix}{key}.")
        elif key != "_target_":
            flat[f"{prefix}{key}"] = value
    return flat
