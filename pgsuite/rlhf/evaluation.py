"""Callbacks of language models: comparison with the reference on held-out prompts, and a directory of the result."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pgsuite import seeding
from pgsuite.nn.policy import Policy
from pgsuite.rlhf.env import LanguageEnv
from pgsuite.rlhf.generation import GenerationCollector
from pgsuite.rlhf.policy import LanguagePolicy
from pgsuite.settings import Count
from pgsuite.training.run_dir import Logger, RunDir
from pgsuite.training.trainer import Callback, Report, Trainer

SHOWN = 8  # texts
MODEL = "model"  # directory in that of the run


class Written(NamedTuple):
    """One response to each of M prompts."""

    prompts: list[str]
    responses: list[str]
    reward: Tensor  # [M]
    true: Tensor | None  # [M] true scores, if there is a scorer
    length: Tensor  # [M] tokens
    log_ratio: Tensor  # [M] log-probability under the policy, less that under the reference

    @property
    def score(self) -> Tensor:
        """The true scores [M], or without a scorer the rewards."""
        return self.reward if self.true is None else self.true


@torch.no_grad()
def respond(policy: Policy, reference: Policy, env: LanguageEnv, seed: int, most: int | None = None) -> Written:
    """The policy's responses to the held-out prompts of ``env``, to ``most`` of them, in pieces of at most as many as
    are in a rollout; deterministic given the seed."""
    found: list[Written] = []
    for i, piece in enumerate(env.apart(most)):
        own = seeding.number(seed, f"piece {i}")
        r = GenerationCollector(piece, piece.max_episode_steps, own).collect(policy)
        responses = piece.tokens.decode(r.action.cpu())
        log_ratio = (r.logp - reference.dist(r).log_prob(r.action)).where(r.mask, 0.0).sum(0)
        numbers = (x.cpu() for x in (r.mask.sum(0).float(), log_ratio))
        found.append(Written(piece.texts, responses, r.reward.sum(0).cpu(), piece.true(responses), *numbers))
    true = [x.true for x in found if x.true is not None]
    return Written(
        prompts=[text for x in found for text in x.prompts],
        responses=[text for x in found for text in x.responses],
        reward=torch.cat([x.reward for x in found]),
        true=torch.cat(true) if true else None,
        length=torch.cat([x.length for x in found]),
        log_ratio=torch.cat([x.log_ratio for x in found]),
    )


def compare(ours: Written, theirs: Written) -> dict[str, float]:
    """Metrics of a policy's responses beside those of its reference.

    ``kl`` is KL(policy || reference) in nats per response.  ``wins`` is the fraction of prompts for which the policy's
    response has the greater true score, or, without a scorer, the greater reward; a tie counts half.
    """
    found = {
        "reward": ours.reward.mean(),
        "kl": ours.log_ratio.mean(),
        "length": ours.length.mean(),
        "wins": ((ours.score - theirs.score).sign() + 1).mean() / 2,
    }
    if ours.true is not None and theirs.true is not None:
        found |= {"true_score": ours.true.mean(), "reference_true_score": theirs.true.mean()}
    return {name: float(x) for name, x in found.items()}


@dataclass(kw_only=True, eq=False)
class Alignment(Callback):
    """Compares the policy with its reference on held-out prompts, about ``points`` times in a run, and logs some
    responses at the start and at the end.

    Only the first process does so, and only if the algorithm has a reference policy.
    """

    points: Count = 20  # comparisons with the reference in a run
    prompts: Count | None = 256  # held-out prompts at most, at equal distances in their list; null takes all

    def setup(self, run: RunDir) -> None:
        self.run = run
        self.theirs: Written | None = None  # the reference's responses, always the same
        self.loggers: list[Logger] = []

    def on_start(self, trainer: Trainer) -> None:
        self.active = self.run.writes and trainer.algorithm.reference is not None
        if self.active:
            self.loggers = [self.run.table("language.csv"), *self.run.loggers[1:]]
        if self.active and trainer.steps == 0:
            self.look(trainer)

    def on_iteration(self, trainer: Trainer, report: Report) -> None:
        if not self.active:
            return
        if report.passes(trainer.total_steps / self.points) or report.steps >= trainer.total_steps:
            self.look(trainer)

    def look(self, trainer: Trainer) -> None:
        env, reference = trainer.collector.env, trainer.algorithm.reference
        assert isinstance(env, LanguageEnv) and reference is not None
        seed = seeding.number(self.run.seed, "evaluation")
        policy, other = trainer.algorithm.policy, reference.policy
        ours = respond(policy, other, env, seed, self.prompts)
        self.theirs = self.theirs or respond(other, other, env, seed, self.prompts)
        found = compare(ours, self.theirs)
        for logger in self.loggers:
            logger.write(trainer.steps, {f"language/{name}": x for name, x in found.items()})
        if trainer.steps == 0 or trainer.steps >= trainer.total_steps:
            rows = list(zip(ours.prompts, ours.responses, ours.score.tolist(), strict=True))[:SHOWN]
            lines = [
                "| prompt | response | score |",
                "|---|---|---|",
                *(f"| {p} | {r} | {x:.2f} |" for p, r, x in rows),
            ]
            for logger in self.loggers:
                logger.log_text("language/responses", "\n".join(lines), trainer.steps)
        if trainer.steps >= trainer.total_steps:
            true = f", true score {found['true_score']:.2f}" if "true_score" in found else ""
            self.run.console.print(
                f"held-out prompts: wins {found['wins']:.1%} against its reference at {found['kl']:.1f} nats per "
                f"response | reward {found['reward']:.2f}{true} | such as: {ours.prompts[0]} / {ours.responses[0]}",
            )

    def on_end(self, trainer: Trainer) -> None:
        if self.active:
            self.loggers[0].close({})


@dataclass(kw_only=True, eq=False)
class SaveModel(Callback):
    """Writes a model of the transformers library, with its tokenizer, to ``model`` in the run directory when the run is
    finished.  Other models are in the checkpoints only."""

    def setup(self, run: RunDir) -> None:
        self.run = run

    def on_end(self, trainer: Trainer) -> None:
        policy = trainer.algorithm.policy
        assert isinstance(policy, LanguagePolicy)
        if not self.run.writes or trainer.steps < trainer.total_steps or not policy.is_pretrained:
            return
        folder, tokens = self.run.folder / MODEL, Path(self.run.facts["config"]["env"]["tokens"])
        if folder.exists():  # of a run that was resumed with more steps
            shutil.rmtree(folder)
        policy.save_pretrained(folder, tokens if tokens.is_dir() else None)
        self.run.console.print(f"{folder} | loads with transformers' from_pretrained")
