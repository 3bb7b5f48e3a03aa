"""What benchmarks/untuned.py says of curves, and its table."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def untuned(benchmark: Callable[[str], Any]) -> Any:
    return benchmark("untuned")


def test_a_score_is_the_mean_of_the_last_tenth_before_so_many_steps_or_seconds(untuned: Any) -> None:
    curve = [(100.0 * i, 2.0 * i, float(i)) for i in range(1, 101)]  # 10,000 steps in 200 seconds
    assert untuned.score(curve, 0, 10_000) == pytest.approx(95.5)  # of 91 to 100
    assert untuned.score(curve, 1, 100) == pytest.approx(48.5)  # of 46 to 51: what ends 2% late counts
    assert untuned.score(curve[:20], 1, 200) == 20.0  # the last one, if none ended in the last tenth
    assert untuned.score(curve, 1, 1) is None


def test_the_seconds_of_a_thinned_curve_are_those_of_the_processor(untuned: Any) -> None:
    curve = [(float(i), i / 10, float(i % 2)) for i in range(1, 1001)]
    found = untuned.spent(curve, 50.0)  # whose last episode ended at 100 s by the clock
    assert len(found["curve"]) == 200 and found["curve"][-1][:2] == (1000.0, 50.0)
    assert found["curve"][99][:2] == (500.0, 25.0) and found["curve"][99][2] in (0.4, 0.6)


def test_the_kept_results_make_the_table_of_the_page(untuned: Any) -> None:
    assert untuned.table() in (ROOT / "docs" / "reference" / "results.md").read_text()
