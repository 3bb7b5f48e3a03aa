"""profile=true: what is said of an iteration's time, and that saying it changes nothing."""

import json
import re
from pathlib import Path

import pytest
import torch
from test_cli import Cli
from test_cli import command as command

from pgsuite.training import checkpoint

SMALL = ["env=CartPole", "num_envs=4", "horizon=8", "total_steps=640"]


@pytest.mark.parametrize("method", ["algo=ppo algo.minibatches=2 algo.epochs=2", "algo=reinforce"])
def test_profiled_run_learns_the_same_and_says_where_its_time_went(command: Cli, method: str) -> None:
    lines = [*method.split(), *SMALL]
    if "reinforce" in method:
        lines += ["horizon=null", "env.max_episode_steps=8"]
    assert command("train", *lines, "hydra.run.dir=plain")[0] == 0
    code, out, _ = command("train", *lines, "profile=true", "hydra.run.dir=profiled")
    assert code == 0

    states = [checkpoint.load(checkpoint.numbered(Path(run))[-1]) for run in ("plain", "profiled")]
    plain, profiled = (state["algorithm"]["policy"] for state in states)
    assert all(torch.equal(plain[name], profiled[name]) for name in plain)

    rows = dict(re.findall(r"^(\S.*?)\s+[\d.]+\s+([\d.]+)%", out[out.index("an iteration") :], flags=re.MULTILINE))
    assert rows.pop("all") == "100.0"
    shares = {name: float(share) for name, share in rows.items() if "::" not in name and "#" not in name}
    assert {"collect", "compute_advantages", "update", "update_statistics", "the rest"} <= shares.keys()
    assert sum(shares.values()) == pytest.approx(100, abs=0.05 * len(shares) + 1e-6)  # they are rounded to tenths
    assert shares["the rest"] > 0
    steps = re.search(r"^ +gradient step .* (\d+)$", out, flags=re.MULTILINE)
    assert steps and int(steps[1]) == (4 if "ppo" in method else 1)  # epochs x minibatches

    events = json.loads(Path("profiled/trace.json").read_text())["traceEvents"]
    seen = [event["name"].strip() for event in events if event.get("cat") == "user_annotation"]
    assert seen.count("collect") == seen.count("update_statistics") == 2
    assert seen.count("act") == seen.count("environments") == 16


def test_run_goes_on_where_no_trace_can_be_written(command: Cli) -> None:
    Path("run/trace.json/taken").mkdir(parents=True)
    code, out, _ = command("train", *SMALL, "algo=a2c", "profile=true", "hydra.run.dir=run")
    assert code == 0 and "no trace: cannot write" in out and "traced in" not in out
    assert json.loads(Path("run/summary.json").read_text())["status"] == "finished"


def test_run_too_short_for_a_profile_says_so(command: Cli) -> None:
    code, out, _ = command("train", *SMALL, "total_steps=64", "profile=true", "hydra.run.dir=run")
    assert code == 0
    assert "no profile: it takes 20 iterations, and the run had 2" in out
