"""Pretraining: the likelihood of the corpus, maximized."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter

from pgsuite import seeding, settings
from pgsuite.language import files
from pgsuite.language.grammar import Grammar, Review
from pgsuite.language.model import FILE, WordModel
from pgsuite.language.tokens import Vocabulary
from pgsuite.nn.optim import Optimizer
from pgsuite.nn.transformer import Transformer
from pgsuite.runtime.build import commit, versions
from pgsuite.runtime.schema import UserError
from pgsuite.settings import Count, Natural, Positive

WARMUP = 50  # steps


@dataclass(kw_only=True)
class Size:
    """Of a transformer."""

    width: Count = 64
    layers: Count = 2
    heads: Count = 4

    def __post_init__(self) -> None:
        settings.check(self)


@dataclass(kw_only=True)
class Pretraining:
    """The settings of a pretraining."""

    seed: Natural = 0
    reviews: Count = 96_000  # in the corpus, each read once
    held_out: Count = 2_000  # reviews to measure on
    batch: Count = 64  # reviews to a step
    lr: Positive = 3e-3  # rises over the first fifty steps, and falls to zero
    points: Count = 20  # measurements on the way
    torch_threads: Count = 1
    size: Size = field(default_factory=Size)

    def __post_init__(self) -> None:
        settings.check(self, label="")


def pretrain(wanted: Pretraining, folder: Path, say: Callable[[str], object]) -> WordModel:
    """A language model of the corpus; leaves model.pt, TensorBoard events and summary.json in a run directory.

    What is measured is the held-out likelihood beside the grammar's own, which none can exceed but by chance: the
    difference estimates the KL of the model from the grammar, in nats a review.  Raises UserError.
    """
    path, grammar, began = files.vacant(folder, FILE), Grammar(), perf_counter()
    torch.set_num_threads(wanted.torch_threads)
    held = grammar.sample(wanted.held_out, seeding.number(wanted.seed, "held out"))
    vocabulary = Vocabulary(grammar.words)
    generator = seeding.generator(wanted.seed, "language model")
    try:
        model = WordModel(
            vocabulary, Transformer(len(vocabulary), **asdict(wanted.size), generator=generator), generator
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    tokens, real = encode(vocabulary, held)
    count = int(real[1:].sum())
    entropy = -math.fsum(map(grammar.log_probability, held)) / len(held)
    parameters = sum(p.numel() for p in model.parameters())
    say(
        f"corpus of {wanted.reviews:,} reviews, {len(vocabulary.words)} words | the grammar's own perplexity "
        f"{math.exp(entropy * len(held) / count):.3f} on {len(held):,} held out | {parameters:,} parameters"
    )

    def measure(steps: int) -> dict[str, float]:
        with torch.no_grad():
            loss = -float(model.log_probability(tokens, real).sum()) / len(held)
        found = {"perplexity": math.exp(loss * len(held) / count), "kl": loss - entropy}
        for name, value in found.items():
            writer.add_scalar(f"held_out/{name}", value, steps)
        return found

    corpus = grammar.sample(wanted.reviews, wanted.seed)
    optimizer = Optimizer([model], wanted.lr, max_grad_norm=1.0)
    steps = -(-len(corpus) // wanted.batch)
    with SummaryWriter(str(folder)) as writer:
        found: dict[str, float] = {}
        for step in range(steps):
            optimizer.lr.fill_(wanted.lr * min(1.0, (step + 1) / WARMUP) * (1 - step / steps))
            chosen = corpus[step * wanted.batch : (step + 1) * wanted.batch]
            metrics = optimizer.descend(lambda *seen: (loss(model, *seen), {}), *encode(vocabulary, chosen))
            if (step + 1) % max(1, steps // wanted.points) == 0 or step + 1 == steps:
                found = measure(step + 1)
                writer.add_scalar("training/grad_norm", float(metrics["grad_norm"]), step + 1)
                say(
                    f"{step + 1:,} of {steps:,} steps | held-out perplexity {found['perplexity']:.3f} | "
                    f"{found['kl']:.3f} nats a review from the grammar | {perf_counter() - began:,.0f} s"
                )
        for text in samples(model, held, wanted.seed):
            say(text)
            writer.add_text("samples", text, steps)
    summary: dict[str, Any] = asdict(wanted) | found
    summary |= {"grammar_perplexity": math.exp(entropy * len(held) / count), "grammar_entropy": entropy}
    summary |= {"parameters": parameters, "seconds": perf_counter() - began, "versions": versions(), "commit": commit()}
    model.save(path, **summary)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return model.requires_grad_(False).eval()


def loss(model: WordModel, tokens: Tensor, real: Tensor) -> Tensor:
    """Mean negative log-probability of the real tokens after the first, prompts included."""
    return -model.log_probability(tokens, real).sum() / real[1:].sum()


def encode(vocabulary: Vocabulary, reviews: list[Review]) -> tuple[Tensor, Tensor]:
    return vocabulary.encode([r.prompt for r in reviews], [r.response for r in reviews])


def samples(model: WordModel, reviews: list[Review], seed: int, count: int = 5) -> list[str]:
    """How the model goes on with some openings."""
    prompts = [review.prompt for review in reviews[:count]]
    written = model.generate(prompts, seeding.generator(seed, "samples"))
    return [str(Review(*pair)) for pair in zip(prompts, written, strict=True)]
