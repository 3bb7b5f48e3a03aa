"""A language model of the transformers library in the place of our own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_worlds import Letters, collector, vowels

from pgsuite import seeding
from pgsuite.algorithms import PPO, TRPO
from pgsuite.algorithms.reference import Reference
from pgsuite.nn.policy import Critic
from pgsuite.rlhf.env import LanguageEnv
from pgsuite.rlhf.policy import language_policy, load

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
        first = int(r.start[:, n].long().argmax())
        with torch.no_grad():
            logits = model(input_ids=r.obs[first:, n].unsqueeze(0)).logits[0].log_softmax(-1)
        own = logits.gather(-1, r.action[first:, n].unsqueeze(-1)).squeeze(-1)
        assert (own - r.logp[first:, n])[r.mask[first:, n]].abs().max() < 1e-5


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


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no causal language model of transformers"):
        load(str(tmp_path))
