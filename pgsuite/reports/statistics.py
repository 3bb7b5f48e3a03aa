"""Statistics over seeds: interquartile means, bootstrap intervals, probabilities of improvement.

After Agarwal et al. (2021), "Deep Reinforcement Learning at the Edge of the Statistical Precipice".  Requires scipy,
by the extra ``report``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

RESAMPLES = 10_000
LEVEL = 0.95


def interquartile_mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """The mean over an axis without the lowest and highest quarter of values, each rounded down to whole values."""
    return np.asarray(stats.trim_mean(values, 0.25, axis=axis))


def stratified_mean(*strata: np.ndarray, axis: int = -1) -> np.ndarray:
    """The interquartile mean of several strata together, each with its values along ``axis``."""
    return interquartile_mean(np.concatenate(strata, axis=axis), axis=axis)


def exceedance(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    """The fraction of pairs of x and y in which x is larger, ties counted half: the Mann-Whitney U over its maximum."""
    pairs = np.moveaxis(x, axis, -1)[..., :, None] - np.moveaxis(y, axis, -1)[..., None, :]
    return (np.sign(pairs).mean((-1, -2)) + 1) / 2


def probability_of_improvement(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
    """Probability that a run of one method scores higher than a run of another: the mean over tasks of
    P(X > Y) + P(X = Y) / 2.

    samples: x and y of the first task, x and y of the second, and so on; values along ``axis``.
    """
    return np.mean([exceedance(x, y, axis) for x, y in zip(samples[::2], samples[1::2], strict=True)], axis=0)


def interval(
    statistic: Callable[..., np.ndarray], *strata: np.ndarray, resamples: int = RESAMPLES
) -> tuple[np.ndarray, np.ndarray] | None:
    """The 95% percentile bootstrap interval of a statistic; None if a stratum has fewer than two values.

    strata: each [n, ...], n values that are resampled with replacement within their stratum.  ``statistic`` takes all
    strata and the axis of the values.  The resampling is seeded, so equal data give equal intervals.
    """
    if any(len(values) < 2 for values in strata):
        return None
    found = stats.bootstrap(
        strata,
        statistic,
        n_resamples=resamples,
        confidence_level=LEVEL,
        method="percentile",
        vectorized=True,
        axis=0,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return np.asarray(found.low), np.asarray(found.high)


def windowed(steps: np.ndarray, values: np.ndarray, weights: np.ndarray, grid: np.ndarray, width: float) -> np.ndarray:
    """Resample a curve on a grid, by weighted means over a window around each point; returns [G].

    steps, values, weights: [R], in ascending steps; row r covers the steps since row r - 1.  grid: [G], within the
    steps; windows are cut off at the ends.
    """
    edges = np.concatenate([[0.0], steps])
    rate = weights / np.diff(edges)  # episodes per step, constant within a row
    total = np.concatenate([[0.0], np.cumsum(rate * values * np.diff(edges))])
    count = np.concatenate([[0.0], np.cumsum(weights)])
    low, high = np.clip(grid - width / 2, 0.0, steps[-1]), np.clip(grid + width / 2, 0.0, steps[-1])
    drawn = [np.interp(high, edges, sums) - np.interp(low, edges, sums) for sums in (total, count)]
    return drawn[0] / drawn[1]


def center(curves: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None, str]:
    """Center of the curves of several seeds, each [G], lower and upper bound of a band if there are at least two, and
    a description of both.

    With four seeds or more, the interquartile mean and pointwise bootstrap intervals; with fewer, which have no
    quarters to leave out, the full range.
    """
    seeds = np.stack(curves)
    if len(seeds) >= 4:
        band = interval(interquartile_mean, seeds, resamples=2000)
        assert band is not None
        return interquartile_mean(seeds, axis=0), *band, "interquartile mean, 95% interval"
    if len(seeds) > 1:
        return seeds.mean(0), seeds.min(0), seeds.max(0), "mean, range from lowest to highest"
    return seeds[0], None, None, "one seed"
