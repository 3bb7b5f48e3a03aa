"""A policy taken elsewhere is the policy: as a file, and as an object to act with."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exports import KINDS, TORQUE, exported, save
from gymnasium import spaces
from test_cli import Cli, trained_in
from test_cli import command as command

import pgsuite
from pgsuite.app.policy_io import restore
from pgsuite.envs.spaces import leaves, of_data, to_data
from pgsuite.errors import UserError
from pgsuite.export.command import METADATA, compare, runner
from pgsuite.export.command import Run as File
from pgsuite.export.portable import Portable
from pgsuite.nn.network import Features

ROOT = Path(__file__).parents[1]
FORMATS = ["torch", "onnx"]
FEW = {("torch", "images-lstm"), ("onnx", "dictionary-gru"), ("onnx", "masks-multicategorical")}
CASES = [
    pytest.param(form, kind, marks=[] if form == "eager" or (form, kind) in FEW else pytest.mark.long)
    for form in ("eager", *FORMATS)
    for kind in KINDS
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that hardly began."""
    few = ("env=HalfCheetah", "num_envs=2", "horizon=8", "total_steps=128")
    return trained_in(tmp_path_factory.mktemp("trained"), *few, run="runs/ppo-HalfCheetah/run")


@pytest.mark.parametrize(("form", "kind"), CASES)
def test_a_file_says_what_its_policy_says(form: str, kind: str, tmp_path: Path) -> None:
    """For batches of 1, 7 and 32, over steps that a memory is carried through, with every output; ``eager`` is what
    files are traced from."""
    if form == "onnx":
        pytest.importorskip("onnxruntime")
    restored, portable, file = exported(tmp_path, kind, form)
    found = compare(portable, restored, file, seed=0)
    assert found.worst <= 1e-5 and found.others == 0, str(found)
    assert found.observations == 6 * (1 + 7 + 32)
    assert sum(path.is_file() for path in tmp_path.iterdir()) == (form != "eager")


def test_the_normalizer_is_inside(tmp_path: Path) -> None:
    """Observations moved and scaled with its statistics give the same actions, and others do not."""
    restored, _, file = exported(tmp_path, "gaussian", "torch")
    moments, inputs = restored.policy.obs_norm.moments, {"obs": torch.randn(7, 5), "noise": torch.zeros(7, 2)}
    assert moments is not None and moments.center.abs().min() > 0.01
    said = file(inputs)
    assert isinstance(restored.policy.body, Features)
    features = restored.policy.body.hidden(moments.standardize(inputs["obs"]).clamp(-10, 10))
    found, without = (
        restored.policy.head(restored.policy.out(x)).mode()
        for x in (features, restored.policy.body.hidden(inputs["obs"]))
    )
    assert torch.allclose(said["mean"], found, atol=1e-5) and not torch.allclose(said["mean"], without, atol=0.1)
    assert torch.equal(said["action"], said["mean"].clamp(torch.tensor(TORQUE.low), torch.tensor(TORQUE.high)))
    assert torch.equal(said["sample"], said["action"]), "noise of zero is no noise"


def test_the_page_on_export_does_what_it_says(command: Cli, trained: Path) -> None:
    """Its commands write one file each beside the run and say how near it is, and its code runs as it is written."""
    onnxruntime = pytest.importorskip("onnxruntime")
    page = (ROOT / "docs" / "howto" / "export.md").read_text().replace("<run>", trained.name)
    home = trained.parents[2]
    command.monkeypatch.chdir(home)
    lines = re.findall(r"^pgsuite export (.*?) *#", page, re.M)
    assert len(lines) == 2
    for line in lines:
        before = set(home.rglob("*"))
        code, out, err = command("export", *line.split())
        assert code == 0 and "largest difference" in out and "obs float32[N, 17], noise float32[N, 6]" in out, err
        assert set(home.rglob("*")) - before == {trained / ("policy.onnx" if "onnx" in line else "policy.pt2")}
    said: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S):
        exec(block, said)
        assert said["env"].action_space.contains(np.reshape(said["action"], 6)), block
    policy, obs = pgsuite.load(trained), said["inputs"]["obs"]
    (action,) = said["session"].run(["action"], said["inputs"])
    assert np.allclose(action, policy.act(obs), atol=1e-5) and np.allclose(said["action"], policy.act(obs), atol=1e-5)

    extra = {METADATA: ""}
    torch.export.load(trained / "policy.pt2", extra_files=extra)
    session = onnxruntime.InferenceSession(trained / "policy.onnx")
    for found in (extra[METADATA], session.get_modelmeta().custom_metadata_map[METADATA]):
        about = json.loads(found)
        assert about["environment"] == "HalfCheetah" and about["steps"] == 128
        assert about["noise"] == "standard_normal" and about["memory"] is None
        assert of_data(about["action_space"]).shape == (6,) and "torch" in about["versions"]


def test_a_file_that_differs_is_not_left(command: Cli, trained: Path) -> None:
    def off(path: Path, form: str) -> File:
        file = runner(path, form)
        return lambda inputs: {name: x + 2e-4 for name, x in file(inputs).items()}

    command.monkeypatch.setattr("pgsuite.export.command.runner", off)
    code, _, err = command("export", f"run={trained}", "format=torch", "to=policy.pt2")
    assert code == 1 and "more than tolerance=1e-05: largest difference 2.0e-04" in err
    assert not any(command.folder.iterdir())
    assert command("export", f"run={trained}", "format=torch", "to=policy.pt2", "tolerance=1e-3")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run must be a run directory"),
        (["run=nowhere"], "no run directory nowhere"),
        (["run=run", "format=transformers"], "format=transformers is for language models: take format=onnx or torch"),
        (["run=run", "format=jit"], "format must be one of onnx, torch, transformers, got 'jit'"),
        (["run=run", "format=torch", "to=policy.onnx"], "to must end in .pt2 for format=torch, got 'policy.onnx'"),
        (["run=run", "format=torch", "to=no/where.pt2"], "no directory no to write where.pt2 in"),
    ],
)
def test_an_export_that_cannot_be_is_refused_in_one_message(command: Cli, arguments: list[str], message: str) -> None:
    save(command.folder, "gaussian")
    code, _, err = command("export", *arguments)
    assert code == 1 and message in err and err.strip().count("\n") == 0 and "Traceback" not in err


# pgsuite.load


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_acts_as_the_policy_does(kind: str, tmp_path: Path) -> None:
    """Singly or in a batch, on arrays or tensors, remembering from call to call; actions are of the space."""
    path = save(tmp_path, kind)
    single, batched, tensors, sampler = (pgsuite.load(path, deterministic=i < 3, seed=1) for i in range(4))
    space = single.observation_space
    assert "critic_obs" not in getattr(space, "spaces", {})
    space.seed(0)
    for _ in range(3):
        obs = space.sample()
        stacked = stack([obs, obs])
        action = single.act(obs)
        assert single.action_space.contains(action), action
        assert single.action_space.contains(sampler.act(obs))
        given = stack([obs], lambda parts: torch.as_tensor(parts[0]))
        acts = [leaves(single.action_space, x) for x in (action, batched.act(stacked), tensors.act(given))]
        for (_, _, one), (_, _, both), (_, _, same) in zip(*acts, strict=True):
            assert isinstance(both, np.ndarray) and np.allclose(both, np.stack([one, one]), atol=1e-5)
            assert isinstance(same, torch.Tensor) and np.allclose(same.numpy(), one, atol=1e-6)


def stack(many: list[Any], fn: Callable[[list[Any]], Any] = np.stack) -> Any:
    """Observations as one, whose parts fn makes of theirs."""
    if isinstance(many[0], dict):
        return {key: stack([x[key] for x in many], fn) for key in many[0]}
    if isinstance(many[0], tuple):
        return tuple(stack(list(parts), fn) for parts in zip(*many, strict=True))
    return fn(many)


def test_memory_lasts_until_it_is_reset(tmp_path: Path) -> None:
    actor = pgsuite.load(save(tmp_path, "dictionary-gru"))
    actor.observation_space.seed(0)
    first, second = stack([actor.observation_space.sample() for _ in range(2)]), actor.observation_space.sample()
    fresh = actor.act(first)
    assert not np.allclose(actor.act(first), fresh)
    actor.reset(np.array([True, False]))
    again = actor.act(first)
    assert np.allclose(again[0], fresh[0], atol=1e-6) and not np.allclose(again[1], fresh[1])
    with pytest.raises(ValueError, match="call reset"):
        actor.act(second)
    actor.reset()
    assert np.allclose(actor.act(first), fresh, atol=1e-6)


def test_samples_come_from_the_seed(tmp_path: Path) -> None:
    path, obs = save(tmp_path, "gaussian"), np.zeros(5)
    actors = [pgsuite.load(path, deterministic=False, seed=s) for s in (1, 1, 2)]
    streams = [[actor.act(obs).tolist() for _ in range(4)] for actor in actors]
    assert streams[0] == streams[1] != streams[2] and streams[0][0] != streams[0][1]


def test_a_wrong_observation_is_named(tmp_path: Path) -> None:
    actor = pgsuite.load(save(tmp_path, "masks"))
    with pytest.raises(ValueError, match=r"'action_mask' is missing"):
        actor.act({"state": np.zeros(5)})
    with pytest.raises(ValueError, match=r"'state' must have the shape \(5,\), or \(N, ...\) for a batch, got \(4,\)"):
        actor.act({"state": np.zeros(4), "action_mask": np.ones(4, np.int8)})


def test_a_run_that_is_not_there_is_said() -> None:
    with pytest.raises(UserError, match="no run directory nowhere"):
        pgsuite.load("nowhere")


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'hydra', 'numpy', 'gymnasium'} & set(sys.modules)"
    code = f"import sys, pgsuite; found = {heavy}; assert not found, found; assert callable(pgsuite.load)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("space", [x for kind in KINDS.values() for x in kind[0]], ids=str)
def test_a_space_survives_being_written_down(space: spaces.Space[Any]) -> None:
    assert of_data(json.loads(json.dumps(to_data(space), allow_nan=False))) == space


def test_beta_gives_its_parameters_in_place_of_samples(tmp_path: Path) -> None:
    restored = restore(save(tmp_path, "beta"))
    portable = Portable(restored)
    said = portable(portable.example(3))
    assert portable.law is None and set(said) == {"action", "alpha", "beta"}
