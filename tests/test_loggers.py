"""What runs leave for TensorBoard and for Weights & Biases, read back."""

import re
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG, parse_session_start_info_plugin_data

from pgsuite.errors import UserError
from pgsuite.training.loggers import Csv, TensorBoard, WandB, Wandb

SETTINGS = {
    "algo": "ppo",
    "env": "Hopper",
    "algo.lr": 3e-4,
    "critic.recurrent": None,
    "policy.hidden": [64, 64],
    "checkpoint.every": 9,
}


def read(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def layout(found: EventAccumulator) -> dict[str, Any]:
    stored = layout_pb2.Layout()  # pyright: ignore[reportAttributeAccessIssue]
    stored.ParseFromString(found.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    return {chart.title: chart for category in stored.category for chart in category.chart}


def drawn(chart: Any, found: EventAccumulator) -> list[str]:
    """The tags of a run in a chart."""
    return [tag for tag in found.Tags()["scalars"] if any(re.search(x, tag) for x in chart.multiline.tag)]


def layout_of(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    TensorBoard(folder, settings).close({})
    return layout(read(folder))


def test_returns_stand_first_and_have_a_band_of_one_deviation(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, SETTINGS)
    board.write(10, {"episode/return": 5.0, "episode/return_std": 2.0})
    board.close({})
    found = read(tmp_path)
    charts = layout(found)
    series = charts["Hopper, one deviation among episodes"].margin.series[0]
    assert next(iter(charts)) == "Hopper"
    assert [found.Scalars(tag)[0].value for tag in (series.value, series.lower, series.upper)] == [5.0, 3.0, 7.0]


@pytest.mark.parametrize("name", ["ALE/Pong-v5", "mine:Env-v0", "a.b (c)"])
def test_returns_of_each_environment_have_charts_of_their_own(tmp_path: Path, name: str) -> None:
    runs = {}
    for env in (name, "Another-v1"):
        board = TensorBoard(tmp_path / env.replace("/", "_"), SETTINGS | {"env.id": env, "evaluation.every": 5})
        board.write(10, {"episode/return": 5.0, "evaluation/return": 6.0, "evaluation/stochastic_return": 7.0})
        board.close({})
        runs[env] = read(tmp_path / env.replace("/", "_"))
    charts = layout(runs[name])
    values = {title: [runs[name].Scalars(tag)[0].value for tag in drawn(charts[title], runs[name])] for title in charts}
    assert values[name] == [5.0] and values[f"{name}, evaluation"] == [6.0, 7.0]
    assert not drawn(charts[name], runs["Another-v1"]) and not drawn(charts[f"{name}, evaluation"], runs["Another-v1"])


def test_evaluations_have_a_chart_where_there_are_any(tmp_path: Path) -> None:
    assert "Hopper, evaluation" not in layout_of(SETTINGS, tmp_path / "without")
    assert "Hopper, evaluation" in layout_of(SETTINGS | {"evaluation.every": 5}, tmp_path / "with")


def test_language_models_have_charts_of_what_aligns_them_before_others(tmp_path: Path) -> None:
    charts = list(layout_of(SETTINGS | {"policy.model": "model.pt"}, tmp_path / "one"))
    assert charts.index("true score, and that of the reference") < charts.index("Hopper")
    assert "reward" not in layout_of(SETTINGS, tmp_path / "another")


def test_hyperparameters_are_numbers_where_they_are_and_leave_out_machinery(tmp_path: Path) -> None:
    TensorBoard(tmp_path, SETTINGS).close({})
    content = read(tmp_path).summary_metadata[SESSION_START_INFO_TAG].plugin_data.content
    stored = parse_session_start_info_plugin_data(content).hparams
    assert set(stored) == {"algo", "env", "algo.lr", "policy.hidden"}
    assert stored["algo.lr"].number_value == 3e-4


def test_results_are_written_where_a_run_came_to_its_end(tmp_path: Path) -> None:
    for name, results in (("finished", {"return_mean": 3.0, "evaluation_return": 4.0}), ("cut", {})):
        board = TensorBoard(tmp_path / name, SETTINGS)
        board.close(results)
    finished = read(tmp_path / "finished")
    assert finished.Scalars("Result/return_mean")[0].value == 3.0
    assert finished.Scalars("Result/evaluation_return")[0].value == 4.0
    assert not [tag for tag in read(tmp_path / "cut").Tags()["scalars"] if tag.startswith("Result/")]


@pytest.mark.parametrize("text", ["\0\x80", "3\n1", ",,\n1,2", "steps\n1,2"])
def test_a_run_does_not_go_on_with_a_damaged_table(tmp_path: Path, text: str) -> None:
    (path := tmp_path / "metrics.csv").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"metrics.csv is damaged .*: move it away"):
        Csv(path, after=10)
    assert path.read_text(encoding="latin-1") == text


@pytest.mark.long
def test_wandb_goes_on_with_its_run_where_one_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    identities = []
    for _ in range(2):
        logger = WandB(tmp_path, SETTINGS, Wandb(project="tests", tags=["tiny"]))
        identities.append(logger.run.id)
        logger.write(10, {"episode/return": 1.0})
        logger.close({"return_mean": 1.0})
    assert identities[0] == identities[1]
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{identities[0]}/*.wandb"))
