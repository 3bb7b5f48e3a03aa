"""Resume: which run, with which settings, and at which level of exactness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from pgsuite import distributed
from pgsuite.app.build import to_dict, versions
from pgsuite.errors import UserError
from pgsuite.settings import INCIDENTAL
from pgsuite.training import checkpoint
from pgsuite.training.run_lock import RunLock
from pgsuite.training.trainer import Level, Trainer, slots
from pgsuite.trust import Source, source_of, strings

# Settings that may change when a run is resumed.
FREE = (
    "total_steps",
    *(name for name in INCIDENTAL if name not in ("resume", "trust", "seeds", "batch", "sweep")),
    "device",
)
MEANING: dict[Level, str] = {
    "exact": "as if it had never stopped",
    "episode": "its environments cannot be saved and begin new episodes",
    "weights": "what was learned, on other devices or processes: environments and random streams are new",
}


@dataclass
class ResumePoint:
    """A run to resume: its directory, settings and checkpoint."""

    folder: Path
    config: dict[str, Any]  # the run's own, with permitted changes; plain, so that it can be sent to other processes
    state: dict[str, Any]
    source: Source | None  # None for settings of this command line

    @property
    def steps(self) -> int:
        return self.state["steps"]


def find_run_to_resume(
    config: dict[str, Any], hydra: HydraConf, lock: RunLock, say: Callable[[str], None]
) -> ResumePoint | None:
    """The run that the setting ``resume`` selects, whose directory is then held; None to start a new one.  Only the
    first process searches.

    Raises UserError for a run that does not exist, has no undamaged checkpoint or is in use, and for settings that may
    not change.
    """
    found: ResumePoint | UserError | None = None
    if config["resume"] is not None and distributed.rank() == 0:
        try:
            if config["resume"] == "auto":
                found = newest_like(config, hydra, Path(hydra.runtime.output_dir), lock, say)
            else:
                found = named(config, hydra, lock, say)
        except UserError as error:
            found = error
    found = distributed.broadcast(found)
    if isinstance(found, UserError):
        raise found
    return found


def named_by_time(hydra: HydraConf) -> bool:
    """Whether the name of the run directory contains the time, so that any other name would do as well."""
    where: Any = hydra.sweep if hydra.mode is RunMode.MULTIRUN else hydra.run
    return any("${now:" in str(part) for part in OmegaConf.to_container(where, resolve=False).values())  # pyright: ignore


def new_run_dir(config: dict[str, Any], hydra: HydraConf, lock: RunLock) -> Path:
    """Make and hold the directory of a new run.  Raises UserError for a given one that holds a run or is in use."""
    folder = Path(hydra.runtime.output_dir)
    if named_by_time(hydra):
        return lock.claim(folder)
    lock.take(folder)
    if holds_another(folder, config):
        raise UserError(f"{folder} already holds a run: go on with resume={folder}, or give another hydra.run.dir=")
    return folder


def named(config: dict[str, Any], hydra: HydraConf, lock: RunLock, say: Callable[[str], None]) -> ResumePoint:
    """The run, or the checkpoint of a run, that ``resume`` names."""
    given = Path(config["resume"])
    if (run := checkpoint.run_of(given) if given.suffix == ".pt" else given).is_dir():
        lock.take(run)  # before its checkpoints are read, which another process might be writing
    path, state = checkpoint.newest(given, say)
    cfg = OmegaConf.create(config)
    own, choices = OmegaConf.create(state["config"]), hydra.runtime.choices
    for override in OverridesParser.create().parse_overrides(list(hydra.overrides.task)):
        key = override.key_or_group
        if key in ("resume", "trust"):
            continue
        if key in choices:
            same, new = choices[key] == state["choices"].get(key), choices[key]
        else:
            new = OmegaConf.select(cfg, key)
            same = new == OmegaConf.select(own, key)
        if not same and key.split(".")[0] not in FREE:
            raise UserError(_fixed(override))
        if not same:
            OmegaConf.update(own, key, new)
    assert isinstance(own, DictConfig)
    source = source_of(path, state, config["trust"], strings(config))
    return ResumePoint(checkpoint.run_of(path), to_dict(own), state, source)


def _fixed(override: Override) -> str:
    return (
        f"{override.key_or_group} cannot change where a run goes on, only {', '.join(FREE)}: leave "
        f"{override.input_line} out, or begin another run"
    )


def misplaced(overrides: Sequence[Override], reason: str) -> str | None:
    """What is wrong with overrides that cannot be composed for this reason, if they resume a run: they are composed
    with the default method and environment, and so are refused by the settings of those."""
    resumes = any(x.key_or_group == "resume" and x.value() not in (None, "auto") for x in overrides)
    fixed = [x for x in overrides if x.key_or_group.split(".")[0] not in (*FREE, "resume", "hydra")]
    return next((_fixed(x) for x in fixed if resumes and x.key_or_group in reason), None)


def newest_like(
    wanted: dict[str, Any], hydra: HydraConf, home: Path, lock: RunLock, say: Callable[[str], None]
) -> ResumePoint | None:
    """The newest run with equal settings, whose directory is then held: in ``home``, or beside it if directories are
    named by the time; None if there is none."""
    beside = home.parent.iterdir() if named_by_time(hydra) and home.parent.is_dir() else []
    configs = [path for folder in {home, *beside} if (path := folder / "config.yaml").is_file()]
    for path in sorted(configs, key=lambda path: path.stat().st_mtime, reverse=True):
        config = written(path)
        if identity(config) != identity(same := with_threads_of(config, wanted)):
            continue
        lock.take(path.parent)
        try:
            _, state = checkpoint.newest(path.parent, say)
        except (UserError, OSError):
            lock.release()
            continue  # it has no checkpoint to resume from
        return ResumePoint(path.parent, same, state, None)
    return None


def written(path: Path) -> dict[str, Any]:
    """The settings in a config.yaml; empty if it cannot be read."""
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def with_threads_of(config: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """The wanted settings; with torch_threads=measure, with the numbers of threads of the given configuration."""
    if wanted["torch_threads"] != "measure":
        return wanted
    return wanted | {key: config.get(key) for key in ("torch_threads", "env_threads")}


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that determine the result of a run."""
    plain = yaml.safe_load(yaml.safe_dump(config))
    return {key: x for key, x in plain.items() if key not in INCIDENTAL}


def holds_another(folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether a directory contains a run that must not be overwritten.  With ``resume=auto``, a run with equal settings
    that has no checkpoint may start again."""
    path = folder / "config.yaml"
    if not path.exists():
        return False
    config = written(path)
    return wanted["resume"] != "auto" or identity(config) != identity(with_threads_of(config, wanted))


def resume_trainer(trainer: Trainer, state: dict[str, Any], say: Callable[[str], None]) -> None:
    """Load the state of a checkpoint into a trainer and its callbacks, and print the level of exactness."""
    states = [state, *state["others"]]
    alike = state["device"] == trainer.collector.env.device.type and len(states) == distributed.size()
    level: Level = trainer.level if alike else "weights"
    trainer.load_state_dict(states[distributed.rank()] if alike else state, level)
    for name, callback in slots(trainer.callbacks).items():
        if (told := state["callbacks"].get(name)) is not None:
            callback.load_state_dict(told)
    say(f"resumed at {trainer.steps:,} steps | {level}: {MEANING[level]}")
    then, now = state["versions"], versions()
    changed = [f"{name} {then.get(name)} -> {now.get(name)}" for name in then | now if then.get(name) != now.get(name)]
    if changed:
        say(f"versions have changed, and numbers may with them: {', '.join(changed)}")
