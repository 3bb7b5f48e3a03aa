"""Pretraining, preferences and reward models: what they learn, and what their commands leave and say."""

import itertools
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from pgsuite import seeding
from pgsuite.errors import UserError
from pgsuite.nn.optim import Adam
from pgsuite.nn.transformer import Transformer
from pgsuite.rlhf import preferences
from pgsuite.rlhf.grammar import Grammar
from pgsuite.rlhf.model import WordModel
from pgsuite.rlhf.preferences import Preference, compare
from pgsuite.rlhf.pretraining import HeldOut, Pretraining, Size, encode, loss, pretrain
from pgsuite.rlhf.reward import Judge, RewardModel, best_of, best_of_kl
from pgsuite.rlhf.reward_training import RewardTraining, accuracy, calibration_error, fit, margins, reliability
from pgsuite.rlhf.tokens import STOP, Vocabulary

SMALL = {"width": 16, "layers": 1, "heads": 2}


def writer(words: str = "a b") -> WordModel:
    vocabulary, generator = Vocabulary(words.split()), seeding.generator(0, "test")
    model = WordModel(vocabulary, Transformer(len(vocabulary), **SMALL, generator=generator), generator)
    torch.nn.init.normal_(model.out.weight, generator=generator)
    return model.requires_grad_(False)


def judges(count: int, words: str = "a b c") -> list[Judge]:
    size = len(Vocabulary(words.split()))
    streams = [seeding.generator(i, "test") for i in range(count)]
    return [Judge(Transformer(size, **SMALL, generator=stream), stream) for stream in streams]


def test_generated_texts_are_as_frequent_as_the_model_says_whatever_they_are_padded_with() -> None:
    model, longest, count = writer(), 2, 2000
    written = model.generate(["a b a", "b"] * count, seeding.generator(0, "writing"), longest)
    for i, prompt in enumerate(("a b a", "b")):
        found = written[i::2]
        for words in itertools.product("ab", repeat=longest):
            text = " ".join(words)
            tokens, real = model.vocabulary.encode([prompt], [text])
            logp = model.log_probability(tokens, real)[-longest - 1 : -1].sum()
            p = float(logp.exp())
            assert abs(found.count(text) - count * p) < 4 * math.sqrt(count * p * (1 - p)), (prompt, text)


def test_the_probability_of_a_text_owes_nothing_to_its_padding_and_counts_the_stop() -> None:
    model = writer()
    alone = model.log_probability(*model.vocabulary.encode(["a"], ["b"]))
    together = model.log_probability(*model.vocabulary.encode(["a", "a b"], ["b", "a b a"]))
    assert torch.allclose(alone[:, 0], together[: len(alone), 0], atol=1e-6)
    assert (together[len(alone) :, 0] == 0).all()
    tokens, _ = model.vocabulary.encode(["a"], ["b"])
    expected = model(tokens)[:-1].log_softmax(-1)
    assert tokens[-1] == STOP and torch.allclose(alone[-1], expected[-1, :, STOP], atol=1e-6)


def test_a_model_learns_a_small_grammar_to_its_own_entropy() -> None:
    grammar = Grammar(
        "review = 3 the soup was / <a> . | 1 the soup is / <b> .\na = 4 hot | 1 cold\nb = 1 cold | 1 hot hot"
    )
    vocabulary = Vocabulary(grammar.words)
    corpus = grammar.sample(64 * 60, seed=0)
    generator = seeding.generator(0, "test")
    model = WordModel(vocabulary, Transformer(len(vocabulary), **SMALL, generator=generator), generator)
    optimizer = Adam([model], 0.0)
    for start in range(0, len(corpus), 64):
        optimizer.lr.fill_(2e-2 * (1 - start / len(corpus)))
        optimizer.step(partial(loss, model), *encode(vocabulary, corpus[start : start + 64]))
    texts = list(dict.fromkeys(corpus))
    exact = torch.tensor([grammar.log_probability(review) for review in texts])
    found = model.log_probability(*encode(vocabulary, texts)).detach().sum(0)
    kl = float((exact.exp() * (exact - found)).sum())
    assert len(texts) == 4 and exact.exp().sum() == pytest.approx(1)
    assert 0 <= kl < 0.05
    fresh = grammar.sample(500, seed=1)
    measured = HeldOut(grammar, vocabulary, fresh).measure(model)
    assert abs(measured["kl"] - kl) < 4 * measured["kl_error"]


def test_choices_have_the_probabilities_of_bradley_and_terry() -> None:
    n, noise = 4000, 2.0

    def scorer(prompts: Any, responses: Any) -> torch.Tensor:
        return torch.tensor([float(x) for x in responses])

    pairs = compare(["?"] * n, ["1"] * n, ["0"] * n, scorer, noise, seeding.generator(0, "test"))
    p = 1 / (1 + math.exp(-1 / noise))
    wins = sum(pair.chosen == "1" for pair in pairs)
    assert abs(wins - n * p) < 4 * math.sqrt(n * p * (1 - p))
    for pair in pairs[:20]:
        assert pair.probability == pytest.approx(p if pair.chosen == "1" else 1 - p)


def test_preferences_come_back_from_their_file(tmp_path: Path) -> None:
    pairs = [Preference("the soup was", "good .", "bad .", 0.9), Preference("so", "ü", "")]
    preferences.save(pairs, tmp_path / "x.jsonl")
    assert preferences.load(tmp_path / "x.jsonl") == pairs
    (tmp_path / "own.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    assert preferences.load(tmp_path / "own.jsonl") == [Preference("a", "b", "c")]


@pytest.mark.parametrize(
    "line", ["[]", "{}", "nonsense", '{"prompt": 1, "chosen": "b", "rejected": "c"}', '{"x": 1}', "3"]
)
def test_a_line_that_is_no_preference_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"line 2 of .*x.jsonl is no preference: it must be"):
        preferences.load(tmp_path / "x.jsonl")


def test_a_reward_model_recovers_the_order_of_a_bradley_terry_scorer_and_is_calibrated() -> None:
    def score(prompts: Any, responses: Any) -> torch.Tensor:
        return torch.tensor([float(text.count("a") - text.count("b")) for text in responses])

    generator = seeding.generator(0, "test")
    drawn = torch.randint(3, (2, 3000, 4), generator=generator)
    first, second = ([" ".join("abc"[i] for i in row) for row in side] for side in drawn.tolist())
    pairs = compare(["c"] * 3000, first, second, score, 1.0, generator)
    train, held = pairs[:2500], pairs[2500:]
    (judge,) = judges(1)
    fit(judge, Vocabulary("abc"), train, RewardTraining(lr=1e-2, epochs=3), generator)
    reward = RewardModel(Vocabulary("abc"), [judge])
    margin, p = margins(reward, held), torch.tensor([pair.probability or 0.0 for pair in held])
    clear = (p - 0.5).abs() > 0.1
    assert accuracy(torch.where(p > 0.5, margin, -margin)[clear]) > 0.97
    assert accuracy(margin) > float(torch.maximum(p, 1 - p).mean()) - 0.03
    assert calibration_error(reliability(margin)) < 0.08


def test_reliability_is_exact_where_it_can_be_counted() -> None:
    margin = torch.tensor([2.0, 2.0, 2.0, -2.0, 0.1, -0.1, 50.0])
    table = reliability(margin, bins=2)
    low, high = 1 / (1 + math.exp(-0.1)), 1 / (1 + math.exp(-2.0))
    assert table == [(pytest.approx(low), 0.5, 2), (pytest.approx((4 * high + 1) / 5), pytest.approx(0.8), 5)]
    assert calibration_error(table) == pytest.approx((2 * (low - 0.5) + abs(4 * high + 1 - 4)) / 7)
    assert accuracy(torch.tensor([1.0, -1.0, 0.0, 2.0])) == pytest.approx(2.5 / 4)


def test_a_judge_reads_the_last_real_token_and_begins_as_published() -> None:
    vocabulary = Vocabulary("abc")
    (judge,) = judges(1)
    alone = judge(*vocabulary.encode(["a"], ["b"]))
    together = judge(*vocabulary.encode(["a", "a b c"], ["b", "a a a a"]))
    assert torch.allclose(alone, together[:1], atol=1e-6)
    wide = Judge(Transformer(6, width=512, layers=1, heads=2), seeding.generator(0, "test"))
    assert float(wide.out.weight.detach().std()) == pytest.approx(1 / math.sqrt(513), rel=0.1)
    assert wide.out.bias.tolist() == [0]


def test_an_ensemble_gives_the_mean_or_the_minimum_and_comes_back_from_its_file(tmp_path: Path) -> None:
    vocabulary, members = Vocabulary("abc"), judges(3)
    asked = (["a", "b c", "c"], ["b", "", "a a b"])
    each = torch.stack([RewardModel(vocabulary, [judge])(*asked) for judge in members])
    mean = RewardModel(vocabulary, members)
    mean.save(tmp_path / "reward.pt")
    assert torch.allclose(mean(*asked), each.mean(0)) and each.std(0).min() > 0
    for given in (tmp_path, tmp_path / "reward.pt"):
        assert torch.equal(RewardModel.load(given, "minimum")(*asked), each.amin(0))
    with pytest.raises(ValueError, match="combine must be one of mean, minimum"):
        RewardModel.load(tmp_path, "median")  # pyright: ignore[reportArgumentType]


def test_the_best_of_n_is_the_best_of_each_n_samples() -> None:
    rewards = torch.tensor([[1.0, 3.0, 2.0, 5.0, 4.0, 9.0, 8.0], [7.0, 1.0, 0.0, 2.0, 3.0, 4.0, 9.0]])
    assert best_of(rewards, 3).tolist() == [[1, 5], [0, 5]]
    assert best_of(rewards, 1).tolist() == [list(range(7))] * 2
    with pytest.raises(ValueError, match="the best of 8 samples needs as many, got 7"):
        best_of(rewards, 8)


def test_the_kl_of_the_best_of_n_is_that_of_its_density() -> None:
    """The best of n uniform draws has the density n u^(n-1), of which the KL is an integral."""
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for n in (1, 2, 5, 64):
        density = n * u ** (n - 1)
        assert best_of_kl(n) == pytest.approx(float(torch.special.xlogy(density, density).mean()), abs=1e-4)


Command = Callable[..., str]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a script in this process, and gives what it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")

    def run(script: str, *arguments: str) -> str:
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        GlobalHydra.instance().clear()
        said = ""
        try:
            __import__(script).main()
        except SystemExit as stop:
            said = str(stop.code)
        return capsys.readouterr().out + said

    return run


TINY = ["reviews=640", "points=1", "held_out=50", "size.width=16", "size.layers=1", "size.heads=2"]


def test_the_commands_of_the_demonstration_leave_models_that_load_and_say_what_they_are_worth(
    command: Command, tmp_path: Path
) -> None:
    said = command("pretrain", *TINY)
    assert "perplexity of the grammar" in said and "10 of 10 steps" in said
    folder = tmp_path / "runs/language"
    model = WordModel.load(folder / "model")
    assert model.generate(["the soup was"], seeding.generator(0, "test"))
    summary = json.loads((folder / "model/summary.json").read_text())
    assert summary["perplexity"] > summary["grammar_perplexity"] > 1
    said = command("reward_model", "count=100", "held_out=40", "epochs=1", "members=2")
    assert "held-out accuracy" in said and "predicted  preferred" in said and "reward model 2 of 2" in said
    reward = RewardModel.load(folder / "reward")
    assert reward(["the soup was"] * 2, ["good .", "bad ."]).shape == (2,)
    assert len(preferences.load(folder / "reward/preferences.jsonl")) == 100
    assert {"accuracy", "best_accuracy", "ordering"} <= json.loads((folder / "reward/summary.json").read_text()).keys()
    for name in ("model", "reward"):
        assert list((folder / name).glob("events.out.tfevents.*"))
    assert "is there already" in command("pretrain", *TINY) and "is there already" in command("reward_model")
    (tmp_path / "own.jsonl").write_text('{"prompt": "the soup was", "chosen": "soupy", "rejected": "bad"}\n')
    own = ["pairs=own.jsonl", "hydra.run.dir=other"]
    assert "line 1 of own.jsonl: 'soupy' is no word of the 101" in command("reward_model", *own)
    own[0] = "pairs=runs/language/reward/preferences.jsonl"
    assert "held_out=1000 of 100 pairs leaves none" in command("reward_model", *own)


def test_rewards_are_zero_on_average_over_what_the_pretrained_model_writes(tmp_path: Path) -> None:
    from pgsuite.rlhf.reward_training import train_reward

    small = Pretraining(reviews=64, held_out=10, size=Size(**SMALL))
    model = pretrain(small, tmp_path, lambda line: None)
    wanted = RewardTraining(model=str(tmp_path), count=100, held_out=50, members=2)
    reward = train_reward(wanted, tmp_path, lambda line: None)
    prompts = [review.prompt for review in Grammar().sample(1000, seed=5)]
    rewards = reward(prompts, model.generate(prompts, seeding.generator(5, "test")))
    assert abs(float(rewards.mean())) < 4 * float(rewards.std()) / math.sqrt(50)


@pytest.mark.parametrize(
    ("script", "arguments", "complaint"),
    [
        ("pretrain", ["reviews=0"], "reviews must be a whole number at least 1"),
        ("pretrain", ["size.heads=5"], "width must be a multiple"),
        ("pretrain", ["reviws=3"], "did you mean reviews or device?"),
        ("reward_model", [], "no language model at runs/language/model/model.pt: python scripts/pretrain.py makes one"),
        ("reward_model", ["noise=0"], "noise must be a number greater than 0"),
    ],
)
def test_commands_say_in_one_message_what_is_wrong(
    command: Command, script: str, arguments: list[str], complaint: str
) -> None:
    assert complaint in command(script, *arguments)


def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    RewardModel(Vocabulary("abc"), judges(1)).save(tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"holds no language model: .*pretrain.* makes one"):
        WordModel.load(tmp_path)
