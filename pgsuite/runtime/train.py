"""One training run, from a composed configuration to its directory."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from pgsuite import parallel
from pgsuite.runtime import callbacks, checkpoint, loggers
from pgsuite.runtime.build import build, check_alike, container, describe, settings_of, spaces_of, versions
from pgsuite.runtime.evaluate import match
from pgsuite.runtime.recovery import Recovery
from pgsuite.runtime.resume import holds_another, past, put_back
from pgsuite.runtime.schema import UserError
from pgsuite.runtime.trainer import Callback, Trainer


def train(cfg: DictConfig) -> float | None:
    """Train, and leave config.yaml, TensorBoard events, metrics.csv, checkpoints and summary.json in Hydra's run
    directory, or go on with a run in its own.

    Returns the mean return over the last tenth of the steps, or the last evaluation's where there was one, for
    sweeps to compare.  Ends the program with code 0 or 143 after SIGINT or SIGTERM.  Raises UserError.
    """
    hydra = HydraConfig.get()
    made = Path(hydra.runtime.output_dir)
    try:
        return _train(cfg, hydra, made)
    finally:
        made_here = (made, *made.parents[:2]) if parallel.rank() == 0 else ()
        for folder in made_here:  # Hydra did; a run that never began here leaves nothing behind
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _train(cfg: DictConfig, hydra: HydraConf, folder: Path) -> float | None:
    console, writes = callbacks.console(), parallel.rank() == 0

    def say(line: str) -> None:
        if writes:
            console.print(line, highlight=False)

    settings_of(cfg)  # complains before anything is looked for
    before = past(cfg, hydra, say)
    if before is not None:
        folder, cfg = before.folder, before.cfg
        if before.steps >= cfg.total_steps and finished(folder):
            say(f"{short(folder)} has made all its {before.steps:,} steps; a greater total_steps would go on")
            return objective(folder)
    trainer, run = build(cfg), settings_of(cfg)
    config, env = container(cfg) | {"resume": None}, trainer.collector.env
    choices = before.state["choices"] if before else dict(hydra.runtime.choices)
    names = {key: choices[key] for key in ("algo", "env")}
    again = -1 if (folder / "config.yaml").exists() else None  # it was killed before anything was saved
    after = before.steps if before else again
    if writes:
        if before is not None:
            checkpoint.set_aside(folder, before.steps)
        elif holds_another(folder, cfg):
            raise UserError(f"{folder} already holds a run: go on with resume={folder}, or give another hydra.run.dir=")
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(config))

    facts = {"config": config, "choices": choices, "versions": versions(), "device": env.device.type}
    facts |= {"spaces": spaces_of(env)}
    checkpoints = callbacks.Checkpoints(folder, facts, run.checkpoint)
    settings = _flatten(config) | names
    board = loggers.TensorBoard(folder, settings, after) if writes else None
    logs: list[loggers.Logger] = [loggers.Csv(folder / "metrics.csv", after), board] if board else []
    if writes and run.logging.wandb.project is not None:
        logs.append(loggers.WandB(folder, settings, run.logging.wandb))
    parts: list[Callback] = [callbacks.Log(logs, run.logging.points), callbacks.Bar(console)] if writes else []
    if run.evaluation.every is not None:
        play = match(cfg, run, folder / "videos", board.animate if board else lambda film, steps: None)
        table = loggers.Csv(folder / "evaluation.csv", after) if writes else None
        parts.append(callbacks.Evaluate(play, table, logs[1:], checkpoints, run.evaluation))
    parts.append(checkpoints)
    if writes:
        found = {"seed": run.seed, "backend": env.backend, "device": str(env.device), "processes": parallel.size()}
        found |= {"resume": trainer.level, "versions": versions()}
        parts.append(callbacks.Summary(folder / "summary.json", names | found))
    trainer.callbacks = parts
    trainer.guard = Recovery(folder, facts, run.recover.attempts, say)
    for line in (*describe(trainer, run), *_recipe(hydra)):
        say(line)
    if before is not None:
        put_back(trainer, before.state, say)
    check_alike(trainer, cfg)
    with answering_signals(trainer):
        trainer.fit()
        parallel.barrier()  # torchrun ends the first process, which may still write, if another ends with 143
    if trainer.stop and trainer.steps < trainer.total_steps:
        how = f"go on with: python scripts/train.py resume={short(folder)}"
        say(f"{signal.Signals(trainer.stop).name} at {trainer.steps:,} steps, saved; {how}")
        sys.exit(0 if trainer.stop == signal.SIGINT else 128 + trainer.stop)
    seconds = trainer.seconds["total"]
    outcome = f"return {trainer.return_mean:,.1f} +- {trainer.return_std:,.1f} over {len(trainer.recent)} episodes"
    say(
        f"{outcome if trainer.recent else 'no episode finished in the last tenth'} | {trainer.steps:,} steps in "
        f"{seconds:,.1f} s ({trainer.steps / seconds:,.0f}/s) | {short(folder)}"
    )
    return objective(folder) if writes else None


@contextmanager
def answering_signals(trainer: Trainer) -> Iterator[None]:
    """SIGINT and SIGTERM ask the trainer to stop after the iteration that it is in; a second one stops it at once."""
    asked = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():  # only there may signals be answered
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        trainer.asked = number
        for each in asked:
            signal.signal(each, signal.SIG_DFL)

    others = [signal.signal(each, stop) for each in asked]
    try:
        yield
    finally:
        for each, other in zip(asked, others, strict=True):
            signal.signal(each, other)


def summary_of(folder: Path) -> dict[str, Any]:
    """What a run says of itself, if it does."""
    try:
        return json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return {}


def finished(folder: Path) -> bool:
    return summary_of(folder).get("status") == "finished"


def objective(folder: Path) -> float | None:
    """What a run came to: its last evaluation's return, or its mean return over the last tenth of the steps."""
    summary = summary_of(folder)
    return (summary.get("evaluation") or {}).get("return", summary.get("return_mean"))


def _recipe(hydra: HydraConf) -> list[str]:
    """A line on the measured recipe that was picked up, if one was."""
    name = hydra.runtime.choices.get("tuned")
    folders = [Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file"]
    return [f"recipe {name}"] if any((folder / "tuned" / f"{name}.yaml").is_file() for folder in folders) else []


def short(folder: Path) -> Path:
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
