"""The result of benchmarks/gpu.py as the tables of docs/reference/gpu.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from gpu_job import Line
from record import write_table

UNMEASURED = "**Nothing has been measured yet.** The first machine with a GPU that runs the command fills this section."


def write(path: Path) -> None:
    lines: list[Line] = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
    measured = any("check" in x or "steps/s" in x for x in lines)  # on a machine without a GPU every job is skipped
    write_table("docs/reference/gpu.md", "gpu.py --docs", tables(lines) if measured else UNMEASURED)


def tables(lines: list[Line]) -> str:
    """Whatever a result holds; a part that did not run leaves its table out."""
    made = [checks(lines), parity(lines), speeds(lines), widths(lines), peer(lines), target(lines), unfinished(lines)]
    return "\n\n".join([*filter(None, made), caption(lines)])


def of(lines: list[Line], part: str, key: str) -> list[Line]:
    """The lines of a part that have a key."""
    return [x for x in lines if x.get("part") == part and key in x]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    made = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *made]) if made else ""


def checks(lines: list[Line]) -> str:
    """How many of the checks of a method hold in an environment, and the names of those that do not."""
    found: dict[str, dict[str, list[Line]]] = {}
    for x in of(lines, "methods", "check"):
        if x["holds"] is not None:
            found.setdefault(x["job"], {}).setdefault(x["env"], []).append(x)

    def cell(each: list[Line]) -> str:
        wrong = [x["check"] for x in each if x["holds"] is False]
        count = sum(bool(x["holds"]) for x in each)
        return f"{count} of {len(each)}" + (f"; not: {', '.join(wrong)}" if wrong else "")

    envs = list(dict.fromkeys(env for row in found.values() for env in row))
    rows = ([method, *(cell(row.get(env, [])) for env in envs)] for method, row in found.items())
    return table(["checks that hold", *envs], rows)


def parity(lines: list[Line]) -> str:
    seconds = {x["job"]: x["compile seconds"] for x in of(lines, "warp", "compile seconds")}
    rows = []
    for x in of(lines, "warp", "observation"):
        errors = (f"{x[key][which]:.0e}" for key in ("observation", "reward") for which in ("99%", "worst"))
        off = f"{x['terminations that differ']} of {x['steps']:,}"
        rows.append([x["job"], f"{seconds.get(x['job'], float('nan')):.1f}", x["claim"], *errors, off])
    head = ["one step on Warp", "seconds to compile", "claim", "observation 99%", "worst", "reward 99%", "worst"]
    return table([*head, "terminations off"], rows)


def rates(lines: list[Line], part: str, *keys: str) -> dict[tuple[str, ...], dict[str, Line]]:
    """Rates by what was measured, in rows of equal keys."""
    rows: dict[tuple[str, ...], dict[str, Line]] = {}
    for x in of(lines, part, "steps/s"):
        if all(key in x for key in keys):
            rows.setdefault(tuple(str(x[key]) for key in keys), {})[x["what"]] = x
    return rows


def numbers(row: dict[str, Line], *whats: str, over: tuple[str, str]) -> list[str]:
    """Rates in words, and the ratio of two of them."""
    one, other = (row.get(what, {}).get("steps/s") for what in over)
    shown = [f"{row[what]['steps/s']:,.0f}" if what in row else "" for what in whats]
    return [*shown, f"{one / other:.2f}" if one and other else ""]


def speeds(lines: list[Line]) -> str:
    rows = rates(lines, "speeds", "job", "worlds").items()
    head = ["environment steps/s", "worlds", "captured", "eager", "physics alone", "captured / physics"]
    whats = ("captured", "eager", "physics")
    return table(head, ([*key, *numbers(row, *whats, over=("captured", "physics"))] for key, row in rows))


def widths(lines: list[Line]) -> str:
    rows = rates(lines, "speeds", "precision").items()
    head = ["HalfCheetah, width 512", "captured", "eager", "captured / eager"]
    return table(head, ([*key, *numbers(row, "captured", "eager", over=("captured", "eager"))] for key, row in rows))


def peer(lines: list[Line]) -> str:
    rows = rates(lines, "peer", "worlds").items()
    head = ["CartPole in the peer's shape, worlds", "captured", "eager", "JAX", "captured / JAX"]
    return table(
        head, ([*key, *numbers(row, "captured", "eager", "jax", over=("captured", "jax"))] for key, row in rows)
    )


def target(lines: list[Line]) -> str:
    return " ".join(
        f"{x['job']} {'reached' if x['reached'] else 'did not reach'} {x['target']:,} in {x['seconds']:.1f} s and "
        f"{x['steps']:,} steps, from the start of the process."
        for x in of(lines, "target", "reached")
    )


def unfinished(lines: list[Line]) -> str:
    found = [f"{x['part']} {x['job']}".strip() + f" ({x['ended']})" for x in lines if x.get("ended", "ran") != "ran"]
    return f"Not measured: {', '.join(found)}." if found else ""


def caption(lines: list[Line]) -> str:
    facts: Line = {}
    for x in lines:
        facts |= x if x.get("part") == "versions" else {}
    versions = ", ".join(f"{name} {x}" for name, x in facts.get("versions", {}).items() if name != "pgsuite")
    card = f"{facts.get('card', 'no card')}; {facts.get('nvidia-smi', 'no nvidia-smi')}"
    return f"{card}; {versions}; commit {facts.get('commit')}."
