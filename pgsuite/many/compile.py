"""Compiled kernels of several runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.export import register_dataclass

from pgsuite.execution.compile import Compiled
from pgsuite.execution.graph_split import compiled
from pgsuite.execution.loops import CompiledFit, loops
from pgsuite.functional import autodiff
from pgsuite.functional.trust_region import map_tensors, tensors
from pgsuite.kernel import Kernel
from pgsuite.many.collect import JointCollector
from pgsuite.many.env import RowDraws, SharedTask
from pgsuite.many.stack import Stack
from pgsuite.many.trainer import ManyTrainer
from pgsuite.nn.distributions import Reparameterized
from pgsuite.nn.policy import Policy, PolicyOutput
from pgsuite.types import Rollout, map_obs

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
    return Apart(Compiled(lambda *args: stack(kernel.function, *args))).__call__


class CompiledJointActing:
    """Acts for all runs through one graph, with noise that each run draws outside of it, as it would alone."""

    def __init__(self, collector: JointCollector) -> None:
        self.collector, self.act = collector, collector.act
        self.dist: Any = None  # of all runs [S, N, ...]
        self.draws = RowDraws(collector.env.count, 1)
        self.choose = Compiled(lambda *args: collector.stack(self._choose, *args))

    @staticmethod
    def _choose(policy: Policy, obs: Any, hidden_state: Any, start: Any, noise: Any) -> PolicyOutput:
        return policy.choose(obs, hidden_state, start, lambda d: d.from_noise(noise))  # pyright: ignore[reportAttributeAccessIssue]

    @torch.no_grad()
    def __call__(self, policy: Policy) -> PolicyOutput:
        c, env = self.collector, self.collector.env
        by_run = (env.count, env.each)
        seen: list[Any] = [
            map_obs(lambda x: x.unflatten(0, by_run), x) for x in (c.whole.obs, c.whole.hidden_state, c.whole.start)
        ]
        if self.dist is None:
            mine = [map_obs(lambda x: x[0], x) for x in seen]
            one = policy.distribution(policy.body.step(*mine)[0], mine[0])
            self.dist = map_tensors(lambda x: x.expand(env.count, *x.shape).contiguous(), one)
        if not isinstance(self.dist, Reparameterized):
            return self.act(policy)
        c.generators.drawing = env.running
        with self.draws:  # depends on the shape of the parameters only, not on their values
            noise = self.dist.noise(c.generators)
        found = self.choose(policy, *seen, noise)
        return PolicyOutput(*(map_obs(lambda x: x.flatten(0, 1), x) for x in found))


def compile_many(many: ManyTrainer) -> None:
    """Replace the ``run`` of kernels by compiled functions of all runs: gradient steps, the loops over minibatches,
    values, acting, and the torch part of a task's step.  Results agree with eager ones to rounding."""
    torch.compiler.reset()
    for optimizer in many.algorithm.optimizers:
        optimizer.gradient_step.run = apart(many.stack, optimizer.gradient_step)
    if loops(many.algorithm, many.env.device):
        fit = CompiledFit(many.algorithm, over=many.stack)
        fit.call = Apart(fit.call).__call__
        many.algorithm.fit.run = fit.__call__
    for critic in many.algorithm.critics:
        if not critic.sequential:
            critic.values_and_next_values.run = apart(many.stack, critic.values_and_next_values)
    many.collector.whole.act.run = CompiledJointActing(many.collector).__call__
    if isinstance(many.env, SharedTask):
        many.env.whole.step_task.run = compiled(many.env.whole.step_task.run)
