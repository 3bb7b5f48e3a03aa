"""Search for the settings of a method by successive halving over steps and seeds.

    python benchmarks/search.py benchmarks/searches/trpo-mujoco.yaml --jobs 2
    python benchmarks/search.py benchmarks/searches/trpo-mujoco.yaml --report

A search is a file of YAML:

    algo: trpo
    env: [HalfCheetah, Hopper, gym env.id=LunarLander-v3]    # each the choice of env, and overrides
    base: [policy.log_sigma=0]                   # given to every candidate
    candidates:                                  # each a name and overrides
      recipe: []
      more critic steps: [algo.critic_minibatches=8]
    rungs:                                       # steps, seeds, and how many candidates go on to the next
      - {steps: 200_000, seeds: [100], keep: 4}
      - {steps: 1_000_000, seeds: [100, 101]}

In each rung every remaining candidate is trained in every environment with every seed, consecutive seeds in one
process.  Its score is the mean over environments of its mean return over the last tenth, scaled so that among the
candidates of the rung the worst has 0 and the best has 1.  Results are kept after every run in
benchmarks/results/searches/, and what is kept is not run again, so a search that was cut off goes on where it was.
Seeds of searches begin at 100; those of reported results are below.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import returns
import yaml
from record import RESULTS, keep, source

FIRST_SEED = 100


@dataclass
class Rung:
    steps: int
    seeds: list[int]
    keep: int | None = None  # candidates that go on; null in the last


@dataclass
class Search:
    algo: str
    env: list[str]
    candidates: dict[str, list[str]]
    rungs: list[Rung]
    base: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> Search:
        found = yaml.safe_load(path.read_text())
        search = cls(**found | {"rungs": [Rung(**rung) for rung in found["rungs"]]})
        if any(seed < FIRST_SEED for rung in search.rungs for seed in rung.seeds):
            raise SystemExit(f"{path}: seeds of a search begin at {FIRST_SEED}")
        return search


class Store:
    """The results of a search, in one file that is written after every run."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, Lock()
        self.runs: dict[str, dict[str, Any]] = json.loads(path.read_text())["runs"] if path.is_file() else {}

    def add(self, key: str, result: dict[str, Any]) -> None:
        with self.lock:
            self.runs[key] = result
            keep(source() | {"runs": dict(sorted(self.runs.items()))}, self.path)


def key_of(env: str, overrides: list[str], steps: int, seed: int) -> str:
    return " ".join([env, *overrides, f"total_steps={steps}", f"seed={seed}"])


def train(algo: str, env: str, overrides: list[str], steps: int, seeds: list[int]) -> list[dict[str, Any]]:
    """The runs of consecutive seeds in one process: the mean return of the last tenth of each; null if it failed."""
    env, *more = env.split()
    try:
        settings = [f"total_steps={steps}", *more, *overrides]
        found = returns.train(f"{algo}-{env}", seeds, settings, evaluations_too=False)
    except SystemExit as error:
        return [{"return": None, "error": str(error).strip().splitlines()[-1:]} for _ in seeds]
    return [{"return": x["summary"]["return_mean"], "seconds": round(x["summary"]["seconds"])} for x in found]


def scores(search: Search, names: list[str], rung: Rung, runs: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The score of each candidate in a rung, and nan for one whose runs are not all there or failed."""
    means = {name: [mean_return(search, name, env, rung, runs) for env in search.env] for name in names}
    found = dict.fromkeys(names, 0.0)
    for i in range(len(search.env)):
        column = [means[name][i] for name in names]
        known = [x for x in column if x is not None]
        low, high = (min(known), max(known)) if known else (0.0, 0.0)
        for name, x in zip(names, column, strict=True):
            found[name] += float("nan") if x is None else (x - low) / max(high - low, 1e-9) / len(search.env)
    return found


def mean_return(search: Search, name: str, env: str, rung: Rung, runs: dict[str, dict[str, Any]]) -> float | None:
    overrides = [*search.base, *search.candidates[name]]
    found = [runs.get(key_of(env, overrides, rung.steps, seed), {}).get("return") for seed in rung.seeds]
    known = [x for x in found if x is not None]
    return statistics.mean(known) if len(known) == len(found) else None


def climb(search: Search, store: Store, jobs: int) -> None:
    """Run what is missing, rung by rung."""
    names = list(search.candidates)
    for rung in search.rungs:
        missing = []
        for env, name in itertools.product(search.env, names):
            given = [*search.base, *search.candidates[name]]
            seeds = [seed for seed in rung.seeds if key_of(env, given, rung.steps, seed) not in store.runs]
            missing += [(env, given, part) for part in returns.stretches(seeds)]

        def run(item: tuple[str, list[str], list[int]], steps: int = rung.steps) -> None:
            env, overrides, seeds = item
            for seed, result in zip(seeds, train(search.algo, env, overrides, steps, seeds), strict=True):
                key = key_of(env, overrides, steps, seed)
                store.add(key, result)
                print(f"{key}: {result['return']} {result.get('error', '')}", flush=True)

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(run, missing))
        names = best(search, names, rung, store.runs)


def best(search: Search, names: list[str], rung: Rung, runs: dict[str, dict[str, Any]]) -> list[str]:
    """The candidates that go on from a rung, best first; failed ones never do."""
    found = scores(search, names, rung, runs)
    alive = [name for name in names if found[name] == found[name]]
    return sorted(alive, key=found.__getitem__, reverse=True)[: rung.keep]


def report(search: Search, runs: dict[str, dict[str, Any]]) -> str:
    """A table for each rung."""
    lines, names = [], list(search.candidates)
    for rung in search.rungs:
        found = scores(search, names, rung, runs)
        lines += [f"\n{rung.steps:,} steps, seeds {', '.join(map(str, rung.seeds))}\n"]
        lines += [f"| candidate | score | {' | '.join(search.env)} |", "|---" * (2 + len(search.env)) + "|"]
        for name in sorted(names, key=lambda name: (found[name] == found[name], found[name]), reverse=True):
            means = [mean_return(search, name, env, rung, runs) for env in search.env]
            cells = ["-" if x is None else f"{x:,.1f}" for x in means]
            lines.append(f"| {name} | {found[name]:.2f} | {' | '.join(cells)} |")
        names = best(search, names, rung, runs)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("search", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--report", action="store_true", help="run nothing, and print tables of what is kept")
    args = parser.parse_args()
    search, store = Search.load(args.search), Store(RESULTS / "searches" / f"{args.search.stem}.json")
    if not args.report:
        climb(search, store, args.jobs)
    print(report(search, store.runs))


if __name__ == "__main__":
    main()
