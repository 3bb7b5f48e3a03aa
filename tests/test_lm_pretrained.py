"""A language model of the transformers library in the place of our own."""

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_worlds import Letters, collector, speaker, vowels
from test_cli import Cli, command  # noqa: F401
from torch import Tensor

from pgsuite import seeding
from pgsuite.algorithms import PPO, TRPO, Reinforce
from pgsuite.algorithms.reference import Reference
from pgsuite.app.policy_io import restore
from pgsuite.execution.modes import execute
from pgsuite.execution.precision import lower
from pgsuite.nn.normalize import Standardize
from pgsuite.nn.policy import Critic
from pgsuite.nn.transformer import rotate
from pgsuite.rlhf.env import LanguageEnv, PretrainedTokens, read_prompts
from pgsuite.rlhf.policy import (
    LanguageModelConfig,
    TokenBody,
    add_adapters,
    language_policy,
    load,
    recompute_activations,
)

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights."""
    torch.manual_seed(0)
    if request.param == "llama":
        sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        config = transformers.LlamaConfig(vocab_size=10, num_hidden_layers=2, num_key_value_heads=1, **sizes)
    else:
        config = transformers.GPT2Config(vocab_size=10, n_positions=32, n_embd=16, n_layer=2, n_head=2)
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    path = tmp_path_factory.mktemp(request.param)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def world() -> LanguageEnv:
    return LanguageEnv(["b", "cde", "fab"], Letters(), [vowels], num_envs=16, length=5, seed=1)


def test_its_likelihoods_while_sampling_are_its_own(directory: Path) -> None:
    env, policy = world(), language_policy(*load(str(directory)))
    r = collector(env).collect(policy)
    logp = policy.dist(r).log_prob(r.action)
    assert (logp - r.logp)[r.mask].abs().max() < 1e-5
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    for n in range(4):  # as transformers itself has them, without padding
        before = r.hidden_state["prompt"][0, n][r.hidden_state["prompt.real"][0, n]]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([before, r.obs[:, n]]).unsqueeze(0)).logits[0].log_softmax(-1)
        own = logits[len(before) :].gather(-1, r.action[:, n].unsqueeze(-1)).squeeze(-1)
        assert (own - r.logp[:, n])[r.mask[:, n]].abs().max() < 1e-5


def test_keys_and_values_are_gone_with_their_last_reference(directory: Path) -> None:
    policy: Any = language_policy(*load(str(directory)))
    tokens = torch.tensor([[1, 2], [3, 4]])
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            _, cache = policy.body.extend(tokens, tokens > 0, {})
        kept = [weakref.ref(x) for x in cache.values()]
        assert len(kept) == 5
        del cache
        assert not any(x() is not None for x in kept)
    finally:
        gc.enable()


@pytest.mark.parametrize("cls", [PPO, TRPO])
def test_it_is_aligned_by_first_and_second_order_methods(directory: Path, cls: Any) -> None:
    env, policy = world(), language_policy(*load(str(directory)))
    generator = seeding.generator(0, "algorithm")
    parts: Any = {"policy": policy, "critic": Critic(policy.obs_norm, shared=policy), "generator": generator}
    algorithm = cls(**parts, reference=Reference(policy, 0.1), gamma=1.0)
    rollouts, before = collector(env), [p.clone() for p in policy.parameters()]
    metrics = algorithm.iterate(rollouts)
    assert all(x.isfinite() for x in metrics.values())
    assert not all(torch.equal(p, q) for p, q in zip(before, policy.parameters(), strict=True))


def saved_for_backward(compute: Callable[[], Tensor]) -> int:
    """The numbers that a computation saves for its backward pass."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        compute()
    return sum(sizes)


@pytest.mark.parametrize("own", [pytest.param(True, marks=pytest.mark.long), False])
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (PPO, {}),
        *(pytest.param(TRPO, {"fisher": x}, marks=pytest.mark.long) for x in ("double-backward", "gauss-newton")),
    ],
)
def test_activations_that_are_computed_anew_give_the_same_step(
    directory: Path, own: bool, cls: Any, options: Any
) -> None:
    model = speaker(10) if own else language_policy(*load(str(directory)))
    found, saved = [], []
    for anew in (False, True):
        env, policy = world(), copy.deepcopy(model)
        assert isinstance(policy.body, TokenBody)
        if anew and own:
            recompute_activations(policy.body.transformer)
        elif anew:
            settings = LanguageModelConfig(model=str(directory), gradient_checkpointing=True)
            policy = settings.build(policy.obs_norm, env.action_space, seeding.generator(0, "networks"))
        parts: Any = {"policy": policy, "generator": seeding.generator(0, "algorithm")}
        critic = Critic(policy.obs_norm, shared=policy, generator=seeding.generator(0, "networks"))
        algorithm = cls(**parts, critic=critic, reference=Reference(policy, 0.1), gamma=1.0, **options)
        r = collector(env).collect(policy)
        saved.append(saved_for_backward(lambda: policy.dist(r).log_prob(r.action)))  # noqa: B023
        algorithm.train_on(r)
        found.append(list(policy.parameters()))
    assert saved[1] < saved[0] / 2
    assert not any(map(torch.equal, found[1], model.parameters()))
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("own", [True, False])
def test_in_bfloat16_it_is_the_same_to_rounding_and_float32_parameters_learn(directory: Path, own: bool) -> None:
    env, policy = world(), speaker(10) if own else language_policy(*load(str(directory)))
    generator, reference = seeding.generator(0, "algorithm"), Reference(policy, 0.1)
    parts: Any = {"policy": policy, "critic": Critic(policy.obs_norm, shared=policy), "generator": generator}
    algorithm, exact = PPO(**parts, reference=reference, gamma=1.0, lr=1e-6), policy.frozen_copy()
    lower(algorithm, torch.device("cpu"), "bf16")
    r = collector(env).collect(policy)
    with torch.no_grad():
        found, again, precise = (x.dist(r).log_prob(r.action) for x in (policy, reference.policy, exact))
    assert torch.equal(found, again) and found.dtype == r.logp.dtype == torch.float32
    for logp in (found, r.logp):
        assert 0 < (logp - precise)[r.mask].abs().max() < 0.05
    before = [p.clone() for p in policy.parameters()]
    algorithm.train_on(r)
    moved = [(p != q).double().mean() for p, q in zip(before, policy.parameters(), strict=True)]
    assert {p.dtype for p in policy.parameters()} == {torch.float32} and max(moved) > 0.9


def test_positions_are_exact_in_bfloat16() -> None:
    x, position = torch.randn(1, 1, 2, 8), torch.tensor([[1000, 1001]])
    assert torch.allclose(rotate(x.bfloat16(), position).float(), rotate(x, position), atol=0.03)


@pytest.mark.long
def test_its_learning_is_compiled(directory: Path) -> None:
    found = []
    for execution in ("eager", "compile"):
        env, policy = world(), language_policy(*load(str(directory)))
        algorithm = Reinforce(policy=policy, reference=Reference(policy, 0.1), gamma=1.0, lr=0.01)
        rollouts = collector(env)
        assert execute(algorithm, rollouts, execution) == execution
        for _ in range(2):
            algorithm.iterate(rollouts)
        found.append([p.clone() for p in policy.parameters()])
    assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(*found, strict=True))


def tokenizer(folder: Path, words: int) -> Path:
    """A tokenizer of so many words, the last of which ends a text, as a directory of transformers."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {f"w{i}": i for i in range(words - 1)} | {"</s>": words - 1}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>").save_pretrained(folder)
    return folder


def length(prompts: Any, responses: Any) -> torch.Tensor:
    return torch.tensor([float(len(text.split())) for text in responses])


def test_adapters_alone_are_trained_shared_by_nobody_and_merged_when_saved(directory: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    env, draw = world(), seeding.generator(0, "networks")
    options: dict[str, Any] = {"model": str(directory), "lora": 2}
    policy = LanguageModelConfig(**options).build(Standardize(env.action_space, None, False), env.action_space, draw)
    reference, plain = Reference(policy, 0.1), language_policy(*load(str(directory)))
    assert all("lora_" in name for name, _ in policy.named_parameters())
    assert sum(p.numel() for p in policy.parameters()) < 0.5 * sum(p.numel() for p in plain.parameters())
    base, kept = (dict(x.named_buffers()) for x in (policy, reference.policy))
    assert any("base_layer" in name for name in base) and all(x is kept[name] for name, x in base.items())
    algorithm = Reinforce(policy=policy, reference=reference, gamma=1.0, lr=0.01)
    rollouts, before = collector(env), {name: x.clone() for name, x in base.items()}
    r = rollouts.collect(policy)
    assert torch.allclose(policy.dist(r).log_prob(r.action), plain.dist(r).log_prob(r.action), atol=1e-5)
    for _ in range(3):
        algorithm.iterate(rollouts)
    assert all(torch.equal(x, before[name]) for name, x in policy.named_buffers())
    found, initial = (x.dist(r).log_prob(r.action) for x in (policy, plain))
    assert (found - initial).abs().max() > 0.01
    policy.save_pretrained(tmp_path / "merged")
    again = language_policy(*load(str(tmp_path / "merged")))
    assert torch.allclose(again.dist(r).log_prob(r.action), found, atol=1e-4)


def test_adapters_are_for_models_of_transformers(directory: Path) -> None:
    model: Any = speaker(10).body.transformer
    with pytest.raises(ValueError, match=r"policy\.lora=2 is for models of the transformers library"):
        add_adapters(model, torch.nn.Linear(1, 1), 2, torch.Generator())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_aligned_and_is_a_directory_of_transformers_again(
    directory: Path,
    dtype: Any,
    command: Cli,  # noqa: F811
) -> None:
    """With a vocabulary that is padded beyond the tokenizer's, and tied weights; a file in bfloat16 is trained in
    float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    given = tokenizer(command.folder / "given", 7)
    model.save_pretrained(given)
    (command.folder / "prompts.txt").write_text("w1 w2\nw3\n")
    settings = [f"policy.model={given}", "env.prompts=prompts.txt", f"env.reward={__name__}:length", "env.length=4"]
    code, out, err = command(
        "train", "algo=ppo", "env=rlhf", *settings, "num_envs=8", "total_steps=64", "hydra.run.dir=run"
    )
    assert code == 0 and "run/model | loads with transformers' from_pretrained" in out, err
    code, out, err = command("export", "run=run", "format=transformers", "to=aligned")
    assert code == 0 and "from_pretrained" in out, err
    code, _, err = command("export", "run=run", "format=transformers", "to=aligned")
    assert code == 1 and "aligned is there already" in err
    code, _, err = command("export", "run=run")
    assert code == 1 and "cannot express a language model: take format=transformers" in err

    aligned = transformers.AutoModelForCausalLM.from_pretrained(command.folder / "aligned").eval()
    assert aligned.dtype == torch.float32
    assert aligned.get_output_embeddings().weight is aligned.get_input_embeddings().weight
    policy, tokens = restore(command.folder / "run").policy, torch.tensor([[1], [2], [3]])
    rollout: Any = SimpleNamespace(obs=tokens, hidden_state={}, start=torch.tensor([[True], [False], [False]]))
    logits = aligned(input_ids=tokens.T).logits[0, :, :7].log_softmax(-1)
    assert policy.dist(rollout).log_prob(torch.tensor([[4], [5], [6]])).flatten().tolist() == pytest.approx(
        logits.gather(-1, torch.tensor([[4], [5], [6]])).flatten().tolist(), abs=1e-5
    )
    before = transformers.AutoModelForCausalLM.from_pretrained(given, dtype=torch.float32)
    pairs = zip(aligned.parameters(), before.parameters(), strict=True)
    moved = [(x != y).double().mean() for x, y in pairs]
    assert max(moved) > 0.9
    read = transformers.AutoTokenizer.from_pretrained(command.folder / "aligned")
    assert read("w1 w2")["input_ids"] == [1, 2]
    finished = transformers.AutoModelForCausalLM.from_pretrained(command.folder / "run" / "model")
    assert all(torch.equal(x, y) for x, y in zip(aligned.parameters(), finished.parameters(), strict=True))


def test_prompts_are_put_into_the_chat_template(tmp_path: Path) -> None:
    plain = PretrainedTokens(str(tokenizer(tmp_path / "plain", 9)))
    with pytest.raises(ValueError, match=r"has no chat template: leave env\.chat out"):
        PretrainedTokens(str(tmp_path / "plain"), chat=True)
    inner = transformers.AutoTokenizer.from_pretrained(tmp_path / "plain")
    inner.chat_template = (
        "{% for m in messages %}w1 {{ m.content }} w2 {% endfor %}{% if add_generation_prompt %}w3{% endif %}"
    )
    inner.save_pretrained(tmp_path / "chat")
    tokens, real = PretrainedTokens(str(tmp_path / "chat"), chat=True).encode(["w5", "w6 w7"])
    assert tokens.T.tolist() == [[1, 5, 2, 3, 8], [1, 6, 7, 2, 3]] and real.sum(0).tolist() == [4, 5]
    assert plain.encode(["w5"])[0].T.tolist() == [[5]]


def test_prompts_are_read_from_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a\\nb", "more": 1}\n{"prompt": "c"}\n')
    assert read_prompts(path, "env.prompts") == ["a\nb", "c"]
    for line in ('{"text": "c"}', '"c"', "c", '{"prompt": ["c"]}', ""):
        path.write_text(f'{{"prompt": "a"}}\n{line}\n')
        with pytest.raises(ValueError, match=r"env\.prompts: line 2 of .* must be like") as raised:
            read_prompts(path, "env.prompts")
        assert repr(line) in str(raised.value)


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no causal language model of transformers"):
        load(str(tmp_path))
