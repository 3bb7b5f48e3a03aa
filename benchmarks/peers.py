"""Training throughput beside other libraries', whole iterations of the same work.

    pip install -c constraints.txt -e ".[peers]"
    python benchmarks/peers.py [--only ppo trpo ...] [--rounds 7] [--seconds 5]
    python benchmarks/peers.py --docs

Each contender (benchmarks/contenders.py, which says what differs between them) is a process of its own, warmed up
before the first round.  In every round each has its turn, in one order and then in the other, while all others wait for
theirs; in its turn it finishes iterations until the seconds are over.  Prints steps/s round by round, of games steps
per CPU second; writes all rounds to benchmarks/results/peers/<table>.json.  ``--docs`` measures nothing, puts the kept
results into docs/reference/speed.md, and draws docs/reference/speed.png.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import textwrap
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from contenders import DEFAULTS, WORKLOADS, Workload, work_of
from record import RESULTS, ROOT, keep, source, write_table

KEPT = RESULTS / "peers"
PLOT = "docs/reference/speed.png"
PEERS = ("stable-baselines3", "sb3-contrib", "rsl-rl-lib", "tianshou", "envpool", "ale-py")
OURS = ["pgsuite", "pgsuite, compile"]
ROUNDED = "pgsuite, compile, bfloat16"  # which computes less than the others
SB3 = ["SB3 on DummyVecEnv", "SB3 on envpool"]
TIANSHOU = ["Tianshou on DummyVectorEnv", "Tianshou on envpool"]
RSL_RL = ["rsl_rl on envpool", "rsl_rl on envpool, compile"]

# Who takes part.  rsl_rl has PPO alone, and no discrete actions; SB3 neither NPG nor REINFORCE.
RACERS = {
    "ppo": ["physics alone", *OURS, *RSL_RL, *SB3, *DEFAULTS, *TIANSHOU],
    "ant": ["physics alone", *OURS, *RSL_RL, *SB3, *TIANSHOU],
    "trpo": ["physics alone", *OURS, *SB3, *TIANSHOU],
    "npg": ["physics alone", *OURS, *TIANSHOU],
    "a2c": ["physics alone", *OURS, *SB3, *TIANSHOU],
    "reinforce": ["physics alone", *OURS, *TIANSHOU],
    "breakout": [*OURS, ROUNDED, "SB3 on ale-py", "CleanRL's shape on ale-py"],
    "pong": [*OURS, ROUNDED, "SB3 on ale-py", "CleanRL's shape on ale-py"],
}
# With how many torch threads.  CartPole's minibatches are large enough for a second one to pay.  Tianshou takes minutes
# for an iteration of it.
TABLES: dict[str, list[tuple[str, int]]] = {table: [(name, 1) for name in names] for table, names in RACERS.items()}
CARTPOLE = ("environment alone", *OURS, "pgsuite, compile, one body", "SB3 on envpool")
TABLES["cartpole"] = [(name, n) for name in CARTPOLE for n in (1, 2)]


class Contender:
    """A process that works when it is asked to, and waits otherwise."""

    def __init__(self, workload: str, name: str, threads: int) -> None:
        self.work, self.name, self.threads = work_of(name, workload), name, threads
        self.label = f"{name}, {threads} thread{'s' * (threads > 1)}"
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # as long as the process
        script = str(Path(__file__).with_name("contenders.py"))
        self.process = subprocess.Popen(
            [sys.executable, script, workload, name, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )

    def __enter__(self) -> Contender:
        self.hear()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def hear(self) -> str:
        assert self.process.stdout
        if not (line := self.process.stdout.readline()):
            self.errors.seek(0)
            raise SystemExit(f"{self.label} has died:\n{self.errors.read()[-2000:]}")
        return line

    def run(self, seconds: float) -> dict[str, float]:
        """What it does in the time.  Raises SystemExit unless its gradient steps are as many as were agreed."""
        assert self.process.stdin
        print(seconds, file=self.process.stdin, flush=True)
        done = json.loads(self.hear())
        agreed = 0 if self.name.endswith(" alone") else self.work.gradient_steps * done["iterations"]
        if (done["gradient_steps"], done["steps"]) != (agreed, self.work.batch * done["iterations"]):
            raise SystemExit(f"{self.label} did other work than {self.work}: {done}")
        return done


def measure(table: str, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Steps/s of every contender, round by round, and its peak memory in GB; of games, steps per CPU second."""
    clock = "cpu" if WORKLOADS[table].game else "seconds"
    with ExitStack() as stack:
        started = [Contender(table, name, threads) for name, threads in TABLES[table]]
        racers = [stack.enter_context(racer) for racer in started]
        rates: dict[str, list[float]] = {racer.label: [] for racer in racers}
        memory: dict[str, float] = {}
        for i in range(rounds):
            for racer in racers if i % 2 == 0 else reversed(racers):
                done = racer.run(seconds)
                rates[racer.label].append(done["steps"] / done[clock])
                memory[racer.label] = done["memory"]
                print(f"{table}: round {i + 1}: {racer.label}: {rates[racer.label][-1]:,.0f} steps/s", flush=True)
    return [
        {"name": racer.name, "threads": racer.threads, "rates": rates[racer.label], "memory": memory[racer.label]}
        for racer in racers
    ]


def installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def describe(work: Workload) -> str:
    shape = "-".join(map(str, work.hidden))
    steps = f"{work.epochs} epoch{'s' * (work.epochs > 1)} x {work.minibatches} minibatches of {work.minibatch:,}"
    natural = work.method in ("TRPO", "NPG")
    whose = "10 iterations of conjugate gradient, critic " if natural else ""
    steps = f"{whose}{work.gradient_steps} steps on the whole batch" if work.minibatches == 1 else steps
    steps = "one gradient step" if work.gradient_steps == 1 else steps
    method = work.method.upper()
    network = "convolutions of Mnih et al. (2015)" if work.game else f"{shape} tanh"
    return f"{work.env}, {method}: {work.envs:,} environments x {work.horizon:,} steps, {steps}, {network}"


def text(table: str, result: dict[str, Any]) -> str:
    """Medians and spreads; the last column compares round by round."""
    rows = sorted(result["rows"], key=lambda row: -statistics.median(row["rates"]))
    best = next(row for row in rows if row["name"].startswith("pgsuite") and row["name"] != ROUNDED)
    game = WORKLOADS[table].game
    unit, more = ("steps per CPU second", " peak memory, GB |") if game else ("steps/s", "")
    heading = f"| | torch threads | {unit} | | {best['name']} is faster by |{more}"
    lines = [f"### {describe(WORKLOADS[table])}", "", heading, "|---|---|---|---|---|" + "---|" * game]
    for row in rows:
        each = row["rates"]
        ratio = statistics.median(ours / theirs for ours, theirs in zip(best["rates"], each, strict=True))
        numbers = f"{statistics.median(each):,.0f} | from {min(each):,.0f} to {max(each):,.0f}"
        faster, last = "" if row is best else f"{ratio:.2f}", f" {row['memory']:.2f} |" if game else ""
        lines.append(f"| {row['name']} | {row['threads']} | {numbers} | {faster} |{last}")
    versions = ", ".join(
        f"{name} {result['versions'][name]}" for name in ("torch", *PEERS) if name in result["versions"]
    )
    caption = f"Medians of {len(best['rates'])} interleaved rounds of {result['seconds']:g} s; {result['machine']}; "
    return "\n".join([*lines, "", f"{caption}commit {result['commit']}; {versions}.", ""])


def draw(results: dict[str, dict[str, Any]], out: Path) -> None:
    """A panel a table: medians, with the slowest and the fastest round.  What is alone is drawn where it has a scale
    in common with those who learn."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(math.ceil(len(results) / 2), 2, figsize=(14, 1.5 * len(results)), squeeze=False)
    for panel in axes.flat[len(results) :]:
        panel.axis("off")
    for panel, (table, result) in zip(axes.flat, results.items(), strict=False):
        rows = [row for row in result["rows"] if row["name"] != "environment alone"]
        rows.sort(key=lambda row: statistics.median(row["rates"]))
        medians = [statistics.median(row["rates"]) for row in rows]
        spread = [[m - min(r["rates"]) for m, r in zip(medians, rows, strict=True)]]
        spread += [[max(r["rates"]) - m for m, r in zip(medians, rows, strict=True)]]
        tones = {"pgsuite": "#1f77b4", " alone": "#e3e3e3", "": "#b0b0b0"}
        colors = [next(tone for part, tone in tones.items() if part in row["name"]) for row in rows]
        several = len({row["threads"] for row in rows}) > 1
        labels = [
            f"{row['name']}, {row['threads']} thread{'s' * (row['threads'] > 1)}" if several else row["name"]
            for row in rows
        ]
        panel.barh(range(len(rows)), medians, xerr=spread, color=colors, error_kw={"elinewidth": 0.8})
        panel.set_yticks(range(len(rows)), labels, fontsize="small")
        panel.set_title(textwrap.fill(describe(WORKLOADS[table]), 70), fontsize="small", loc="left")
        panel.xaxis.set_major_formatter(lambda x, _: f"{x / 1e3:g}k")
        panel.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("steps/s, whole iterations")
    figure.tight_layout()
    figure.savefig(out, dpi=90)
    print(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(TABLES), choices=TABLES, metavar="TABLE")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each turn")
    parser.add_argument("--out", type=Path, default=KEPT)
    parser.add_argument("--docs", action="store_true", help="put the kept results into docs/reference/speed.md")
    args = parser.parse_args()
    if args.docs:
        paths = {name: KEPT / f"{name}.json" for name in TABLES}
        kept = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
        write_table("docs/reference/speed.md", "peers.py --docs", "\n".join(text(*item) for item in kept.items()))
        draw(kept, ROOT / PLOT)
        return
    for name in args.only:
        result = source() | {"seconds": args.seconds}
        result["versions"] |= {peer: version(peer) for peer in PEERS if installed(peer)}
        result["rows"] = measure(name, args.rounds, args.seconds)
        print(text(name, result))
        keep(result, args.out / f"{name}.json")


if __name__ == "__main__":
    main()
