"""The figures of a report, one per environment, narrow enough for a phone."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, MultipleLocator

from pgsuite.errors import counted
from pgsuite.reports import statistics
from pgsuite.reports.runs import Curve, Group

# Okabe and Ito's palette for colour-blind readers; further methods use other line styles.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
LINES = ("-", "--", ":", "-.")
POINTS = 150
LABEL = 60  # characters in a line of the legend
WIDTH = 0.03  # width of a curve's averaging window, as a fraction of the run

STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#222222",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.8,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar sign in a name is no formula
}

Look = dict[str, tuple[str, str]]  # colour and line style by method


def looks(methods: Sequence[str]) -> Look:
    return {m: (COLORS[i % len(COLORS)], LINES[i // len(COLORS) % len(LINES)]) for i, m in enumerate(methods)}


@mpl.rc_context(STYLE)
def curves(groups: Sequence[Group], look: Look, *, of: str, against: str) -> tuple[bytes, str] | None:
    """Return over steps or seconds, one line per method: the figure as PNG, and its caption.

    of: training or evaluations.  against: steps or seconds; the time of a step is the median over seeds.
    """
    figure, axes = figure_of(3.5)
    shown: dict[str, list[str]] = {}
    last, handles, labels = 0.0, list[Line2D](), list[str]()
    for group in groups:
        found: list[Curve] = [c for run in group.runs if (c := getattr(run, of)) is not None]
        if against == "seconds":
            found = [curve for curve in found if curve.seconds is not None]
        if not found:
            continue
        start, end = max(c.steps[0] for c in found), min(c.steps[-1] for c in found)
        if start > end:
            continue
        if of == "training":
            grid = np.linspace(start, end, POINTS)
            lines = [statistics.windowed(c.steps, c.returns, c.weights, grid, WIDTH * end) for c in found]
        else:  # few points, each a mean over many episodes: not averaged further
            grid = np.unique(np.concatenate([c.steps for c in found]))
            grid = grid[(grid >= start) & (grid <= end)]
            lines = [np.interp(grid, c.steps, c.returns) for c in found]
        middle, low, high, kind = statistics.center(lines)
        times = [np.interp(grid, [0, *c.steps], [0, *c.seconds]) for c in found if c.seconds is not None]
        x = np.median(times, axis=0) if against == "seconds" else grid
        color, line = look[group.method]
        done = any(run.finished for run in group.runs)
        mark = "o" if len(grid) == 1 else None
        axes.plot(x, middle, color=color, linestyle=line, marker=mark, linewidth=1.9, alpha=1 if done else 0.5)
        if low is not None and high is not None:
            axes.fill_between(x, low, high, color=color, alpha=0.16, linewidth=0)
        handles += axes.plot([], [], color=color, linestyle=line, linewidth=1.9)
        labels.append(_label(group, len(found), done))
        shown.setdefault(kind, []).append(group.method)
        last = max(last, float(x[-1]))
    if not shown:
        return None
    unit, scale = ("hours", 3600) if last > 7200 else ("minutes", 60) if last > 180 else ("seconds", 1)
    axes.set_xlabel("environment steps" if against == "steps" else f"training time in {unit} (median over seeds)")
    axes.xaxis.set_major_formatter(lambda x, _: _steps(x) if against == "steps" else f"{x / scale:,.4g}")
    if against == "seconds":
        axes.xaxis.set_major_locator(MultipleLocator(_tick(last / scale) * scale))
    axes.set_ylabel("return of training episodes" if of == "training" else "return of evaluation episodes")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.6g}")
    axes.set_xlim(left=0)
    axes.set_title(groups[0].env, loc="left", fontsize=11, fontweight="bold")
    axes.grid(axis="y")
    _legend(figure, handles, labels)
    return png(figure), "; ".join(f"{kind}: {', '.join(m)}" if len(shown) > 1 else kind for kind, m in shown.items())


@mpl.rc_context(STYLE)
def intervals(
    title: str,
    rows: Sequence[tuple[str, str, float, tuple[float, float] | None]],
    label: str,
    *,
    probability: bool = False,
) -> bytes:
    """A point and its interval in each row, from top to bottom.  rows: name, colour, point, interval."""
    names = [textwrap.fill(name, 20) for name, *_ in rows]
    figure, axes = figure_of(0.9 + (0.2 + 0.16 * max(name.count("\n") + 1 for name in names)) * len(rows))
    for y, (_, color, point, ends) in enumerate(rows):
        if ends is not None:
            axes.plot(ends, [y, y], color=color, linewidth=7, alpha=0.32, solid_capstyle="butt")
        axes.plot([point], [y], "o", color=color, markersize=6)
    axes.set_yticks(range(len(rows)), names, color="#222222")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    if probability:
        axes.set_xlim(-0.02, 1.02)
        axes.axvline(0.5, color="#888888", linewidth=1, zorder=0)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    else:
        axes.margins(x=0.08)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.6g}")
    return png(figure)


def figure_of(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, height), layout="constrained")
    return figure, figure.add_subplot()


def _legend(figure: Figure, handles: Sequence[Line2D], labels: Sequence[str]) -> None:
    columns = 2 if max(map(len, labels)) < 28 and len(labels) > 1 else 1
    numbers = [str(i) for i in range(len(labels))]
    legend = figure.legend(handles, numbers, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(textwrap.fill(label, LABEL))  # a label with a leading underscore would be left out above


def _label(group: Group, count: int, done: bool) -> str:
    return f"{group.method} ({counted(count, 'seed')}{'' if done else ', unfinished'})"


def _steps(x: float) -> str:
    return f"{x / 1e6:g}M" if abs(x) >= 1e6 else f"{x / 1e3:g}k" if abs(x) >= 1e3 else f"{x:g}"


def _tick(span: float) -> float:
    """A round distance between ticks that divides a span into about five parts."""
    raw = max(span, 1e-3) / 5
    unit = 10 ** np.floor(np.log10(raw))
    return float(unit * next(m for m in (1, 2, 5, 10) if raw <= m * unit))


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()
