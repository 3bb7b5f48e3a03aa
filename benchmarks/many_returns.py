"""Returns of many runs at once beside the same seeds alone.

    python benchmarks/many_returns.py CartPole HalfCheetah [--seeds 20]
    python benchmarks/many_returns.py --table

Runs at once equal single runs up to rounding, which training amplifies: after some iterations they are other samples of
the same distribution.  Each environment is trained with PPO's recipe and ``STEPS`` steps, with all seeds in one process
and with each seed in a process of its own.  Written down is the return over the last tenth of each run, in
benchmarks/results/many/returns-<environment>.json; the table has interquartile means with 95% bootstrap intervals, and
the probability that a run at once is better than a single one, which is one half if they do not differ.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import returns
from record import RESULTS, keep, source

from pgsuite.reports.statistics import interquartile_mean, interval, probability_of_improvement

STEPS = {"CartPole": 50_000, "HalfCheetah": 200_000}


def train(env: str, seeds: list[int]) -> list[float]:
    """The returns of the runs of one process, in order of seed."""
    found = returns.train(f"ppo-{env}", seeds, [f"total_steps={STEPS[env]}"], evaluations_too=False)
    return [x["summary"]["return_mean"] for x in found]


def table() -> str:
    rows = ["| environment | steps | seeds | at once | alone | probability |", "|---|---|---|---|---|---|"]
    for path in sorted((RESULTS / "many").glob("returns-*.json")):
        found = json.loads(path.read_text())
        ways = [np.array(found[way]) for way in ("at once", "alone")]
        cells = []
        for scores in ways:
            low, high = interval(interquartile_mean, scores) or (np.nan, np.nan)
            cells.append(f"{interquartile_mean(scores):,.0f} [{low:,.0f}, {high:,.0f}]")
        low, high = interval(probability_of_improvement, *ways) or (np.nan, np.nan)
        better = f"{probability_of_improvement(*ways):.2f} [{low:.2f}, {high:.2f}]"
        env, steps = found["env"], found["steps"]
        rows.append(f"| {env} | {steps:,} | {len(ways[0])} | {cells[0]} | {cells[1]} | {better} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("envs", nargs="*", choices=[*STEPS, []])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    for env in args.envs:
        at_once = train(env, list(range(args.seeds)))
        alone = [x for seed in range(args.seeds) for x in train(env, [seed])]
        found = {"env": env, "steps": STEPS[env], "at once": at_once, "alone": alone}
        keep(source() | found, RESULTS / "many" / f"returns-{env}.json")
    print(table())


if __name__ == "__main__":
    main()
