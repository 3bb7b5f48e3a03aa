"""Games: scores at equal steps, beside the runs that RL Baselines3 Zoo publishes.

    python benchmarks/games.py [--games Breakout] [--methods ppo a2c] [--seeds 0 1 2] [--steps 500000] [--jobs 2]
                               [--sticky]
    python benchmarks/games.py --docs

The protocol is RL Zoo's: no sticky actions, clipped rewards, and in training a lost life ends an episode; scores are of
whole games.  With ``--sticky`` actions are sticky (Machado et al., 2018); the rest of the protocol is the same.
Learning rates are those of the first ``steps`` of the recipe's ten million, and layers are computed in bfloat16.
Results are kept in benchmarks/results/returns-games and returns-games-sticky; a kept run is not repeated with the same
code.
``--docs`` measures nothing and puts the kept results into docs/reference/results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from itertools import product
from typing import Any

from record import spread, write_table
from returns import apart, run

KEPT, KEPT_STICKY = apart("games"), apart("games-sticky")
GAMES, METHODS = ("Breakout", "Pong"), ("ppo", "a2c")
LR = {"ppo": 2.5e-4, "a2c": 7e-4}
WHOLE = 10_000_000  # steps of the recipe
STICKY = 0.25  # probability that a frame repeats the action of the frame before
AT = (100_000, 250_000, 500_000, 1_000_000, 3_000_000)
# Mean scores of the games that ended in the last tenth of so many steps, in the monitor files of one run of each, of
# eight environments (PPO) and sixteen (A2C): github.com/DLR-RM/rl-trained-agents, commit cd35bde.
PUBLISHED = {
    ("ppo", "Breakout"): (3.9, 9.7, 14.6, 25.6, 110.6),
    ("ppo", "Pong"): (-20.0, -20.4, -18.3, -9.7, 20.3),
    ("a2c", "Breakout"): (1.2, 1.0, 1.7, 2.1, 5.5),
    ("a2c", "Pong"): (-20.8, -20.5, -20.3, -20.3, -19.4),
}


def settings(method: str, steps: int, sticky: bool) -> list[str]:
    """Those beside method, game and seed."""
    lr = LR[method]
    protocol = [f"env.sticky={STICKY if sticky else 0}", "env.terminal_on_life_loss=true"]
    how = ["execution=compile", "precision=bf16", "torch_threads=1"]
    return [*how, *protocol, f"total_steps={steps}", f"algo.lr={{linear:[{lr:g},{lr * (1 - steps / WHOLE):g}]}}"]


def score(curve: dict[str, list[float]], steps: int) -> float | None:
    """The mean score in the last tenth of the first ``steps``; None if there were fewer, a last rollout apart."""
    if curve["steps"][-1] < 0.99 * steps:
        return None
    found = [x for at, x in zip(curve["steps"], curve["return"], strict=True) if 0.9 * steps < at <= steps]
    return statistics.fmean(found)


def table() -> str:
    """Every kept result, by method and game: without sticky actions, RL Zoo's run, which has none, and with them."""
    short = [f"{steps // 1_000_000}M" if steps >= 1_000_000 else f"{steps // 1000}k" for steps in AT]
    heads = [*short, "last policy, sampled", "last policy, deterministic"]
    lines = [f"| | seeds | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    commits, machines = set[str](), set[str]()
    for (method, game), folder in product(PUBLISHED, (KEPT, KEPT_STICKY)):
        paths = sorted(folder.glob(f"{method}-{game}-s*.json"))
        runs: list[dict[str, Any]] = [json.loads(path.read_text()) for path in paths]
        if not runs:
            continue
        which = ", sticky actions" if folder == KEPT_STICKY else ""
        reached = [[x for each in runs if (x := score(each["curve"], steps)) is not None] for steps in AT]
        cells = [spread(found, 1) if found else "" for found in reached]
        cells += [spread([each["evaluation"][how]["mean"] for each in runs], 1) for how in ("sampled", "deterministic")]
        lines.append(f"| {method.upper()}, {game}{which} | {len(runs)} | {' | '.join(cells)} |")
        if folder == KEPT:
            theirs = " | ".join(f"{x:.1f}" for x in PUBLISHED[method, game])
            lines.append(f"| RL Zoo | 1 | {theirs} | | |")
        commits |= {each["commit"] for each in runs}
        machines |= {each["machine"] for each in runs}
    about = f"{', '.join(sorted(machines))}; commits {', '.join(sorted(commits))}"
    return f"Means and standard deviations over seeds; {about}.\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", nargs="+", choices=GAMES, default=["Breakout"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500_000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--sticky", action="store_true", help="with sticky actions, which RL Zoo's runs do not have")
    parser.add_argument("--docs", action="store_true")
    options = parser.parse_args()
    if not options.docs:
        os.environ["OMP_NUM_THREADS"] = "1"
        for method in options.methods:
            names = [f"{method}-{game}" for game in options.games]
            overrides = settings(method, options.steps, options.sticky)
            folder = KEPT_STICKY if options.sticky else KEPT
            run(names, options.seeds, options.jobs, overrides, folder, one_by_one=True)
    write_table("docs/reference/results.md", "games.py", table())


if __name__ == "__main__":
    main()
