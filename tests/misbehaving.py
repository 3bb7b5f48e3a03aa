"""Environments that misbehave: each is answered in one message that says what, where, and what would be right, or does
no harm.

    python tests/misbehaving.py --out benchmarks/results/robustness/misbehaving.json

Each is trained on in this process and in workers, but for those that end or block their process, and a few are filmed.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fuzz
import gymnasium
import numpy as np
from gymnasium import spaces

BASE = ["env=gym", "env.import=misbehaving", "env.id=Odd-v0", "num_envs=2", "horizon=8", "total_steps=64"]
AT = 3  # the step at which a fault shows
OBS = spaces.Box(-1, 1, (2,), np.float32)
IMAGE = spaces.Box(0, 255, (12, 12, 3), np.uint8)


@dataclass
class Case:
    """A misbehaviour, and what a run is to say about it; an empty ``says`` means that the run takes no harm."""

    says: str = ""
    step: Callable[[tuple[Any, ...]], Any] | None = None  # from the right results of a step to the wrong ones
    reset: Callable[[Any], Any] | None = None  # from the right results of a reset to the wrong ones
    made: Callable[[Any], object] | None = None  # called with the environment when it is constructed
    own: bool = True  # whether the message begins with the place in this file
    ways: Sequence[int] = (0, 2)  # env.workers=
    given: Sequence[str] = ()  # further settings
    film: str = ""  # what an evaluation with a film is to say


def fail(error: BaseException) -> Any:
    raise error


def setting(**attributes: Any) -> Callable[[Any], None]:
    """Give an environment these attributes."""
    return lambda env: vars(env).update(attributes)


def reward(x: Any) -> Callable[[tuple[Any, ...]], Any]:
    return lambda r: (r[0], x, *r[2:])


def obs(x: Any) -> Any:
    """An observation that is given by the steps from ``AT`` on."""
    return {"step": lambda r: (x, *r[1:])}


def read(name: str) -> object:
    return Path(name).read_text()


def recurse(env: Any) -> Any:
    return recurse(env)


ONE = "it must be one number"
FIVE = "step(action) must return observation, reward, terminated, truncated and a dictionary"
TWO = "reset(seed=, options=) must return an observation and a dictionary"
STEP = "Odd-v0 (environment 0) at its step 3"
RESET = "Odd-v0 (environment 0) at its reset"
MADE = "gymnasium cannot make Odd-v0: "
DISCRETE: dict[str, Any] = {"made": setting(observation_space=spaces.Discrete(4, start=1), right=1)}
PARTS = spaces.Dict({"arm": OBS, "cam.front": IMAGE, "keys": IMAGE})
RIGHT = {"arm": np.zeros(2, np.float32), "cam.front": np.zeros((12, 12, 3), np.uint8)}
RIGHT |= {"keys": RIGHT["cam.front"]}
RIGHT_BUT_ARM = {key: x for key, x in RIGHT.items() if key != "arm"}
DICT: dict[str, Any] = {"made": setting(observation_space=PARTS, right=RIGHT)}
FILM = "return "

CASES: dict[str, Case] = {
    # rewards
    "reward of shape (1,)": Case(f"{STEP} gave a reward of shape (1,); {ONE}", step=reward(np.ones(1))),
    "reward of shape (2,)": Case(f"{STEP} gave a reward of shape (2,); {ONE}", step=reward(np.ones(2))),
    "reward as a list": Case(f"{STEP} gave a reward of shape (2,); {ONE}", step=reward([1.0, 2.0])),
    "reward None": Case(f"{STEP} gave the reward None; {ONE}", step=reward(None)),
    "reward text": Case(f"{STEP} gave the reward 'good'; {ONE}", step=reward("good")),
    "reward complex": Case(f"{STEP} gave the reward 1j; {ONE}", step=reward(1j)),
    "reward a dictionary": Case(f"{STEP} gave the reward {{'a': 1}}; {ONE}", step=reward({"a": 1})),
    "reward NaN": Case(f"{STEP} gave the reward nan", step=reward(math.nan)),
    "reward infinite": Case(f"{STEP} gave the reward -inf", step=reward(-math.inf)),
    "reward a 0-d array": Case(step=reward(np.array(1.0, np.float32))),
    "reward true": Case(step=reward(np.bool_(True))),
    # ends
    "terminated None": Case(
        f"{STEP} gave terminated=None; it must be true or false", step=lambda r: (*r[:2], None, *r[3:])
    ),
    "terminated text": Case(f"{STEP} gave terminated='no'", step=lambda r: (*r[:2], "no", *r[3:])),
    "truncated an array": Case(
        f"{STEP} gave truncated=[False False]", step=lambda r: (*r[:3], np.zeros(2, bool), r[4])
    ),
    "truncated a count": Case(f"{STEP} gave truncated=7; it must be true or false", step=lambda r: (*r[:3], 7, r[4])),
    # results of a step
    "old step with four results": Case(f"{STEP} gave (array", step=lambda r: (*r[:3], r[4])),
    "old step under a time limit": Case(FIVE, step=lambda r: (*r[:3], r[4]), given=["env.max_episode_steps=9"]),
    "step gives None": Case(f"{STEP} gave None; {FIVE}", step=lambda r: None),
    "step raises": Case(f"{STEP} raised KeyError: 'no such joint'", step=lambda r: fail(KeyError("no such joint"))),
    "step raises in many lines": Case(f"{STEP} raised ValueError: a b", step=lambda r: fail(ValueError("a\n\n  b"))),
    "step raises without words": Case(f"{STEP} raised AssertionError", step=lambda r: fail(AssertionError())),
    "step exits": Case(f"{STEP} raised SystemExit: 3", step=lambda r: fail(SystemExit(3))),
    "step recurses for ever": Case(f"{STEP} raised RecursionError", step=recurse),
    "step opens a missing file": Case(f"{STEP} raised FileNotFoundError", step=lambda r: read("data.csv")),
    "step has no memory": Case(f"{STEP} raised MemoryError", step=lambda r: fail(MemoryError())),
    "step raises what cannot be sent": Case(
        "raised Odd: lock", step=lambda r: fail(type("Odd", (Exception,), {})("lock"))
    ),
    # observations
    "observation of another shape": Case(
        f"{STEP} gave an observation of shape (3,); its space declares (2,)", **obs(np.zeros(3))
    ),
    "observation a number": Case(f"{STEP} gave an observation of shape (); its space declares (2,)", **obs(0.5)),
    "observation complex": Case(f"{STEP} gave an observation that is [0.+1.j", **obs(np.full(2, 1j))),
    "observation text": Case(f"{STEP} gave an observation that is 'left'; it must hold numbers", **obs("left")),
    "observation None": Case(f"{STEP} gave an observation that is None; it must hold numbers", **obs(None)),
    "observation ragged": Case(f"{STEP} gave an observation that is no array", **obs([[1.0], [1.0, 2.0]])),
    "observation NaN": Case(f"{STEP} gave an observation that is not finite: [nan nan]", **obs(np.full(2, math.nan))),
    "observation float64": Case(**obs(np.zeros(2))),
    "observation out of bounds": Case(**obs(np.full(2, 9.0, np.float32))),
    "observation a list": Case(**obs([0.0, 0.5])),
    "number out of range": Case(
        f"{STEP} gave an observation of 9; its space declares Discrete(4, start=1)", **DISCRETE, **obs(9)
    ),
    "number with a fraction": Case(
        f"{STEP} gave an observation of dtype float64; its space declares int64", **DISCRETE, **obs(1.5)
    ),
    "image of floats": Case(
        f"{STEP} gave an observation with 'cam.front' of dtype float64; its space declares uint8",
        **DICT,
        **obs(RIGHT | {"cam.front": np.zeros((12, 12, 3))}),
    ),
    "entry missing": Case(
        f"{STEP} gave an observation without 'arm', which its space declares", **DICT, **obs(RIGHT_BUT_ARM)
    ),
    "dictionary instead of an array": Case(f"{STEP} gave an observation that is {{'arm': 1}}", **obs({"arm": 1})),
    "array instead of a dictionary": Case(f"{STEP} gave an observation that is [0. 0.]", **DICT, **obs(np.zeros(2))),
    "images with dots and names of torch": Case(**DICT),
    # resets
    "old reset": Case(f"{RESET} gave [0. 0.]; {TWO}", reset=lambda r: r[0]),
    "reset without seed": Case(f"{RESET} raised TypeError", made=setting(reset=lambda: (np.zeros(2, np.float32), {}))),
    "reset gives None": Case(f"{RESET} gave None; {TWO}", reset=lambda r: None),
    "reset NaN": Case(f"{RESET} gave an observation that is not finite", reset=lambda r: (np.full(2, math.nan), {})),
    "reset of another shape": Case(f"{RESET} gave an observation of shape (3,)", reset=lambda r: (np.zeros(3), {})),
    "reset raises": Case(f"{RESET} raised RuntimeError: no robot", reset=lambda r: fail(RuntimeError("no robot"))),
    # construction
    "constructor raises": Case(f"{MADE}RuntimeError: no licence", made=lambda env: fail(RuntimeError("no licence"))),
    "constructor opens a missing file": Case(f"{MADE}FileNotFoundError", made=lambda env: read("data.csv")),
    "constructor exits": Case(f"{MADE}SystemExit: 2", made=lambda env: fail(SystemExit(2))),
    "no observation space": Case(
        "must have a gymnasium space as its observation_space", made=setting(observation_space=None)
    ),
    "a space that is a number": Case("must have a gymnasium space as its action_space", made=setting(action_space=4)),
    "spaces that differ": Case(
        "spaces", made=lambda env: vars(env).update(action_space=spaces.Discrete(next(COUNT))), own=False, ways=(0,)
    ),
    "metadata None": Case("must have a dictionary as its metadata, and it is None", made=setting(metadata=None)),
    "no action mask": Case("gave no action_mask in its info", given=["env.action_mask=true"]),
    "an unknown option": Case("unexpected keyword argument 'size'", given=["+env.options.size=3"], own=False),
    # packages
    "an option that a package refuses": Case(
        "gymnasium cannot make FrozenLake-v1: KeyError: 'bad', with env.options map_name=bad",
        given=["env.import=null", "env.id=FrozenLake-v1", "+env.options.map_name=bad"],
        own=False,
    ),
    "a package divides by zero": Case(
        "gymnasium cannot make Reacher-v5: ",
        given=["env.import=null", "env.id=Reacher-v5", "+env.options.frame_skip=0"],
        own=False,
    ),
    "a module with an error of syntax": Case(
        "broken_syntax.py:2: SyntaxError", given=["env.import=broken_syntax"], own=False
    ),
    "a module that raises": Case("broken_import.py:1: NameError", given=["env.import=broken_import"], own=False),
    "a module that exits": Case("broken_exit.py:2: SystemExit", given=["env.import=broken_exit"], own=False),
    # processes
    "a worker that dies": Case(
        "the worker of environments 0 to 0 died (exit code 3)", step=lambda r: os._exit(3), own=False, ways=(2,)
    ),
    "a step that hangs": Case(
        "the worker of environments 0 to 0 has not answered for 2 s",
        step=lambda r: time.sleep(999),
        own=False,
        ways=(2,),
        given=["env.timeout=2"],
    ),
    "a constructor that hangs": Case(
        "the worker of environments 0 to 0 has not answered for 2 s",
        made=lambda env: time.sleep(999),
        own=False,
        ways=(2,),
        given=["env.timeout=2"],
    ),
    "too many workers": Case(
        "env.workers must be a whole number from 0 to 256", given=["env.workers=99999"], own=False, ways=(0,)
    ),
    "a time limit without workers": Case(
        "env.timeout needs env.workers=1 or more", given=["env.timeout=2"], own=False, ways=(0,)
    ),
    # films
    "render_fps None": Case(made=setting(metadata={"render_modes": ["rgb_array"], "render_fps": None}), film=FILM),
    "render_fps text": Case(made=setting(metadata={"render_modes": ["rgb_array"], "render_fps": "fast"}), film=FILM),
    "render_modes None": Case(made=setting(metadata={"render_modes": None}), film="cannot be drawn"),
    "render gives None": Case(made=setting(frame=None), film="its render() gives NoneType and not bytes [H, W, 3]"),
}
COUNT = iter(range(2, 10_000))
MODULES = {"syntax": "x = 1\nx = = 2\n", "import": "undefined()\n", "exit": "import sys\nsys.exit(1)\n"}


class Odd(gymnasium.Env[Any, Any]):
    """Does what is right, until it does what its case says."""

    observation_space, action_space = OBS, spaces.Discrete(2)
    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012

    def __init__(self, case: str, render_mode: str | None = None) -> None:
        self.case, self.t, self.render_mode = CASES[case], 0, render_mode
        self.right: Any = np.zeros(2, np.float32)
        self.frame: Any = np.zeros((64, 64, 3), np.uint8)
        if self.case.made is not None:
            self.case.made(self)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        result = (self.right, {})
        return result if self.case.reset is None else self.case.reset(result)

    def step(self, action: Any) -> Any:
        self.t += 1
        result = (self.right, 1.0, self.t % 5 == 0, False, {})
        return result if self.case.step is None or self.t < AT else self.case.step(result)

    def render(self) -> Any:
        return self.frame


if __name__ != "__main__":
    gymnasium.register("Odd-v0", "misbehaving:Odd")


@dataclass
class Outcome:
    said: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def attempt(name: str, ways: Sequence[int] = (0, 2)) -> Outcome:
    """Train on a case in these of its ways, and film it, each time in a directory of its own."""
    case, outcome = CASES[name], Outcome()
    options = [] if "env.import=null" in case.given else [f'+env.options.case="{name}"']
    for workers in (x for x in case.ways if x in ways):
        run = tempfile.mkdtemp(dir=".")
        line = [*BASE, f"env.workers={workers}", *options, *case.given, f"hydra.run.dir={run}", "recover.attempts=0"]
        judge(outcome, f"{name}, {workers} workers", fuzz.answer("train", line, iterations=3), case.says, case.own)
        if case.film:
            given = fuzz.answer("evaluate", [f"run={run}", "episodes=1", "video=film.gif"])
            judge(outcome, f"{name}, filmed", given, case.film.removeprefix(FILM), own=False)
    return outcome


def judge(outcome: Outcome, what: str, given: fuzz.Answer, says: str, own: bool) -> None:
    """Add an answer to an outcome, with what is wrong about it if anything is."""
    said = (given.said or given.kind).replace(f"{Path(__file__).parents[1]}/", "")  # so that a record has no place
    outcome.said.append(f"{what}: {said}")
    wrong = given.wrong
    if not says and given.kind not in ("trained", "accepted"):
        wrong = wrong or "is to do no harm"
    if says and not (says in given.said and (not own or f"{Path(__file__).name}:" in given.said)):
        wrong = wrong or f"is to say {says!r}{' and where' if own else ''}"
    if wrong:
        outcome.wrong.append(f"{what}: {wrong}\n    {given.kind}: {given.said}")


@contextlib.contextmanager
def workshop() -> Any:
    """A directory with modules that cannot be imported, where these environments are found."""
    here = str(Path(__file__).parent)
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        for name, text in MODULES.items():
            Path(f"broken_{name}.py").write_text(text)
        sys.path[:0] = [here, scratch]
        try:
            yield
        finally:
            sys.path[:2] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="names of cases; all without")
    parser.add_argument("--out", type=Path)
    wanted = parser.parse_args()
    out = wanted.out and wanted.out.resolve()
    said: list[str] = []
    wrong: list[str] = []
    with workshop():
        for name in wanted.cases or CASES:
            outcome = attempt(name)
            said += outcome.said
            wrong += outcome.wrong
            print(*outcome.said, *(f"WRONG {x}" for x in outcome.wrong), sep="\n", flush=True)
    print(f"{len(wanted.cases or CASES)} cases, {len(said)} runs, {len(wrong)} wrong")
    if out is not None:
        sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
        from record import keep, source  # pyright: ignore[reportMissingImports]

        keep(source() | {"cases": len(CASES), "runs": len(said), "wrong": wrong, "said": said}, out)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    from misbehaving import main  # so that the registered environments and the cases are those of one module

    main()
