"""Searches and populations in a report: the history of the trials, what mattered, and the lineage of members."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from pgsuite.errors import counted
from pgsuite.reports.pictures import COLORS, STYLE, figure_of, png
from pgsuite.reports.runs import RECORD, DamagedError, directories, printable, reason_of, show, text_of

SHOWN = 10  # best trials or members in the table


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The contents of the record of a search or a population."""

    folder: Path
    kind: str  # search or population
    algo: str
    env: str
    settings: list[str]  # that it varies
    logarithmic: set[str]  # settings whose range is
    rows: list[tuple[str, float | None, dict[str, Any]]]  # of the table, best first: what it was, return, values
    trials: list[dict[str, Any]]  # of a search
    importances: dict[str, float]  # of a search
    turns: list[list[dict[str, Any]]]  # of a population: the members of each

    @property
    def name(self) -> str:
        return f"{self.kind.capitalize()} with {self.algo} on {self.env}"


def find(paths: Sequence[str]) -> tuple[list[Sweep], list[str]]:
    """All searches and populations at or below the paths, and a line on every damaged one.  Raises UserError if a path
    does not exist."""
    found, skipped = [], []
    for folder in directories(paths, []):
        if (folder / RECORD).exists():
            try:
                found.append(read(folder))
            except Exception as error:  # whatever is wrong with one directory, the others are reported
                skipped.append(f"{printable(str(folder))}: {reason_of(error)}")
    return found, skipped


def read(folder: Path) -> Sweep:
    """Read the record of a search or a population.  Raises DamagedError."""
    try:
        found = json.loads(text_of(folder / RECORD) or "")
        kind, ranges = found["kind"], {k: v for k, v in found["settings"].items() if k.startswith("sweep.space.")}
        space = {name.removeprefix("sweep.space."): x for name, x in ranges.items()}
        trials = [_trial(x) for x in found.get("trials", [])]
        turns = [[_member(x) for x in members] for members in found.get("turns", [])]
        complete = [t for t in trials if t["state"] == "complete" and t["return"] is not None]
        last = [
            (i, m) for i, m in enumerate(next((x for x in reversed(turns) if _over(x)), [])) if m["return"] is not None
        ]
        rows = [(f"trial {t['number']}", t["return"], t["values"]) for t in complete]
        rows += [(f"member {i}", m["return"], m["values"]) for i, m in last]
        return Sweep(
            folder=folder,
            kind=printable(str(kind)),
            algo=printable(str(found["algo"])),
            env=printable(str(found["env"])),
            settings=[printable(name) for name in space],
            logarithmic={name for name, x in space.items() if "log" in x},
            rows=sorted(rows, key=lambda row: -(row[1] or 0.0))[:SHOWN],
            trials=trials,
            importances={printable(str(k)): float(v) for k, v in found.get("importances", {}).items()},
            turns=turns,
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedError(f"its {RECORD} cannot be read ({type(error).__name__}: {error})") from error


def _trial(given: Mapping[str, Any]) -> dict[str, Any]:
    """A trial with its return: the last one that was seen, of one that was pruned."""
    points = given["points"]
    value = given["value"] if given["value"] is not None else points[-1][1] if points else None
    return {
        "number": int(given["number"]),
        "state": str(given["state"]),
        "return": _finite(value),
        "values": {str(k): x for k, x in given["values"].items()},
    }


def _member(given: Mapping[str, Any]) -> dict[str, Any]:
    source = given["from"]
    return {
        "from": None if source is None else int(source),
        "return": _finite(given.get("return")),
        "over": "return" in given,
        "values": {str(k): x for k, x in given["values"].items()},
    }


def _over(members: Sequence[Mapping[str, Any]]) -> bool:
    return all(m["over"] for m in members)


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def table(sweep: Sweep) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Columns and rows of the best trials, or of the members of the last turn that is over."""
    rows = [
        (what, ["-" if value is None else f"{value:,.1f}", *(_short(values.get(name)) for name in sweep.settings)])
        for what, value, values in sweep.rows
    ]
    return ["return", *sweep.settings], rows


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else show(value)


def summary(sweep: Sweep) -> str:
    """The numbers of trials or of members and turns, in one sentence."""
    if sweep.kind == "population":
        members = len(sweep.turns[0]) if sweep.turns else 0
        return f"{counted(members, 'member')}, {counted(sum(map(_over, sweep.turns)), 'turn')} over."
    states = [t["state"] for t in sweep.trials]
    words = [
        f"{states.count(x)} {word}" for x, word in (("complete", "finished"), ("pruned", "pruned"), ("fail", "failed"))
    ]
    return f"{counted(len(states), 'trial')}: {', '.join(words)}."


@mpl.rc_context(STYLE)
def history(sweep: Sweep) -> bytes | None:
    """The return of every trial in order, and the best up to then; None without any."""
    seen = [t for t in sweep.trials if t["return"] is not None]
    if not seen:
        return None
    figure, axes = figure_of(3.2)
    for state, mark, alpha, label in (("complete", "o", 0.9, "finished"), ("pruned", "x", 0.6, "pruned")):
        here = [t for t in seen if t["state"] == state]
        color = COLORS[0] if state == "complete" else "#777777"
        axes.plot([t["number"] for t in here], [t["return"] for t in here], mark, color=color, alpha=alpha, label=label)
    best, steps = -math.inf, list[tuple[int, float]]()
    for t in sorted(seen, key=lambda t: t["number"]):
        if t["state"] == "complete":
            best = max(best, t["return"])
            steps.append((t["number"], best))
    if steps:
        x, y = zip(*steps, strict=True)
        axes.step(x, y, where="post", color=COLORS[1], linewidth=1.9, label="best so far")
    axes.set_xlabel("trial")
    axes.set_ylabel("return")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _titled(axes, "Trials in order")
    axes.legend(fontsize=9)
    return png(figure)


@mpl.rc_context(STYLE)
def importance(sweep: Sweep) -> bytes | None:
    """How much of the differences between the trials' returns each setting explains; None where that is not known."""
    if not sweep.importances:
        return None
    rows = sorted(sweep.importances.items(), key=lambda row: row[1])
    figure, axes = figure_of(0.9 + 0.34 * len(rows))
    axes.barh([name for name, _ in rows], [x for _, x in rows], color=COLORS[0], height=0.6)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axes.set_xlabel("share of importance")
    _titled(axes, "What mattered", grid="x")
    return png(figure)


@mpl.rc_context(STYLE)
def slices(sweep: Sweep) -> bytes | None:
    """The return of the trials over each setting."""
    seen = [t for t in sweep.trials if t["return"] is not None]
    if not seen:
        return None
    figure, panels = _panels(sweep)
    for axes, name in zip(panels, sweep.settings, strict=True):
        for state, color in (("pruned", "#999999"), ("complete", COLORS[0])):
            here = [t for t in seen if t["state"] == state]
            axes.plot(
                [_place(t["values"].get(name)) for t in here],
                [t["return"] for t in here],
                "o",
                color=color,
                markersize=4,
            )
        if name in sweep.logarithmic:
            axes.set_xscale("log")
            _log_ticks(axes.xaxis)
        axes.set_xlabel(name)
        axes.grid(axis="y")
    return png(figure)


@mpl.rc_context(STYLE)
def lineage(sweep: Sweep) -> bytes | None:
    """From which member each one of a turn continued, and its return; the ancestors of the best are drawn bold."""
    turns = [members for members in sweep.turns if _over(members)]
    returns = [m["return"] for members in turns for m in members if m["return"] is not None]
    if not returns:
        return None
    figure, axes = figure_of(0.9 + 0.3 * len(turns[0]))
    ancestors = _ancestors(turns)
    for t, members in enumerate(turns[1:], 1):
        for i, m in enumerate(members):
            bold = ancestors[t] == i
            color = COLORS[1] if bold else "#bbbbbb" if m["from"] == i else "#777777"
            axes.plot([t, t + 1], [m["from"], i], color=color, linewidth=2.6 if bold else 1.1, zorder=1 + bold)
    points = [(t + 1, i, m["return"]) for t, members in enumerate(turns) for i, m in enumerate(members)]
    known = [p for p in points if p[2] is not None]
    places, colors = ([p[k] for p in known] for k in (0, 1)), [p[2] for p in known]
    drawn = axes.scatter(*places, c=colors, s=46, cmap="viridis", zorder=3)
    failed = [p for p in points if p[2] is None]
    axes.plot([p[0] for p in failed], [p[1] for p in failed], "x", color="#333333", zorder=3)
    figure.colorbar(drawn, ax=axes, label="return")
    axes.set_xlabel("turn")
    axes.set_ylabel("member")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    _titled(axes, "Who continued from whom", grid=None)
    return png(figure)


@mpl.rc_context(STYLE)
def courses(sweep: Sweep) -> bytes | None:
    """The values of each setting over the turns; the ancestors of the best member are drawn as a line."""
    turns = [members for members in sweep.turns if _over(members)]
    if not turns:
        return None
    figure, panels = _panels(sweep)
    ancestors = _ancestors(turns)
    for axes, name in zip(panels, sweep.settings, strict=True):
        for t, members in enumerate(turns):
            axes.plot([t + 1] * len(members), [_place(m["values"].get(name)) for m in members], ".", color="#999999")
        line = [_place(members[i]["values"].get(name)) for members, i in zip(turns, ancestors, strict=True)]
        axes.plot(range(1, len(turns) + 1), line, color=COLORS[1], linewidth=1.9)
        if name in sweep.logarithmic:
            axes.set_yscale("log")
            _log_ticks(axes.yaxis)
        axes.set_title(name, loc="left", fontsize=9)
        axes.set_xlabel("turn")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return png(figure)


def _ancestors(turns: Sequence[Sequence[Mapping[str, Any]]]) -> list[int]:
    """The ancestors of the best member of the last turn, by turn."""
    last = turns[-1]
    found = [max(range(len(last)), key=lambda i: -math.inf if last[i]["return"] is None else last[i]["return"])]
    for members in reversed(turns[1:]):
        found.append(members[found[-1]]["from"])
    return found[::-1]


def _place(value: Any) -> Any:
    """Where a value is drawn: a number as such, anything else by its name."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else show(value)


def _panels(sweep: Sweep) -> tuple[Any, list[Axes]]:
    rows = math.ceil(len(sweep.settings) / 2)
    figure, axes = figure_of(0.3 + 1.9 * rows)
    figure.delaxes(axes)
    return figure, [figure.add_subplot(rows, 2, i + 1) for i in range(len(sweep.settings))]


def _log_ticks(axis: Axis) -> None:
    axis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _titled(axes: Axes, title: str, grid: str | None = "y") -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    if grid is not None:
        axes.grid(axis=grid)  # pyright: ignore[reportArgumentType]
