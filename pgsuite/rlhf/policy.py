"""Language models as policies: the observation is a token, the action the next one."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from gymnasium import spaces
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from pgsuite.errors import install
from pgsuite.nn.configs import PolicyConfig
from pgsuite.nn.distributions import Categorical, Distribution
from pgsuite.nn.heads import FORBIDDEN, CategoricalHead, permitted
from pgsuite.nn.network import Body, PolicyInput, Sequencer
from pgsuite.nn.normalize import Standardize
from pgsuite.nn.policy import Policy
from pgsuite.nn.transformer import SEEN, Transformer, look
from pgsuite.nn.transformer import LanguageModel as TrainedModel
from pgsuite.settings import Natural, Positive, Range
from pgsuite.types import Cells, HiddenState, Obs, Rollout

FILE = "model.pt"  # in a directory that scripts/pretrain.py wrote
ADAPTER = "lora_"  # in the names of adapters
PROMPT, REAL = "prompt", "prompt.real"  # hidden states of a rollout
M = TypeVar("M", bound=nn.Module)


class TokenBody(Body):
    """A transformer as a body, over tokens [T, N].  Each column is one text: padding, then its tokens, with ``start``
    at the first one only.

    While acting, the hidden state is the cache of keys and values, which grows with the text.  That of a rollout is
    the preceding tokens, see ``prompt_state``; without any, every text begins in the rollout.

    The transformer is computed in ``dtype`` by autocast; parameters and features stay float32.

    On a CPU, where reading which columns these are costs nothing, a prompt that several columns have is computed once
    for all of them: before responses are generated, and in learning where this saves an eighth of the tokens or more.
    """

    sequential = True
    pieces_sync_reason = "algo.micro_batches reads the lengths of texts, to put similar ones together: give 1"

    def __init__(self, transformer: Transformer | Pretrained, obs_norm: Standardize, name: str = "policy") -> None:
        super().__init__(obs_norm, name, transformer.size, transformer.shape)
        self.transformer, self.dtype = transformer, torch.float32

    def read(self, tokens: Tensor, real: Tensor) -> HiddenState:
        """The hidden state after texts [T, N], whose real tokens are ``real`` [T, N]."""
        return self.keep(self.cache(*distinct(tokens, real))) if len(tokens) else {}

    def sequence(self, seen: PolicyInput) -> tuple[Tensor, HiddenState]:
        return self.after_prompts(seen.obs, started(seen.start), seen.hidden_state), {}

    def after_prompts(self, tokens: Tensor, real: Tensor, hidden_state: HiddenState) -> Tensor:
        """Features [T, N, size] of tokens [T, N] after those of the hidden state of a rollout, if it has any."""
        if PROMPT not in hidden_state:
            return self.features(tokens, real)
        prompt, known = hidden_state[PROMPT][0].T, hidden_state[REAL][0].T
        if len(prompt) and not self.fixed_shape:
            given, is_real, column = distinct(prompt, known)
            if 8 * (prompt.numel() - given.numel()) >= prompt.numel() + tokens.numel():
                return self.extend(tokens, real, self.cache(given, is_real, column))[0]
        return self.features(torch.cat([prompt, tokens]), torch.cat([known, real]))[-len(tokens) :]

    def cache(self, tokens: Tensor, real: Tensor, column: Tensor) -> HiddenState:
        """The cache of texts [T, N], of which the nth is the column [N] of the given ones [T, M]."""
        return {name: x.index_select(0, column) for name, x in self.extend(tokens, real, {})[1].items()}

    def pieces(self, seen: Cells, count: int) -> list[tuple[Tensor, Cells]]:
        """As of other bodies, of texts of similar lengths, each part only as wide and as high as its longest prompt and
        response: padding is then computed for few of them.  Equally long ones of a group stay together, so that their
        prompt is computed once.  Reads the lengths from the device."""
        first = {name: x[:1] for name, x in seen.hidden_state.items()}
        length = seen.mask.sum(0) + (first[REAL][0].sum(-1) if REAL in first else 0)
        found = []
        for index in length.argsort(stable=True).tensor_split(min(count, len(length))):
            part = replace(seen, hidden_state=first).map(lambda x, index=index: x.index_select(1, index))
            rows = int((part.mask.any(1) * torch.arange(1, len(part.mask) + 1, device=index.device)).max())
            part = part[: max(1, rows)]
            if PROMPT in first:
                padding = int((part.hidden_state[REAL].any(1).cumsum(-1) == 0).sum())
                part = replace(part, hidden_state={name: x[..., padding:] for name, x in part.hidden_state.items()})
            found.append((index, part))
        return found

    def step(self, obs: Obs, hidden_state: HiddenState, start: Tensor) -> tuple[Tensor, HiddenState]:
        cache = {key.removeprefix(f"{self.name}."): x for key, x in hidden_state.items()}
        if cache:
            cache[SEEN] = cache[SEEN] & ~start.unsqueeze(-1)
        features, cache = self.extend(obs.unsqueeze(0), torch.ones_like(start).unsqueeze(0), cache)
        return features.squeeze(0), self.keep(cache)

    def features(self, tokens: Tensor, real: Tensor) -> Tensor:
        """Features [T, N, size] of texts [T, N]."""
        with self.autocast(tokens):
            return self.exact(self.transformer(tokens, real))

    def extend(self, tokens: Tensor, real: Tensor, cache: HiddenState) -> tuple[Tensor, HiddenState]:
        """Features [T, N, size] of tokens that follow those of a cache, and the extended cache."""
        with self.autocast(tokens):
            features, cache = self.transformer.forward_with_cache(tokens, real, cache)
        return self.exact(features), cache

    def exact(self, features: Tensor) -> Tensor:
        return features if self.dtype is torch.float32 else features.float()

    def autocast(self, tokens: Tensor) -> AbstractContextManager[Any]:
        if self.dtype is torch.float32:
            return nullcontext()
        # Without a cache of cast weights, as each is used once in a pass.
        return torch.autocast(tokens.device.type, self.dtype, cache_enabled=False)

    def another(self, name: str) -> TokenBody:
        """A copy under another name, with its own parameters except for frozen ones, which are shared."""
        return TokenBody(copy_sharing_frozen(self.transformer), self.obs_norm, name)

    def keep(self, cache: HiddenState) -> HiddenState:
        return {f"{self.name}.{key}": x for key, x in cache.items()}

    def successors(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Features and successors' features in one pass, since the successor of a token is the next one in its
        column."""
        tokens = torch.cat([rollout.obs, rollout.next_obs[-1:]])
        real = started(torch.cat([rollout.start, torch.zeros_like(rollout.start[:1])]))
        features = self.after_prompts(tokens, real, rollout.hidden_state)
        return features[:-1], features[1:]

    def successors_by_need(self, rollout: Rollout, sequence: Sequencer) -> tuple[Tensor, Tensor]:
        return self.successors(rollout)


def prompt_state(tokens: Tensor, real: Tensor, rows: int) -> HiddenState:
    """The tokens [P, N] before those of a rollout [rows, N], and the mask of real ones [P, N], as its hidden state
    [rows, N, P], the same in all rows and stored once."""
    return {name: x.T.expand(rows, *x.T.shape) for name, x in ((PROMPT, tokens), (REAL, real))}


def distinct(tokens: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The different ones among texts [T, N] and their masks of real tokens, each [T, M], and the place of each text
    among them [N].  On another device than the CPU, from which their number would have to be read, these are all."""
    if tokens.device.type != "cpu":
        return tokens, real, torch.arange(tokens.shape[1], device=tokens.device)
    both, column = (2 * tokens + 1).where(real, 0).unique(dim=1, return_inverse=True)
    return both // 2, both % 2 == 1, column


def started(start: Tensor) -> Tensor:
    """The mask [T, N] of cells in which a text has started."""
    return start.cumsum(0) > 0


class TokenHead(CategoricalHead):
    """Token probabilities at a ``temperature``, truncated to the nucleus: the most likely tokens with a total
    probability of at least ``top_p`` (Holtzman et al., 2020).

    The truncated distribution is renormalized, and log-probabilities refer to it.  An action outside the nucleus of the
    current policy has probability zero.
    """

    def __init__(self, space: spaces.Space[Any], temperature: float = 1.0, top_p: float = 1.0) -> None:
        """Logits beyond the tokens of ``space``, with which models pad their vocabulary, are ignored."""
        super().__init__(space)
        self.temperature, self.top_p = temperature, top_p

    def forward(self, numbers: Tensor, allowed: Tensor | None = None) -> Distribution:
        logits = permitted(numbers[..., : self.inputs], allowed)
        logits = (logits if self.temperature == 1 else logits / self.temperature).log_softmax(-1)  # which are large
        if self.top_p < 1:
            with torch.no_grad():
                chance, order = logits.exp().sort(-1, descending=True)
                outside = chance.cumsum(-1) - chance >= self.top_p
                outside = torch.zeros_like(outside).scatter(-1, order, outside)
            logits = logits.masked_fill(outside, FORBIDDEN).log_softmax(-1)
        return Categorical(logits)


class LanguagePolicy(Policy):
    """A policy over the tokens of a language model."""

    def critic_body(self) -> Body | None:
        return self.body.another("critic") if isinstance(self.body, TokenBody) else None

    @property
    def is_pretrained(self) -> bool:
        """Whether the model is one of the transformers library."""
        return isinstance(self.body, TokenBody) and isinstance(self.body.transformer, Pretrained)

    def save_pretrained(self, folder: Path, tokens: Path | None = None) -> None:
        """Write the model, with the tokenizer of the directory ``tokens``, as a directory that the transformers library
        loads.  Raises ValueError if the model is none of that library."""
        assert isinstance(self.body, TokenBody)
        body = self.body.transformer
        if not isinstance(body, Pretrained):
            raise ValueError("format=transformers is for models of the transformers library, and this one is our own")
        from transformers import AutoModelForCausalLM, AutoTokenizer  # pyright: ignore[reportMissingImports]

        model: Any = AutoModelForCausalLM.from_config(body.model.config).float()
        model.base_model.load_state_dict(merged(body.model))
        model.get_output_embeddings().load_state_dict(self.out.state_dict())  # the same parameters, where they are tied
        model.save_pretrained(folder)
        if tokens is not None:
            AutoTokenizer.from_pretrained(tokens, local_files_only=True, trust_remote_code=False).save_pretrained(
                folder
            )

    def frozen_copy(self) -> LanguagePolicy:
        """A copy that later updates do not change, sharing frozen layers.  Its distribution is not truncated to a
        nucleus."""
        copied = copy_sharing_frozen(self).requires_grad_(False)
        if isinstance(copied.head, TokenHead):
            copied.head.top_p = 1.0
        return copied


@dataclass(kw_only=True)
class LanguageModelConfig(PolicyConfig):
    """A language model as the policy."""

    model: str | None = None  # a file that scripts/pretrain.py wrote, or a directory of transformers
    temperature: Positive = 1.0  # of sampling, and thereby of the policy
    top_p: Annotated[float, Range(0, 1, open=True)] = (
        1.0  # probability of the nucleus that is sampled from; 1 samples from all tokens
    )
    lora: Natural = 0  # rank of low-rank adapters, which alone are trained (Hu et al., 2022); 0 trains all parameters
    gradient_checkpointing: bool = False  # compute activations anew in backward passes: less memory, more time
    frozen: Natural = 0  # number of lowest layers that are not trained, and are shared by policy and reference

    def build(self, obs_norm: Standardize, action_space: spaces.Space[Any], generator: Generator) -> LanguagePolicy:
        """Build the policy over the tokens of ``action_space``.  Raises ValueError if the model does not fit it."""
        if self.model is None:
            raise ValueError("responses are written by language models: give policy.model")
        body, out = load(self.model)
        tokens = int(getattr(action_space, "n", 0))
        if not 0 < tokens <= body.vocabulary or (tokens < body.vocabulary and isinstance(body, Transformer)):
            raise ValueError(
                f"the language model of policy.model knows {body.vocabulary} tokens, and actions are {action_space}"
            )
        if self.lora:
            add_adapters(body, out, self.lora, generator)
        if self.gradient_checkpointing:
            recompute_activations(body)
        options: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p, "frozen": self.frozen}
        return language_policy(body, out, tokens=tokens, **options)


class Pretrained(nn.Module):
    """The body of a causal language model of the ``transformers`` library, with the interface of ``Transformer``."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.base_model
        takes = inspect.signature(self.model.forward).parameters
        self.cache_name = "cache" if "cache" in takes else "past_key_values"  # as the installed version has it
        self.vocabulary, self.size = model.config.vocab_size, model.config.hidden_size
        self.shape = f"{self.vocabulary} > {type(model).__name__} {self.size} x {model.config.num_hidden_layers}"

    @property
    def blocks(self) -> nn.ModuleList:
        """Its layers, lowest first."""
        return next(x for x in self.model.modules() if isinstance(x, nn.ModuleList))

    def forward(self, tokens: Tensor, real: Tensor | None = None) -> Tensor:
        real = torch.ones_like(tokens, dtype=torch.bool) if real is None else real
        return self.run(tokens, *look(real.T, {})[1:], use_cache=False).last_hidden_state.transpose(0, 1)

    def forward_with_cache(self, tokens: Tensor, real: Tensor, cache: HiddenState) -> tuple[Tensor, HiddenState]:
        seen, position, visible = look(real.T, cache)
        keys = growing_cache_class()(cache)
        found = self.run(tokens, position, visible, **{self.cache_name: keys}, use_cache=True)
        return found.last_hidden_state.transpose(0, 1), {SEEN: seen} | keys.after

    def run(self, tokens: Tensor, position: Tensor, visible: Tensor, **options: Any) -> Any:
        """The model's outputs for tokens [T, N] at positions [N, T], with the attention mask ``visible`` [N, T, S]."""
        mask = torch.zeros_like(visible, dtype=self.model.dtype)
        mask = mask.masked_fill(~visible, torch.finfo(mask.dtype).min).unsqueeze(1)
        return self.model(input_ids=tokens.T, attention_mask=mask, position_ids=position.clamp(min=0), **options)


@functools.cache
def growing_cache_class() -> Any:
    """The class of caches of transformers that begin with the keys and values of another, of whose layers ``after`` has
    those that were computed.  A layer that is computed twice, since activations are not kept, finds the same again."""
    from transformers import DynamicCache  # pyright: ignore[reportMissingImports]

    class GrowingCache(DynamicCache):
        def __init__(self, before: HiddenState) -> None:
            super().__init__()
            self.before, self.after = before, HiddenState()

        def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            if self.before:
                key = torch.cat([self.before[f"{layer}.key"], key], -2)
                value = torch.cat([self.before[f"{layer}.value"], value], -2)
            self.after |= {f"{layer}.key": key, f"{layer}.value": value}
            return key, value

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return self.before[SEEN].shape[1] if self.before else 0

    return GrowingCache


def load(path: str) -> tuple[Transformer | Pretrained, nn.Module]:
    """Load the body and the output layer of a language model, from a file of this suite or from a directory that
    ``save_pretrained`` of the transformers library wrote.  Nothing is downloaded.  Raises ValueError if it cannot be
    loaded."""
    file = Path(path) / FILE if (Path(path) / FILE).exists() else Path(path)
    if not file.is_dir():
        model = TrainedModel.load(file)
        return model.body, model.out
    try:
        from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"{path} is a model of transformers: {install('rlhf')}") from error
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation="eager",
            dtype=torch.float32,  # a file in bfloat16 would lose most of each small update
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no causal language model of transformers: {error}") from error
    return Pretrained(model.eval()), model.get_output_embeddings()


def language_policy(
    body: Transformer | Pretrained,
    out: nn.Module,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    frozen: int = 0,
    tokens: int | None = None,
) -> LanguagePolicy:
    """A policy from a language model, over the first ``tokens`` of its vocabulary, by default all.  If ``frozen``, the
    embedding and that many lowest layers are not trained.  Raises ValueError if the model has fewer layers."""
    if frozen > len(body.blocks):
        raise ValueError(f"policy.frozen={frozen}, but the model has {len(body.blocks)} layers")
    space = spaces.Discrete(tokens or body.vocabulary)
    norm = Standardize(space, None, enabled=False)
    policy = LanguagePolicy(norm, space, body=TokenBody(body, norm), head=TokenHead(space, temperature, top_p))
    policy.out = out  # pyright: ignore[reportAttributeAccessIssue]
    if frozen:
        embedding = next(x for x in body.modules() if isinstance(x, nn.Embedding))
        for part in (embedding, *body.blocks[:frozen]):
            freeze_parameters(part)
    return policy


def freeze_parameters(module: nn.Module, *, but: str | None = None) -> None:
    """Turn parameters into buffers of the same names, except in parts whose name contains ``but``.  This excludes them
    from optimizers and Fisher products, and ``copy_sharing_frozen`` shares them."""
    for path, part in module.named_modules():
        if but is not None and but in path:
            continue
        part.frozen = True  # pyright: ignore[reportArgumentType]
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach())


def add_adapters(body: Transformer | Pretrained, out: nn.Module, rank: int, generator: Generator) -> None:
    """Add low-rank adapters to all linear layers of a model of transformers, scaled by 2 and initially without effect,
    and freeze everything else.  Raises ValueError for another model."""
    if not isinstance(body, Pretrained):
        raise ValueError(f"policy.lora={rank} is for models of the transformers library, and this one is our own")
    try:
        from peft import LoraConfig, inject_adapter_in_model  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"policy.lora={rank} needs peft: {install('lora')}") from error
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"), body.model)
    for name, parameter in body.named_parameters():
        if ADAPTER in name and "lora_A" in name:  # as peft does, from a generator of the run
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)
    freeze_parameters(body, but=ADAPTER)
    freeze_parameters(out)


def recompute_activations(body: Transformer | Pretrained) -> None:
    """Have the layers of a model keep nothing but their inputs for backward passes, which compute activations anew
    (Chen et al., 2016)."""

    def forward(given: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return given(*inputs, **options)
        return checkpoint(given, *inputs, use_reentrant=False, preserve_rng_state=False, **options)

    for block in body.blocks:
        block.forward = functools.partial(forward, block.forward)


def merged(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model of transformers, with its adapters added to the layers that they belong to."""
    state = {name.replace(".base_layer.", "."): x for name, x in model.state_dict().items() if ADAPTER not in name}
    layers: list[tuple[str, Any]] = [x for x in model.named_modules() if hasattr(x[1], "get_delta_weight")]
    for name, layer in layers:
        state[f"{name}.weight"] = state[f"{name}.weight"] + layer.get_delta_weight("default")
    return state


def copy_sharing_frozen(module: M) -> M:
    """A deep copy that shares the frozen parameters."""
    frozen = (part for part in module.modules() if getattr(part, "frozen", False))
    return copy.deepcopy(module, {id(x): x for part in frozen for x in part.buffers(recurse=False)})
