"""The corpus: its grammar, its tokens, and the hidden scorer of what is written."""

import math
from collections import Counter

import pytest
import torch

from pgsuite.rlhf import corpus
from pgsuite.rlhf.grammar import Grammar, Review
from pgsuite.rlhf.scorer import KIND, VALUE, score, score_terms
from pgsuite.rlhf.tokens import BEGIN, PAD, STOP, Vocabulary


def test_probabilities_of_a_small_grammar_are_those_of_all_derivations_and_sum_to_one() -> None:
    grammar = Grammar("review = 1 <mood> / <mood> | 3 so / so\nmood = 1 so | 2 so so | 1")
    texts = [("so " * i).strip() for i in range(3)]
    each = dict(zip(texts, (0.25, 0.25, 0.5), strict=True))
    total = 0.0
    for prompt, response in ((a, b) for a in texts for b in texts):
        expected = 0.25 * each[prompt] * each[response] + 0.75 * (prompt == response == "so")
        found = math.exp(grammar.log_probability(Review(prompt, response)))
        assert found == pytest.approx(expected)
        total += found
    assert total == pytest.approx(1)


def test_the_same_seed_writes_the_same_corpus_and_every_text_as_often_as_its_probability_says() -> None:
    assert Grammar().sample(100, seed=1) == Grammar().sample(100, seed=1) != Grammar().sample(100, seed=2)
    grammar = Grammar(
        "review = 3 the <noun> / <verdict> | 1 a soup / good\nnoun = 2 soup | 1 pie\nverdict = 1 good | 4 bad"
    )
    counts = Counter(grammar.sample(4000, seed=1))
    assert len(counts) == 5
    for review, count in counts.items():
        p = math.exp(grammar.log_probability(review))
        assert abs(count - 4000 * p) < 4 * math.sqrt(4000 * p * (1 - p)), str(review)


def test_what_the_grammar_cannot_derive_has_no_probability() -> None:
    grammar = Grammar()
    assert math.isfinite(grammar.log_probability(Review("the soup was", "not very good .")))
    for response in ("", "not very good", "friendly .", "good . .", "ünheard of ."):
        assert grammar.log_probability(Review("the soup was", response)) == -math.inf


@pytest.mark.parametrize(
    ("rules", "complaint"),
    [("review: so", "name = weight"), ("review = so", "begins with its weight"), ("review = 1 <so>", "no rule for so")],
)
def test_rules_that_cannot_be_read_are_named(rules: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Grammar(rules)


def test_the_scorer_knows_every_noun_and_every_opinion_of_the_grammar() -> None:
    grammar = Grammar()
    options = {name: [symbols for _, symbols in grammar.rules[name]] for name in grammar.rules}
    for name in ("fine", "poor", *(f"{side} {kind}" for side in ("fitting", "unfit") for kind in set(KIND.values()))):
        kind, good = name.split()[-1] if " " in name else "any", name.startswith(("fine", "fitting"))
        for (word,) in options[name]:
            assert word.isalpha() and VALUE[word][0] == kind and (VALUE[word][1] > 0) == good, word
    assert {word for kind in set(KIND.values()) for (word,) in options[f"noun {kind}"]} == KIND.keys()


def test_texts_come_back_from_their_tokens_with_nothing_but_padding_behind_them() -> None:
    reviews = Grammar().sample(50, seed=0)
    vocabulary = corpus.vocabulary()
    tokens, real = vocabulary.encode([r.prompt for r in reviews], [r.response for r in reviews])
    assert vocabulary.decode(tokens) == [f"{r.prompt} {r.response}" for r in reviews]
    assert (tokens[0] == BEGIN).all() and ((tokens == PAD) == ~real).all()
    assert ((tokens == STOP).sum(0) == 1).all() and (real.sum(0) == (tokens == STOP).int().argmax(0) + 1).all()
    assert tokens.max() < len(vocabulary)


def test_openings_that_are_held_out_are_no_others_and_all_are_of_known_words() -> None:
    learned, apart = corpus.prompts(), corpus.held_out()
    assert not set(learned) & set(apart) and len(set(apart)) == len(apart) > 20
    assert len(learned) > 1000 > len(set(learned)) > 80
    tokens, real = corpus.vocabulary().encode([*learned, *apart])
    assert corpus.vocabulary().decode(tokens) == [*learned, *apart] and real.any(0).all()


def test_an_unknown_word_is_named_with_its_neighbours() -> None:
    with pytest.raises(ValueError, match=r"'soupe' is no word of the 101; did you mean soup"):
        Vocabulary(Grammar().words).encode(["the soupe was"])


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("very good .", "good ."),
        ("good .", "a bit good ."),
        ("good .", "not good ."),
        ("not bad at all .", "not bad ."),
        ("not good .", "bad ."),
        ("good , we will come back .", "good ."),
        ("good .", "good , we will not come back ."),
        ("delicious .", "friendly ."),  # no soup is
        ("good and tasty .", "good and good ."),
        ("good but the bread was bad .", "good but the soup was bad ."),  # which contradicts itself
        ("good .", "the waiter was perfect ."),  # for it was the soup
        ("good .", "good"),
        ("good .", "good . ."),
        (
            "good and fresh .",
            "very good and very fresh and the bread was very warm and really nice and extremely good .",
        ),
    ],
)
def test_the_scorer_prefers_sense(better: str, worse: str) -> None:
    high, low = score(["the soup was"] * 2, [better, worse]).tolist()
    assert high > low


def test_the_scorer_answers_to_any_text_and_praise_saturates() -> None:
    for response in ("", ".", ", ,", "not", "at all", "word salad with no sense", "good " * 100):
        assert torch.isfinite(score(["nothing"], [response])).all()
    praise = score_terms(
        "the soup was", "wonderful , perfect , divine , delicious , great , tasty , fresh , nice , good ."
    )
    assert 5.5 < praise["sentiment"] < 6
