"""The hidden scorer: the true score of a review, by which simulated annotators compare responses.

Models are trained only on noisy preferences that it generates, never on its scores.  Hence improvement under the reward
model can be compared with improvement in true score.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

NOUNS = {
    "food": "soup pasta pizza steak fish bread salad dessert",
    "service": "waiter service staff chef",
    "place": "room music terrace view",
}
VALUES = {  # of adjectives for any noun, then of those for one kind of topic
    "any": {
        "good": 1.0, "nice": 1.0, "fine": 0.5, "great": 2.0, "wonderful": 2.5, "perfect": 2.5,
        "bad": -1.0, "poor": -1.0, "disappointing": -1.5, "awful": -2.0, "terrible": -2.5, "horrible": -2.5,
    },
    "food": {
        "tasty": 1.5, "fresh": 1.0, "warm": 0.5, "delicious": 2.0, "divine": 2.5,
        "bland": -1.0, "cold": -1.0, "salty": -1.0, "stale": -1.5, "disgusting": -2.5,
    },
    "service": {
        "friendly": 1.5, "quick": 1.0, "polite": 1.0, "attentive": 1.5, "charming": 2.0,
        "slow": -1.0, "rude": -1.5, "careless": -1.0, "clumsy": -1.0, "insulting": -2.5,
    },
    "place": {
        "cozy": 1.5, "quiet": 1.0, "lovely": 1.5, "beautiful": 2.0,
        "loud": -1.0, "dirty": -1.5, "cramped": -1.0, "filthy": -2.5,
    },
}  # fmt: skip
DEGREES = {"very": 1.5, "really": 1.5, "extremely": 2.0, "quite": 0.75, "bit": 0.5}
EMPHATIC = ("very", "really", "extremely")
INTENTIONS = {"come": 1.0, "recommend": 1.0, "worth": 1.0, "avoid": -1.0, "waste": -1.0}
NEGATIONS = {"not": -0.5, "never": -0.75}  # factors of "not" and "never"; "not ... at all" has the factor -1
MOST, FULL = 18, 6.0  # words of a response without a penalty of length; bound of the sentiment

KIND = {noun: kind for kind, nouns in NOUNS.items() for noun in nouns.split()}
VALUE = {word: (kind, value) for kind, words in VALUES.items() for word, value in words.items()}


def score_terms(prompt: str, response: str) -> dict[str, float]:
    """The terms of a response's score, whose sum is the score.

    - ``sentiment``: the values of its adjectives, scaled by degree and turned by negation, and of its intentions,
      summed and bent by tanh so that it stays within six
    - ``topic``: -2 if there is no opinion on the topic of the prompt
    - ``unfit``: -1 for each adjective that does not suit its noun, as a friendly soup, which counts for nothing else
    - ``repetition``: -1 for each adjective, intention or emphatic word that was there before; no adjective counts twice
    - ``contradiction``: -1 for each noun that is called both good and bad
    - ``gushing``: -1 for each emphatic word after the second
    - ``length``: -0.25 for each word after the eighteenth
    - ``ending``: -2 where it does not end in its only full stop
    """
    words = response.split()
    subject = topic = next((word for word in reversed(prompt.split()) if word in KIND), "")
    said, opinions = Counter[str](), dict[str, set[bool]]()
    sentiment, unfit = 0.0, 0
    for clause in re.split(r" (?:and|but|,|\.)(?= |$)", f" {response}"):
        part = clause.split()
        subject = next((word for word in part if word in KIND), subject)
        degree = math.prod(DEGREES.get(word, 1.0) for word in part)
        negation = next((NEGATIONS[word] for word in part if word in NEGATIONS), None)
        whole = part[-2:] == ["at", "all"]
        modifier = degree if negation is None else -1.0 if whole else negation
        for word in part:
            said[word] += 1
            if word in VALUE:
                kind, value = VALUE[word]
                if kind not in ("any", KIND.get(subject)):
                    unfit += 1
                elif said[word] == 1:
                    sentiment += value * modifier
                    opinions.setdefault(subject, set()).add(value * modifier > 0)
            elif word in INTENTIONS and said[word] == 1:
                sentiment += INTENTIONS[word] * (1.0 if negation is None else -1.0)
    weighty = VALUE.keys() | INTENTIONS.keys() | set(EMPHATIC)
    stops = [i for i, word in enumerate(words) if word == "."]
    return {
        "sentiment": FULL * math.tanh(sentiment / FULL),
        "topic": 0.0 if topic in opinions else -2.0,
        "unfit": -1.0 * unfit,
        "repetition": -1.0 * sum(count - 1 for word, count in said.items() if word in weighty),
        "contradiction": -1.0 * sum(len(sides) == 2 for sides in opinions.values()),
        "gushing": -1.0 * max(0, sum(said[word] for word in EMPHATIC) - 2),
        "length": -0.25 * max(0, len(words) - MOST),
        "ending": 0.0 if stops == [len(words) - 1] else -2.0,
    }


def score(prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
    """The true scores [N] of responses, about 0 on average over the corpus.

    Raises ValueError unless there are as many responses as prompts.
    """
    return torch.tensor([sum(score_terms(p, r).values()) for p, r in zip(prompts, responses, strict=True)])
