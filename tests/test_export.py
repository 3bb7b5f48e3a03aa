"""A policy taken elsewhere is the policy: as a file, and as an object to act with."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from test_cli import Cli
from test_cli import command as command

import pgsuite
from pgsuite.envs.spaces import of_data, tensor_space, to_data
from pgsuite.runtime import checkpoint
from pgsuite.runtime.build import build_policy
from pgsuite.runtime.export import METADATA, Portable, compare, quiet, runner, write
from pgsuite.runtime.restore import restore
from pgsuite.runtime.schema import PolicyNetwork, Run, UserError
from pgsuite.types import map_obs

LONG = bool(os.environ.get("PGSUITE_LONG"))  # every kind in both formats
FORMATS = ["torch", "onnx"]

BOX = spaces.Box(-np.inf, np.inf, (5,), np.float64)
TORQUE = spaces.Box(np.array([-1.0, -2.0], np.float32), np.array([0.1, 2.0], np.float32))
IMAGE = spaces.Box(0, 255, (12, 14, 3), np.uint8)
MIXED = spaces.Dict(
    {
        "camera": IMAGE,
        "joints": BOX,
        "inner": spaces.Dict({"gear": spaces.Discrete(3, start=1)}),
        "critic_obs": spaces.Box(-1, 1, (2,)),
    }
)
MASKED = spaces.Dict({"state": BOX, "action_mask": spaces.MultiBinary(4)})
HIDDEN = spaces.Dict({"state": BOX, "critic_obs": BOX})
KINDS: dict[str, tuple[spaces.Space[Any], spaces.Space[Any], dict[str, Any]]] = {
    "gaussian": (BOX, TORQUE, {}),
    "gaussian-state": (BOX, spaces.Box(-1, 1, (2, 3)), {"sigma": "state"}),
    "squashed": (BOX, TORQUE, {"distribution": "squashed"}),
    "beta": (BOX, TORQUE, {"distribution": "beta"}),
    "categorical": (BOX, spaces.Discrete(4, start=2), {}),
    "multicategorical": (BOX, spaces.MultiDiscrete([2, 3, 4]), {}),
    "bernoulli": (BOX, spaces.MultiBinary(3), {"activation": "elu"}),
    "discrete": (spaces.Discrete(6), spaces.Discrete(2), {"activation": "silu"}),
    "images": (IMAGE, spaces.Discrete(3), {"activation": "relu"}),
    "masks": (MASKED, spaces.Discrete(4), {}),
    "hidden": (HIDDEN, TORQUE, {}),
    "dictionary-gru": (MIXED, TORQUE, {"recurrent": "gru", "recurrent_size": 8}),
    "lstm": (BOX, spaces.Discrete(4), {"recurrent": "lstm", "recurrent_size": 8}),
}
ENV = {"_target_": "pgsuite.envs.Gym", "id": "Somewhere-v0"}


def save(folder: Path, kind: str) -> Path:
    """A checkpoint of a policy of a kind, with everything in it far from where it began."""
    observation, action, options = KINDS[kind]
    run = Run(policy=PolicyNetwork(hidden=[16], **options))
    generator = torch.Generator().manual_seed(0)
    policy = build_policy(tensor_space(observation), action, run, generator)
    state = {name: x.clone() for name, x in policy.state_dict().items()}
    for name, x in state.items():
        if name.endswith(("moments.mean", "log_sigma", "out.weight")):
            x.normal_(generator=generator)
        elif name.endswith("moments.scale"):
            x.uniform_(0.2, 3.0, generator=generator)
    config = nested(run) | {"env": ENV, "algo": {}}
    data = {"observation": to_data(observation), "action": to_data(action)}
    path = checkpoint.path_of(folder / "run", 123)
    facts = {"config": config, "spaces": data, "choices": {}, "versions": {}}
    checkpoint.save({"steps": 123, "algorithm": {"policy": state}} | facts, path)
    return path


def nested(x: Any) -> Any:
    """Settings with those that are dataclasses as dictionaries."""
    if hasattr(x, "__dataclass_fields__"):
        return nested(vars(x)) | {"_target_": f"{type(x).__module__}.{type(x).__qualname__}"}
    return {k: nested(v) for k, v in x.items()} if isinstance(x, dict) else x


SHORT = {("onnx", kind) for kind in ("squashed", "dictionary-gru", "masks", "multicategorical")}
CASES = [(form, kind) for form in FORMATS for kind in KINDS if LONG or form == "torch" or (form, kind) in SHORT]


@pytest.mark.parametrize(("form", "kind"), CASES)
def test_a_file_says_what_its_policy_says(form: str, kind: str, tmp_path: Path) -> None:
    """For batches of 1, 7 and 32, over steps that a memory is carried through, with every output."""
    if form == "onnx":
        pytest.importorskip("onnxruntime")
    restored = restore(save(tmp_path, kind))
    portable, path = Portable(restored).eval(), tmp_path / "policy"
    with quiet():
        write(portable, portable.metadata(restored), path, form)
    run = runner(path, form)
    found = compare(portable, restored, run, seed=0)
    assert found.worst <= 1e-5 and found.others == 0, str(found)
    assert found.observations == 6 * (1 + 7 + 32)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["policy"]


@pytest.mark.parametrize("form", FORMATS)
def test_the_normalizer_is_inside(form: str, tmp_path: Path) -> None:
    """Observations moved and scaled with its statistics give the same actions, and others do not."""
    if form == "onnx":
        pytest.importorskip("onnxruntime")
    restored = restore(save(tmp_path, "gaussian"))
    moments = restored.policy.obs_norm.moments
    assert moments is not None and moments.mean.abs().min() > 0.01
    portable, path = Portable(restored).eval(), tmp_path / "policy"
    with quiet():
        write(portable, portable.metadata(restored), path, form)
    run, inputs = runner(path, form), {"obs": torch.randn(7, 5), "noise": torch.zeros(7, 2)}
    said = run(inputs)
    features = restored.policy.body.hidden(((inputs["obs"] - moments.mean) * moments.scale).clamp(-10, 10))
    assert torch.allclose(said["mean"], restored.policy.out(features), atol=1e-5)
    assert not torch.allclose(said["mean"], restored.policy.out(restored.policy.body.hidden(inputs["obs"])), atol=0.1)
    assert torch.equal(said["action"], said["mean"].clamp(torch.tensor(TORQUE.low), torch.tensor(TORQUE.high)))
    assert torch.equal(said["sample"], said["action"]), "noise of zero is no noise"


TINY = ["env=CartPole", "num_envs=4", "horizon=16", "total_steps=200", "hydra.run.dir=run"]


@pytest.mark.parametrize("form", FORMATS)
def test_the_script_writes_one_file_beside_the_run_and_says_how_near_it_is(command: Cli, form: str) -> None:
    if form == "onnx":
        pytest.importorskip("onnxruntime")
    assert command("train", *TINY)[0] == 0
    before = set(command.folder.rglob("*"))
    code, out, err = command("export", "run=run", f"format={form}")
    assert code == 0 and "largest difference" in out and "obs float32[N, 4], noise float32[N, 2]" in out, err
    (path,) = set(command.folder.rglob("*")) - before
    assert path == command.folder / "run" / ("policy.onnx" if form == "onnx" else "policy.pt2")
    if form == "onnx":
        import onnxruntime

        found = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map[METADATA]
    else:
        extra = {METADATA: ""}
        torch.export.load(path, extra_files=extra)
        found = extra[METADATA]
    metadata = json.loads(found)
    assert metadata["environment"] == "CartPole" and metadata["steps"] == 256
    assert metadata["noise"] == "standard_exponential" and metadata["memory"] is None
    assert of_data(metadata["action_space"]) == spaces.Discrete(2) and "torch" in metadata["versions"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run must be a run directory"),
        (["run=nowhere"], "no run directory nowhere"),
        (["run=run", "format=jit"], "format must be one of onnx, torch, got 'jit'"),
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
        both = batched.act(stacked)
        assert isinstance(both, np.ndarray) and np.allclose(both, np.stack([action, action]), atol=1e-5)
        given = map_obs(torch.as_tensor, obs)
        same = tensors.act(given)
        assert isinstance(same, torch.Tensor) and np.allclose(same.numpy(), action, atol=1e-6)


def stack(many: list[Any]) -> Any:
    if isinstance(many[0], dict):
        return {key: stack([x[key] for x in many]) for key in many[0]}
    return np.stack(many)


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


def test_a_loaded_policy_plays_gymnasiums_own_environment(command: Cli) -> None:
    import gymnasium

    assert command("train", *TINY)[0] == 0
    env, policy = gymnasium.make("CartPole-v1"), pgsuite.load("run")
    obs, _ = env.reset(seed=0)
    for _ in range(5):
        obs, *_ = env.step(policy.act(obs))
    with pytest.raises(UserError, match="no run directory nowhere"):
        pgsuite.load("nowhere")


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'hydra', 'numpy', 'gymnasium'} & set(sys.modules)"
    code = f"import sys, pgsuite; found = {heavy}; assert not found, found; assert callable(pgsuite.load)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("space", [x for kind in KINDS.values() for x in kind[:2]], ids=str)
def test_a_space_survives_being_written_down(space: spaces.Space[Any]) -> None:
    assert of_data(json.loads(json.dumps(to_data(space), allow_nan=False))) == space


def test_beta_gives_its_parameters_in_place_of_samples(tmp_path: Path) -> None:
    restored = restore(save(tmp_path, "beta"))
    portable = Portable(restored)
    said = portable(portable.example(3))
    assert portable.law is None and set(said) == {"action", "alpha", "beta"}
