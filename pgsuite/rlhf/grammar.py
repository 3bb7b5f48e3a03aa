"""Restaurant reviews of mixed sentiment, written by a grammar whose probabilities are known.

A rule is ``name = weight symbols | weight symbols | ...``, where symbols are words and ``<names>`` of rules.  A line
that begins with ``|`` goes on with the rule before; ``<kind>`` stands for each kind of topic in turn, as in
``<praise <kind>>``.  A review has a mood that is never said, an opening, which is the prompt, and what follows the
slash, which is the response:

    honestly the soup was / not very good , but the waiter was quite friendly .
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pgsuite import seeding

KINDS = ("food", "service", "place")
RULES = """
review = 4 <glad> | 4 <cross> | 3 <torn>
glad = 6 <glad food> | 3 <glad service> | 2 <glad place>
cross = 6 <cross food> | 3 <cross service> | 2 <cross place>
torn = 6 <torn food> | 3 <torn service> | 2 <torn place>

glad <kind> = 1 <start> <noun <kind>> was / <praise <kind>> <more glad> .
cross <kind> = 1 <late> <noun <kind>> was / <blame <kind>> <more cross> .
torn <kind> = 1 <start> <noun <kind>> was / <praise <kind>> <yet bad> .
  | 1 <late> <noun <kind>> was / <blame <kind>> <yet good> .

start = 8 the | 3 i thought the | 2 honestly the | 2 last night the | 2 as always the | 1 on our anniversary the
late = 7 the | 3 i thought the | 2 honestly the | 2 last night the | 3 after a long wait the
  | 1 we were hungry but the

noun food = 4 soup | 4 pasta | 3 pizza | 3 steak | 2 fish | 2 bread | 2 salad | 3 dessert
noun service = 4 waiter | 4 service | 2 staff | 1 chef
noun place = 3 room | 2 music | 2 terrace | 1 view

praise <kind> = 5 <degree> <good <kind>> | 2 <good <kind>> and <good <kind>>
  | 2 <degree> <good <kind>> and <degree> <good <kind>> | 2 not <bad <kind>> at all | 1 not <bad <kind>>
blame <kind> = 5 <degree> <bad <kind>> | 2 <bad <kind>> and <bad <kind>>
  | 2 <degree> <bad <kind>> and <degree> <bad <kind>> | 3 not <good <kind>> at all | 2 not very <good <kind>>
  | 1 never <good <kind>>
degree = 6 | 3 very | 2 really | 1 extremely | 2 quite | 2 a bit

good <kind> = 3 <fine> | 4 <fitting <kind>>
bad <kind> = 3 <poor> | 4 <unfit <kind>>
fine = 5 good | 4 nice | 3 fine | 2 great | 1 wonderful | 1 perfect
poor = 5 bad | 4 poor | 3 disappointing | 2 awful | 1 terrible | 1 horrible
fitting food = 4 tasty | 4 fresh | 3 warm | 2 delicious | 1 divine
unfit food = 4 bland | 4 cold | 3 salty | 2 stale | 1 disgusting
fitting service = 4 friendly | 3 quick | 3 polite | 2 attentive | 1 charming
unfit service = 4 slow | 4 rude | 3 careless | 2 clumsy | 1 insulting
fitting place = 4 cozy | 3 quiet | 3 lovely | 1 beautiful
unfit place = 4 loud | 3 dirty | 3 cramped | 1 filthy

more glad = 4 | 3 and <also glad> | 3 , <promise> | 1 and <also glad> , <promise>
more cross = 4 | 3 and <also cross> | 3 , <threat> | 1 and <also cross> , <threat>
yet good = 4 but <also glad> | 1 but <promise>
yet bad = 4 but <also cross> | 1 but <threat>
also glad = 3 the <noun food> was <praise food> | 2 the <noun service> was <praise service>
  | 2 the <noun place> was <praise place>
also cross = 3 the <noun food> was <blame food> | 2 the <noun service> was <blame service>
  | 2 the <noun place> was <blame place>
promise = 4 we will come back | 2 i recommend it | 1 worth every penny
threat = 4 we will not come back | 2 i would avoid it | 1 a waste of money
"""
Symbols = tuple[str, ...]


@dataclass(frozen=True)
class Review:
    """An opening, and how it goes on."""

    prompt: str
    response: str

    def __str__(self) -> str:
        return f"{self.prompt} / {self.response}"


class Grammar:
    """Draws texts of ``review``, and knows how probable each is.

    Raises ValueError for rules that cannot be read.
    """

    def __init__(self, rules: str = RULES) -> None:
        self.rules: dict[str, list[tuple[float, Symbols]]] = {}
        for line in filter(None, rules.replace("\n  |", " |").splitlines()):
            for kind in KINDS if "<kind>" in line else ("",):
                name, is_rule, options = line.replace("<kind>", kind).partition(" = ")
                if not is_rule:
                    raise ValueError(f"a rule is written name = weight symbols | ..., got {line!r}")
                self.rules[name] = _normalized([_option(option) for option in options.split("|")])
        used = {symbol for options in self.rules.values() for _, symbols in options for symbol in symbols}
        if missing := {symbol[1:-1] for symbol in used if symbol[0] == "<"} - self.rules.keys():
            raise ValueError(f"no rule for {', '.join(sorted(missing))}")
        self.words = sorted(symbol for symbol in used if symbol[0] not in "</")

    def sample(self, count: int, seed: int) -> list[Review]:
        """``count`` reviews, the same for the same seed."""
        draws = _Draws(seed)
        return [self._review(draws) for _ in range(count)]

    def _review(self, draws: _Draws) -> Review:
        words: list[str] = []
        pending = ["<review>"]
        while pending:
            symbol = pending.pop()
            if symbol[0] == "<":
                pending += reversed(draws.choose(self.rules[symbol[1:-1]]))
            else:
                words.append(symbol)
        at = words.index("/")
        return Review(" ".join(words[:at]), " ".join(words[at + 1 :]))

    def log_probability(self, review: Review) -> float:
        """Of drawing exactly this text, over all moods and all ways to derive it; minus infinity if there is none."""
        words = str(review).split()
        known: dict[tuple[str, int], dict[int, float]] = {}

        def ends(symbol: str, start: int) -> dict[int, float]:
            """Where what a symbol derives may end if it begins at ``start``, with the probability of each end."""
            if symbol[0] != "<":
                return {start + 1: 1.0} if words[start : start + 1] == [symbol] else {}
            if (symbol, start) not in known:
                known[symbol, start] = found = {}
                for probability, symbols in self.rules[symbol[1:-1]]:
                    reached = {start: probability}
                    for part in symbols:
                        following: dict[int, float] = {}
                        for middle, p in reached.items():
                            for end, q in ends(part, middle).items():
                                following[end] = following.get(end, 0.0) + p * q
                        reached = following
                    for end, p in reached.items():
                        found[end] = found.get(end, 0.0) + p
            return known[symbol, start]

        probability = ends("<review>", 0).get(len(words), 0.0)
        return math.log(probability) if probability else -math.inf


class _Draws:
    """Uniform numbers, drawn a block at a time."""

    def __init__(self, seed: int, block: int = 4096) -> None:
        self.generator, self.block = seeding.generator(seed, "grammar"), block
        self.left: list[float] = []

    def choose(self, options: list[tuple[float, Symbols]]) -> Symbols:
        if len(options) == 1:
            return options[0][1]
        if not self.left:
            drawn: Tensor = torch.rand(self.block, generator=self.generator, dtype=torch.float64)
            self.left = drawn.tolist()
        x = self.left.pop()
        for probability, symbols in options:
            x -= probability
            if x < 0:
                return symbols
        return options[-1][1]


def _option(text: str) -> tuple[float, Symbols]:
    """The weight and the symbols of one way to go on."""
    weight, *rest = text.split()
    symbols: list[str] = []
    for part in rest:  # names of rules may hold spaces
        if symbols and symbols[-1][0] == "<" and symbols[-1][-1] != ">":
            symbols[-1] += f" {part}"
        else:
            symbols.append(part)
    try:
        return float(weight), tuple(symbols)
    except ValueError as error:
        raise ValueError(f"a way to go on begins with its weight, got {text!r}") from error


def _normalized(options: list[tuple[float, Symbols]]) -> list[tuple[float, Symbols]]:
    total = sum(weight for weight, _ in options)
    return [(weight / total, symbols) for weight, symbols in options]
