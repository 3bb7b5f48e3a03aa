"""What methods and settings learn beside PPO, at the same steps and with its recipes.

    python benchmarks/beside_ppo.py [reppo symmetry ...]
    python benchmarks/beside_ppo.py --docs

Each comparison trains every contender in every environment with the seeds of ``SEEDS``, which are trained at once.
Kept are the mean return over the last tenth of the steps and the seconds of each run, in
benchmarks/results/beside_ppo/<comparison>.json after every environment; what is there is not run again.  ``--docs``
trains nothing and puts the kept results into docs/explanation/algorithms.md.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from statistics import mean
from typing import Any

import returns
from record import RESULTS, keep, source, write_table

KEPT = RESULTS / "beside_ppo"
SEEDS = [0, 1]


@dataclass(frozen=True)
class Comparison:
    steps: dict[str, int]  # by environment
    contenders: dict[str, tuple[str, ...]]  # arguments of each, the method first; {env} is the environment


PPO = ("ppo",)
EAGER = (*PPO, "execution=eager")  # in short runs compilation takes longer than what it saves
COMPARISONS = {
    "reppo": Comparison(
        {"Pendulum": 40_000, "HalfCheetah": 65_536},
        {"PPO": EAGER, "REPPO": ("reppo", "execution=eager")},
    ),
    "locomotion": Comparison(
        {"HalfCheetah": 300_000},
        {"PPO": PPO, "SPO": ("spo", "tuned=ppo-{env}"), "REPPO": ("reppo", "execution=eager")},
    ),
    "symmetry": Comparison(
        {"Pendulum": 40_000},
        {
            "PPO": EAGER,
            "PPO, symmetry.augment=true": (*EAGER, "symmetry.augment=true"),
        },
    ),
}


def run(name: str) -> None:
    """Train what is missing of a comparison."""
    comparison, path = COMPARISONS[name], KEPT / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text())["runs"] if path.is_file() else {}
    for env, steps in comparison.steps.items():
        for contender, (algo, *given) in comparison.contenders.items():
            if f"{env}, {contender}" in found:
                continue
            arguments = [f"total_steps={steps}", *(x.format(env=env) for x in given)]
            runs = returns.train(f"{algo}-{env}", SEEDS, arguments, evaluations_too=False)
            found[f"{env}, {contender}"] = {
                "command": runs[0]["command"],
                "commit": runs[0]["commit"],
                "returns": [x["summary"]["return_mean"] for x in runs],
                "seconds": runs[0]["summary"]["seconds"],  # of all seeds at once
                "curves": [x["curve"] for x in runs],
            }
            keep(source() | {"seeds": SEEDS, "runs": found}, path)
            print(f"{env}, {contender}: {found[f'{env}, {contender}']['returns']}", flush=True)


def table() -> str:
    rows = []
    for name, comparison in COMPARISONS.items():
        path = KEPT / f"{name}.json"
        if not path.is_file():
            continue
        kept = json.loads(path.read_text())
        for env, steps in comparison.steps.items():
            for contender in comparison.contenders:
                if (x := kept["runs"].get(f"{env}, {contender}")) is None:
                    continue
                each = ", ".join(f"{r:,.0f}" for r in x["returns"])
                rows.append(f"| {env} | {steps:,} | {contender} | {mean(x['returns']):,.0f} | {each} |")
    head = ["| environment | steps | | mean return | by seed |", "|---" * 5 + "|"]
    return "\n".join(dict.fromkeys([*head, *rows]))  # comparisons may have runs in common


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparisons", nargs="*", choices=[*COMPARISONS, []], help="all, if none is named")
    parser.add_argument("--docs", action="store_true", help="train nothing, and write what is kept into the page")
    args = parser.parse_args()
    if args.docs:
        write_table("docs/explanation/algorithms.md", "beside_ppo.py", f"{table()}\n")
        return
    for name in args.comparisons or COMPARISONS:
        run(name)
    print(table())


if __name__ == "__main__":
    main()
