"""Plot of a metric of one run over environment steps."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.figure import Figure


class InlineFigure(Figure):
    """A figure that notebooks display, with or without matplotlib's inline backend."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=100)
        return file.getvalue()


def curve(steps: np.ndarray, values: np.ndarray, name: str, title: str) -> Figure:
    """A plot of values [L] over steps [L]; NaN values are left out."""
    figure = InlineFigure(figsize=(6, 3.5), layout="constrained")
    axes, known = figure.subplots(), ~np.isnan(values)
    axes.plot(steps[known], values[known])
    axes.set(xlabel="environment steps", ylabel=name, title=title)
    axes.grid(color="#e3e3e3")
    return figure
