"""Writes random command lines, good ones and bad ones, and runs them: each works or is answered in one message.

    python tests/fuzz.py --count 1000 --seeds 0 1 2 --out benchmarks/results/robustness/fuzz.json

Every line is a script's own, run in this process, in a fresh copy of a directory with a run and damaged ones.  Training
begins, and is interrupted before its first iteration, or of some lines after the second.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import multiprocessing
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import traceback
import types
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints
from unittest import mock

import torch
from hydra.core.global_hydra import GlobalHydra

from pgsuite.algorithms import A2C, NPG, PPO, TRPO, PPOPenalty, Reinforce
from pgsuite.app.evaluate import EvaluateConfig
from pgsuite.app.replay import Replaying
from pgsuite.app.schema import Run
from pgsuite.envs import Gym
from pgsuite.envs.tasks import CartPole, HalfCheetah, Pendulum
from pgsuite.export.command import Export
from pgsuite.rlhf.env import Language
from pgsuite.rlhf.pretraining import Pretraining
from pgsuite.rlhf.reward_training import RewardTraining
from pgsuite.settings import number, plain
from pgsuite.training import checkpoint
from pgsuite.training.trainer import Trainer

SCRIPTS = Path(__file__).parents[1] / "scripts"
LONGEST = 600  # characters of a message
PATIENCE = 120  # seconds for a line
MEMORY = 8 << 30  # bytes more than there are, so that what would fill the machine fails at once
ALGOS = {"ppo": PPO, "a2c": A2C, "npg": NPG, "trpo": TRPO, "ppo_penalty": PPOPenalty, "reinforce": Reinforce}
ENVS = {"CartPole": CartPole, "Pendulum": Pendulum, "HalfCheetah": HalfCheetah, "gym": Gym, "reviews": Language}
OTHERS = {"evaluate": EvaluateConfig, "export": Export, "replay": Replaying}
OTHERS |= {"pretrain": Pretraining, "reward_model": RewardTraining}
SMALL = ["num_envs=4", "total_steps=320"]
TINY = {  # language models
    "pretrain": ["reviews=64", "held_out=16", "size.width=8", "size.layers=1", "size.heads=1"],
    "reward_model": ["count=32", "held_out=8"],
}
HOME = "runs/ppo-CartPole"
RUNS = [f"{HOME}/{name}" for name in ("whole", "cut", "hostile", "unsaved", "garbled", "strange", "crashed")]
RUNS += [f"{HOME}/whole/checkpoints/000000000320.pt", f"{HOME}/hostile/checkpoints/000000000320.pt"]
RUNS += [f"{HOME}/crashed/crash.pt", f"{HOME}/hostile/crash.pt", HOME, "runs", "nowhere", "nothing.pt", "."]

# What settings that are words may say, and groups choose.
GOOD: dict[str, list[str]] = {
    "device": ["auto", "cpu"],
    "backend": ["auto", "torch", "mujoco.batch", "gymnasium"],
    "execution": ["eager"],  # compiling takes longer than all the rest
    "precision": ["float32", "bf16"],  # tf32 is for a GPU
    "policy.distribution": ["auto", "gaussian", "squashed", "beta", "categorical"],
    "env.id": ["CartPole-v1", "Pendulum-v1", "Acrobot-v1", "FrozenLake-v1", "Blackjack-v1", "Taxi-v3"],
    "run": [RUNS[0], *RUNS],
    "crash": [RUNS[6], *RUNS],
    "resume": ["null", "auto", RUNS[0], *RUNS],
    "video": ["null", "x.gif"],
    "to": ["null", "x.pt2", "x.onnx"],
    "logging.wandb.project": ["null", "x"],
    "model": ["runs/language/model", "runs/language/model/model.pt", *RUNS],
    "pairs": ["null", "runs/language/reward/preferences.jsonl", *RUNS],
    "count": ["8", "64"],
    "env.prompts": ["pgsuite.rlhf.corpus:prompts", "math:tau"],
    "env.held_out": ["null", "pgsuite.rlhf.corpus:held_out"],
    "env.tokens": ["pgsuite.rlhf.corpus:vocabulary", "math:tau"],
    "env.reward": ["pgsuite.rlhf.reward:RewardModel.load", "pgsuite.rlhf.scorer:score", "math:floor"],
    "env.rewards": ["[]", "[runs/language/reward]", "[runs/language/reward,runs/language/model]"],
    "env.scorer": ["null", "pgsuite.rlhf.scorer:score", "math:floor"],
}
GROUPS = {"algo": [*ALGOS], "env": [*ENVS, "Acrobot", "Hopper", "Pong", "envpool", "torch", "rlhf"]}
GROUPS |= {"tuned": ["ppo-Ant", "null"], "algo/estimator": ["gae", "n_step", "td_lambda", "vtrace", "monte_carlo"]}
SCHEDULES = ["{linear:[%s,%s]}", "{cosine:[%s,%s]}", "{piecewise:{0:%s,1:%s}}", "{constant:%s}"]
SCHEDULES += ["{adaptive:{start:%s,kl:0.01}}"]
OPTIONS = """
--cfg --cfg=job --cfg=x --resolve --help --hydra-help --info --info=all --package=env --version -c -m --multirun
--config-name=x --config-path=.. --config-dir=nowhere --nonsense -x --out --out= --out=x --out=/dev/null --out=a/b/c
"""
FLAGS = OPTIONS.split()
WORDS = """
0 1 -1 2 3 0.5 -0.5 1.0 1e-3 1e400 -1e400 1e308 1e-400 nan inf -inf .nan 9223372036854775807 9223372036854775808
1000000000000000000000000000000 1000000000 0x10 1_000 1,2 007 true false yes null ~ '' "" ' " \\ = == : , [ ] { } [] {}
[[]] [{}] {a:1} {a:{b:[1,null]}} [1,2] [64,64] [0] [-1] [1.5] [null] [a,b] [nan] [1e30] [[8,4,2]] [[8,4]]
[[1,1,0]] [[64,99,1]] {linear:[1e-3,0]} {cosine:[1,0]} {linear:[1]} {linear:[]} {linear:null} {linear:3}
{linear:[a,b]} {linear:{a:1}} {linier:[1,0]} {linear:[1,0],cosine:[1,0]} {piecewise:[[0,1],[1,0]]}
{piecewise:[[0.5,1]]} {piecewise:3} {piecewise:[[1,0],[0,1]]} {adaptive:{kl:0.01}} {adaptive:{}} {adaptive:null}
{adaptive:{kl:-1}} {adaptive:{start:1,kl:0.01,factor:nan}} {adaptive:[1]} {_target_:os.system}
{_target_:pgsuite.nn.heads.Head} {_target_:null} {_target_:3} os.system pgsuite.nn.heads.GaussianHead ${seed}
${nowhere} ${} ${ ${seed ${algo.clip} ${env:HOME} ${oc.env:HOME} ${oc.env:NOWHERE_AT_ALL} ${oc.decode:[}
${num_envs}${num_envs} ??? abc ünïcödé 漢字 🙂 \u202e a.b a..b .a a. ../.. /dev/null /etc/passwd . .. * ? % %s {} #
#a !!python/object:os.system 'quoted' "quoted" 'unbalanced "unbalanced (a) f(x) choice(1,2) range(1,3) sweep
glob(*) None True inf,nan a=b cpu cuda:99 gaussian squashed beta gru lstm state auto tanh adam onnx torch run
nothing.pt CartPole-v1 Pendulum-v1 ALE/Pong-v5 my:thing torch:zeros math:floor
"""
NASTY = WORDS.split()
NASTY += ["", " ", "a b", "[1, 2", "{a: 1", "x" * 5000, "[" * 50, "${" * 50, "\t", "1\n2", "[1, [2, [3]]]", "'a' 'b'"]


def parse_run_config(cls: type, prefix: str = "") -> dict[str, Any]:
    """Every setting of a class, those of its parts too, with its type."""
    found: dict[str, Any] = {}
    hints = get_type_hints(cls, include_extras=True)
    for f in (f for f in fields(cls) if f.init):
        name, hint = prefix + f.name.removesuffix("_"), hints[f.name]
        if isinstance(hint, type) and is_dataclass(hint):
            found |= {name: hint} | parse_run_config(hint, f"{name}.")
        elif hint is Any or Any not in (plain(hint), *get_args(plain(hint))):
            found[name] = hint
    return found


SETTINGS = {name: parse_run_config(cls) for name, cls in OTHERS.items()} | {"train": parse_run_config(Run)}
SETTINGS |= {name: parse_run_config(cls, "algo.") for name, cls in ALGOS.items()}
SETTINGS |= {name: parse_run_config(cls, "env.") for name, cls in ENVS.items()}


class Writer:
    """Draws command lines."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def line(self) -> tuple[str, list[str]]:
        """A script and its arguments: what is right for it, and one to three changes, of half the lines nasty ones."""
        draw = self.random
        script = draw.choices(["train", *OTHERS, "report", "envs"], [20, 3, 1, 1, 1, 1, 1, 1])[0]
        nasty = draw.random() < 0.5
        if script in ("report", "envs"):
            arguments = draw.choices([*RUNS, "runs/*/*", "**"], k=draw.randint(0, 3)) if script == "report" else []
            return script, [*arguments, *([draw.choice([*FLAGS, *NASTY])] if nasty else [])]
        settings, arguments = dict(SETTINGS[script]), []
        if script == "train":
            algo, env = draw.choice([*ALGOS]), draw.choice([*ENVS])
            settings |= SETTINGS[algo] | SETTINGS[env]
            horizon = "null" if algo == "reinforce" or env == "reviews" else 16
            arguments = [*SMALL, f"horizon={horizon}", f"algo={algo}", f"env={env}"]
            arguments += ["env.id=CartPole-v1"] if env == "gym" else []
            if draw.random() < 0.15:
                resume = draw.choice([*GOOD["resume"], *NASTY[:20]])
                arguments = [*(arguments if resume == "auto" else []), f"resume={resume}"]
        elif script in TINY:
            arguments = [*TINY[script], "hydra.run.dir=runs/language/new"]
        else:
            key = "crash" if script == "replay" else "run"
            arguments = [f"{key}={RUNS[6 if script == 'replay' else 0]}"]
        for _ in range(draw.choice([1, 1, 1, 2, 3])):
            arguments.append((self.spoilt if nasty else self.fitting)(settings))
        return script, arguments

    def fitting(self, settings: dict[str, Any]) -> str:
        """An override that its setting's own type allows."""
        draw = self.random
        if "algo" in settings and draw.random() < 0.1:
            group = draw.choice([*GROUPS])
            return f"{group}={draw.choice(GROUPS[group])}"
        key = draw.choice([key for key, hint in settings.items() if hint is not Any and not is_dataclass(hint)])
        hint = settings[key]
        if key.startswith("algo.") and number(hint) and draw.random() < 0.3:
            form = draw.choice(SCHEDULES)
            return f"{key}={form % tuple(self.value(hint) for _ in range(form.count('%s')))}"
        return f"{key}={draw.choice(GOOD[key]) if key in GOOD else self.value(hint)}"

    def value(self, hint: Any) -> str:
        """One of a type."""
        draw, origin, args = self.random, get_origin(hint), get_args(hint)
        if origin is Annotated:
            base, limits = args
            low, high = max(limits.low, 0), min(limits.high, max(limits.low, 0) + 8)
            return str(draw.randint(int(low), int(high))) if base is int else f"{draw.uniform(low, high):.3g}"
        if origin in (Union, types.UnionType):
            return self.value(draw.choice(args))
        if origin is Literal:
            return str(draw.choice(args))
        if origin is list:
            return f"[{','.join(self.value(args[0]) for _ in range(draw.randint(1, 3)))}]"
        if origin is tuple:
            return f"[{','.join(map(self.value, args))}]"
        return draw.choice({bool: ["true", "false"], int: ["7"], float: ["0.5", "-1"], str: ["x"]}.get(hint, ["null"]))

    def spoilt(self, settings: dict[str, Any]) -> str:
        """An override that need not be one."""
        draw = self.random
        key, value = draw.choice([*settings, "algo._target_", "hydra.run.dir", "hydra.mode"]), draw.choice(NASTY)
        value = (
            draw.choice(RUNS) if key in ("run", "crash", "resume", "hydra.run.dir") and draw.random() < 0.5 else value
        )
        key = self.misspelt(key) if draw.random() < 0.1 else key
        group = draw.choice([*GROUPS, "algo@x", "schema", "schema/os.Path", "a/b/c", "hydra/launcher"])
        choice = f"{group}={draw.choice([value, self.misspelt(draw.choice([*ALGOS, *ENVS]))])}"
        lines = [f"{key}={value}", f"+{key}={value}", f"++{key}={value}", f"~{key}={value}", f"~{key}", key, value]
        return draw.choices([*lines, choice, draw.choice(FLAGS)], [60, 8, 10, 2, 5, 2, 3, 10, 3])[0]

    def misspelt(self, key: str) -> str:
        at = self.random.randrange(len(key))
        more = key[:at] + self.random.choice("x.@_é[") + key[at:]
        return self.random.choice([key[:at] + key[at + 1 :], more, f"{key}.more", key.upper()])


class TooLongError(BaseException):
    """A line took longer than anybody would wait."""


@dataclass
class Answer:
    """What came of a line: it was accepted, or trained, or refused with an error of this class, or nothing of that."""

    kind: str
    said: str = ""
    wrong: str = ""  # what was not right about it


def answer(script: str, arguments: list[str], iterations: int = 0) -> Answer:
    """Run a script, here and now; a run that it begins is interrupted after so many iterations."""
    out, err, done, turn = io.StringIO(), io.StringIO(), 0, Trainer.step
    raised: BaseException | None = None

    def counted(self: Trainer) -> None:
        nonlocal done
        if done == iterations:
            self.stop = signal.SIGINT
        else:
            turn(self)
            done += 1

    def too_long(*_: Any) -> None:
        raise TooLongError

    alarm = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(PATIENCE)
    GlobalHydra.instance().clear()
    with (
        mock.patch.dict(os.environ, {"WANDB_MODE": "disabled"}),
        mock.patch.object(sys, "argv", [f"{script}.py", *arguments]),
        mock.patch.object(Trainer, "step", counted),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        os.environ.pop("HYDRA_FULL_ERROR", None)
        try:
            runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
        except (Exception, SystemExit, TooLongError) as error:
            raised = error
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, alarm)
    code = raised.code if isinstance(raised, SystemExit) else 0
    said, printed = (code if isinstance(code, str) else err.getvalue()).strip(), out.getvalue() + err.getvalue()
    if isinstance(raised, TooLongError):
        return Answer("too long", said, f"took more than {PATIENCE} s")
    if raised is not None and not isinstance(raised, SystemExit):
        return Answer("traceback", said, "".join(traceback.format_exception(raised)[-3:]))
    if "Traceback" in printed:
        return Answer("traceback", said, printed[printed.index("Traceback") :][-600:])
    if not code:
        return Answer("trained" if done else "accepted", said)
    if code == 2 and "error: " in said:
        return Answer("argparse", said)
    if not said.startswith("error: ") or len(said) > LONGEST or "\n" in said:
        return Answer("no message", said, f"in {len(said)} characters: {said[:600]!r}")
    return Answer(type(raised.__context__).__name__ if raised is not None else "nothing", said)


def furnish(folder: Path) -> None:
    """Make a run, and damaged ones beside it."""
    home = folder / HOME
    with contextlib.chdir(folder):
        for script, small in TINY.items():
            answer(script, small)
        base = ["algo=ppo", "env=CartPole", *SMALL, "horizon=16", "checkpoint.every=160"]
        for name, more in (
            ("whole", []),
            ("crashed", ["algo.lr=1e30", "algo.max_grad_norm=null", "recover.attempts=0"]),
        ):
            answer("train", [*base, *more, f"hydra.run.dir={HOME}/{name}"], iterations=100)
    assert (home / "crashed" / "crash.pt").is_file()
    for name in ("cut", "hostile", "unsaved", "garbled", "strange"):
        shutil.copytree(home / "whole", home / name)
    (newest := checkpoint.numbered(home / "cut")[-1]).write_bytes(newest.read_bytes()[:-1000])
    for path in (*checkpoint.numbered(home / "hostile"), home / "hostile" / "crash.pt"):
        torch.save(Hostile(), path)
        with path.open("r+b") as file:
            checkpoint.seal(file)
    shutil.rmtree(home / "unsaved" / checkpoint.FOLDER)
    for name, text in (("garbled", "\0[1, 2\x80"), ("strange", "[3, {4: [null, x]}]\n,,\n1,2")):
        for path in (home / name).glob("*.*"):
            path.write_text(text, encoding="latin-1")
    (home / "garbled" / "config.yaml").write_text("!!python/object/apply:os.mkdir [broken_into]")


class Hostile:
    """Makes a directory where it is unpickled carelessly."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("broken_into",)


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """No more than is reserved already, which may be much in a process that did other things, and ``MEMORY``.

    Where even a frame of the interpreter finds no room, CPython 3.11 raises SystemError instead of MemoryError.
    """
    gc.collect()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def attempt(seed: int, count: int, folder: Path, say: Callable[[str], object] = lambda line: None) -> list[Answer]:
    """Try so many lines in a directory."""
    writer, found, threads = Writer(seed), [], torch.get_num_threads()
    pristine, place = folder / "pristine", folder / "a" / "b"
    pristine.mkdir(parents=True)
    with little_memory():
        furnish(pristine)
        for i in range(count):
            script, arguments = writer.line()
            say(f"{i} {script} {arguments}")
            shutil.copytree(pristine, place)
            with contextlib.chdir(place):
                given = answer(script, arguments, iterations=2 if writer.random.random() < 0.1 else 0)
            if (place / "broken_into").exists():
                given = Answer("harm", given.said, "what it was given did harm")
            shutil.rmtree(place)
            say(f"    {given.kind}: {given.said[:300]}")
            given.wrong = given.wrong and f"{script} {arguments}\n    {given.kind}: {given.wrong}"
            found.append(given)
    torch.set_num_threads(threads)
    return found


def alone(count: int, aloud: bool, seed: int) -> list[Answer]:
    """The lines of a seed, in a process of their own."""
    with tempfile.TemporaryDirectory() as scratch:
        return attempt(seed, count, Path(scratch), partial(print, flush=True) if aloud else lambda line: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="command lines for each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--say", action="store_true", help="print every line and what is answered")
    wanted = parser.parse_args()
    results: dict[int, dict[str, int]] = {}
    wrong: list[str] = []
    with ProcessPoolExecutor(len(wanted.seeds), multiprocessing.get_context("spawn")) as pool:
        answers = pool.map(partial(alone, wanted.count, wanted.say), wanted.seeds)
        for seed, found in zip(wanted.seeds, answers, strict=True):
            results[seed] = dict(Counter(each.kind for each in found).most_common())
            wrong += (here := [each.wrong for each in found if each.wrong])
            print(f"seed {seed}: {results[seed]}", *here, sep="\n", flush=True)
    if wanted.out is not None:
        sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
        from record import keep, source  # pyright: ignore[reportMissingImports]

        record = source() | {"lines": wanted.count * len(wanted.seeds)}
        record |= {"tracebacks": sum(x.get("traceback", 0) for x in results.values()), "wrong": wrong, "seeds": results}
        keep(record, wanted.out)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
