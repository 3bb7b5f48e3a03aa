"""Draw the learning curves from the committed results: python benchmarks/plot.py"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import numpy as np
from record import ROOT
from returns import ENVIRONMENTS, METHODS, load

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

COLORS = dict(zip(METHODS, ("#7f7f7f", "#ff7f0e", "#9467bd", "#2ca02c", "#1f77b4"), strict=True))
POINTS = 60
COLUMNS = 4


def draw(out: Path) -> None:
    """One panel an environment: mean over seeds, with a band of one standard deviation."""
    results = load()
    environments = [env for env in ENVIRONMENTS if any(results.get(f"{env}/{method}") for method in METHODS)]
    rows = -(-len(environments) // COLUMNS)
    size = 3.3 * COLUMNS, 2.7 * rows
    figure, axes = plt.subplots(rows, COLUMNS, figsize=size, squeeze=False, layout="constrained")
    for panel, env in zip(axes.flat, environments, strict=False):
        for method in METHODS:
            runs = results.get(f"{env}/{method}", [])
            if not runs:
                continue
            curves = [(np.array(r["curve"]["steps"]), np.array(r["curve"]["return"])) for r in runs]
            grid = np.linspace(max(s[0] for s, _ in curves), min(s[-1] for s, _ in curves), POINTS)
            values = np.stack([np.interp(grid, s, _smooth(v)) for s, v in curves])
            mean, spread = values.mean(0), values.std(0, ddof=1 if len(values) > 1 else 0)
            panel.plot(grid, mean, color=COLORS[method])
            panel.fill_between(grid, mean - spread, mean + spread, color=COLORS[method], alpha=0.15, linewidth=0)
        panel.set_title(env)
        panel.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1e3:g}k")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in axes.flat[len(environments) :]:
        panel.set_axis_off()
    lines = [Line2D([], [], color=COLORS[method], label=method.upper()) for method in METHODS]
    figure.legend(handles=lines, frameon=False, loc="outside upper center", ncols=len(lines), fontsize="large")
    figure.supxlabel("environment steps")
    figure.supylabel("return of training episodes")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    print(out)


def _smooth(values: np.ndarray, width: int = 5) -> np.ndarray:
    """A centred moving mean, shorter at the ends."""
    weights = np.ones(min(width, len(values)))
    return np.convolve(values, weights, "same") / np.convolve(np.ones_like(values), weights, "same")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "reference" / "returns.png")
    draw(parser.parse_args().out)
