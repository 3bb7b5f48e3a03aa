"""Compiled kernels of several runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.export import register_dataclass

from pgsuite.algorithms import NPG
from pgsuite.algorithms.npg import LocalModel
from pgsuite.execution.compile import Compiled, CompiledActing, CompiledLinearization
from pgsuite.execution.graph_split import TwoStageGraph, compiled
from pgsuite.execution.loops import CompiledFit, has_memory, loops
from pgsuite.execution.rollouts import CompiledRollout, Filled, is_one_graph
from pgsuite.functional import autodiff
from pgsuite.functional.trust_region import map_tensors, tensors
from pgsuite.kernel import Kernel
from pgsuite.many.collect import JointCollector
from pgsuite.many.env import JointTaskEnv, RowDraws, SharedTask
from pgsuite.many.stack import Stack
from pgsuite.many.trainer import ManyTrainer
from pgsuite.nn.distributions import Reparameterized
from pgsuite.nn.policy import Critic, Policy, PolicyOutput
from pgsuite.rollout import StepCollector
from pgsuite.types import Batch, Rollout, map_obs

register_dataclass(Rollout)  # tracing then treats a rollout as a nest of its tensors


class Apart:
    """A function that, called under vmap, calls one of the tensors of all runs."""

    def __init__(self, of_all: Callable[..., Any]) -> None:
        self.of_all = of_all

    def __call__(self, *args: Any) -> Any:
        nests = []

        def run(*xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            given = iter(xs)
            nests.append(self.of_all(*map_tensors(lambda _: next(given), args)))
            return tuple(tensors(nests[-1]))

        found = iter(autodiff.outside(run, *tensors(args)))
        return map_tensors(lambda _: next(found), nests[-1])


def apart(stack: Stack, kernel: Kernel[..., Any]) -> Callable[..., Any]:
    """A kernel of the first run that, called under vmap, runs for all runs as one compiled graph."""
    return Apart(Compiled(lambda *args: stack(kernel.function, *args), kernel.name)).__call__


class CompiledJointValues:
    """A critic's values [S, T, N] of each observation and of its true successor, of the rollouts of all runs.  A
    successor that is the next observation is not computed again, as in ``Body.successors_by_need``; those of terminal
    successors are arbitrary."""

    def __init__(self, stack: Stack, critic: Critic) -> None:
        def of_run(rollout: Rollout, cells: Tensor) -> tuple[Tensor, Tensor]:
            value = critic.read(critic.body.sequence(rollout)[0])
            obs = map_obs(lambda x: x.flatten(0, 1)[cells], rollout.next_obs)
            anew = critic.read(critic.body.step(obs, {}, torch.zeros_like(cells, dtype=torch.bool))[0])
            return value, value.roll(-1, 0).flatten().scatter(0, cells, anew).view_as(value)

        self.graph = Compiled(lambda *seen: stack(of_run, *seen), "the critic's pass over a rollout")

    def __call__(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """So that few graphs are compiled, the number of cells [S, K] whose successors are computed is doubled until it
        suffices for each run."""
        anew = rollout.truncated.clone()
        anew[:, -1] = True
        most, count = int(anew.sum((1, 2)).max()), anew.shape[2]
        while count < most:
            count *= 2
        return self.graph(rollout, anew.flatten(1).int().topk(min(count, anew[0].numel())).indices)


class CompiledJointLinearization(CompiledLinearization):
    """The local models of all runs; called under vmap."""

    def __init__(self, stack: Stack, linearize: Callable[[Tensor, Batch], LocalModel]) -> None:
        def of_all(start: Tensor, batch: Batch) -> LocalModel:
            def at(part: Callable[[LocalModel], Callable[[Tensor], Any]]) -> Callable[[Tensor], Any]:
                return lambda x: stack(lambda s, b, x: part(linearize(s, b))(x), start, batch, x)

            gradient, entropy = stack(lambda s, b: linearize(s, b)[:2], start, batch)
            return LocalModel(gradient, entropy, at(lambda m: m.product), at(lambda m: m.evaluate_step))

        super().__init__(of_all)

    def __call__(self, start: Tensor, batch: Batch) -> LocalModel:
        gradient, entropy = Apart(self.numbers)(start, batch)
        product, evaluate_step = (self.at(x, start, batch) for x in (self.product, self.evaluate_step))
        return LocalModel(gradient, entropy, product, evaluate_step)

    def at(self, graph: TwoStageGraph, *seen: Any) -> Callable[[Tensor], Any]:
        """What the graph's second stage computes of a tensor, with the first computed once."""
        stages: list[Callable[..., Any]] = []

        def of_all(*args: Any) -> Any:
            if not stages:
                stages.append(graph(*args[:-1]))
            return stages[0](args[-1])

        return lambda x: Apart(of_all)(*seen, x)


class CompiledJointActing(CompiledActing):
    """Acts for all runs through one graph, with noise that each run draws outside of it, as it would alone."""

    def __init__(self, collector: JointCollector) -> None:
        super().__init__(collector.whole)
        self.joint, self.act = collector, collector.act
        self.draws = RowDraws(collector.env.count, 1)

    def seen(self) -> tuple[Any, Any, Any]:
        by_run = self.joint.env.count, self.joint.env.each
        seen = super().seen()
        return tuple(map_obs(lambda x: x.unflatten(0, by_run), x) for x in seen)  # pyright: ignore[reportReturnType]

    def distribution(self, policy: Policy) -> Any:
        """Of all runs [S, N, ...]."""
        if self.dist is None:
            obs, hidden_state, start = (map_obs(lambda x: x[0], x) for x in self.seen())
            one = policy.distribution(policy.body.step(obs, hidden_state, start)[0], obs)
            self.dist = map_tensors(lambda x: x.expand(self.joint.env.count, *x.shape).contiguous(), one)
        return self.dist if isinstance(self.dist, Reparameterized) else None

    def noise(self, policy: Policy, count: int) -> Tensor:
        generators, running = self.joint.generators, self.joint.env.running
        dist = self.distribution(policy)  # noise depends on the shape of the parameters only, not on their values
        if all(running):
            draw = self.draw(map_tensors(lambda x: x[0], dist), count)
            return torch.stack([draw(generator=mine) for mine in generators.each], 1)
        generators.drawing = running
        with self.draws:
            return torch.stack([dist.noise(generators) for _ in range(count)])

    def _choose(self, policy: Policy, obs: Any, hidden_state: Any, start: Tensor, noise: Tensor) -> PolicyOutput:
        found: PolicyOutput = self.joint.stack(super()._choose, policy, obs, hidden_state, start, noise)
        return PolicyOutput(*(map_obs(lambda x: x.flatten(0, 1), x) for x in found))


class CompiledJointRollout(CompiledRollout):
    """The rollouts of all runs as one graph, while all of them go on."""

    env: JointTaskEnv

    def __init__(self, collector: StepCollector, env: JointTaskEnv, acting: CompiledJointActing) -> None:
        super().__init__(collector, env, acting)
        self.joint = acting.joint.env

    def __call__(self, policy: Policy) -> Rollout:
        if not all(self.joint.live):
            return self.collector._collect(policy)
        self.env.generator.drawing = self.joint.running
        return super().__call__(policy)

    def rows_of(self, draw: Filled) -> Callable[..., list[Tensor]]:
        of_run = super().rows_of(replace(draw, like=draw.like[: self.joint.each]))
        return lambda generator: [torch.cat([x for mine in generator.each for x in of_run(generator=mine)], 1)]


def compile_many(many: ManyTrainer) -> None:
    """Replace the ``run`` of kernels by compiled functions of all runs: gradient steps and the loops over minibatches,
    except with memory, values, natural gradient steps, acting, and the torch part of a task's step.  Results agree with
    eager ones to rounding."""
    torch.compiler.reset()
    algorithm = many.algorithm
    if not has_memory(algorithm):
        for optimizer in algorithm.optimizers:
            optimizer.gradient_step.run = apart(many.stack, optimizer.gradient_step)
    if loops(algorithm, many.env.device):
        algorithm.fit.run = CompiledFit(algorithm, over=many.stack, around=Apart).__call__
    for critic in algorithm.critics:
        if not critic.sequential:
            values, plain = critic.values_and_next_values, type(critic).read_both is Critic.read_both
            by_need = plain and many.env.device.type == "cpu"  # where reading is free
            joint = Apart(CompiledJointValues(many.stack, critic)).__call__ if by_need else apart(many.stack, values)
            values.run = joint
    if isinstance(algorithm, NPG) and not algorithm.policy.sequential:
        algorithm.linearize.run = CompiledJointLinearization(many.stack, algorithm.linearize.function).__call__
    acting, whole = CompiledJointActing(many.collector), many.collector.whole
    whole.act.run = acting.__call__
    if isinstance(many.env, SharedTask):
        env = many.env.whole
        env.step_task.run = compiled(env.step_task.run, "the task's step")
        if is_one_graph(whole, env):
            whole.collect.run = CompiledJointRollout(whole, env, acting).__call__
