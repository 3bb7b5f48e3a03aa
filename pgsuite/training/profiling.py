"""Profiling: the time of each phase and kernel of an iteration."""

from __future__ import annotations

import resource
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from pgsuite.files import replacing
from pgsuite.kernel import Kernel, surrounded
from pgsuite.training.trainer import Callback, Report, Trainer

TRACE = "trace.json"
WARM_UP, TIMED, TRACED = 8, 10, 2  # iterations; graphs are captured during the warm-up
OPERATIONS = 8  # lines of the table
ROWS = {  # kernels and phases in the order of an iteration, with their nesting depth
    "collect": 0,
    "act": 1,
    "generate": 1,
    "environments": 1,
    "write": 1,
    "preprocess": 0,
    "compute_advantages": 0,
    "update": 0,
    "policy": 1,
    "line search": 2,
    "critic": 1,
    "fit": 1,
    "gradient step": 2,
    "metrics": 0,
    "channels": 0,
    "adapt": 0,
    "update_statistics": 0,
    "keep the state": 0,
}


class Profile(Callback):
    """Times the phases of ten iterations, traces two more with torch's profiler, and prints the results.  Training is
    not affected.

    Phases are timed without the tracer, which slows down small operations.  On an accelerator each phase is
    synchronized.  trace.json can be opened in chrome://tracing or ui.perfetto.dev.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self.iterations = 0
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls = Counter[str]()
        self.looking = ExitStack()  # contexts of the timing or tracing in progress

    def on_iteration(self, trainer: Trainer, report: Report) -> None:
        self.iterations += 1
        if self.iterations == WARM_UP:
            self.device = trainer.collector.env.device
            self.looking.enter_context(surrounded(timed(trainer), self.clock))
            self.began, self.before = self.now(), report.steps
        elif self.iterations == WARM_UP + TIMED:
            took, steps = self.now() - self.began, report.steps - self.before
            self.looking.close()
            self.lines = self.table(took, steps)
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
            self.looking.enter_context(surrounded(timed(trainer), record_function))
            self.tracer = self.looking.enter_context(profile(activities=activities, acc_events=True))
        elif self.iterations == WARM_UP + TIMED + TRACED:
            self.looking.close()
            for line in (*self.lines, *self.operations(), self.keep(self.folder / TRACE)):
                self.say(line)

    def on_end(self, trainer: Trainer) -> None:
        if self.iterations < (wanted := WARM_UP + TIMED + TRACED):
            self.looking.close()
            self.say(f"no profile: it takes {wanted} iterations, and the run had {self.iterations}")

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return perf_counter()

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        began = self.now()
        try:
            yield
        finally:
            self.seconds[name] += self.now() - began
            self.calls[name] += 1

    def table(self, took: float, steps: int) -> list[str]:
        """A table with milliseconds and share of each phase; nested phases are indented."""
        lines = [f"{'an iteration':<22}{'ms':>10}{'share':>8}{'calls':>8}"]

        def row(name: str, seconds: float, calls: float | None = None) -> None:
            counted = "" if calls is None else f"{calls:>8,.0f}"
            lines.append(f"{name:<22}{1e3 * seconds / TIMED:>10.2f}{seconds / took:>8.1%}{counted}")

        for name, depth in ROWS.items():
            if self.calls[name]:
                row("  " * depth + name, self.seconds[name], self.calls[name] / TIMED)
        row("the rest", took - sum(self.seconds[name] for name, depth in ROWS.items() if depth == 0))
        row("all", took)
        lines[-1] += f"{'':>8}  {steps / took:,.0f} steps/s, {memory(self.device)}"
        return lines

    def operations(self) -> Iterator[str]:
        """A table of the operations with the largest self time."""
        on = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        found = [x for x in self.tracer.key_averages() if x.key not in ROWS]
        total = sum(getattr(x, on) for x in found) or 1
        yield f"{'an operation':<42}{'share':>8}{'calls':>8}"
        for x in sorted(found, key=lambda x: getattr(x, on), reverse=True)[:OPERATIONS]:
            yield f"{x.key[:40]:<42}{getattr(x, on) / total:>8.1%}{x.count / TRACED:>8,.0f}"

    def keep(self, path: Path) -> str:
        """Write the trace and return a message; a failure does not stop the run."""
        try:
            with replacing(path) as temporary:
                self.tracer.export_chrome_trace(str(temporary))  # it may fail silently
                if not temporary.stat().st_size:
                    raise OSError("nothing was written")
        except OSError:
            return f"no trace: cannot write {path}"
        return f"traced in {path.parent.name}/{TRACE}"


def timed(trainer: Trainer) -> dict[str, Kernel[..., Any]]:
    return {name: kernel for name, kernel in trainer.kernels.items() if kernel.name in ROWS}


def memory(device: torch.device) -> str:
    """Peak memory use so far."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB at most on {device}"
    unit = 1 if sys.platform == "darwin" else 2**10
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20:,.0f} MiB at most"
