"""Behavior cloning against least squares, distillation against its teacher, and files of recorded episodes."""

import errno
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from test_cli import Cli, command  # noqa: F401
from torch import Tensor
from toys import PointMass, resume_alike

from pgsuite import seeding
from pgsuite.algorithms import BC, Distill
from pgsuite.app.demonstrations import Recording, load
from pgsuite.envs import make
from pgsuite.envs.spaces import tensor_space
from pgsuite.errors import UserError
from pgsuite.nn.normalize import Standardize
from pgsuite.nn.policy import Policy
from pgsuite.rollout import DemonstrationCollector, Demonstrations
from pgsuite.types import Step


def build_policy(env: Any, **settings: Any) -> Policy:
    generator = seeding.generator(0, "networks")
    return Policy(Standardize(env.observation_space, enabled=False), env.action_space, generator=generator, **settings)


def expert(env: Any) -> Policy:
    """Linear in position and velocity, which leads a point mass to the origin."""
    policy = build_policy(env, hidden=[], log_sigma=-2.0)
    with torch.no_grad():
        policy.out.bias.zero_()
        policy.out.weight.copy_(-torch.cat([torch.eye(2), 1.5 * torch.eye(2)], 1))
    return policy


def test_cloning_linear_gaussian_data_is_least_squares() -> None:
    """The mean is the least squares solution, and sigma the residual's standard deviation."""
    env, stream = PointMass(8), torch.Generator().manual_seed(0)
    obs = torch.randn(8 * 25, 4, generator=stream)
    action = obs @ (0.5 * torch.randn(4, 2, generator=stream)) + 0.3 * torch.randn(200, 2, generator=stream) + 0.5
    start = torch.zeros(200, dtype=torch.bool)
    algorithm = BC(
        policy=build_policy(env, hidden=[]),
        demonstrations=Demonstrations(obs, action, start),
        lr={"linear": [0.1, 0]},  # pyright: ignore[reportArgumentType]
        minibatches=1,
        max_grad_norm=None,
    )
    rollouts, metrics = algorithm.make_collector(env, 25, 0), dict[str, Tensor]()
    for i in range(400):
        algorithm.update_schedules(i / 400)
        metrics = algorithm.iterate(rollouts)
    wide = torch.cat([obs, torch.ones(200, 1)], 1)
    best = torch.linalg.lstsq(wide, action).solution
    assert torch.allclose(algorithm.policy.out.weight, best[:4].T, atol=1e-4)
    assert torch.allclose(algorithm.policy.out.bias, best[4], atol=1e-4)
    sigma = (action - wide @ best).square().mean(0).sqrt()
    assert torch.allclose(algorithm.policy.head.log_sigma.exp(), sigma, rtol=1e-3)  # pyright: ignore
    expected = (0.5 * math.log(2 * math.pi * math.e) + sigma.log()).sum()
    assert float(metrics["imitation_loss"]) == pytest.approx(float(expected), abs=1e-4)


def test_columns_of_demonstrations_are_windows_that_continue_one_another() -> None:
    env = PointMass(3)
    data = Demonstrations(torch.arange(30.0).expand(4, 30).T, torch.zeros(30, 2), torch.arange(30) % 7 == 0)
    policy = build_policy(env)
    rollouts = DemonstrationCollector(env, 4, 0, data)
    seen = [rollouts.collect(policy) for _ in range(3)]
    steps = torch.cat([rollout.obs[..., 0] for rollout in seen])
    expected = (torch.arange(12).unsqueeze(1) + torch.tensor([0, 10, 20])) % 30
    assert torch.equal(steps, expected.float())
    assert torch.equal(seen[1].start[1:], expected[5:8] % 7 == 0) and bool(seen[1].start[0].all())
    ratio = policy.dist(seen[2]).log_prob(seen[2].action) - seen[2].logp
    assert float(ratio.detach().abs().max()) == 0


def mean_return(policy: Policy, env: Any, steps: int = 50) -> float:
    obs, total, start = env.reset(), torch.zeros(env.num_envs), torch.ones(env.num_envs, dtype=torch.bool)
    live = start.clone()
    for _ in range(steps):
        step = env.step(policy.act(obs, {}, start, deterministic=True).action)
        total += step.reward.where(live, 0.0)
        live, obs = live & ~step.done, step.obs
    return float(total.mean())


def test_a_student_reaches_the_return_of_its_teacher() -> None:
    env = PointMass(16)
    teacher = expert(env)
    student = build_policy(env, hidden=[32])
    goal, before = (mean_return(policy, PointMass(64, seed=1)) for policy in (teacher, student))
    algorithm = Distill(policy=student, teacher=teacher, lr=5e-3, epochs=2, generator=torch.Generator().manual_seed(0))
    rollouts, metrics = algorithm.make_collector(env, 20, 0), dict[str, Tensor]()
    for _ in range(40):
        metrics = algorithm.iterate(rollouts)
    after = mean_return(student, PointMass(64, seed=1))
    assert before < goal - 10 and after > goal - 0.5 and float(metrics["imitation_loss"]) < 0.1


class Hidden(PointMass):
    """The policy sees the state under another scale; the teacher's observation is what only critics see."""

    def __init__(self, num_envs: int) -> None:
        super().__init__(num_envs)
        box = self.observation_space
        self.observation_space = spaces.Dict({"vector": box, "critic_obs": spaces.Box(-math.inf, math.inf, (5,))})

    def view(self, state: Tensor) -> dict[str, Tensor]:
        return {"vector": 3 * state, "critic_obs": torch.cat([state, torch.ones_like(state[:, :1])], -1)}

    def reset(self) -> Any:
        return self.view(super().reset())

    def step(self, action: Tensor) -> Step:
        step = super().step(action)
        return step._replace(obs=self.view(step.obs), next_obs=self.view(step.next_obs))


def test_a_privileged_teacher_is_distilled_into_a_student_that_does_not_see_what_it_sees() -> None:
    env: Any = Hidden(16)
    space = spaces.Box(-math.inf, math.inf, (5,))
    teacher = Policy(Standardize(space, enabled=False), env.action_space, hidden=[], log_sigma=-1.0)
    with torch.no_grad():
        teacher.out.weight.copy_(-torch.cat([torch.eye(2), 1.5 * torch.eye(2), torch.tensor([[0.2], [-0.1]])], 1))
    student = build_policy(env, hidden=[])
    algorithm = Distill(policy=student, teacher=teacher, lr={"linear": [0.05, 0]}, minibatches=1, max_grad_norm=None)  # pyright: ignore
    rollouts = algorithm.make_collector(env, 5, 0)
    for i in range(200):
        algorithm.update_schedules(i / 200)
        algorithm.iterate(rollouts)
    expected = -torch.cat([torch.eye(2), 1.5 * torch.eye(2)], 1) / 3
    assert torch.allclose(student.out.weight, expected, atol=1e-3)
    assert torch.allclose(student.out.bias, torch.tensor([-0.2, 0.1]), atol=1e-3)
    rollout = rollouts.collect(student)
    blind = student.dist(rollout).mode()
    rollout.obs["critic_obs"].fill_(7.0)
    assert torch.equal(student.dist(rollout).mode(), blind)


def test_teachers_that_do_not_fit_are_refused_by_name() -> None:
    env, box = PointMass(4), spaces.Box(-1.0, 1.0, (2,))
    student = build_policy(env)
    other = Policy(Standardize(spaces.Box(-1.0, 1.0, (9,))), box)
    memory = Policy(Standardize(env.observation_space), box, recurrent="gru")
    beta = Policy(Standardize(env.observation_space), box, distribution="beta")
    for teacher, message in ((None, "give teacher="), (other, "no part of"), (memory, "memory"), (beta, "is beta")):
        with pytest.raises(ValueError, match=message):
            Distill(policy=student, teacher=teacher)
    with pytest.raises(ValueError, match="give demonstrations="):
        BC(policy=student).make_collector(env, 10, 0)


@pytest.mark.parametrize("cls", [BC, Distill])
def test_imitation_resumes_exactly(cls: Any) -> None:
    env = PointMass(8)
    stream = torch.Generator().manual_seed(0)
    data = Demonstrations(
        torch.randn(50, 4, generator=stream), torch.randn(50, 2, generator=stream), torch.ones(50) > 0
    )
    pairs = []
    for _ in range(2):
        part: dict[str, Any] = {"demonstrations": data} if cls is BC else {"teacher": expert(env)}
        algorithm = cls(policy=build_policy(env), generator=torch.Generator().manual_seed(3), **part)
        pairs.append((algorithm, algorithm.make_collector(PointMass(8), 16, 0)))
    pairs[0][0].iterate(pairs[0][1])
    resume_alike(*pairs)
    assert all(torch.equal(a, b) for a, b in zip(*(x.policy.parameters() for x, _ in pairs), strict=True))


@pytest.mark.long
def test_imitation_does_what_the_suite_relies_on() -> None:
    """With a teacher and data of the task with continuous actions, and of that with discrete ones."""
    from pgsuite.envs.make import make
    from pgsuite.testing import algorithms as checks
    from pgsuite.testing.worlds import Point

    env = make(Point(max_episode_steps=12, actions="continuous"), 4, seed=0)
    stream = torch.Generator().manual_seed(0)
    obs = torch.randn(500, *(env.observation_space.shape or ()), generator=stream)
    for world in checks.WORLDS:
        env = make(Point(max_episode_steps=12, actions=world.actions), 4, seed=0)
        shape = (500, 2) if world.actions == "continuous" else (500,)
        action = torch.randint(2, shape, generator=stream)
        data = Demonstrations(obs, action.float() if world.actions == "continuous" else action, torch.ones(500) > 0)
        teacher = Policy(Standardize(env.observation_space), env.action_space)
        with checks.blame(str(world)), checks.as_on_accelerator():
            for cls, part in ((BC, {"demonstrations": data}), (Distill, {"teacher": teacher})):
                checks._check_iterations(cls, world, part)


@pytest.mark.long
def test_recorded_episodes_are_cloned_and_the_clone_goes_on(command: Cli) -> None:  # noqa: F811
    """CartPole: train, record, clone, and begin PPO with the clone."""
    small = ["env=CartPole", "~tuned", "num_envs=8", "horizon=32", "execution=eager"]
    assert command("train", "algo=ppo", *small, "total_steps=2048", "hydra.run.dir=expert")[0] == 0
    code, _, err = command("evaluate", "run=expert", "episodes=5", "record=demos.npz")
    assert code == 0, err
    lengths = json.loads((command.folder / "expert" / "evaluation.json").read_text())["lengths"]
    with np.load(command.folder / "demos.npz") as file:
        assert len(file["observations"]) == sum(lengths) and file["rewards"].sum() == sum(lengths)
        ends = np.flatnonzero(file["terminations"] | file["truncations"])
        assert np.diff(ends, prepend=-1).tolist() == lengths
    given = ["algo=bc", *small, "demonstrations=demos.npz", "total_steps=4096", "hydra.run.dir=clone"]
    code, _, err = command("train", *given)
    assert code == 0, err
    code, out, err = command("train", "algo=ppo", *small, "total_steps=256", "init=clone", "hydra.run.dir=on")
    assert code == 0 and "policy: took" in out + err
    for wrong, message in (
        (["algo=ppo", *small, "demonstrations=demos.npz"], "demonstrations= is for algo=bc"),
        (["algo=bc", *small], "give demonstrations="),
        (["algo=bc", "env=Acrobot", "~tuned", "demonstrations=demos.npz"], "observations have the shape (4,)"),
        (["algo=bc", *small, "demonstrations=demos.npz", "seeds=2"], "demonstrations= are read by one run"),
    ):
        code, _, err = command("train", *wrong)
        assert code == 1 and message in err, err
    code, _, err = command(
        "train", "algo=distill", *small, "teacher=expert", "total_steps=512", "hydra.run.dir=student"
    )
    assert code == 0, err
    assert (Path(command.folder) / "student" / "summary.json").exists()


class Interface:
    """The spaces of environments of gymnasium, and of what the policy sees of them."""

    name = "interface"

    def __init__(self, space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
        self.space, self.observation_space, self.action_space = space, tensor_space(space), action_space


def test_episodes_of_minari_are_read(tmp_path: Path) -> None:
    """Of the layout of its files: one observation more than actions, nested by group, and actions of the space."""
    h5py = pytest.importorskip("h5py")
    place = spaces.Dict({"place": spaces.Box(-1.0, 1.0, (2,)), "goal": spaces.Discrete(3)})
    env: Any = Interface(place, spaces.Discrete(2, start=5))
    with h5py.File(tmp_path / "main_data.hdf5", "w") as file:
        for i, steps in ((10, 2), (9, 3)):  # in the order of their numbers
            group = file.create_group(f"episode_{i}")
            inner = group.create_group("observations")
            inner["place"] = np.arange(2.0 * (steps + 1)).reshape(-1, 2) + 100 * i
            inner["goal"] = np.full(steps + 1, 2)
            group["actions"] = np.arange(steps) % 2 + 5
    found = load(str(tmp_path / "main_data.hdf5"), env)
    assert found.start.tolist() == [True, False, False, True, False] and found.action.tolist() == [0, 1, 0, 0, 1]
    places = [[900, 901], [902, 903], [904, 905], [1000, 1001], [1002, 1003]]
    assert found.obs.shape[1:] == env.observation_space.shape
    columns = {tuple(x) for x in found.obs.T.long().tolist()}
    assert columns >= {tuple(x[i] for x in places) for i in range(2)} | {(0,) * 5, (1,) * 5}


def test_files_that_do_not_fit_are_refused_in_one_line(tmp_path: Path) -> None:
    env: Any = Interface(spaces.Box(-1.0, 1.0, (2,)), spaces.Box(-1.0, 1.0, (1,)))
    good: dict[str, Any] = {"observations": np.zeros((4, 2), np.float32), "actions": np.zeros((4, 1), np.float32)}
    good |= {name: np.zeros(4, bool) for name in ("terminations", "truncations")}
    for change, message in (
        ({"observations": np.zeros((4, 3))}, r"observations have the shape \(3,\), and those of interface \(2,\)"),
        ({"actions": np.zeros((4, 2))}, r"actions have the shape \(2,\)"),
        ({"actions": np.zeros((3, 1))}, "there are 4 steps, and 3 actions"),
        ({"observations": np.full((4, 2), np.nan)}, "not all observations are finite"),
        ({"actions": np.array([None] * 4)}, "cannot be read"),
    ):
        np.savez(tmp_path / "demos.npz", allow_pickle=True, **good | change)
        with pytest.raises(UserError, match=message):
            load(str(tmp_path / "demos.npz"), env)
    (tmp_path / "demos.npz").write_bytes(b"PK and no more")
    for path, message in ((tmp_path / "demos.npz", "cannot be read"), (tmp_path / "none.npz", "no such file")):
        with pytest.raises(UserError, match=message):
            load(str(path), env)
    np.savez(tmp_path / "demos.npz", **good)
    assert load(str(tmp_path / "demos.npz"), env).action.shape == (4, 1)


def test_a_full_disk_leaves_the_former_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = make("CartPole", 2)
    recording, path = Recording(str(tmp_path / "demos.npz")), tmp_path / "demos.npz"
    obs = env.reset()
    action = torch.zeros(2, dtype=torch.long)
    recording(obs, action, env.step(action), torch.ones(2, dtype=torch.bool))
    recording.write()
    before = path.read_bytes()

    def fills(file: Any, **arrays: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", fills)
    with pytest.raises(UserError, match=r"cannot write .*demos.npz: No space left on device"):
        recording.write()
    assert path.read_bytes() == before and [x.name for x in tmp_path.iterdir()] == ["demos.npz"]
    with pytest.raises(UserError, match=r"there is no directory .*nowhere"):  # before anything is played
        Recording(str(tmp_path / "nowhere" / "demos.npz"))


@pytest.mark.parametrize(
    ("space", "actions", "message"),
    [
        (spaces.Discrete(3), [0, 2, 3, 0], "actions must be from 0 to 2"),
        (spaces.Discrete(3), [0, -1, 1, 0], "actions must be from 0 to 2"),
        (spaces.MultiDiscrete([2, 3]), [[0, 0], [1, 2], [0, 3], [0, 0]], r"actions must be from 0 to \[1, 2\]"),
        (spaces.MultiBinary(2), [[0, 0], [1, 1], [0, 2], [0, 0]], r"actions must be from 0 to \[1, 1\]"),
    ],
)
def test_actions_that_a_space_does_not_have_are_refused(
    tmp_path: Path, space: spaces.Space[Any], actions: list[Any], message: str
) -> None:
    env: Any = Interface(spaces.Box(-1.0, 1.0, (2,)), space)
    good: dict[str, Any] = {name: np.zeros(4, bool) for name in ("terminations", "truncations")}
    np.savez(tmp_path / "demos.npz", observations=np.zeros((4, 2), np.float32), actions=np.array(actions), **good)
    with pytest.raises(UserError, match=message):
        load(str(tmp_path / "demos.npz"), env)
    np.savez(
        tmp_path / "demos.npz", observations=np.zeros((4, 2), np.float32), actions=np.array([actions[0]] * 4), **good
    )
    assert load(str(tmp_path / "demos.npz"), env).action.shape[0] == 4


def test_a_file_of_another_layout_is_refused_in_one_line(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    env: Any = Interface(spaces.Box(-1.0, 1.0, (2,)), spaces.Discrete(2))
    for name, size in (("foo", 2), ("episode_0", 3)):
        with h5py.File(path := tmp_path / f"{name}.hdf5", "w") as file:
            group = file.create_group(name)
            group["actions"], group["observations"] = np.zeros((5, size)), np.zeros((6, 2))
        with pytest.raises(UserError, match=r"cannot be read: \S+"):
            load(str(path), env)
