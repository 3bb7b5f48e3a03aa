"""Pretraining of a language model by maximum likelihood on the corpus."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter

from pgsuite import seeding, settings
from pgsuite.app.build import commit, pick_device, versions
from pgsuite.app.train import short
from pgsuite.errors import UserError
from pgsuite.files import write_text
from pgsuite.nn.optim import Adam
from pgsuite.nn.transformer import Transformer
from pgsuite.rlhf import files
from pgsuite.rlhf.grammar import Grammar, Review
from pgsuite.rlhf.model import FILE, WordModel
from pgsuite.rlhf.tokens import Vocabulary
from pgsuite.settings import Count, Natural, Positive, TorchThreads
from pgsuite.types import Metrics

WARMUP = 50  # steps


@dataclass(kw_only=True)
class Size:
    """The size of a transformer."""

    width: Count = 64  # features of each token (d_model)
    layers: Count = 2  # transformer blocks
    heads: Count = 4  # attention heads

    def __post_init__(self) -> None:
        settings.check(self)


@dataclass(kw_only=True)
class Pretraining:
    """The settings of a pretraining."""

    seed: Natural = 0  # of corpus, initial weights and order
    reviews: Count = 96_000  # in the corpus, each read once
    held_out: Count = 2_000  # reviews to measure on
    batch: Count = 64  # reviews to a step
    lr: Positive = 3e-3  # rises over the first fifty steps, and falls to zero
    points: Count = 20  # measurements on the way
    device: str = "auto"  # auto, cpu, cuda or cuda:<number>
    torch_threads: TorchThreads = 1  # CPU threads of torch
    size: Size = field(default_factory=Size)

    def __post_init__(self) -> None:
        settings.check(self, label="")


class HeldOut:
    """Held-out reviews, with their log-probabilities under the grammar."""

    def __init__(
        self, grammar: Grammar, vocabulary: Vocabulary, reviews: list[Review], device: torch.device | None = None
    ) -> None:
        self.reviews = reviews
        self.tokens, self.real = encode(vocabulary, reviews, device)
        self.log_probability = torch.tensor([grammar.log_probability(review) for review in reviews], device=device)

    def perplexity(self, logp: Tensor) -> float:
        """Perplexity per token, including stop tokens, from the log-probabilities of reviews [N]."""
        return math.exp(-float(logp.sum()) / int(self.real[1:].sum()))

    @torch.no_grad()
    def measure(self, model: WordModel) -> dict[str, float]:
        """The perplexity of a model, and an estimate of KL(grammar || model) in nats per review with its standard
        error."""
        logp = model.log_probability(self.tokens, self.real).sum(0)
        excess = self.log_probability - logp
        error = float(excess.std()) / math.sqrt(len(excess))
        return {"perplexity": self.perplexity(logp), "kl": float(excess.mean()), "kl_error": error}


def pretrain(wanted: Pretraining, folder: Path, say: Callable[[str], object]) -> WordModel:
    """Pretrain a language model; writes model.pt, TensorBoard events and summary.json to a run directory.

    The likelihood of held-out reviews is compared with that under the grammar, which is the upper bound in expectation.
    Raises UserError if the settings are inconsistent, the device is not there, or the directory already holds a model.
    """
    device = pick_device(wanted.device)
    path, grammar, began = files.require_empty(folder, FILE), Grammar(), perf_counter()
    torch.set_num_threads(wanted.torch_threads)
    vocabulary, generator = Vocabulary(grammar.words), seeding.generator(wanted.seed, "language model")
    try:
        body = Transformer(len(vocabulary), **asdict(wanted.size), generator=generator)
    except ValueError as error:
        raise UserError(str(error)) from error
    model = WordModel(vocabulary, body, generator).to(device)
    unread = grammar.sample(wanted.held_out, seeding.number(wanted.seed, "held out"))
    held_out = HeldOut(grammar, vocabulary, unread, device)
    facts = {"grammar_perplexity": held_out.perplexity(held_out.log_probability)}
    facts |= {"parameters": sum(p.numel() for p in model.parameters())}
    say(
        f"{wanted.reviews:,} reviews of {len(vocabulary.words)} words | perplexity of the grammar "
        f"{facts['grammar_perplexity']:.3f} on {wanted.held_out:,} held out | {facts['parameters']:,} parameters on "
        f"{device}"
    )
    corpus, found = grammar.sample(wanted.reviews, wanted.seed), dict[str, float]()
    optimizer, steps = Adam([model], wanted.lr, max_grad_norm=1.0), -(-wanted.reviews // wanted.batch)
    with SummaryWriter(str(folder)) as writer:
        for step in range(steps):
            optimizer.lr.fill_(wanted.lr * min(1.0, (step + 1) / WARMUP) * (1 - step / steps))
            chosen = corpus[step * wanted.batch : (step + 1) * wanted.batch]
            metrics = optimizer.step(partial(loss, model), *encode(vocabulary, chosen, device))
            if (step + 1) % max(1, steps // wanted.points) == 0 or step + 1 == steps:
                found = held_out.measure(model)
                for name, x in (metrics | found).items():
                    writer.add_scalar(f"{'training' if name in metrics else 'held_out'}/{name}", float(x), step + 1)
                say(
                    f"{step + 1:,} of {steps:,} steps | held-out perplexity {found['perplexity']:.3f} | "
                    f"KL(grammar || model) {found['kl']:.3f} nats per review | {perf_counter() - began:,.0f} s"
                )
        for text in samples(model, held_out.reviews, wanted.seed):
            say(text)
            writer.add_text("samples", text, steps)
    summary: dict[str, Any] = asdict(wanted) | facts | found
    summary |= {"seconds": perf_counter() - began, "versions": versions(), "commit": commit()}
    model.save(path, **summary)
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    say(f"trained on {wanted.reviews:,} reviews in {summary['seconds']:,.0f} s | {short(path)}")
    return model.requires_grad_(False).eval()


def loss(model: WordModel, tokens: Tensor, real: Tensor) -> tuple[Tensor, Metrics]:
    """Mean negative log-probability of the real tokens after the first, prompts included."""
    loss = -model.log_probability(tokens, real).sum() / real[1:].sum()
    return loss, {"loss": loss.detach()}


def encode(vocabulary: Vocabulary, reviews: list[Review], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    return vocabulary.encode([r.prompt for r in reviews], [r.response for r in reviews], device)


def samples(model: WordModel, reviews: list[Review], seed: int, count: int = 5) -> list[str]:
    """Sample responses of the model to some prompts."""
    prompts = [review.prompt for review in reviews[:count]]
    written = model.generate(prompts, seeding.generator(seed, "samples", model.device))
    return [str(Review(*pair)) for pair in zip(prompts, written, strict=True)]


def main() -> None:
    """The command line."""
    from pgsuite.app import cli  # configures Hydra

    cli.main_with_settings(pretrain, "pretrain")
