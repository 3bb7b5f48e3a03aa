"""Environments of prompts, with rewards of responses."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from gymnasium import spaces
from torch import Tensor, nn

from pgsuite import seeding, settings
from pgsuite.components import find_object, make_object
from pgsuite.envs.base import BrokenEnvError, VectorEnvConfig, broken_env
from pgsuite.errors import UserError, install, reason
from pgsuite.rlhf.generation import GenerationCollector
from pgsuite.settings import Count, NonNegative
from pgsuite.types import Step

Reward = Callable[[list[str], list[str]], Tensor]  # prompts and responses -> rewards [N], or [L, N] per token
Ensemble = Literal["mean", "minimum"]


class Tokens(Protocol):
    """The tokenizer protocol."""

    pad: int  # padding token
    stop: int  # ends a response

    def __len__(self) -> int:
        """The size of the vocabulary."""
        ...

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens [P, N] of prompts, with a beginning token if the model uses one, and the mask of real ones [P, N]."""
        ...

    def decode(self, tokens: Tensor) -> list[str]:
        """The texts of responses [L, N], each up to its stop token, without padding."""
        ...


@dataclass(kw_only=True, eq=False)
class Language(VectorEnvConfig):
    """Prompts, tokenizer and rewards, each an object at a path ``package:name``, or the result of calling it.

    ``reward`` is a callable of prompts and responses.  With ``rewards``, which are files of reward models, it is
    instead called with each file and with ``ensemble``, and returns such a callable.
    """

    backends = ("language",)

    prompts: str = (
        ""  # a list of texts, or a function that makes one; or a file, on each line a text or {"prompt": text}
    )
    tokens: str | None = (
        None  # an object with pad, stop, encode and decode, or a function that makes it; or a directory of transformers
    )
    chat: bool = False  # prompts are messages of a user, inserted into the chat template of the tokenizer
    reward: str = ""  # a callable of prompts and responses
    rewards: list[str] | None = None  # files that env.reward makes callables of; null where it is one itself
    ensemble: Ensemble = "mean"  # of several rewards; the minimum is conservative (Coste et al., 2024)
    scorer: str | None = None  # true score, if it is known: logged, not used for training
    held_out: str | None = None  # prompts for evaluation, not used for training
    samples: Count = 1  # responses to each prompt
    length: Count = 32  # maximum number of tokens of a response
    truncation_penalty: NonNegative = 0.0  # subtracted from the reward of a response without a stop token

    def __post_init__(self) -> None:
        settings.check(self, label="env.")

    def build(self, num_envs: int, *, device: torch.device, dtype: torch.dtype, seed: int) -> LanguageEnv:
        if missing := [f"env.{name}" for name in ("prompts", "tokens", "reward") if not getattr(self, name)]:
            raise ValueError(
                f"a language model is aligned on prompts and a reward: give {', '.join(missing)}, and policy.model, "
                "whose directory is that of env.tokens too; env=reviews has them all"
            )
        tokens = self.vocabulary(str(self.tokens))
        rewards = [self.made_of(file) for file in self.rewards or ()] or [find_object(self.reward, "env.reward")]
        scorer: Reward | None = None if self.scorer is None else find_object(self.scorer, "env.scorer")
        if num_envs % self.samples:
            raise ValueError(f"num_envs={num_envs} responses do not divide into env.samples={self.samples} a prompt")
        return LanguageEnv(
            self.texts(self.prompts, "prompts"),
            tokens,
            rewards,
            num_envs=num_envs,
            ensemble=self.ensemble,
            scorer=scorer,
            held_out=None if self.held_out is None else self.texts(self.held_out, "held_out"),
            samples=self.samples,
            length=self.length,
            truncation_penalty=self.truncation_penalty,
            device=device,
            dtype=dtype,
            seed=seed,
        )

    def made_of(self, file: str) -> Reward:
        """The reward function that ``reward`` makes of a file.  Raises ValueError if it makes no callable, and passes
        on UserError for an invalid file."""
        made: Any = None
        try:
            made = make_object(self.reward, "env.reward", file, self.ensemble)
            wrong = f"made a {type(made).__name__} of {file!r}, and no callable"
        except UserError:
            raise
        except Exception as error:
            wrong = f"made no callable of {file!r}: {reason(error)}"
        if callable(made):
            return cast(Reward, made)
        raise ValueError(
            f"env.reward={self.reward} {wrong}; with env.rewards it is called with each of these files and "
            "env.ensemble, and where it takes prompts and responses itself, env.rewards=null leaves them out"
        )

    def texts(self, path: str, name: str) -> list[str]:
        if Path(path).is_file():
            return read_prompts(Path(path), f"env.{name}")
        found = find_object(path, f"env.{name}")
        texts = make_object(path, f"env.{name}") if callable(found) else found
        if isinstance(texts, str) or not isinstance(texts, Sequence) or not all(isinstance(x, str) for x in texts):
            raise ValueError(f"env.{name} must be a list of texts, and {path} is {type(texts).__name__}")
        return list(texts)

    def vocabulary(self, path: str) -> Tokens:
        if Path(path).is_dir():
            return PretrainedTokens(path, self.chat)
        if self.chat:
            raise ValueError(f"env.chat=true is for tokenizers of transformers, and env.tokens={path} is no directory")
        found = find_object(path, "env.tokens")
        makes = isinstance(found, type) or not hasattr(found, "encode")
        tokens: Any = make_object(path, "env.tokens") if makes and callable(found) else found
        if missing := [name for name in ("pad", "stop", "encode", "decode", "__len__") if not hasattr(tokens, name)]:
            raise ValueError(f"env.tokens={path} has no {', '.join(missing)}")
        return tokens


def read_prompts(path: Path, where: str) -> list[str]:
    """The prompts of a file: its lines, or in a ``.jsonl`` file the texts under "prompt".  Raises ValueError, with the
    line, for one without."""
    lines = path.read_text().splitlines()
    if path.suffix != ".jsonl":
        return lines
    texts: list[str] = []
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not (isinstance(found, dict) and isinstance(text := found.get("prompt"), str)):
            raise ValueError(f'{where}: line {number} of {path} must be like {{"prompt": "..."}}, and is {line[:80]!r}')
        texts.append(text)
    return texts


class PretrainedTokens:
    """A tokenizer saved by the ``transformers`` library.  With ``chat``, prompts are messages of a user, and
    are inserted into its chat template.  Raises ValueError for one without a stop token, or then without a template."""

    def __init__(self, path: str, chat: bool = False) -> None:
        try:
            from transformers import AutoTokenizer  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError(f"env.tokens={path} is of transformers: {install('rlhf')}") from error
        self.inner: Any = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if self.inner.eos_token_id is None:
            raise ValueError(f"the tokenizer of {path} has no stop token (eos_token)")
        if chat and self.inner.chat_template is None:
            raise ValueError(f"the tokenizer of {path} has no chat template: leave env.chat out")
        self.chat, self.stop = chat, self.inner.eos_token_id
        self.pad = self.stop if self.inner.pad_token_id is None else self.inner.pad_token_id

    def __len__(self) -> int:
        return len(self.inner)

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        texts = [self.in_template(text) for text in prompts] if self.chat else prompts
        special = {"add_special_tokens": not self.chat}  # the template has them
        rows = [torch.tensor(self.inner(text, **special)["input_ids"], dtype=torch.long) for text in texts]
        real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows])
        return torch.nn.utils.rnn.pad_sequence(rows, padding_value=self.pad), real

    def in_template(self, text: str) -> str:
        message = [{"role": "user", "content": text}]
        return self.inner.apply_chat_template(message, tokenize=False, add_generation_prompt=True)

    def decode(self, tokens: Tensor) -> list[str]:
        rows = [row[: row.index(self.stop)] if self.stop in row else row for row in tokens.T.tolist()]
        return [self.inner.decode(row) for row in rows]


class LanguageEnv:
    """N responses at a time, to prompts drawn at random; groups of ``samples`` responses have the same prompt.

    ``GenerationCollector`` calls ``prompts`` and ``score``.  For evaluation it is also an ordinary environment, stepped
    token by token: the observation is a token and the action the next one; within a prompt, actions have no effect.
    """

    backend, is_resumable = "language", True
    collector = GenerationCollector

    def __init__(
        self,
        texts: Sequence[str],
        tokens: Tokens,
        rewards: Sequence[Reward],
        *,
        num_envs: int,
        ensemble: Ensemble = "mean",
        scorer: Reward | None = None,
        held_out: Sequence[str] | None = None,
        samples: int = 1,
        length: int = 32,
        truncation_penalty: float = 0.0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        """Raises ValueError without prompts, and for a prompt without tokens."""
        self.options = {
            "ensemble": ensemble,
            "scorer": scorer,
            "length": length,
            "truncation_penalty": truncation_penalty,
        }
        self.texts, self.tokens, self.rewards, self.scorer = list(texts), tokens, list(rewards), scorer
        self.held_out = list(held_out or ())
        self.num_envs, self.samples, self.length, self.truncation_penalty = (
            num_envs,
            samples,
            length,
            truncation_penalty,
        )
        self.ensemble, self.device, self.dtype = ensemble, torch.device(device), dtype
        for reward in (*rewards, scorer):
            if isinstance(reward, nn.Module):
                reward.to(self.device)
        self.pad, self.stop = tokens.pad, tokens.stop
        if not self.texts:
            raise ValueError("env.prompts are none")
        encoded, real = self.encode(self.texts)
        self.lengths = real.sum(0)  # tokens of each prompt, on the host
        self.encoded, self.real = encoded.to(self.device), real.to(self.device)
        self.width, vocabulary = len(self.encoded), len(tokens)
        self.max_episode_steps = self.width + length - 1
        self.observation_space: spaces.Space[Any] = spaces.Discrete(vocabulary)
        self.action_space: spaces.Space[Any] = self.observation_space
        self.name = "rlhf"
        each = f" in groups of {samples}" if samples > 1 else ""
        self.description = (
            f"{self.name} | {len(self.texts):,} prompts of up to {self.width} tokens, responses of up to {length} | "
            f"{num_envs} at a time{each}"
        )
        self.ordered = False  # prompts in order instead of at random
        self.generator = seeding.generator(seed, "environment")
        self.chosen = torch.zeros(num_envs, dtype=torch.long)  # index of the prompt of each response
        self.text = torch.full((self.max_episode_steps + 1, num_envs), self.pad, device=self.device)
        self.clock = torch.zeros(num_envs, dtype=torch.long, device=self.device)

    def apart(self, most: int | None = None) -> list[LanguageEnv]:
        """Environments with each held-out prompt once, in order, and of at most ``num_envs`` each, like a rollout;
        without held-out prompts, with each training one.  Of more than ``most`` prompts, so many are taken at equal
        distances."""
        texts, placed = self.held_out or self.texts, {"device": self.device, "dtype": self.dtype}
        count = min(len(texts), most or len(texts))
        texts = [texts[i * len(texts) // count] for i in range(count)]
        pieces = [texts[i : i + self.num_envs] for i in range(0, count, self.num_envs)]
        envs = [LanguageEnv(x, self.tokens, self.rewards, num_envs=len(x), **self.options, **placed) for x in pieces]
        for env in envs:
            env.ordered = True
        return envs

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Prompts [P, N], left-padded, and the mask of real tokens [P, N]."""
        tokens, real = self.tokens.encode(texts)
        if not bool(real.any(0).all()):
            raise ValueError(f"a prompt has no tokens: {texts[int(real.any(0).long().argmin())]!r}")
        order = real.long().argsort(stable=True, dim=0)  # padding first
        tokens, real = tokens.gather(0, order), real.gather(0, order)
        return tokens.where(real, self.pad), real

    def prompts(self) -> tuple[Tensor, Tensor]:
        """The prompts [P, N] of the next N responses, with groups in adjacent columns, and the mask of real tokens; P
        is the length of the longest among them."""
        drawn = torch.randint(len(self.texts), (self.num_envs // self.samples,), generator=self.generator)
        drawn = torch.arange(self.num_envs) if self.ordered else drawn
        self.chosen = drawn.repeat_interleave(self.samples)
        chosen, padding = self.chosen.to(self.device), self.width - int(self.lengths[self.chosen].max())
        return self.encoded[padding:, chosen], self.real[padding:, chosen]

    def score(self, tokens: Tensor, written: Tensor) -> Tensor:
        """The reward [L, N] of each response token in texts [P + L, N]; ``written`` [L, N] is the mask of real ones.  A
        reward of the whole response is paid at its last token."""
        prompts = [self.texts[i] for i in self.chosen.tolist()]
        responses = tokens[-len(written) :]
        said = self.tokens.decode(responses.cpu())
        found = torch.stack([self.call_reward("reward", reward, prompts, said) for reward in self.rewards])
        found = found.mean(0) if self.ensemble == "mean" else found.amin(0)
        last = written & ~torch.cat([written[1:], torch.zeros_like(written[:1])])
        if found.ndim == 2:
            reward = torch.zeros_like(written, dtype=self.dtype)
            reward[: len(found)] = found[: len(written)]
        else:
            reward = last.to(self.dtype) * found
        return (reward - self.truncation_penalty * (last & (responses != self.stop))).where(written, 0.0)

    def call_reward(self, name: str, reward: Reward, prompts: list[str], responses: list[str]) -> Tensor:
        """Call a reward function: rewards of the responses [N], or of their tokens [L, N].  Raises BrokenEnvError for
        an exception or a result of another shape."""
        with broken_env(f"{self.name}: env.{name} raised"):
            found = torch.as_tensor(reward(prompts, responses), device=self.device, dtype=self.dtype)
        if found.shape[-1:] != (len(responses),) or found.ndim > 2:
            raise BrokenEnvError(
                f"{self.name}: env.{name} must say one number for each of {len(responses)} responses, or a row of them "
                f"for each token, and what it said was of shape {tuple(found.shape)}"
            )
        return found.detach()

    def true(self, responses: list[str]) -> Tensor | None:
        """The true scores [N] of responses to all prompts in order; None without a scorer."""
        if self.scorer is None:
            return None
        found = self.call_reward("scorer", self.scorer, self.texts, responses).cpu()
        return found.sum(0) if found.ndim == 2 else found

    def reset(self) -> Tensor:
        self.begin(torch.ones_like(self.clock, dtype=torch.bool))
        return self.text[0]

    def begin(self, where: Tensor) -> None:
        """Draw new prompts for the columns where [N] is true, and restart their texts."""
        drawn = torch.randint(len(self.texts), (self.num_envs,), generator=self.generator)
        self.chosen = torch.where(where.cpu(), drawn, self.chosen)
        chosen = self.chosen.to(self.device)
        order = (~self.real[:, chosen]).long().argsort(stable=True, dim=0)  # padding last
        fresh = torch.full_like(self.text, self.pad)
        fresh[: self.width] = self.encoded[:, chosen].gather(0, order)
        self.text = torch.where(where, fresh, self.text)
        self.clock = torch.where(where, 0, self.clock)

    def step(self, action: Tensor) -> Step:
        first = self.real[:, self.chosen.to(self.device)].sum(0)  # where the response begins
        self.clock = self.clock + 1
        column = torch.arange(self.num_envs, device=self.device)
        given = self.clock < first
        token = torch.where(given, self.text[self.clock, column], action)
        self.text[self.clock, column] = token
        done = ~given & ((token == self.stop) | (self.clock + 1 >= first + self.length))
        reward = torch.zeros(self.num_envs, dtype=self.dtype, device=self.device)
        if bool(done.any()):
            place = first + torch.arange(self.length, device=self.device).unsqueeze(-1)
            written = place <= self.clock
            reward = self.score(self.text.gather(0, place), written).sum(0).where(done, 0.0)
            self.begin(done)
        return Step(
            obs=self.text[self.clock, column],
            next_obs=token,
            reward=reward,
            terminated=done,
            truncated=torch.zeros_like(done),
        )

    def state_dict(self) -> dict[str, Any]:
        state = {name: getattr(self, name).clone() for name in ("chosen", "text", "clock")}
        return state | {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.chosen = state["chosen"].cpu()
        self.text, self.clock = state["text"].to(self.device), state["clock"].to(self.device)
