"""Align the generated reviews' language model with every method, and set the true score beside the KL.

    python benchmarks/language.py run ppo rloo --seeds 0 1 2 3 4      # trains, and measures every checkpoint
    python benchmarks/language.py run ppo --label=-free --set reference.coef=0 algo.lr=1e-3    # strays freely
    python benchmarks/language.py best                               # the best of n samples under the reward model
    python benchmarks/language.py keep runs/ppo-reviews/<run> --as ppo  # measures a run that is there
    python benchmarks/language.py table
    python benchmarks/language.py plot

Raw results lie in benchmarks/results/language.  ``run`` makes the pretrained model and the reward model where they are
not there; all runs share them, as seeds are those of the alignment.  ``table`` and ``plot`` need only the results.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import RESULTS, ROOT, keep, source, write_table

from pgsuite import seeding
from pgsuite.rlhf import scorer
from pgsuite.rlhf.grammar import Grammar
from pgsuite.rlhf.model import WordModel
from pgsuite.rlhf.reward import RewardModel, best_of, best_of_kl
from pgsuite.training import checkpoint

RUNS = RESULTS / "language"
MODELS = Path("runs/language")
PLOT = "docs/howto/alignment.png"
PROMPTS = 1_000  # to which a policy and its reference respond
ASKED, SAMPLES = 100, 512  # prompts, and samples of each, for the best of n
METHODS = {  # what is given to scripts/train.py
    "reinforce": ["algo=reinforce"],
    "rloo": ["algo=reinforce", "algo/estimator=rloo", "env.samples=4"],
    "grpo": ["algo=ppo", "algo/estimator=grpo", "algo.value_coef=0", "env.samples=4"],
    "a2c": ["algo=a2c"],
    "ppo": ["algo=ppo"],
    "npg": ["algo=npg"],
    "trpo": ["algo=trpo"],
}
COLORS = dict(zip(METHODS, ("#7f7f7f", "#d62728", "#8c564b", "#ff7f0e", "#1f77b4", "#9467bd", "#2ca02c"), strict=True))


def aligned(path: Path, reference: WordModel) -> WordModel:
    """The language model that a checkpoint of scripts/train.py env=reviews holds."""
    state = checkpoint.load(path)["algorithm"]["policy"]
    named = {name.replace("body.transformer.", "body."): x for name, x in state.items()}
    model = copy.deepcopy(reference)
    model.load_state_dict({name: named[name] for name in model.state_dict()})
    return model


def compare(model: WordModel, reference: WordModel, reward: RewardModel, seed: int = 0) -> dict[str, float]:
    """One response of each to the same prompts: their true scores and those of the reward model, how often the
    model's has the higher true score (a tie counts half), and its KL from the reference, in nats per response."""
    prompts = [review.prompt for review in Grammar().sample(PROMPTS, seeding.number(seed, "evaluation"))]
    generator = seeding.generator(seed, "evaluation")
    ours, theirs = model.generate(prompts, generator), reference.generate(prompts, generator)
    true, other = scorer.score(prompts, ours), scorer.score(prompts, theirs)
    tokens, real = model.vocabulary.encode(prompts, ours)
    given = model.vocabulary.encode(prompts)[1].sum(0) - 1  # of whose tokens nobody chose any
    chosen = torch.arange(len(tokens) - 1).unsqueeze(-1) >= given
    strayed = model.log_probability(tokens, real) - reference.log_probability(tokens, real)
    strayed = strayed.where(chosen, 0.0).sum(0)
    return {
        "kl": float(strayed.mean()),
        "kl_error": float(strayed.std()) / PROMPTS**0.5,
        "true": float(true.mean()),
        "reference_true": float(other.mean()),
        "reward": float(reward(prompts, ours).mean()),
        "wins": float(((true - other).sign() + 1).mean() / 2),
        "length": statistics.fmean(len(text.split()) for text in ours),
        "distinct": len(set(ours)) / PROMPTS,
    }


def examine(folder: Path, name: str, models: Path) -> dict[str, Any]:
    """Every checkpoint of a run, beginning with the reference itself."""
    reference, reward = WordModel.load(models / "model"), RewardModel.load(models / "reward")
    summary = json.loads((folder / "summary.json").read_text())
    points: list[dict[str, Any]] = [{"steps": 0} | compare(reference, reference, reward)]
    paths = checkpoint.numbered(folder)
    points += [{"steps": int(x.stem)} | compare(aligned(x, reference), reference, reward) for x in paths]
    model, prompts = (
        aligned(paths[-1], reference),
        ["the soup was", "honestly the waiter was", "after a long wait the room was"],
    )
    texts = [model.generate(prompts, seeding.generator(i, "samples")) for i in range(3)]
    written = [f"{prompt} / {text}" for row in texts for prompt, text in zip(prompts, row, strict=True)]
    print(f"{name} seed {summary['seed']}: {points[-1]}", flush=True)
    return source() | {"name": name, "summary": summary, "points": points, "samples": written}


def train(name: str, seed: int, models: Path, overrides: list[str]) -> Path:
    """A run directory."""
    folder = Path("runs/language-benchmark") / f"{name}-s{seed}"
    arguments = [
        *METHODS[name],
        "env=reviews",
        f"seed={seed}",
        "checkpoint.every=10000",
        "checkpoint.keep=100",
        f"hydra.run.dir={folder}",
        *overrides,
    ]
    call("train", *arguments)
    return ROOT / folder


def call(script: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, f"scripts/{script}.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{script} {' '.join(arguments)} failed:\n{done.stdout}\n{done.stderr}")


def prepare(models: Path) -> None:
    """The pretrained model and the reward model, where they are not there."""
    for script, name in (("pretrain", "model"), ("reward_model", "reward")):
        if not (models / name / f"{name}.pt").exists():
            known = [f"model={models / 'model'}"] if script == "reward_model" else []
            call(script, *known, f"hydra.run.dir={models / name}")


def best(models: Path) -> None:
    """The best of n samples of the reference under the reward model, for powers of two."""
    reference, reward = WordModel.load(models / "model"), RewardModel.load(models / "reward")
    asked = [review.prompt for review in Grammar().sample(ASKED, seeding.number(0, "best of n"))]
    generator = seeding.generator(0, "best of n")
    prompts = [prompt for prompt in asked for _ in range(SAMPLES)]
    chunks = [prompts[i : i + 4096] for i in range(0, len(prompts), 4096)]
    written = [text for chunk in chunks for text in reference.generate(chunk, generator)]
    rewards, true = (score(prompts, written).view(ASKED, SAMPLES) for score in (reward, scorer.score))
    points = []
    for n in (2**i for i in range(SAMPLES.bit_length() - 1)):
        chosen = best_of(rewards, n)
        point = {"n": n, "kl": best_of_kl(n)}
        points.append(point | {k: float(x.gather(1, chosen).mean()) for k, x in (("reward", rewards), ("true", true))})
        print(points[-1], flush=True)
    facts = {name: json.loads((models / name / "summary.json").read_text()) for name in ("model", "reward")}
    keep(source() | facts | {"name": "best of n", "points": points}, RUNS / "best-of-n.json")


def load() -> dict[str, list[dict[str, Any]]]:
    """The kept results by name, each in order of seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(RUNS.glob("*.json")):
        result = json.loads(path.read_text())
        found.setdefault(result["name"], []).append(result)
    order = [*METHODS, *sorted(found.keys() - METHODS.keys())]
    return {name: found[name] for name in order if name in found}


def table() -> str:
    """In Markdown: the last checkpoint of each method, means over seeds with the least and the greatest."""
    results = load()
    lines = [
        "| | seeds | true score | reward | beats the reference | KL, nats per response | tokens | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        if "summary" not in runs[0]:
            continue
        ends = [run["points"][-1] for run in runs]
        cells = [
            _range([x[key] for x in ends], form)
            for key, form in (("true", ".2f"), ("reward", ".2f"), ("wins", ".1%"), ("kl", ".2f"), ("length", ".1f"))
        ]
        seconds = statistics.median(run["summary"]["seconds"] for run in runs)
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} | {seconds:,.0f} |")
    for run in results.get("best of n", []):
        shown = [x for x in run["points"] if x["n"] in (4, 16, 64, 256)]
        lines += [
            f"| best of {x['n']} | - | {x['true']:.2f} | {x['reward']:.2f} | - | {x['kl']:.2f} | - | - |" for x in shown
        ]
    return "\n".join(lines)


def _range(values: list[float], form: str) -> str:
    mean = f"{statistics.fmean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} [{min(values):{form}}, {max(values):{form}}]"


def plot(out: Path) -> None:
    """What the reward model says and what is true, against the KL: the first goes on rising where the second falls."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharex=True)
    for name, runs in load().items():
        for panel, key in zip(axes, ("reward", "true"), strict=True):
            if name == "best of n":
                (run,) = runs
                panel.plot(*([x[k] for x in run["points"]] for k in ("kl", key)), "k--", label=name)
                continue
            count = min(len(run["points"]) for run in runs)
            kl, value = (np.mean([[x[k] for x in run["points"][:count]] for run in runs], 0) for k in ("kl", key))
            look = {"color": COLORS.get(name.split("-")[0]), "linestyle": "-" if name in METHODS else ":"}
            panel.plot(kl, value, label=name if len(runs) == 1 else f"{name}, {len(runs)} seeds", **look)
    for panel, title in zip(axes, ("reward model", "true score"), strict=True):
        panel.set_title(title)
        panel.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))  # as Gao et al., 2023
        panel.set_xlim(left=0)
        panel.set_xticks([x for x in (0, 1, 5, 10, 20, 40, 70, 100, 150, 200) if x <= panel.get_xlim()[1]])
        panel.set_xlabel("KL to the reference, nats per response (square-root axis)")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("mean score of responses")
    axes[1].legend(frameon=False, fontsize="small")
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    print(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=MODELS, help="directory of the pretrained and the reward model")
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="train, measure and keep")
    runner.add_argument("names", nargs="+", choices=[*METHODS, "all"])
    runner.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    runner.add_argument("--set", nargs="*", default=[], help="further overrides")
    runner.add_argument("--label", default="", help="appended to the names under which results are kept")
    keeper = commands.add_parser("keep", help="measure runs that are there")
    keeper.add_argument("folders", nargs="+", type=Path)
    keeper.add_argument("--as", dest="name", required=True, help="name of the method")
    commands.add_parser("best", help="measure the best of n")
    teller = commands.add_parser("table", help="print what is kept")
    teller.add_argument("--docs", action="store_true", help="put it into docs/howto/alignment.md as well")
    drawer = commands.add_parser("plot", help="draw what is kept")
    drawer.add_argument("--out", type=Path, default=ROOT / PLOT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.command in ("run", "best"):
        prepare(args.models)
    if args.command == "run":
        for name in METHODS if args.names == ["all"] else args.names:
            for seed in args.seeds:
                result = examine(train(name, seed, args.models, args.set), name + args.label, args.models)
                keep(result, RUNS / f"{name}{args.label}-s{seed}.json")
    elif args.command == "keep":
        for folder in args.folders:
            result = examine(folder, args.name, args.models)
            keep(result, RUNS / f"{args.name}-s{result['summary']['seed']}.json")
    elif args.command == "best":
        best(args.models)
    elif args.command == "table":
        print(table())
        if args.docs:
            write_table("docs/howto/alignment.md", "language.py table --docs", table())
    else:
        plot(args.out)


if __name__ == "__main__":
    main()
