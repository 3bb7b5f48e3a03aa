"""What the two forms of the Fisher product and the two line searches cost.

    python benchmarks/trust_region.py

Of TRPO on a batch of random cells and advantages, for several policies: one Fisher product in each form, and one search
of ten tries in each way, where the first try is accepted and where none is.  All ways take turns in every round; prints
medians in milliseconds and the ratios round by round; writes all rounds to benchmarks/results/trust-region.json.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from record import RESULTS, keep, source
from torch import Tensor

from pgsuite import seeding
from pgsuite.algorithms import TRPO
from pgsuite.functional import trust_region as tr
from pgsuite.nn.normalize import Standardize
from pgsuite.nn.policy import Critic, Policy
from pgsuite.nn.stateless import functional_in_parameters
from pgsuite.types import Batch, masked_mean

RESULT = RESULTS / "trust-region.json"
HORIZON, ENVS = 32, 64
POLICIES: dict[str, dict[str, Any]] = {
    "17 numbers, 64-64": {"size": 17, "actions": 6, "hidden": (64, 64)},
    "348 numbers, 256-256": {"size": 348, "actions": 17, "hidden": (256, 256)},
    "17 numbers, GRU of 64": {"size": 17, "actions": 6, "hidden": (64,), "recurrent": "gru"},
}


def learner(size: int, actions: int, **look: Any) -> tuple[TRPO, Batch]:
    """An algorithm, and something to learn from."""
    generator = seeding.generator(0, "networks")
    seen = spaces.Box(-np.inf, np.inf, (size,))
    norm = Standardize(seen)
    policy = Policy(norm, spaces.Box(-1.0, 1.0, (actions,)), generator=generator, **look)
    critic = Critic(norm, num_envs=ENVS, generator=generator)
    obs, start = torch.randn(HORIZON, ENVS, size), torch.rand(HORIZON, ENVS) < 0.02
    memory = {name: x.expand(HORIZON, *x.shape) for name, x in policy.initial_state(ENVS).items()}
    cells = torch.zeros(HORIZON, ENVS)
    blank = Batch(obs, memory, start, cells, cells, cells, cells, cells, torch.ones(HORIZON, ENVS, dtype=torch.bool))
    with torch.no_grad():
        dist = policy.dist(blank)
        action = dist.sample(generator)
        logp = dist.log_prob(action)
    advantage = torch.randn(HORIZON, ENVS)
    batch = Batch(obs, memory, start, action, logp, cells, advantage, cells, blank.mask)
    return TRPO(policy=policy, critic=critic, generator=generator), batch


def products(algorithm: TRPO, batch: Batch) -> dict[str, Callable[[], object]]:
    policy = algorithm.policy
    start = tr.flatten(list(policy.parameters())).detach()
    dist_at = functional_in_parameters(policy, lambda: policy.dist(batch))
    theta, v = start.clone().requires_grad_(), torch.randn_like(start)
    kl = masked_mean(dist_at(start).detach().kl(dist_at(theta)), batch.mask)
    twice = tr.fisher_product(kl, [theta], 0.1)
    once = tr.gauss_newton_product(dist_at, lambda p, q: masked_mean(p.kl(q), batch.mask), start, 0.1)
    return {"double-backward": lambda: twice(v), "gauss-newton": lambda: once(v)}


def searches(algorithm: TRPO, batch: Batch, accepts: bool) -> dict[str, Callable[[], object]]:
    """The search alone, as improve would call it with a step that the first try takes, or that no try does."""
    caught: list[tuple[Any, Tensor]] = []

    class Catch(TRPO):
        def line_search(self, evaluate_fraction: Any, full_step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            caught.append((evaluate_fraction, full_step))
            return 0 * full_step, {}

    def search(way: Any) -> Callable[[], object]:
        parts = {"policy": algorithm.policy, "critic": algorithm.critic}
        Catch(**parts).update_policy(batch)
        attempt, whole = caught[-1]
        # A larger budget than the step's own takes the first try, and one that nothing meets takes none.
        searcher = TRPO(**parts, backtracking=way, max_kl=1.0 if accepts else 1e-30)
        return lambda: searcher.line_search(attempt, whole)

    return {way: search(way) for way in ("sequential", "batched")}


def clock(fn: Callable[[], object], repeats: int) -> float:
    """Milliseconds of one call."""
    began = perf_counter()
    for _ in range(repeats):
        fn()
    return 1e3 * (perf_counter() - began) / repeats


def race(ways: dict[str, Callable[[], object]], rounds: int, repeats: int) -> dict[str, Any]:
    for fn in ways.values():
        clock(fn, 2)
    runs: list[dict[str, float]] = []
    for turn in range(rounds):
        order = list(ways) if turn % 2 == 0 else list(ways)[::-1]
        taken = {way: clock(ways[way], repeats) for way in order}
        runs.append({way: taken[way] for way in ways})
    first, second = ways
    medians = {way: statistics.median(run[way] for run in runs) for way in ways}
    ratios = sorted(run[second] / run[first] for run in runs)
    return {"ms": medians, "ratio": statistics.median(ratios), "range": [ratios[0], ratios[-1]], "rounds": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: dict[str, Any] = {"source": source(), "cells": [HORIZON, ENVS], "repeats": args.repeats, "policies": {}}
    for name, options in POLICIES.items():
        algorithm, batch = learner(**options)
        races = {
            "product": products(algorithm, batch),
            "search, first try taken": searches(algorithm, batch, accepts=True),
            "search, none taken": searches(algorithm, batch, accepts=False),
        }
        found["policies"][name] = {what: race(ways, args.rounds, args.repeats) for what, ways in races.items()}
        for what, result in found["policies"][name].items():
            each = ", ".join(f"{way} {ms:.2f} ms" for way, ms in result["ms"].items())
            low, high = result["range"]
            print(f"{name}: {what}: {each}; ratio {result['ratio']:.2f} ({low:.2f} to {high:.2f})", flush=True)
    keep(found, RESULT)


if __name__ == "__main__":
    main()
