"""One training run, from a composed configuration to its directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from pgsuite.runtime import callbacks, loggers
from pgsuite.runtime.build import build, container, describe, settings_of, spaces_of, versions
from pgsuite.runtime.schema import UserError


def train(cfg: DictConfig) -> None:
    """Train, and leave config.yaml, TensorBoard events, metrics.csv, checkpoints and summary.json in Hydra's run
    directory.  Raises UserError."""
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    names = {key: hydra.runtime.choices[key] for key in ("algo", "env")}
    try:
        trainer, run = build(cfg), settings_of(cfg)
    except UserError:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()  # Hydra made it; a run that never began leaves nothing behind
        raise
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder} already holds a run: give another with hydra.run.dir=")
    config, console = container(cfg), callbacks.console()
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config))
    facts = {"config": config, "spaces": spaces_of(trainer.collector.env)}
    checkpoints = callbacks.Checkpoints(folder, facts, run.checkpoint_every)
    logs: list[loggers.Logger] = [
        loggers.Csv(folder / "metrics.csv"),
        loggers.TensorBoard(folder, _flatten(config) | names, ("return_mean",)),
    ]
    trainer.callbacks = (
        callbacks.DivergenceWatch(checkpoints),
        callbacks.Log(logs),
        callbacks.Bar(console),
        checkpoints,
        callbacks.Summary(folder / "summary.json", names | {"seed": run.seed}, versions),
    )
    for line in (*describe(trainer, run), *_recipe(hydra)):
        console.print(line, highlight=False)
    try:
        trainer.fit()
    except KeyboardInterrupt:
        console.print(f"interrupted at {trainer.steps:,} steps; everything so far is in {_short(folder)}")
        raise
    seconds = trainer.seconds["total"]
    outcome = f"return {trainer.return_mean:,.1f} +- {trainer.return_std:,.1f} over {len(trainer.recent)} episodes"
    console.print(
        f"{outcome if trainer.recent else 'no episode finished in the last tenth'} | {trainer.steps:,} steps in "
        f"{seconds:,.1f} s ({trainer.steps / seconds:,.0f}/s) | {_short(folder)}",
        highlight=False,
    )


def _recipe(hydra: HydraConf) -> list[str]:
    """A line on the measured recipe that was picked up, if one was."""
    name = hydra.runtime.choices.get("tuned")
    folders = [Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file"]
    return [f"recipe {name}"] if any((folder / "tuned" / f"{name}.yaml").is_file() for folder in folders) else []


def _short(folder: Path) -> Path:
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def _flatten(tree: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level with dotted names, without the machinery."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif key != "_target_":
            flat[f"{prefix}{key}"] = value
    return flat
