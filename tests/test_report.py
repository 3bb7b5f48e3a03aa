"""Reports: the statistics, which runs are pooled, and what the page says."""

import csv
import itertools
import json
import os
import runpy
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import malformed
import numpy as np
import pytest
import yaml
from scipy import stats
from toys import mostly_long

from pgsuite.errors import UserError
from pgsuite.reports import report, runs, statistics
from pgsuite.reports.runs import find, group
from pgsuite.reports.scores import ALL, comparisons, overall, scores
from pgsuite.reports.statistics import interquartile_mean, interval, probability_of_improvement

VERSIONS = {"python": "3.11.7", "pgsuite": "0.1.0", "torch": "2.13.0", "gymnasium": "1.4.0", "mujoco": "4.0.0"}


def make_run(
    folder: Path,
    *,
    algo: str = "ppo",
    env: str = "CartPole",
    seed: int = 0,
    score: float | None = 10.0,
    settings: dict[str, Any] | None = None,
    summary: dict[str, Any] | None = None,
    columns: bool = True,
) -> Path:
    """A run directory as training leaves it; ``columns``: with the clock among the metrics."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = {
        "_target_": "pgsuite.app.schema.Run",
        "seed": seed,
        "total_steps": 1000,
        "algo": {"_target_": f"pgsuite.algorithms.{algo}.{algo.upper()}", "lr": 0.001},
        "env": {"_target_": f"pgsuite.envs.tasks.classic.{env}", "max_episode_steps": 500},
    }
    for key, value in (settings or {}).items():
        *parents, last = key.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    facts = {"algo": algo, "env": env, "seed": seed, "status": "finished", "steps": 1000, "seconds": 10.0}
    facts |= {"steps_per_second": 100.0, "return_mean": score, "backend": "torch", "device": "cpu"}
    facts |= {"versions": VERSIONS} | (summary or {})
    (folder / "summary.json").write_text(json.dumps(facts))
    with (folder / "metrics.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        clock = ["time/seconds"] if columns else []
        rows.writerow(["steps", "episode/return", "episode/count", "time/steps_per_second", *clock])
        for steps in range(100, 1001, 100):
            value = "" if steps == 300 or score is None else score * steps / 1000
            rows.writerow([steps, value, 4, 100, *([steps / 100] if columns else [])])
    return folder


def sweep(root: Path, levels: dict[tuple[str, str], list[float]]) -> Path:
    """Runs by method and environment, one for every score."""
    for (algo, env), values in levels.items():
        for seed, score in enumerate(values):
            make_run(root / f"{algo}-{env}" / f"s{seed}", algo=algo, env=env, seed=seed, score=score)
    return root


LEVELS = {
    ("ppo", "CartPole"): [500.0, 480.0, 500.0, 490.0, 470.0],
    ("trpo", "CartPole"): [400.0, 480.0, 410.0, 450.0, 300.0],
    ("ppo", "Pendulum"): [-150.0, -160.0, -155.0, -170.0, -140.0],
    ("trpo", "Pendulum"): [-150.0, -250.0, -145.0, -300.0, -260.0],
}


# --- statistics


def test_interquartile_mean_leaves_a_quarter_out_at_each_end() -> None:
    assert interquartile_mean(np.array([100.0, 0, 1, 2, 3])) == 2  # a quarter of five is one whole value
    assert interquartile_mean(np.array([9.0, 1, 2])) == 4  # of three, none
    assert interquartile_mean(np.array([-50.0, -9, 1, 2, 3, 4, 70, 900])) == 2.5
    np.testing.assert_array_equal(interquartile_mean(np.array([[0.0, 4, 5, 99], [1, 1, 1, 1]])), [4.5, 1])


def test_probability_of_improvement_counts_pairs_and_half_of_ties() -> None:
    x, y = np.array([1.0, 2, 3, 3]), np.array([3.0, 0, 2])
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in itertools.product(x, y)]
    assert probability_of_improvement(x, y) == pytest.approx(np.mean(pairs))
    assert probability_of_improvement(x, y) == pytest.approx(stats.mannwhitneyu(x, y).statistic / 12)
    assert probability_of_improvement(y, x) == pytest.approx(1 - np.mean(pairs))


def test_probability_over_tasks_is_the_mean_of_theirs() -> None:
    above, below, ten = np.array([5.0, 6]), np.array([1.0, 2]), np.arange(10.0)
    assert probability_of_improvement(above, below, ten, ten) == pytest.approx((1 + 0.5) / 2)


def test_interval_of_two_values_is_that_of_enumeration() -> None:
    # Of the four resamples of (0, 1) a quarter each have the means 0 and 1, more than the 2.5% cut off.
    assert interval(interquartile_mean, np.array([0.0, 1.0])) == (0.0, 1.0)
    assert interval(interquartile_mean, np.array([0.0])) is None


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(200):
        ends = interval(interquartile_mean, rng.normal(3.0, 2.0, 20), resamples=400)
        assert ends is not None
        held += bool(ends[0] <= 3.0 <= ends[1])
    assert 0.88 <= held / 200 <= 0.98


def test_strata_are_drawn_among_themselves() -> None:
    low, high = np.zeros(4), np.ones(4)
    assert interval(statistics.stratified_mean, low, high) == (0.5, 0.5)
    pooled = interval(interquartile_mean, np.concatenate([low, high]))
    assert pooled is not None and pooled[0] < 0.5 < pooled[1]


def test_window_weighs_rows_by_their_episodes() -> None:
    steps, values, weights = np.array([10.0, 20.0]), np.array([0.0, 1.0]), np.array([1.0, 3.0])
    found = statistics.windowed(steps, values, weights, np.array([5.0, 10.0, 15.0]), 10)
    np.testing.assert_allclose(found, [0, 0.75, 1])
    uneven = np.array([1.0, 7.0, 30.0])
    np.testing.assert_allclose(statistics.windowed(uneven, np.full(3, 4.0), np.ones(3), np.linspace(1, 30, 9), 3), 4.0)


# --- which runs belong together


def test_seeds_of_one_configuration_are_one_group(tmp_path: Path) -> None:
    groups, remarks = group(find([str(sweep(tmp_path, LEVELS))])[0])
    assert [g.name for g in groups] == ["ppo on CartPole", "trpo on CartPole", "ppo on Pendulum", "trpo on Pendulum"]
    assert [list(g.scores) for g in groups] == [LEVELS[g.method, g.env] for g in groups]
    assert not remarks


def test_groups_are_named_by_the_settings_in_which_they_differ(tmp_path: Path) -> None:
    make_run(tmp_path / "a", seed=0)
    make_run(tmp_path / "b", seed=1, settings={"logging": {"points": 3}, "resume": "auto"})
    make_run(tmp_path / "c", settings={"algo.lr": 0.01})
    make_run(tmp_path / "d", settings={"algo.lr": {"linear": [0.01, 0]}})
    make_run(tmp_path / "e", algo="trpo")
    groups, _ = group(find([str(tmp_path)])[0])
    found = {g.method: len(g.runs) for g in groups}
    assert found == {"ppo lr=0.001": 2, "ppo lr=0.01": 1, "ppo lr.linear=[0.01, 0]": 1, "trpo": 1}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"versions": VERSIONS | {"gymnasium": "1.5.0"}}, "gymnasium"),
        ({"versions": VERSIONS | {"mujoco": "4.1.0"}}, "mujoco"),
        ({"backend": "gymnasium"}, "backend"),
        ({"device": "cuda:0"}, "device"),
    ],
)
def test_other_environments_versions_and_back_ends_are_not_pooled(
    tmp_path: Path, change: dict[str, Any], name: str
) -> None:
    make_run(tmp_path / "a", seed=0)
    make_run(tmp_path / "b", seed=1, summary=change)
    groups, remarks = group(find([str(tmp_path)])[0])
    assert len(groups) == 2 and all(f"{name}=" in g.method for g in groups)
    assert any(f"differ in {name}" in line and "not pooled" in line for line in remarks)


def test_runs_of_other_lengths_are_not_pooled(tmp_path: Path) -> None:
    make_run(tmp_path / "a", seed=0)
    make_run(tmp_path / "b", seed=1, settings={"total_steps": 20_000}, summary={"steps": 20_000})
    groups, remarks = group(find([str(tmp_path)])[0])
    assert [g.method for g in groups] == ["ppo total_steps=1000", "ppo total_steps=20_000"]
    assert any("different lengths" in line for line in remarks)


def test_one_seed_twice_is_no_second_evidence(tmp_path: Path) -> None:
    make_run(tmp_path / "old", score=1.0)
    make_run(tmp_path / "young", score=1.0)
    (only,), remarks = group(find([str(tmp_path), str(tmp_path / "old")])[0])
    assert len(only.runs) == 1
    assert any("more than once" in line for line in remarks)


def test_unfinished_runs_have_no_score_and_are_named(tmp_path: Path) -> None:
    make_run(tmp_path / "a", seed=0, score=10.0)
    make_run(tmp_path / "b", seed=1, score=99.0, summary={"status": "failed", "steps": 400})
    make_run(tmp_path / "c", seed=2)
    (tmp_path / "c" / "summary.json").unlink()  # as if killed
    (tmp_path / "c" / "summary.json").write_text(json.dumps({"algo": "ppo", "env": "CartPole"} | {"status": "running"}))
    groups, remarks = group(find([str(tmp_path)])[0])
    assert [list(g.scores) for g in groups if g.runs[0].finished] == [[10.0]]
    said = " ".join(remarks)
    assert "failed, at 400 of 1,000 steps" in said and "flatter" in said and "still runs, or was killed" in said


def test_a_score_of_other_episodes_is_remarked_on(tmp_path: Path) -> None:
    make_run(tmp_path / "a", seed=3, summary={"return_window": "unfinished episodes"})
    make_run(tmp_path / "b", seed=4)
    (only,), remarks = group(find([str(tmp_path)])[0])
    assert list(only.scores) == [10.0, 10.0]
    (line,) = (line for line in remarks if "last tenth" in line)
    assert "seed 3: the score is the mean return of the unfinished episodes" in line


def test_runs_that_record_no_status_and_no_clock_are_reported(tmp_path: Path) -> None:
    make_run(tmp_path / "a", summary={"status": None}, columns=False)
    (run,) = find([str(tmp_path)])[0]
    assert run.finished and run.training is not None and run.training.seconds is not None
    np.testing.assert_allclose(run.training.seconds, run.training.steps / 100)
    assert 300 not in run.training.steps  # a row without an episode


# --- directories that are no runs


def test_damaged_and_foreign_directories_are_skipped_with_a_line(tmp_path: Path) -> None:
    make_run(tmp_path / "good")
    (make_run(tmp_path / "json") / "summary.json").write_text('{"algo": ')
    (make_run(tmp_path / "yaml") / "config.yaml").write_text("a: [1,\nb: {")
    (make_run(tmp_path / "list") / "config.yaml").write_text("- 1")
    (make_run(tmp_path / "bytes") / "metrics.csv").write_bytes(b"steps,episode/return\n\xff\xfe,1\n")
    (make_run(tmp_path / "bare") / "config.yaml").unlink()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.yaml").write_text("model: {name: gpt}")
    (tmp_path / "empty").mkdir()
    runs, skipped = find([str(tmp_path), str(tmp_path / "empty")])
    assert [run.folder.name for run in runs] == ["good"]
    assert {Path(line.split(":")[0]).name for line in skipped} == {
        *("json", "yaml", "list", "bytes", "bare", "foreign", "empty")
    }


@pytest.mark.parametrize("seed", mostly_long(range(100, 108), 100, 101, 102))
def test_malformed_directories_are_read_or_skipped(seed: int) -> None:
    """A few of the trials of malformed.py."""
    result = malformed.trial(seed)
    assert malformed.right(result), result


@pytest.mark.parametrize(
    ("name", "harm", "words"),
    [
        ("config.yaml", os.mkfifo, "its config.yaml is no regular file"),
        ("metrics.csv", os.mkfifo, "its metrics.csv is no regular file"),
        ("summary.json", Path.mkdir, "its summary.json is no regular file"),
        ("config.yaml", "algo: &x {_target_: a.B, y: *x}\nenv: {}", "its config.yaml has aliases"),
        ("config.yaml", "[" * 5000, "its config.yaml cannot be read (maximum recursion"),
        ("summary.json", "[" * 100_000, "its summary.json cannot be read (maximum recursion"),
        ("metrics.csv", "steps,episode/return\n5,1e308", "it holds the number 1e+308, and none above 1e+30 can be"),
        ("config.yaml", "algo: {_target_: a.B}\nenv: {x: [{[1, 2]: 3}]}", "found unhashable key"),
    ],
)
def test_a_directory_that_cannot_be_read_is_skipped_with_the_reason(
    tmp_path: Path, name: str, harm: Any, words: str
) -> None:
    make_run(tmp_path / "good")
    path = make_run(tmp_path / "bad") / name
    path.unlink()
    path.write_text(harm) if isinstance(harm, str) else harm(path)
    found, (line,) = find([str(tmp_path)])
    assert [run.folder.name for run in found] == ["good"] and words in line


def test_whatever_reading_raises_skips_one_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "good")
    make_run(tmp_path / "bad", seed=7)
    flatten = runs.flatten
    monkeypatch.setattr(runs, "flatten", lambda tree: flatten(tree) | {"x": 1 // (7 - tree["seed"])})
    found, (line,) = find([str(tmp_path)])
    assert len(found) == 1 and line.startswith(f"{tmp_path / 'bad'}: ZeroDivisionError: ")


def test_nothing_to_report_on_is_an_error(tmp_path: Path) -> None:
    (make_run(tmp_path / "json") / "summary.json").write_text("")
    with pytest.raises(UserError, match="no run to report on"):
        report([str(tmp_path)], tmp_path / "out", "")
    with pytest.raises(UserError, match="there is no"):
        report([str(tmp_path / "absent")], tmp_path / "out", "")
    with pytest.raises(UserError, match="nothing matches"):
        report([str(tmp_path / "x*")], tmp_path / "out", "")
    assert not (tmp_path / "out").exists()


def test_a_metrics_file_cut_off_or_written_twice_is_read(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    with (folder / "metrics.csv").open("a") as file:
        file.write("900,1,4,100,9\n950,2,4,100,9.5\n96")
    (run,) = find([str(folder)])[0]
    assert run.training is not None and run.training.steps[-2:].tolist() == [900, 950]


def test_wrong_arguments_get_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(__file__).parents[1] / "scripts" / "report.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "no")])
    with pytest.raises(SystemExit, match=r"^error: there is no '.*no': give run directories"):
        runpy.run_path(str(script), run_name="__main__")


# --- the page


class Page(HTMLParser):
    """Fails on tags that do not nest and on anything loaded from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images = 0
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "object")
        for name, value in attrs:
            if name in ("src", "href", "srcset"):
                assert (value or "").startswith("data:image/png;base64,")
        self.images += tag == "img"
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["style"]:
            assert "url(" not in data and "@import" not in data
        self.text += data


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    lines = report([str(sweep(tmp_path / "runs", LEVELS))], tmp_path / "out", "python scripts/report.py runs")
    page = Page((tmp_path / "out" / "index.html").read_text())
    pictures = list((tmp_path / "out").glob("*.png"))
    assert page.images == len(pictures) == 3 + 2 + 2 + 3  # scores, curves over steps and time, improvement
    for words in ("In short", "Learning curves", "Over time", "Probability of improvement", "Configurations", "4.0.0"):
        assert words in page.text
    assert "20 runs in 4 groups" in lines


def test_names_from_the_outside_are_text(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "<i>", settings={"env.id": "<script>alert(1)</script>|x/../y"}, score=3.0)
    report([str(tmp_path / "runs")], tmp_path / "out", "<b>")
    Page((tmp_path / "out" / "index.html").read_text())
    assert all(path.parent == tmp_path / "out" for path in tmp_path.rglob("*.png"))
    assert r"\|x" in (tmp_path / "out" / "table.md").read_text()


STRANGE = {
    "_x": r"| \_x |",
    "$x_{$": r"| \$x\_{\$ |",  # which is no formula
    "a$b$c": r"| a\$b\$c |",
    "*a* [b](c) `d` _e_ f_g": r"| \*a\* \[b\](c) \`d\` \_e\_ f_g |",
    "\ue000\0": "| ?? |",
    "x" * 3000: "xxx ... |",
}


@pytest.mark.parametrize("env", STRANGE, ids=lambda env: repr(env[:30]))
def test_strange_names_are_drawn_and_written_as_they_are(tmp_path: Path, env: str) -> None:
    for algo, seed in itertools.product((f"_{env}", "ppo"), (0, 1)):
        folder = tmp_path / "runs" / f"{algo == 'ppo'}{seed}"
        make_run(folder, algo="ppo", seed=seed, settings={"env.id": env}, summary={"algo": algo})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as matplotlib's on a label that it leaves out
        assert "4 runs in 2 groups" in report([str(tmp_path / "runs")], tmp_path / "out", "")
    Page((tmp_path / "out" / "index.html").read_text())
    assert STRANGE[env] in (tmp_path / "out" / "table.md").read_text()


def test_the_table_holds_the_statistics(tmp_path: Path) -> None:
    root = sweep(tmp_path / "runs", LEVELS)
    report([str(root)], tmp_path / "out", "")
    rows = [line.strip("| ").split(" | ") for line in (tmp_path / "out" / "table.md").read_text().splitlines()]
    for (algo, env), values in LEVELS.items():
        (row,) = (r for r in rows if r[:2] == [env, algo] and len(r) > 5)
        x = np.array(values)
        ends = interval(interquartile_mean, x)
        assert ends is not None
        assert row[2:7] == [
            f"{interquartile_mean(x):,.1f}",
            f"[{ends[0]:,.1f}, {ends[1]:,.1f}]",
            f"{x.mean():,.1f}",
            f"{x.std(ddof=1):,.1f}",
            "5",
        ]
    (row,) = (r for r in rows if r[:3] == ["CartPole", "ppo", "trpo"])
    chance = probability_of_improvement(np.array(LEVELS["ppo", "CartPole"]), np.array(LEVELS["trpo", "CartPole"]))
    assert row[3] == f"{chance:.0%}"


def test_over_all_environments_scores_are_normalized_and_stratified(tmp_path: Path) -> None:
    groups, _ = group(find([str(sweep(tmp_path, LEVELS))])[0])
    scaled = {}
    for env in ("CartPole", "Pendulum"):
        every = np.array([LEVELS[m, env] for m in ("ppo", "trpo")])
        for m in ("ppo", "trpo"):
            scaled[m, env] = (np.array(LEVELS[m, env]) - every.min()) / np.ptp(every)
    best, other = overall(groups)
    assert (best.method, other.method) == ("ppo", "trpo")
    strata = [scaled["ppo", env] for env in ("CartPole", "Pendulum")]
    assert best.center == pytest.approx(interquartile_mean(np.concatenate(strata)))
    assert best.ends == interval(statistics.stratified_mean, *strata)
    (together,) = (c for c in comparisons(groups, [best, other, *scores(groups)]) if c.env == ALL)
    each = [np.array(LEVELS[m, env]) for env in ("CartPole", "Pendulum") for m in ("ppo", "trpo")]
    assert together.probability == pytest.approx(float(probability_of_improvement(*each)))


def test_evaluation_has_a_column_and_curves_of_its_own(tmp_path: Path) -> None:
    for seed in (0, 1):
        best = {"evaluation": {"steps": 1000, "return_mean": 42.0 + seed}}
        folder = make_run(tmp_path / "runs" / str(seed), seed=seed, summary=best)
        (folder / "evaluation.csv").write_text("steps,time/seconds,evaluation/return\n500,5,20\n1000,10,42\n")
    report([str(tmp_path / "runs")], tmp_path / "out", "")
    assert "| 42.5 | [42.0, 43.0] |" in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "learning-evaluation-CartPole.png").exists()
    assert "Fewer than 5 seeds" in (tmp_path / "out" / "table.md").read_text()
