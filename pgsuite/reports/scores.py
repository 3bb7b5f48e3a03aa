"""Summaries of final scores: per environment, over all environments, and between pairs of methods."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pgsuite.reports import statistics
from pgsuite.reports.runs import FEW, Group

ALL = "all environments"
MANY = 6  # methods; of more, only those with the best are compared

Ends = tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class Score:
    """Final returns of one method on one environment, or normalized over all environments.  NaN and None: unknown."""

    env: str
    method: str
    seeds: int
    center: float  # interquartile mean
    ends: Ends  # 95% interval
    mean: float
    deviation: float  # sample standard deviation over seeds
    evaluation: float
    evaluation_ends: Ends
    evaluated: int  # number of seeds with evaluations
    speed: float  # steps per second, median over seeds
    steps: int | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Probability that a run of one method scores higher than a run of another."""

    env: str
    x: str
    y: str
    probability: float
    ends: Ends
    seeds: int  # of the method with fewer


def scores(groups: Sequence[Group]) -> list[Score]:
    """Scores by environment, best first; unknown ones come last."""
    found = [_score(group) for group in groups]
    return sorted(found, key=lambda s: (s.env.lower(), -s.center if s.seeds else np.inf))


def _score(group: Group) -> Score:
    values, evaluated = group.scores, group.evaluations
    speeds = [run.speed for run in group.runs if run.speed is not None]
    center, ends = _summary(values)
    evaluation, evaluation_ends = _summary(evaluated)
    return Score(
        env=group.env,
        method=group.method,
        seeds=len(values),
        center=center,
        ends=ends,
        mean=float(values.mean()) if len(values) else np.nan,
        deviation=float(values.std(ddof=1)) if len(values) > 1 else np.nan,
        evaluation=evaluation,
        evaluation_ends=evaluation_ends,
        evaluated=len(evaluated),
        speed=float(np.median(speeds)) if speeds else np.nan,
        steps=group.runs[0].total_steps,
    )


def _summary(*strata: np.ndarray) -> tuple[float, Ends]:
    if not all(map(len, strata)):
        return np.nan, None
    return float(statistics.stratified_mean(*strata)), _ends(statistics.interval(statistics.stratified_mean, *strata))


def _ends(found: tuple[np.ndarray, np.ndarray] | None) -> Ends:
    return None if found is None else (float(found[0]), float(found[1]))


def shared(groups: Sequence[Group]) -> tuple[list[str], list[str]]:
    """Environments on which at least two methods have scores, and the methods with scores on all of these."""
    scored = {(g.env, g.method) for g in groups if len(g.scores)}
    envs = [e for e in dict.fromkeys(g.env for g in groups) if sum(env == e for env, _ in scored) > 1]
    return envs, [m for m in dict.fromkeys(g.method for g in groups) if all((env, m) in scored for env in envs)]


def overall(groups: Sequence[Group]) -> list[Score]:
    """Interquartile means over all environments of normalized scores, 0 for the lowest and 1 for the highest run of
    each environment, with intervals stratified by environment; best first.  Empty unless two methods share two
    environments."""
    envs, methods = shared(groups)
    if len(envs) < 2 or len(methods) < 2:
        return []
    values = {(g.env, g.method): g.scores for g in groups}
    found = []
    for method in methods:
        strata = []
        for env in envs:
            everything = np.concatenate([v for (e, _), v in values.items() if e == env])
            low, span = everything.min(), np.ptp(everything)
            strata.append((values[env, method] - low) / span if span else np.ones(len(values[env, method])))
        center, ends = _summary(*strata)
        together = np.concatenate(strata)
        found.append(
            Score(
                env=ALL,
                method=method,
                seeds=len(together),
                center=center,
                ends=ends,
                mean=float(together.mean()),
                deviation=np.nan,
                evaluation=np.nan,
                evaluation_ends=None,
                evaluated=0,
                speed=np.nan,
                steps=None,
            )
        )
    return sorted(found, key=lambda s: -s.center)


def comparisons(groups: Sequence[Group], ranking: Sequence[Score]) -> list[Comparison]:
    """Comparisons of all pairs of methods, per environment and over the shared environments; the higher in ``ranking``
    comes first.  With more than ``MANY`` methods, only pairs with the best one."""
    found = []
    for env in dict.fromkeys(s.env for s in ranking):
        envs = shared(groups)[0] if env == ALL else [env]
        values = {(g.env, g.method): g.scores for g in groups}
        order = [s.method for s in ranking if s.env == env and s.seeds]
        pairs = list(itertools.combinations(order, 2))
        for x, y in pairs if len(order) <= MANY else pairs[: len(order) - 1]:
            samples = [values[e, m] for e in envs for m in (x, y)]
            found.append(
                Comparison(
                    env=env,
                    x=x,
                    y=y,
                    probability=float(statistics.probability_of_improvement(*samples)),
                    ends=_ends(statistics.interval(statistics.probability_of_improvement, *samples)),
                    seeds=min(map(len, samples)),
                )
            )
    return found


def verdict(env: str, ranking: Sequence[Score], compared: Sequence[Comparison]) -> tuple[str, dict[str, list[str]]]:
    """The best method of an environment, and the other methods by the strength of the evidence against them."""
    best = next(s.method for s in ranking if s.env == env and s.seeds)
    others: dict[str, list[str]] = {"clear": [], "unclear": [], "few": []}
    for c in compared:
        if c.env == env and c.x == best:
            clear = c.ends is not None and c.ends[0] > 0.5
            others["few" if c.seeds < FEW else "clear" if clear else "unclear"].append(c.y)
    return best, others
