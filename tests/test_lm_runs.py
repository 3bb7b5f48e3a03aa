"""Each test is one claim about the command that aligns a language model."""

import csv
from pathlib import Path

import pytest
import torch
import yaml
from lm_worlds import Letters
from test_cli import Cli
from test_cli import command as command

from pgsuite.nn.transformer import LanguageModel, Transformer
from pgsuite.training import checkpoint

PROMPTS = ["b", "cde", "gh", "fab"]
TINY = [
    "env=rlhf",
    "num_envs=8",
    "total_steps=200",
    "algo.minibatches=2",
    "algo.epochs=1",
    "algo.lr=5e-4",
    "checkpoint.every=60",
]
WORLD = [
    "env.prompts=test_lm_runs:PROMPTS",
    "env.tokens=lm_worlds:Letters",
    "env.reward=lm_worlds:vowels",
]
APART = ["env.scorer=lm_worlds:vowels", "env.held_out=null", "env.length=5", "policy.model=model.pt"]
ALL = [*TINY, *WORLD, *APART]


SIZES: list[int] = []


def counted(prompts: list[str], responses: list[str]) -> torch.Tensor:
    SIZES.append(len(prompts))
    return torch.zeros(len(prompts))


@pytest.fixture
def ready(command: Cli) -> Cli:
    """In a directory with a language model."""
    generator = torch.Generator().manual_seed(0)
    LanguageModel(Transformer(len(Letters()), 8, 1, 2, generator), generator).save(command.folder / "model.pt")
    return command


def test_a_run_is_compared_with_its_reference_before_and_after(ready: Cli) -> None:
    code, out, err = ready("train", *ALL, "hydra.run.dir=run")
    assert code == 0, err
    assert "held-out prompts: wins" in out and "4 prompts of up to 3 tokens" in out
    with Path("run/language.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["steps"] == "0" and float(rows[0]["language/kl"]) == pytest.approx(0, abs=1e-6)
    assert abs(float(rows[-1]["language/kl"])) > 1e-4 and int(rows[-1]["steps"]) >= 200
    code, out, err = ready("evaluate", "run=run", "episodes=4")
    assert code == 0 and "4 deterministic episodes" in out, err


def test_a_resumed_run_is_the_same_bit_for_bit(ready: Cli) -> None:
    assert ready("train", *ALL, "hydra.run.dir=whole", "checkpoint.keep=9")[0] == 0
    assert ready("train", *ALL, "hydra.run.dir=torn", "checkpoint.keep=9")[0] == 0
    saved = checkpoint.numbered(Path("torn"))
    for path in saved[1:]:
        path.unlink()
    code, _, err = ready("train", "resume=torn")
    assert code == 0, err
    whole, torn = (checkpoint.load(checkpoint.numbered(Path(name))[-1])["algorithm"] for name in ("whole", "torn"))
    assert all(torch.equal(x, torn["policy"][name]) for name, x in whole["policy"].items())


def test_the_generated_reviews_have_everything_and_another_model_nothing_of_theirs(ready: Cli) -> None:
    code, _, err = ready("train", "env=reviews")
    assert code == 1 and "no reward model at runs/language/reward" in err
    code, _, err = ready("train", "env=reviews", "env.rewards=[a.pt]")
    assert code == 1 and "no reward model at a.pt" in err
    code, _, err = ready("train", "env=rlhf", "policy.model=model.pt")
    assert code == 1 and "give env.prompts, env.reward, and policy.model" in err and "env=reviews has them all" in err
    (composed,) = (yaml.safe_load(ready("train", "env=rlhf", "policy.model=mine", "--cfg", "job", "--resolve")[1]),)
    env = composed["env"]
    assert env["tokens"] == "mine" and not any(
        env[name] for name in ("prompts", "reward", "rewards", "held_out", "scorer")
    )
    assert composed["algo"]["lr"] == {"linear": [3e-6, 0]} and composed["reference"]["coef"] == 0.05


def test_prompts_are_answered_in_pieces_and_no_more_than_asked(ready: Cli) -> None:
    """With as many responses at a time as in a rollout."""
    (ready.folder / "prompts.txt").write_text("\n".join("abcdefgh"[i % 8] * (i % 5 + 1) for i in range(100)))
    given = ["env.prompts=prompts.txt", "total_steps=8", "callbacks.alignment.prompts=21", "hydra.run.dir=run"]
    SIZES.clear()
    code, _, err = ready("train", *ALL, *given, "env.scorer=null", f"env.reward={__name__}:counted")
    assert code == 0, err
    assert SIZES == [8, 8, 5, 8, 8, 5, 8, 8, 8, 5]  # the policy's and the reference's, a rollout, and the policy's


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["policy.model=nothing.pt"], "no language model at nothing.pt"),
        (["policy.model=null"], "responses are written by language models: give policy.model"),
        (["env.reward=lm_worlds:vowel"], "did you mean vowels"),
        (["env.samples=3"], "num_envs=8 responses do not divide into env.samples=3 a prompt"),
        (["policy.frozen=2"], "policy.frozen=2, but the model has 1 layers"),
        (["horizon=32"], "leave horizon out"),
        (["env.tokens=lm_worlds:nowhere"], "has nothing named 'nowhere'"),
        (["env.tokens=math:tau"], "env.tokens=math:tau has no pad, stop, encode, decode, __len__"),
        (["env.prompts=math:tau"], "env.prompts must be a list of texts, and math:tau is float"),
        (
            ["env.prompts=math:floor"],
            "env.prompts=math:floor cannot be called with nothing: missing a",
        ),
        (["env.reward=math:floor", "env.rewards=[x]"], "env.reward=math:floor cannot be called with 'x', 'mean'"),
        (
            ["env.rewards=[x]"],
            "env.reward=lm_worlds:vowels made no callable of 'x': ValueError: zip() argument 2 is longer",
        ),
        (["env.reward=operator:add", "env.rewards=[x]"], "env.reward=operator:add made a str of 'x', and no callable"),
        (["env.rewards=[x]"], "where it takes prompts and responses itself, env.rewards=null leaves them out"),
        (["env.reward=math:floor"], "rlhf: env.reward raised TypeError: math.floor() takes exactly one argument"),
        (["env.scorer=math:floor"], "rlhf: env.scorer raised TypeError: math.floor() takes exactly one argument"),
        (["env.scorer=builtins:zip"], "rlhf: env.scorer raised TypeError"),
    ],
)
def test_mistakes_get_one_message(ready: Cli, given: list[str], said: str) -> None:
    code, _, err = ready("train", *ALL, *given, "hydra.run.dir=run")
    assert code == 1 and said in err and "Traceback" not in err


def test_a_temperature_without_a_language_model_is_refused(ready: Cli) -> None:
    code, _, err = ready("train", "env=CartPole", "policy.temperature=0.5", "total_steps=100")
    assert code == 1 and "no setting 'temperature' in policy" in err, err


def test_a_language_model_is_for_tokens_and_tokens_are_for_a_language_model(ready: Cli) -> None:
    code, _, err = ready("train", "env=CartPole", "policy=language_model", "policy.model=model.pt", "total_steps=100")
    assert code == 1 and "the language model of policy.model knows" in err and "Discrete(2)" in err, err
    given = [x for x in ALL if not x.startswith("policy.")]
    code, _, err = ready("train", *given, "policy=mlp", "critic.shared=true")
    assert code == 1 and "responses are written by language models: give policy=language_model" in err, err
