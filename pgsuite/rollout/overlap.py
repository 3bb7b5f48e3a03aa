"""Collecting the next rollout while the present one is learned from."""

from __future__ import annotations

import copy
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch

from pgsuite import distributed
from pgsuite.functional import objectives
from pgsuite.kernel import Kernel
from pgsuite.nn.policy import Policy
from pgsuite.rollout.buffer import RolloutBuffer
from pgsuite.rollout.collect import Collector
from pgsuite.types import Rollout


class OverlappedCollector(Collector):
    """Has a thread fill the next rollout, by a copy of the policy as it was when the present one was asked for.

    So from the second rollout on the policy that acted is one update behind the one that learns.  Every rollout has the
    ``logp`` of the one that learns, and as ``extra["weight"]`` its chance of each action over that of the one that
    acted.  The two threads meet once a rollout and share nothing in between: a seed still decides everything.

    Its state is where the rollout that is under way began, so nothing waits for that one to be saved; put back, it is
    collected again.
    """

    is_off_policy = True

    def __init__(self, inner: Collector, policy: Policy) -> None:
        """Raises ValueError for generated texts, and where there are several processes."""
        if not inner.supports_overlap:
            raise ValueError("overlap=true is for environments that are stepped, and env=rlhf's are not: leave it out")
        if distributed.size() > 1:
            raise ValueError("overlap=true is for one process: leave torchrun, or leave it out")
        self.inner, self.env, self.horizon = inner, inner.env, inner.horizon
        self.whole_episodes, self.host_sync_reason = inner.whole_episodes, inner.host_sync_reason
        self.policy = copy.deepcopy(policy).requires_grad_(False)  # which acts
        self.generator = inner.generator
        self.buffer, self.back_buffer = RolloutBuffer(inner.horizon), RolloutBuffer(inner.horizon)
        self.collect = Kernel("collect", self._collect)  # acting is a kernel of the inner one
        self.thread = ThreadPoolExecutor(1, "collecting")
        self.ahead: Future[Rollout] | None = None
        self.started = False
        self.seconds = {"waiting": 0.0}  # for rollouts; what else the thread does costs no time

    @property
    def stepper(self) -> Collector:
        return self.inner

    def wait(self) -> None:
        if self.ahead is not None:
            wait([self.ahead])

    def _collect(self, policy: Policy) -> Rollout:
        """Raises whatever was raised in the thread."""
        began, first = perf_counter(), self.ahead is None
        if self.ahead is None:
            if not self.started:
                self.inner.started, self.started = False, True
                self.policy.load_state_dict(policy.state_dict())
            self.submit()
        assert self.ahead is not None
        rollout = self.ahead.result()
        self.policy.load_state_dict(policy.state_dict())
        self.submit()
        if first:  # after which everything is compiled; only one thread may run while something is
            self.wait()
        rollout = as_seen_by(policy, rollout)
        self.buffer.set(rollout)
        self.seconds["waiting"] += perf_counter() - began
        return rollout

    def submit(self) -> None:
        self.before = copy.deepcopy(self.inner.state_dict())
        self.inner.buffer, self.back_buffer = self.back_buffer, self.inner.buffer
        self.ahead = self.thread.submit(self.fill, torch.get_num_threads())

    def fill(self, torch_threads: int) -> Rollout:
        torch.set_num_threads(torch_threads)  # which a thread that has computed before does not follow
        return self.inner._collect(self.policy)

    def cancel(self) -> None:
        """Go back to where the rollout under way began."""
        if self.ahead is not None:
            self.wait()
            self.ahead = None
            self.inner.load_state_dict(self.before)

    def reseed(self) -> None:
        self.cancel()
        self.inner.reseed()

    def state_dict(self) -> dict[str, Any]:
        inner = self.inner.state_dict() if self.ahead is None else self.before
        return {"inner": inner, "policy": self.policy.state_dict(), "begun": self.started}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cancel()
        self.inner.load_state_dict(state["inner"])
        self.policy.load_state_dict(state["policy"])
        self.started = state["begun"]


@torch.no_grad()
def as_seen_by(policy: Policy, rollout: Rollout) -> Rollout:
    """A rollout [T, N] of another policy, with what this one thinks of its actions."""
    logp = policy.dist(rollout).log_prob(rollout.action)
    weight = objectives.log_ratio(logp, rollout.logp).exp().where(rollout.mask, 1.0)
    return replace(rollout, logp=logp, extra=rollout.extra | {"weight": weight})
