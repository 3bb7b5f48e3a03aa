"""Compiled or as written, an algorithm is the same algorithm."""

import copy
import shutil
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor as inductor
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree
from toys import PointMass, build, collector, compile_by

from pgsuite import distributed
from pgsuite.algorithms import A2C, NPG, PPO, TRPO, Algorithm, Reinforce
from pgsuite.envs import TaskEnv, make, tasks
from pgsuite.envs.tasks import Hopper
from pgsuite.envs.tasks.mujoco import MujocoTask
from pgsuite.execution import loops
from pgsuite.execution.compile import Compiled
from pgsuite.execution.graph_split import TwoStageGraph, compiled, signature
from pgsuite.execution.modes import execute
from pgsuite.functional import trust_region as tr
from pgsuite.nn.network import Features
from pgsuite.testing import random_actions
from pgsuite.types import Batch, Metrics, Obs

CASES: list[tuple[type[Algorithm], dict[str, Any], str]] = [
    (
        PPO,
        {"epochs": 2, "entropy_coef": 0.01, "clip": {"linear": [0.3, 0.1]}, "lr": {"linear": [1e-2, 0]}},
        "aot_eager",
    ),
    (Reinforce, {"baseline": "critic", "critic_minibatches": 2}, "inductor"),
    (TRPO, {"critic_epochs": 2, "critic_lr": {"linear": [1e-2, 0]}}, "aot_eager"),
    (A2C, {"lr": {"cosine": [1e-2, 1e-3]}, "entropy_coef": {"linear": [0.1, 0]}}, "aot_eager"),
]
WINDOW = {"recurrent": {"_target_": "transformer", "window": 5}, "recurrent_size": 8}
RESIDUAL = {"block": "residual", "norm": "layer"}
LONG: list[tuple[type[Algorithm], dict[str, Any], str]] = [
    (NPG, {"critic_epochs": 2, "max_kl": {"linear": [0.02, 0]}, "damping": {"linear": [0.1, 1.0]}}, "aot_eager"),
    (PPO, {"epochs": 2, "look": RESIDUAL, "critic_look": {"head": "categorical"}}, "inductor"),
    (TRPO, {"critic_epochs": 2, "look": RESIDUAL, "critic_look": {"normalize_values": True}}, "aot_eager"),
    (TRPO, {"critic_epochs": 2, "backtracking": "batched", "max_backtracks": 3, "fisher": "gauss-newton"}, "aot_eager"),
    (NPG, {"critic_epochs": 2, "fisher": "gauss-newton", "name": "CartPole", "shared": True}, "aot_eager"),
    (
        TRPO,
        {"critic_epochs": 1, "critic_minibatches": 1, "look": {"recurrent": "gru", "recurrent_size": 4}},
        "aot_eager",
    ),
]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("method", "settings", "backend"), [*CASES, *(pytest.param(*case, marks=pytest.mark.long) for case in LONG)]
)
def test_compiled_learning_is_eager_learning(
    method: type[Algorithm], settings: dict[str, Any], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schedules included, whose numbers a graph must not take for constant, nor parameters that were put back; and each
    graph is made once.  One method goes all the way through the compiler, which takes its time."""
    made = compile_by(backend, monkeypatch)
    runs = []
    for how in ("eager", "compile"):
        env = make(settings.get("name", "Pendulum"), 8, max_episode_steps=16)
        algorithm = build(method, env, **{key: x for key, x in settings.items() if key != "name"})
        begun = copy.deepcopy(algorithm.state_dict())
        rollouts, found, graphs = collector(algorithm, env), [], []
        execute(algorithm, rollouts, how)
        for fraction in (0.0, 0.3, 0.6, 0.9, None):
            if fraction is None:
                algorithm.load_state_dict(begun)
            algorithm.update_schedules(fraction or 0.0)
            metrics = algorithm.iterate(rollouts)
            params = tr.flatten([x for part in algorithm.parts.values() for x in part.parameters()])
            found.append((params, metrics))
            graphs.append((torch._dynamo.utils.counters["stats"]["unique_graphs"], len(made)))
        assert graphs[0] == graphs[-1]
        runs.append(found[-2:])
    for (eager, eager_metrics), (graphed, graphed_metrics) in zip(*runs, strict=True):
        assert torch.allclose(eager, graphed, atol=1e-4)
        for name, value in eager_metrics.items():
            assert torch.allclose(value, graphed_metrics[name], atol=1e-4), name


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("name", "look"),
    [
        ("CartPole", {}),
        ("Pendulum", {"distribution": "beta"}),
        ("Pendulum", {"recurrent": "gru"}),
        pytest.param("CartPole", WINDOW, marks=pytest.mark.long),
    ],
    ids=["categorical", "beta", "gru", "transformer"],
)
def test_compiled_acting_does_what_eager_acting_does(
    name: str, look: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the same generator, through restarts; Beta's actions are no function of noise, and are drawn eagerly."""
    compile_by("eager", monkeypatch)
    rollouts = []
    for how in ("eager", "compile"):
        env = make(name, 8, max_episode_steps=7)
        algorithm = build(A2C, env, look=look)
        collecting = collector(algorithm, env)
        execute(algorithm, collecting, how)
        rollouts += [collecting.collect(algorithm.policy)]
    eager, compiled = rollouts
    assert eager.done.any()
    for part in ("obs", "action", "logp", "reward", "next_obs", "done"):
        assert torch.allclose(getattr(eager, part), getattr(compiled, part), atol=1e-5), part


def test_gradient_steps_of_recurrent_networks_are_not_unrolled(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_by("eager", monkeypatch)
    for look, compiles in (({}, True), ({"recurrent": "lstm"}, False)):
        env = make("CartPole", 8)
        algorithm = build(PPO, env, look=look)
        execute(algorithm, collector(algorithm, env), "compile")
        kernel = algorithm.optimizer.gradient_step
        assert (kernel.run is not kernel.function) == compiles


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("fails", [False, True])
def test_the_steps_of_an_epoch_are_one_graph(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first epoch no gradient step is called, and the parameters are those of eager steps, with the same
    minibatches, and a mask that stops some epochs; where the loop cannot be made, too."""
    made = compile_by("eager", monkeypatch)
    if fails:
        monkeypatch.setattr(loops, "compile_loop", lambda *given: 1 / 0)
    runs = []
    for how in ("eager", "compile"):
        env = make("CartPole", 8, max_episode_steps=16, dtype=torch.float64)
        stops: dict[str, Any] = {"target_kl": 1e-4, "early_stop": "masked"}
        algorithm = build(PPO, env, epochs=3, lr={"linear": [1e-2, 0]}, **stops)
        rollouts, kernel, called = collector(algorithm, env), algorithm.optimizer.gradient_step, []
        execute(algorithm, rollouts, how)
        run = kernel.run
        kernel.run = lambda *given, run=run, called=called: called.append(0) or run(*given)
        metrics = []
        for i in range(3):
            if i:
                called.clear()
            algorithm.update_schedules(i / 3)
            warned = pytest.warns(UserWarning, match="as a whole") if fails and how == "compile" and not i else None
            with warned or nullcontext():
                metrics.append(algorithm.iterate(rollouts))
        assert len(called) == (0 if how == "compile" and not fails else 12)
        assert bool(made) == (how == "compile")
        runs.append((algorithm.optimizer.state | {"flat": algorithm.optimizer.flat}, metrics[-1]))
    (eager, eager_metrics), (graphed, metrics) = runs
    assert 0 < eager_metrics["epochs"] < 3
    for one, two in ((eager, graphed), (eager_metrics, metrics)):
        assert one.keys() == two.keys()
        for name, x in one.items():
            assert torch.allclose(x, two[name], rtol=1e-10, atol=1e-12), name


def test_a_loop_holds_a_tensor_in_its_own_shape_and_views_of_it_in_its_memory() -> None:
    """A step writes to a tensor and reads its row and its transpose; it also writes to a part of another one.  Both are
    held once, the whole one in its shape: as a vector it would be copied around its own whole."""
    whole, other = torch.arange(12.0).view(3, 4), torch.arange(6.0)
    row, transpose, part = whole[1], whole.t(), other[2:5]

    def step(x: Tensor, seen: None) -> Tensor:
        before = row + x
        whole.mul_(2)
        part.add_(x)
        return before + row + transpose.sum(1) + other.sum()

    wanted = [x.clone() for x in (step(torch.tensor(1.0), None), whole, other)]
    whole.copy_(torch.arange(12.0).view(3, 4))
    other.copy_(torch.arange(6.0))
    module, held = loops.with_inputs(loops.traced(step, (torch.tensor(1.0), None))[0])
    assert {x.shape for x in held} == {(3, 4), (6,)}
    whole.copy_(torch.arange(12.0).view(3, 4))
    other.copy_(torch.arange(6.0))
    body, carried, results = loops.pure(module, [torch.tensor(1.0)], [], held)
    assert sorted(carried) == [0, 1] and results == 1
    assert sum(node.target is loops.aten.slice_scatter.default for node in body.graph.nodes) == 1  # the part
    new = body(*(held[i] for i in carried), torch.tensor(1.0))
    found = [new[-1], *(x for x, i in sorted(zip(new, carried, strict=False), key=lambda pair: -held[pair[1]].dim()))]
    for x, y in zip(wanted, found, strict=True):
        assert torch.equal(x, y)


def test_a_loop_computes_once_what_it_uses_for_many_and_fuses_the_sum_with_a_bias() -> None:
    """Adam's correction is a power, which the compiler would compute for every parameter."""

    def step(x: Tensor, steps: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.addmm(bias, x, weight) / (1 - 0.9**steps)

    given = torch.randn(32, 8), torch.tensor(3.0), torch.randn(8, 16), torch.randn(16)
    body = loops.make_fx(step)(*given)
    loops.store_what_spreads(body)
    loops.add_apart(body)
    assert torch.allclose(body(*given), step(*given), rtol=1e-6)
    targets = [node.target for node in body.graph.nodes]
    assert loops.aten.mm.default in targets and loops.aten.addmm.default not in targets
    (quotient,) = body.graph.find_nodes(op="call_function", target=loops.aten.div.Tensor)
    (product,) = body.graph.find_nodes(op="call_function", target=loops.aten.mm.default)
    for node in (quotient.args[1], *product.users):
        assert node.target is loops.aten.as_strided.default


class Twice(NPG):
    def update(self, batch: Batch) -> Metrics:
        return super().update(batch) | super().update(batch)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("method", "shared", "parallel"), [(NPG, False, True), (NPG, True, False), (Twice, False, False)]
)
def test_a_critic_learns_beside_the_policy_where_neither_writes_what_the_other_reads(
    method: type[NPG], shared: bool, parallel: bool
) -> None:
    """And where the update is known to be those two."""
    env = PointMass(8)
    algorithm = build(method, env, shared=shared)
    execute(algorithm, collector(algorithm, env), "compile")
    threads = []
    for name in ("update_policy", "fit_critic"):
        setattr(algorithm, name, lambda *_: threads.append(threading.current_thread()) or {})
    for _ in range(2):
        algorithm.update(None)
    assert len(set(threads[:2])) == 1
    assert (len(set(threads[2:])) == 2) == parallel


def test_what_is_new_to_the_policy_alone_waits_for_the_critic() -> None:
    """Only one thread may run while anything is traced."""
    algorithm: Any = build(NPG, env := PointMass(8))
    execute(algorithm, collector(algorithm, env), "compile")
    regressed: list[bool] = []
    seen: list[int] = []

    def regress(*_: Any) -> Metrics:
        time.sleep(0.2)
        regressed.append(True)
        return {}

    def improve(*_: Any) -> Metrics:
        algorithm.linearize.run.__self__.evaluate_step.exclusive()
        seen.append(len(regressed))
        return {}

    algorithm.fit_critic, algorithm.update_policy = regress, improve
    for _ in range(2):
        algorithm.update(None)
    assert seen == [0, 2]  # in turn first, and then beside it


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_what_was_compiled_before_is_found_again() -> None:
    """By another process too, as all that it goes by is kept on disk; and it reads the parameters and the numbers of
    the one that asks, as they are when it asks."""
    counters.clear()
    for _ in range(2):
        weight, rate, x = torch.nn.Parameter(torch.randn(7)), torch.rand(()), torch.randn(7)

        def slope(x: Tensor, weight: torch.nn.Parameter = weight, rate: Tensor = rate) -> Tensor:
            return rate * torch.autograd.grad((x * weight).sin().sum(), weight)[0]

        made = Compiled(slope, "a slope")
        for _ in range(2):
            assert torch.allclose(made(x), rate * x * (x * weight).cos(), atol=1e-6)
            weight.data.mul_(2)
            rate.fill_(0.1)
    found = counters["inductor"]
    assert found["fxgraph_cache_hit"] >= 1 and found["fxgraph_cache_bypass"] == 0


def test_a_staged_function_computes_once_what_its_later_arguments_say_nothing_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Derivatives included; and what the second graph writes to is not what the first has left."""
    ran: list[bool] = []

    def counted(graph: torch.fx.GraphModule, _: Any) -> Any:
        def run(*args: Tensor) -> Any:
            ran.append("aten.sin." in graph.code or "aten.sigmoid." in graph.code)
            return graph(*args)

        return run

    monkeypatch.setattr(inductor, "compile", counted)

    def curvature(x: Tensor) -> Any:
        at = x.clone().requires_grad_()
        slope = torch.autograd.grad(at.sin().sum(), at, create_graph=True)[0]

        def along(v: Tensor) -> dict[str, Tensor]:
            product = torch.autograd.grad(slope @ v, at, retain_graph=True)[0]
            return {"product": product, "written": x.sigmoid().mul_(v)}

        return along

    two_stage, x = TwoStageGraph(curvature, "a curvature"), torch.randn(5)
    for at in (x, x + 1):
        along = two_stage(at)
        for v in torch.randn(2, 5):
            found = along(v)
            assert torch.allclose(found["product"], -at.sin() * v, atol=1e-6)
            assert torch.allclose(found["written"], at.sigmoid() * v, atol=1e-6)
    assert len(two_stage.graphs.made) == 1
    assert ran == [True, False, False] * 2


def test_what_a_graph_is_known_by_names_tensors_in_the_order_of_tracing() -> None:
    """Which is pytree's: another would hand a graph one tensor for another of the same shape."""
    cells = [torch.full((3,), float(i)) for i in range(15)]
    obs, hidden_state = {"b": cells[0], "a": {"d": cells[1], "c": cells[2]}}, {"h": cells[3], "c": cells[4]}
    names = ("start", "action", "logp", "value", "advantage", "target", "mask")
    plain = dict(zip(names, cells[5:12], strict=True))
    batch = Batch(obs=obs, hidden_state=hidden_state, extra={"z": cells[12], "y": cells[13]}, **plain)
    args = ("word", [2, batch], (cells[14], None))
    about, tensors = signature(args)
    theirs = [x for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]
    assert len(tensors) == 15 and all(x is y for x, y in zip(tensors, theirs, strict=True))
    assert about == signature(args)[0] != signature(("word", [3, batch], (cells[14], None)))[0]
    assert about != signature(("word", [2, batch], (cells[14][:2], None)))[0]
    assert about != signature(("word", [2, batch], [cells[14], None]))[0]


class Scale:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def of(self, x: Tensor) -> Tensor:
        return x * self.factor

    def sum(self, x: Tensor) -> Tensor:
        return self.of(x).sum()


class Shift(Scale):
    def of(self, x: Tensor) -> Tensor:
        return x + self.factor


def test_a_graph_is_not_taken_for_that_of_another_object_number_or_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch keeps the graphs of all methods of one name together, and decides by what is watched."""
    compile_by("aot_eager", monkeypatch)
    double, triple, shift = Scale(2.0), Scale(3.0), Shift(2.0)
    sums = [compiled(x.sum, "a sum") for x in (double, triple, shift)]
    for _ in range(2):
        assert [float(f(torch.ones(3))) for f in sums] == [6.0, 9.0, 9.0]
    double.factor = 5.0
    assert [float(f(torch.ones(4))) for f in sums] == [20.0, 12.0, 12.0]


def test_what_cannot_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    env = PointMass(8)
    algorithm = build(A2C, env)
    monkeypatch.setattr(distributed, "size", lambda: 2)
    with pytest.raises(ValueError, match="for one process"):
        execute(algorithm, collector(algorithm, env), "compile")
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"no no-such-compiler: install it"):
        execute(algorithm, collector(algorithm, env), "compile")
    assert execute(algorithm, collector(algorithm, env), "auto") == "eager"
    for how in ("cuda_graph", "compile_cuda_graph"):
        with pytest.raises(ValueError, match=f"execution={how} is for a GPU: give device=cuda, or leave it out"):
            execute(algorithm, collector(algorithm, env), how)


@pytest.mark.parametrize(
    ("cls", "task", "settings", "mode"),
    [
        (PPO, "CartPole", {}, "cuda_graph"),
        (TRPO, "Pendulum", {"backtracking": "batched"}, "cuda_graph"),
        (TRPO, "Pendulum", {"backtracking": "sequential"}, "eager"),  # asks after each step whether it was taken
        (PPO, "CartPole", {"target_kl": 0.01, "early_stop": "read"}, "eager"),
        (Reinforce, "CartPole", {}, "eager"),  # asks whether an episode still runs
        (PPO, "HalfCheetah", {}, "eager"),  # is simulated on the host
    ],
)
def test_on_a_gpu_auto_captures_what_can_be_captured_as_a_whole(
    cls: type[Algorithm], task: str, settings: dict[str, Any], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    env: Any = make(task, 4)
    algorithm = build(cls, env, **settings)
    rollouts = collector(algorithm, env)
    env.device = torch.device("cuda")
    if task != "HalfCheetah":
        monkeypatch.setattr(type(env.task), "device", env.device, raising=False)
        env.task.__dict__.pop("device", None)
    assert execute(algorithm, rollouts, "auto") == mode
    monkeypatch.setattr(distributed, "size", lambda: 2)
    assert execute(algorithm, rollouts, "auto") == "eager"


@pytest.mark.parametrize("name", ["CartPole", "Pendulum", "Acrobot", "MountainCar", "MountainCarContinuous"])
def test_classic_tasks_are_one_graph_whatever_their_data(name: str) -> None:
    envs: list[Any] = [make(name, 16, dtype=torch.float64, max_episode_steps=30) for _ in range(2)]
    captured = torch.compile(envs[1].task.advance, backend="eager", fullgraph=True)
    compilations = torch._dynamo.utils.counters["stats"]
    before = compilations["unique_graphs"]
    envs[1].task.advance = captured
    first = [env.reset() for env in envs]
    assert torch.equal(*first)
    for action in random_actions(envs[0], 100):
        steps = [env.step(action) for env in envs]
        assert all(torch.equal(x, y) for x, y in zip(*steps, strict=True) if x is not None)
    assert compilations["unique_graphs"] - before == 1


@pytest.mark.parametrize("name", [x for x in tasks.__all__ if issubclass(getattr(tasks, x), MujocoTask)])
def test_a_step_of_a_robot_is_one_graph(name: str) -> None:
    ours, graphed = envs = [make(name, 2, threads=1) for _ in range(2)]
    assert isinstance(graphed, TaskEnv)
    torch.compiler.reset()
    graphed.step_task.run = torch.compile(graphed.step_task.run, backend="eager", fullgraph=True)
    assert torch.equal(*(pytree.tree_leaves(env.reset())[0] for env in envs))
    for action in random_actions(ours, 3):
        for x, y in zip(*(pytree.tree_leaves(env.step(action)) for env in envs), strict=True):
            assert x is None or torch.equal(x, y)


def test_a_body_that_the_model_lacks_is_named_beside_those_that_it_has() -> None:
    task = make("Hopper", 1, threads=1).task  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(KeyError, match="no body 'tors' in the model, whose bodies are 'world', 'torso'"):
        task.body("tors")


@dataclass(kw_only=True, eq=False)
class Named(Hopper):
    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        return super().advance(action + self.model.body("torso").id)


def test_a_step_that_is_no_graph_runs_as_written_and_its_line_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_by("eager", monkeypatch)
    envs = [make(Named(max_episode_steps=20), 2, threads=1) for _ in range(2)]
    algorithms = [build(PPO, env) for env in envs]
    ours, graphed = (collector(*pair) for pair in zip(algorithms, envs, strict=True))
    execute(algorithms[1], graphed, "compile")
    said = r"test_execution.py:\d+: torch cannot compile the task's step, which runs as written: .*Dynamo .*MjModel"
    with pytest.warns(UserWarning, match=said):
        found = graphed.collect(algorithms[1].policy)
    wanted = ours.collect(algorithms[0].policy)
    for name, x in vars(wanted).items():
        assert not isinstance(x, Tensor) or torch.equal(x, getattr(found, name)), name


@pytest.mark.parametrize("algo", [PPO, TRPO])
def test_a_network_that_is_no_graph_runs_as_written_and_its_line_is_said(
    algo: type[Algorithm], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_by("eager", monkeypatch)
    encode = Features.encode

    def reads(self: Features, obs: Obs) -> Tensor:
        features = encode(self, obs)
        return features if float(features.abs().max()) < 100 else features * 0

    monkeypatch.setattr(Features, "encode", reads)
    runs = []
    for how in ("eager", "compile"):
        env = make("CartPole", 8, max_episode_steps=16)
        algorithm = build(algo, env)
        rollouts = collector(algorithm, env)
        execute(algorithm, rollouts, how)
        with warnings.catch_warnings(record=True, action="always") as warned:
            for _ in range(2):
                algorithm.iterate(rollouts)
        runs.append(nn.utils.parameters_to_vector(algorithm.policy.parameters()))
    said = {str(x.message).partition(": torch cannot compile ")[::2] for x in warned if x.category is UserWarning}
    line = reads.__code__.co_firstlineno + 2
    assert {Path(where).name for where, _ in said} == {f"test_execution.py:{line}"}
    assert len(said) == (5 if algo is PPO else 8) and all("read back to the host" in what for _, what in said)
    assert torch.equal(*runs)
