"""Overlapped collection: a thread collects the next rollout during the update on the current one."""

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
    """Collects each rollout in a thread, with a copy of the policy from before the current update.

    From the second rollout on, the behavior policy is therefore one update older than the policy that is updated.
    ``logp`` of a rollout is that of the current policy, and ``extra["weight"]`` is the importance ratio of each action,
    current over behavior policy.  The threads synchronize once per rollout and share no state in between, so a run is
    still determined by its seed.

    On a GPU the thread has a stream of its own.  Each of the two streams waits for the other where it reads what the
    other has written, and otherwise they run side by side.

    ``state_dict`` is the state at the start of the rollout in progress, so saving does not wait for it; after
    ``load_state_dict`` that rollout is collected again.
    """

    is_off_policy = True

    def __init__(self, inner: Collector, policy: Policy) -> None:
        """Raises ValueError for environments of language models, and with several processes."""
        if not inner.supports_overlap:
            raise ValueError("overlap=true is for environments that are stepped, and env=rlhf's are not: leave it out")
        if distributed.size() > 1:
            raise ValueError("overlap=true is for one process: leave torchrun, or leave it out")
        self.inner, self.env, self.horizon = inner, inner.env, inner.horizon
        self.whole_episodes, self.host_sync_reason = inner.whole_episodes, inner.host_sync_reason
        self.policy = copy.deepcopy(policy).requires_grad_(False)  # the behavior policy
        self.generator = inner.generator
        self.buffer, self.back_buffer = RolloutBuffer(inner.horizon), RolloutBuffer(inner.horizon)
        self.collect = Kernel("collect", self._collect)  # acting is a kernel of the inner collector
        self.thread = ThreadPoolExecutor(1, "collecting")
        on_gpu = self.env.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.env.device) if on_gpu else None  # of the thread
        self.ahead: Future[Rollout] | None = None
        self.started = False
        self.seconds = {"waiting": 0.0}  # seconds of waiting for a rollout; the rest of collection is hidden

    @property
    def stepper(self) -> Collector:
        return self.inner

    def wait(self) -> None:
        if self.ahead is not None:
            wait([self.ahead])
            self.read_after_thread()

    def read_after_thread(self) -> None:
        """What is launched here from now on comes after what the thread has launched."""
        if self.stream is not None:
            torch.cuda.current_stream(self.env.device).wait_stream(self.stream)

    def _collect(self, policy: Policy) -> Rollout:
        """As in the base class; exceptions of the thread are raised here."""
        began, first = perf_counter(), self.ahead is None
        if self.ahead is None:
            if not self.started:
                self.inner.started, self.started = False, True
                self.policy.load_state_dict(policy.state_dict())
            self.submit()
        assert self.ahead is not None
        rollout = self.ahead.result()
        self.read_after_thread()
        self.policy.load_state_dict(policy.state_dict())
        self.submit()
        if first:  # the first rollout may compile, and no other thread may run meanwhile
            self.wait()
        rollout = as_seen_by(policy, rollout)
        self.buffer.set(rollout)
        self.seconds["waiting"] += perf_counter() - began
        return rollout

    def submit(self) -> None:
        self.before = copy.deepcopy(self.inner.state_dict())
        self.inner.buffer, self.back_buffer = self.back_buffer, self.inner.buffer
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.env.device))
        self.ahead = self.thread.submit(self.fill, torch.get_num_threads())

    def fill(self, torch_threads: int) -> Rollout:
        torch.set_num_threads(torch_threads)  # torch applies it per thread
        with torch.cuda.stream(self.stream):  # without a stream, this does nothing
            return self.inner._collect(self.policy)

    def cancel(self) -> None:
        """Discard the rollout in progress and restore the state at its start."""
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
    """A rollout [T, N] of a behavior policy, with log-probabilities and importance ratios of ``policy``."""
    logp = policy.dist(rollout).log_prob(rollout.action)
    weight = objectives.log_ratio(logp, rollout.logp).exp().where(rollout.mask, 1.0)
    return replace(rollout, logp=logp, extra=rollout.extra | {"weight": weight})
