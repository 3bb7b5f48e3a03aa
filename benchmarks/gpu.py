"""Everything that this suite claims of a GPU, in one command: is it correct, and how fast is it?

    python benchmarks/gpu.py --budget 480                  # seconds; writes benchmarks/results/gpu/cuda.jsonl
    python benchmarks/gpu.py --only warp speeds --out /tmp/some.jsonl
    python benchmarks/gpu.py --budget 60 --device cpu      # tries out every part that a CPU has
    python benchmarks/gpu.py --docs                        # measures nothing: puts the kept result into the page

The parts are in benchmarks/gpu_parts.py, and the peer in benchmarks/jax_peer.py.  A part consists of jobs, each in a
process of its own: one that crashes, hangs or runs out of memory costs no other.  The parts share the budget by their
weights; what one leaves goes to those after it.  Every line of the output is JSON, printed and appended to the file as
soon as it is known, so whatever stops this command loses nothing.  ``seconds`` in a line counts from the start of its
job.

Exits with 1 if a job failed or was cut off, or if a check does not hold; a job that lacks what it needs is skipped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TextIO

from gpu_job import Line, results

RESULT = Path(__file__).parent / "results" / "gpu" / "cuda.jsonl"


@dataclass(frozen=True)
class Part:
    """A function of gpu_parts.py, each of whose jobs is a call in a process of its own."""

    name: str
    weight: float  # its share of the budget
    jobs: tuple[str, ...]
    at_once: int = 1


GPU = (  # of 480 seconds
    Part("versions", 15, ("",)),
    Part("warp", 100, ("HalfCheetah", "Ant", "InvertedPendulum", "Humanoid"), at_once=4),
    Part("methods", 80, ("ppo", "trpo", "a2c", "npg", "reinforce"), at_once=5),
    Part("speeds", 170, ("HalfCheetah", "CartPole", "Ant", "Humanoid", "width 512", "compiled")),
    Part("peer", 55, ("pgsuite", "jax")),
    Part("target", 60, ("HalfCheetah",)),
)
CPU = (  # of 60 seconds
    Part("versions", 5, ("",)),
    Part("warp", 11, ("InvertedPendulum",)),
    Part("methods", 13, ("ppo",)),
    Part("speeds", 13, ("CartPole", "width 512"), at_once=2),
    Part("peer", 12, ("pgsuite", "jax"), at_once=2),
    Part("target", 6, ("HalfCheetah",)),
)


class Log:
    """Prints lines of JSON, and appends them to a file, at once."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.lines, self.lock = file, list[Line](), threading.Lock()

    def __call__(self, line: Line) -> None:
        text = json.dumps(line)
        with self.lock:
            self.lines.append(line)
            for out in (sys.stdout, self.file):
                out.write(f"{text}\n")
                out.flush()


class Schedule:
    """Runs the jobs of parts as processes, within a budget in seconds.

    command: the arguments of the process of a part, a job and its time limit, which prints a line of JSON a result.
    """

    def __init__(self, command: Callable[[str, str, float], list[str]], say: Callable[[Line], None]) -> None:
        self.command, self.say = command, say
        self.running: set[subprocess.Popen[str]] = set()

    def run(self, parts: tuple[Part, ...], budget: float) -> None:
        end = monotonic() + budget
        for i, part in enumerate(parts):
            left = end - monotonic()
            self.run_part(part, monotonic() + left * part.weight / sum(x.weight for x in parts[i:]))

    def run_part(self, part: Part, end: float) -> None:
        def attempt(i: int) -> None:
            turns = math.ceil((len(part.jobs) - i) / part.at_once)  # this one's, and those of the jobs that wait
            self.run_job(part.name, part.jobs[i], (end - monotonic()) / turns)

        with ThreadPoolExecutor(part.at_once) as pool:
            try:
                list(pool.map(attempt, range(len(part.jobs))))
            except BaseException:  # a signal
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self.running):
                    kill(process)
                raise

    def run_job(self, part: str, job: str, limit: float) -> None:
        about, began = {"part": part, "job": job}, monotonic()
        if limit <= 0:
            self.say(about | {"ended": "cut off", "why": "no time was left for it"})
            return
        process = subprocess.Popen(
            self.command(part, job, limit),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,  # so that what it starts ends with it
        )
        self.running.add(process)
        overdue = threading.Timer(limit, kill, [process])
        overdue.start()
        kinds: set[str] = set()
        assert process.stdout is not None
        for text in process.stdout:
            line = parsed(text)
            if line is None:
                print(text, end="", file=sys.stderr, flush=True)
                continue
            kinds |= line.keys() & {"failed", "skipped"} or {"ran"}
            self.say(about | {"seconds": round(monotonic() - began, 2)} | line)
        code, seconds = process.wait(), round(monotonic() - began, 2)
        overdue.cancel()
        self.running.discard(process)
        if code == -signal.SIGKILL and seconds >= limit:
            ended: Line = {"ended": "cut off", "why": f"its limit of {limit:.0f} s"}
        elif code:
            ended = {"ended": "failed", "why": f"exit code {code}"}
        else:
            ended = {"ended": next((x for x in ("failed", "ran", "skipped") if x in kinds), "ran")}
        self.say(about | {"seconds": seconds} | ended)


def parsed(text: str) -> Line | None:
    """A line of output as JSON; None if it is something else, such as what a library prints."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def kill(process: subprocess.Popen[str]) -> None:
    """End a process, and the processes that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def summary(lines: list[Line]) -> Line:
    """How each job ended, and the checks that do not hold."""
    ended = {f"{x['part']} {x['job']}".strip(): x["ended"] for x in lines if "ended" in x}
    wrong = [{key: x for key, x in line.items() if key != "seconds"} for line in lines if line.get("holds") is False]
    return {"summary": ended, "checks": sum("holds" in x for x in lines), "do not hold": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=480.0, help="seconds of all parts together")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--only", nargs="+", default=[], choices=[x.name for x in GPU], help="these parts")
    parser.add_argument("--out", type=Path, help="file of the lines; results/gpu/cuda.jsonl for all parts on a GPU")
    parser.add_argument("--docs", action="store_true", help="put the kept result into docs/reference/gpu.md")
    parser.add_argument("--job", nargs=2, metavar=("PART", "JOB"), help="in this process, which a schedule has started")
    args = parser.parse_args()
    if args.docs:
        from gpu_tables import write

        write(RESULT)
        return
    if args.job:
        part, job = args.job
        for line in results(part, job, args.device, args.budget):
            print(json.dumps(line), flush=True)
        os._exit(0)  # at once: taking a device's context apart takes seconds
    parts = tuple(x for x in (CPU if args.device == "cpu" else GPU) if not args.only or x.name in args.only)
    out = args.out or (None if args.only or args.device == "cpu" else RESULT)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)

    def command(part: str, job: str, seconds: float) -> list[str]:
        this = [sys.executable, str(Path(__file__).resolve())]
        return [*this, "--device", args.device, "--budget", f"{seconds:.1f}", "--job", part, job]

    with (out or Path(os.devnull)).open("w") as file:
        say = Log(file)
        Schedule(command, say).run(parts, args.budget)
        found = summary(say.lines)
        say(found)
    sys.exit(bool(found["do not hold"]) or bool({"failed", "cut off"} & set(found["summary"].values())))


if __name__ == "__main__":
    main()
