"""Loggers of scalars, texts and videos: TensorBoard and Weights & Biases."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from pgsuite.errors import UserError, install
from pgsuite.files import write_text
from pgsuite.settings import INCIDENTAL, Checked
from pgsuite.training.run_dir import Csv, Logger
from pgsuite.training.video import Gif, log_gif

__all__ = ["Csv", "Logger", "TensorBoard", "WandB", "Wandb"]

# Charts of the Custom Scalars tab by their tags, which are regular expressions.  Returns of different environments have
# no common scale, so each environment has charts of its own: TensorBoard joins the layouts of all runs by their titles.
RETURNS = {"episode/return": "training", "evaluation/return": "evaluation", "evaluation/stochastic_return": "sampled"}
DIAGNOSTICS = {
    "KL": "algorithm/kl",
    "entropy": "algorithm/entropy",
    "explained variance": "algorithm/explained_variance",
    "clipped fraction of ratios": "algorithm/clip_fraction",
    "fraction of the full step": "algorithm/step_fraction",
    "policy loss": "algorithm/policy_loss",
    "surrogate improvement": "algorithm/surrogate_improvement",
    "value loss": "algorithm/value_loss",
    "gradient norm": "algorithm/grad_norm",
    "gradient norm of the critic": "algorithm/critic_grad_norm",
    "learning rate": "algorithm/learning_rate",
    "episode length": "episode/length",
    "steps per second": "time/steps_per_second",
}
ALIGNMENT = {
    "true score, and that of the reference": "language/(reference_)?true_score",
    "reward": "language/reward",
    "win rate against the reference": "language/wins",
    "KL to the reference, nats per response": "language/kl",
    "tokens per response": "language/length",
    "KL coefficient": "algorithm/reference_coef",
}
MACHINERY = re.compile(rf"(device|backend|execution|torch_threads|({'|'.join(INCIDENTAL)})(\..*)?)$")


@dataclass(kw_only=True)
class Wandb(Checked):
    project: str | None = None  # project on Weights & Biases; null logs nothing there
    name: str | None = None  # of the run there; null takes the run directory's
    group: str | None = None  # that the run belongs to there
    tags: list[str] = field(default_factory=list)  # of the run there


class TensorBoard(Logger):
    """TensorBoard event files, with hyperparameters and results in the HParams tab, and returns by environment above
    diagnostics in the Custom Scalars tab."""

    def __init__(self, folder: Path, hyperparameters: Mapping[str, Any], after: int | None = None) -> None:
        """``after`` is the number of steps from which the run is resumed; later entries are no longer shown."""
        from torch.utils.tensorboard.summary import hparams
        from torch.utils.tensorboard.writer import SummaryWriter

        self.steps = max(after or 0, 0)
        named = (hyperparameters.get(key) for key in ("env.id", "env.game", "env"))
        self.env = next((str(x) for x in named if x is not None), "return")
        self.returns = f"returns/{re.sub(r'[^-/.a-zA-Z0-9_]', '_', self.env)}"  # as TensorBoard writes it
        self.writer = SummaryWriter(str(folder), purge_step=None if after is None else after + 1)
        shown = {name: x for name, x in hyperparameters.items() if x is not None and not MACHINERY.match(name)}
        shown = {name: x if isinstance(x, bool | int | float | str) else str(x) for name, x in shown.items()}
        # The summary of the experiment is omitted: TensorBoard would take the columns of all runs from the first one.
        _, session, self.end = hparams(shown, {})
        if after is None or after < 0:
            self.writer._get_file_writer().add_summary(session)
            at = re.escape(self.returns)
            charts = {self.env: f"{at}/training"}
            if hyperparameters.get("evaluation.every") is not None:
                charts[f"{self.env}, evaluation"] = f"{at}/(evaluation|sampled)"
            layout = {"Returns": charts, "Diagnostics": DIAGNOSTICS}
            if hyperparameters.get("policy.model") is not None:
                layout = {"Alignment, on prompts that are held out": ALIGNMENT} | layout
            drawn = {x: {title: ["Multiline", [f"^{tag}$"]] for title, tag in y.items()} for x, y in layout.items()}
            band = [f"{self.returns}/{x}" for x in ("training", "lower", "upper")]
            drawn["Returns"][f"{self.env}, one deviation among episodes"] = ["Margin", band]
            self.writer.add_custom_scalars(drawn)

    def write(self, steps: int, scalars: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        scalars = dict(scalars)
        if {"episode/return", "episode/return_std"} <= scalars.keys():
            mean, std = scalars["episode/return"], scalars["episode/return_std"]
            scalars |= {f"{self.returns}/lower": mean - std, f"{self.returns}/upper": mean + std}
        scalars |= {f"{self.returns}/{name}": scalars[tag] for tag, name in RETURNS.items() if tag in scalars}
        # One event for all: each event is handed to a thread and waited for, which takes longer than a small update.
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self.writer._get_file_writer().add_summary(Summary(value=values), steps)
        self.writer.flush()
        self.steps = steps

    def log_text(self, name: str, text: str, steps: int) -> None:
        self.writer.add_text(name, text, steps)
        self.writer.flush()

    def log_video(self, film: Gif, steps: int) -> None:
        log_gif(self.writer, film, steps)

    def close(self, results: Mapping[str, float]) -> None:
        for name, value in results.items():
            if math.isfinite(value):  # with a capital, since HParams shows the first few metrics in ASCII order;
                # one step later, so that it is dropped when the run is resumed
                self.writer.add_scalar(f"Result/{name}", value, self.steps + 1)
        if results:
            self.writer._get_file_writer().add_summary(self.end)
        self.writer.close()


class WandB(Logger):
    """A run on Weights & Biases; WANDB_MODE=offline keeps it in the run directory.  A resumed run continues its own."""

    def __init__(self, folder: Path, hyperparameters: Mapping[str, Any], wanted: Wandb) -> None:
        """Raises UserError without the package, and if wandb cannot start a run."""
        try:
            import wandb
        except ImportError as error:
            raise UserError(f"logging.wandb needs wandb: {install('wandb')}") from error
        identity = folder / "wandb_id"
        if not identity.exists():
            write_text(identity, uuid4().hex[:12])
        try:
            self.run = wandb.init(
                project=wanted.project,
                name=wanted.name or f"{folder.parent.name}/{folder.name}",
                group=wanted.group,
                tags=wanted.tags,
                id=identity.read_text().strip(),
                resume="allow",
                dir=folder,
                config=dict(hyperparameters),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.errors.Error as error:  # pyright: ignore[reportAttributeAccessIssue]
            raise UserError(f"wandb does not begin: {error}. WANDB_MODE=offline logs without a network") from error
        self.run.define_metric("*", step_metric="steps")  # wandb's own step count cannot decrease when a run is resumed

    def write(self, steps: int, scalars: Mapping[str, float]) -> None:
        self.run.log({"steps": steps} | dict(scalars))

    def close(self, results: Mapping[str, float]) -> None:
        self.run.summary.update({f"Result/{name}": value for name, value in results.items() if math.isfinite(value)})
        self.run.finish()
