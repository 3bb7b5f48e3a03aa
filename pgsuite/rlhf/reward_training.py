"""Training of a reward model on preferences, and its accuracy and calibration on held-out ones."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import logsigmoid
from torch.utils.tensorboard.writer import SummaryWriter

from pgsuite import seeding, settings
from pgsuite.app.build import commit, pick_device, versions
from pgsuite.app.train import short
from pgsuite.errors import UserError
from pgsuite.files import write_text
from pgsuite.nn.optim import Adam
from pgsuite.rlhf import files, preferences, scorer
from pgsuite.rlhf.grammar import Grammar
from pgsuite.rlhf.model import WordModel
from pgsuite.rlhf.preferences import Preference
from pgsuite.rlhf.reward import FILE, Judge, RewardModel
from pgsuite.rlhf.tokens import Vocabulary
from pgsuite.settings import Count, Natural, Positive, TorchThreads

PAIRS = "preferences.jsonl"
BINS = 10  # of the reliability table, between one half and one
REFERENCES = 1_000  # samples over which the mean reward is zero


@dataclass(kw_only=True)
class RewardTraining:
    """The settings of a reward model's training."""

    model: str = "runs/language/model"  # a pretrained model, which generates the pairs and initializes the judges
    pairs: str | None = None  # a file of preferences; null generates them by the hidden scorer
    count: Count = 16_000  # number of pairs to generate
    noise: Positive = 1.0  # of choices: the score difference at which the odds of a preference are e
    held_out: Count = 1_000  # number of held-out pairs, the last ones
    members: Count = 1  # judges, each trained with a seed of its own
    seed: Natural = 0  # of pairs, choices, initial weights and order
    epochs: Count = 2  # passes over the training pairs
    batch: Count = 64  # pairs to a step
    lr: Positive = 5e-4  # falls to zero
    device: str = "auto"  # auto, cpu, cuda or cuda:<number>
    torch_threads: TorchThreads = 1  # CPU threads of torch

    def __post_init__(self) -> None:
        settings.check(self, label="")


@torch.no_grad()
def margins(reward: RewardModel, pairs: Sequence[Preference]) -> Tensor:
    """The reward margins [N], chosen minus rejected response, of preferences."""
    prompts = [pair.prompt for pair in pairs]
    chosen, rejected = ([getattr(pair, side) for pair in pairs] for side in ("chosen", "rejected"))
    return (reward(prompts, chosen) - reward(prompts, rejected)).cpu()


def accuracy(margin: Tensor) -> float:
    """The fraction of pairs whose chosen response has the greater reward; a tie counts half."""
    return float((margin.sign() + 1).mean() / 2)


def reliability(margin: Tensor, bins: int = BINS) -> list[tuple[float, float, int]]:
    """A reliability table: for each of ``bins`` equal intervals of the predicted probability from one half to one, the
    mean probability, the observed frequency, and the number of predictions.  Empty intervals are omitted."""
    confidence, right = margin.abs().sigmoid(), margin > 0
    place = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    inside = [place == i for i in range(bins)]
    return [(float(confidence[x].mean()), float(right[x].float().mean()), int(x.sum())) for x in inside if x.any()]


def calibration_error(table: Sequence[tuple[float, float, int]]) -> float:
    """The expected calibration error (Guo et al., 2017): the mean absolute difference of probability and frequency."""
    return sum(n * abs(p - frequency) for p, frequency, n in table) / sum(n for *_, n in table)


def fit(
    judge: Judge, vocabulary: Vocabulary, pairs: Sequence[Preference], wanted: RewardTraining, generator: Generator
) -> list[float]:
    """Minimize the Bradley-Terry loss -log sigmoid(r(chosen) - r(rejected)).  Returns its mean in each step."""
    losses: list[Tensor] = []
    optimizer = Adam([judge], wanted.lr, max_grad_norm=1.0)

    def loss(tokens: Tensor, real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = judge(tokens, real).chunk(2)
        loss = -logsigmoid(chosen - rejected).mean()
        return loss, {"loss": loss.detach()}

    rounds = [torch.randperm(len(pairs), generator=generator).split(wanted.batch) for _ in range(wanted.epochs)]
    batches = [chosen for each in rounds for chosen in each]
    for step, chosen in enumerate(batches):
        optimizer.lr.fill_(wanted.lr * (1 - step / len(batches)))
        some = [pairs[i] for i in chosen.tolist()]
        responses = [pair.chosen for pair in some] + [pair.rejected for pair in some]
        asked = [pair.prompt for pair in some] * 2
        metrics = optimizer.step(loss, *vocabulary.encode(asked, responses, judge.shift.device))
        losses.append(metrics["loss"])
    return torch.stack(losses).tolist()  # read from the device once


def train_reward(wanted: RewardTraining, folder: Path, say: Callable[[str], object]) -> RewardModel:
    """Train a reward model; writes reward.pt, preferences.jsonl if it sampled them, TensorBoard events and summary.json
    to a run directory.

    Rewards are shifted to a mean of zero, for each judge, over samples of the pretrained model, as in the code of
    Ziegler et al. (2019).  They are not scaled, which would undo their calibration.  Raises UserError if a file is
    missing or invalid, or too many pairs are held out.
    """
    device = pick_device(wanted.device)
    path, began = files.require_empty(folder, FILE), perf_counter()
    torch.set_num_threads(wanted.torch_threads)
    model = WordModel.load(wanted.model).to(device)
    generator = seeding.generator(wanted.seed, "preferences", device)
    count = wanted.count if wanted.pairs is None else REFERENCES
    prompts = [review.prompt for review in Grammar().sample(count, seeding.number(wanted.seed, "prompts"))]
    if wanted.pairs is None:
        say(f"sampling two responses to each of {len(prompts):,} prompts on {device}")
        pairs = preferences.collect(model, prompts, scorer.score, wanted.noise, generator)
        preferences.save(pairs, folder / PAIRS)
        say(f"{len(pairs):,} pairs in {perf_counter() - began:,.0f} s | {short(folder / PAIRS)}")
    else:
        pairs = preferences.load(Path(wanted.pairs), model.vocabulary)
    if wanted.held_out >= len(pairs):
        raise UserError(f"held_out={wanted.held_out} of {len(pairs)} pairs leaves none to train on")
    train, held = pairs[: -wanted.held_out], pairs[-wanted.held_out :]
    asked = prompts[:REFERENCES]
    references = model.vocabulary.encode(asked, model.generate(asked, generator), device)
    judges: list[Judge] = []
    with SummaryWriter(str(folder)) as writer:
        for member in range(wanted.members):
            say(f"training reward model {member + 1} of {wanted.members} on {len(train):,} pairs")
            generator = seeding.generator(wanted.seed, f"judge {member}")
            judge = Judge(copy.deepcopy(model.body).cpu().requires_grad_(), generator).to(device)
            for step, x in enumerate(fit(judge, model.vocabulary, train, wanted, generator), 1):
                writer.add_scalar(f"training/loss_{member}", x, step)
            with torch.no_grad():
                judge.shift.copy_(judge(*references).mean())
            judges.append(judge)
        reward = RewardModel(model.vocabulary, judges)
        found = measure(reward, held)
        for name in ("accuracy", "calibration_error"):
            writer.add_scalar(f"held_out/{name}", found[name], 1)
    for line in report(found):
        say(line)
    summary: dict[str, Any] = asdict(wanted) | found
    summary |= {"seconds": perf_counter() - began, "versions": versions(), "commit": commit()}
    reward.save(path, **summary)
    say(f"trained in {summary['seconds']:,.0f} s | {short(path)}")
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return reward.requires_grad_(False).eval()


def measure(reward: RewardModel, pairs: Sequence[Preference]) -> dict[str, Any]:
    """Accuracy, loss and calibration on preferences; if their probabilities are known, also the best attainable
    accuracy and loss."""
    margin = margins(reward, pairs)
    table = reliability(margin)
    found: dict[str, Any] = {"accuracy": accuracy(margin), "calibration_error": calibration_error(table)}
    found |= {"loss": float(-logsigmoid(margin).mean()), "reliability": table}
    if len(known := [pair.probability for pair in pairs if pair.probability is not None]) == len(pairs):
        p = torch.tensor(known)
        found["best_accuracy"] = float(torch.maximum(p, 1 - p).mean())
        found["best_loss"] = float(torch.special.entr(torch.stack([p, 1 - p])).sum(0).mean())
        found["ordering"] = accuracy(torch.where(p > 0.5, margin, -margin)[p != 0.5])
    return found


def report(found: dict[str, Any]) -> list[str]:
    """The measurements as lines of text."""
    lines = [f"held-out accuracy {found['accuracy']:.1%} | expected calibration error {found['calibration_error']:.3f}"]
    if "best_accuracy" in found:
        lines[0] = (
            f"held-out accuracy {found['accuracy']:.1%}, at best {found['best_accuracy']:.1%} with such noise | "
            f"{found['ordering']:.1%} of pairs ordered as by the true scores | loss {found['loss']:.3f}, at best "
            f"{found['best_loss']:.3f} | expected calibration error {found['calibration_error']:.3f}"
        )
    lines.append("predicted  preferred   pairs")
    return lines + [f"{p:>9.1%} {frequency:>9.1%} {n:>7,}" for p, frequency, n in found["reliability"]]


def main() -> None:
    """The command line."""
    from pgsuite.app import cli  # configures Hydra

    cli.main_with_settings(train_reward, "reward_model")
