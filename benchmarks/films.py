"""Train a policy on four environments, and film each.

    python benchmarks/films.py                          # all of them, one after the other
    python benchmarks/films.py HalfCheetah Breakout
    python benchmarks/films.py table --docs             # writes the table of docs/reference/policies.md

Seed 0 of a shipped recipe is trained for the steps of FILMS and evaluated ten times on the way.  The policy of the best
of these evaluations plays 20 episodes from other initial states, with the mode of its distribution: their returns are
what is kept, in benchmarks/results/films/.  The film is the beginning of the first of them, or all of it if it is
shorter, in docs/reference/films/.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import RESULTS, ROOT, keep, source, write_table

import pgsuite

KEPT = RESULTS / "films"
FILMED = ROOT / "docs" / "reference" / "films"
SEED, EPISODES = 1, 20  # of the evaluation whose returns are kept; the evaluations in training have another seed
SIDE, COLOURS = 240, 48  # of the films: a page loads all of them


@dataclass(frozen=True)
class Film:
    steps: int  # of training
    frames: int  # of the environment's steps that are filmed at most
    what: str  # is seen, in words


FILMS = {
    "HalfCheetah": Film(1_000_000, 120, "the first 6 s of an episode"),
    "Ant": Film(1_000_000, 120, "the first 6 s of an episode"),
    "Humanoid": Film(250_000, 400, "the first 6 s of an episode, or until it falls"),
    "Breakout": Film(300_000, 240, "the first 16 s of a game"),
}
CUT = 3_000  # steps of an episode of a game at most, which a policy may otherwise not end


def shrink(path: Path) -> None:
    """Rewrite a GIF with frames of at most SIDE pixels and one palette for all of them."""
    from PIL import Image, ImageSequence

    with Image.open(path) as film:
        frames, durations = [], []
        for frame in ImageSequence.Iterator(film):
            durations.append(frame.info["duration"])
            frames.append(frame.convert("RGB"))
            frames[-1].thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    few = frames[:: max(1, len(frames) // 8)]  # whose colours stand for all
    width, height = frames[0].size
    strip = Image.new("RGB", (width, height * len(few)))
    for i, frame in enumerate(few):
        strip.paste(frame, (0, height * i))
    palette = strip.quantize(COLOURS)
    first, *rest = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0, optimize=True)


def make(name: str) -> None:
    """Train, evaluate and film one policy."""
    film, about = FILMS[name], source()
    with tempfile.TemporaryDirectory() as folder:
        chosen: dict[str, Any] = {"evaluation.every": film.steps // 10, "checkpoint.every": None}
        chosen |= {"evaluation.max_steps": CUT} if name == "Breakout" else {}
        run = pgsuite.train("ppo", name, seed=0, total_steps=film.steps, folder=f"{folder}/run", **chosen)
        best = run.folder / "checkpoints" / "best.pt"
        found = pgsuite.evaluate(best, EPISODES, seed=SEED, max_steps=CUT, trust=True)
        FILMED.mkdir(exist_ok=True)
        path = FILMED / f"{name}.gif"
        pgsuite.evaluate(best, EPISODES, seed=SEED, max_steps=film.frames, video=str(path), trust=True)
        shrink(path)
        summary = json.loads((run.folder / "summary.json").read_text())
    settings = {"algo": "ppo", "env": name, "seed": 0, "total_steps": film.steps} | chosen
    keep(about | {"settings": settings, "summary": summary, "evaluation": found}, KEPT / f"{name}.json")
    print(f"{name}: {found['return_mean']:,.1f} +- {found['return_std']:,.1f}, {path.stat().st_size / 1e6:.2f} MB")


def table() -> str:
    """A row for each policy, and below them the films."""
    kept = {
        name: json.loads((KEPT / f"{name}.json").read_text()) for name in FILMS if (KEPT / f"{name}.json").is_file()
    }
    lines = [
        "| | method | steps of the policy | steps of the run | return | length | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in kept.items():
        found, summary = result["evaluation"], result["summary"]
        length = sum(found["lengths"]) / len(found["lengths"])
        lines.append(
            f"| [{name}](#{name.lower()}) | PPO | {found['steps']:,} | {summary['steps']:,} "
            f"| {found['return_mean']:,.1f} ± {found['return_std']:,.1f} | {length:,.0f} | {summary['seconds']:,.0f} |"
        )
    commits = ", ".join(sorted({result["commit"] for result in kept.values()}))
    first = next(iter(kept.values()))
    lines += ["", f"{first['machine']}; torch {first['versions']['torch']}; commit {commits}.", ""]
    for name in kept:
        lines += [f"### {name}", "", f"![{name}: {FILMS[name].what}](films/{name}.gif)", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(FILMS), help=f"table, or some of {', '.join(FILMS)}")
    parser.add_argument("--docs", action="store_true", help="put the table into docs/reference/policies.md")
    args = parser.parse_args()
    if args.names == ["table"]:
        if args.docs:
            write_table("docs/reference/policies.md", "films.py table --docs", table())
        else:
            print(table())
        return
    if unknown := set(args.names) - set(FILMS):
        parser.error(f"no film of {', '.join(unknown)}: one of {', '.join(FILMS)}")
    for name in args.names:
        make(name)


if __name__ == "__main__":
    main()
