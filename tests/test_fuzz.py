"""Whatever is written on a command line, it works or it is answered in one message.

A few dozen lines are tried by default; PGSUITE_FUZZ=1000 tries as many, and PGSUITE_FUZZ_SEED=1 other ones.
"""

import os
import random
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from test_cli import Cli
from test_cli import command as command

from pgsuite.runtime import cli, schema
from pgsuite.runtime.build import build
from pgsuite.runtime.evaluate import evaluate
from pgsuite.runtime.export import export

COUNT, SEED = int(os.environ.get("PGSUITE_FUZZ", 40)), int(os.environ.get("PGSUITE_FUZZ_SEED", 0))
LONGEST = 600  # characters of a message
ALGOS = ["ppo", "a2c", "npg", "trpo", "reinforce", "ppo_penalty"]
ENVS = ["CartPole", "Pendulum", "HalfCheetah", "gym"]

WORDS = """
0 1 -1 2 3 0.5 -0.5 1.0 1e-3 1e400 -1e400 1e308 1e-400 nan inf -inf .nan 9223372036854775807 9223372036854775808
1000000000000000000000000000000 0x10 1_000 1,2 007 true false yes null ~ '' "" ' " \\ = == : , [ ] { } [] {}
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
SIMPLE = "0 1 2 4 16 0.5 0.99 1e-3 10.0 true false null [8] [8,8] cpu auto gru lstm none linear adam tanh relu"
PLAUSIBLE = SIMPLE.split()
PLAUSIBLE += ["{linear:[1e-3,0]}", "{cosine:[0.1,0.01]}", "{piecewise:[[0,0.1],[1,0]]}", "squashed", "beta", "state"]


def keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Every setting, nested ones and those above them."""
    for key in node:
        yield f"{prefix}{key}"
        value = None if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key) else node[key]
        if isinstance(value, DictConfig):
            yield from keys(value, f"{prefix}{key}.")


class Known:
    """The settings of every command, of every method and environment."""

    def __init__(self) -> None:
        schema.register()
        with initialize_config_dir(str(cli.CONFIGS), version_base="1.3"):
            self.of = {name: sorted(keys(compose(name))) for name in ("evaluate", "export")}
            for algo in ALGOS:
                self.of[algo] = sorted(keys(compose("train", [f"algo={algo}", "env=CartPole"])))
            for env in ENVS:
                self.of[env] = [x for x in keys(compose("train", [f"env={env}"])) if x.startswith("env")]
        GlobalHydra.instance().clear()


def misspelt(draw: random.Random, key: str) -> str:
    at = draw.randrange(len(key))
    return draw.choice(
        [key[:at] + key[at + 1 :], key[:at] + draw.choice("x.@_é[") + key[at:], f"{key}.more", key.upper()]
    )


def line(draw: random.Random, command: str, known: Known) -> list[str]:
    """One command line: a choice or two that exist, and one to three overrides that need not."""
    overrides = [f"run={draw.choice(['run', 'run', 'nowhere', 'run/checkpoints'])}"] if command != "train" else []
    settings = known.of.get(command, [])
    if command == "train":
        algo, env = draw.choice(ALGOS), draw.choice(ENVS)
        settings = known.of[algo] + 3 * known.of[env]
        episodes = ["horizon=null"] if algo == "reinforce" else []
        overrides += ["num_envs=16", f"env={env}", f"algo={algo}", *episodes]
        overrides += ["env.id=CartPole-v1"] if env == "gym" else []
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        key = draw.choice([x for x in settings if draw.random() < 0.05 or not x.endswith("_target_")] or settings)
        key = misspelt(draw, key) if draw.random() < 0.1 else key
        value = draw.choice(NASTY if draw.random() < 0.6 else PLAUSIBLE)
        groups = [
            "algo",
            "env",
            "algo/estimator",
            "tuned",
            "algo@x",
            "schema",
            "schema/os.Path",
            "a/b/c",
            "hydra/launcher",
        ]
        other = f"{draw.choice(groups)}={draw.choice([value, misspelt(draw, draw.choice(ALGOS + ENVS))])}"
        overrides.append(
            draw.choices(
                [*(f"{sign}{key}={value}" for sign in ("", "+", "++", "~")), f"~{key}", value, key, other],
                [60, 8, 10, 2, 5, 3, 2, 10],
            )[0]
        )
    return overrides


def assemble(cfg: DictConfig) -> None:
    """All of a training run but the training."""
    build(cfg)


TASKS: dict[str, Callable[[DictConfig], None]] = {"train": assemble, "evaluate": evaluate, "export": export}


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Under which what would fill the machine fails at once."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.usefixtures("little_memory")
def test_no_command_line_ends_in_a_traceback(command: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command("train", "env=CartPole", "num_envs=2", "horizon=8", "total_steps=16", "hydra.run.dir=run")[0] == 0
    threads = torch.get_num_threads()
    monkeypatch.setattr("test_cli.train", assemble)
    draw, known, outcomes, wrong = random.Random(SEED), Known(), Counter[str](), []
    for _ in range(COUNT):
        which = draw.choices(list(TASKS), [8, 1, 1])[0]
        arguments = line(draw, which, known)
        try:
            code, out, err = command(which, *arguments)
        except Exception as error:
            wrong.append(f"{which} {arguments}\n    raised {type(error).__name__}: {str(error)[:300]}")
            continue
        said = err.strip()
        if os.environ.get("PGSUITE_FUZZ_SAY"):
            with command.capsys.disabled():
                print(which, *arguments, "->", said[:200] or "accepted", flush=True)
        outcomes["accepted" if code == 0 else "refused"] += 1
        if code and (not said.startswith("error: ") or "Traceback" in out + err or len(said) > LONGEST):
            wrong.append(f"{which} {arguments}\n    said ({len(said)}) {said[:700]}")
    torch.set_num_threads(threads)
    counts = f"{outcomes['accepted']} accepted, {outcomes['refused']} refused, {len(wrong)} wrong"
    print(f"\n{COUNT} command lines, seed {SEED}: {counts}")
    assert not wrong, f"{len(wrong)} of {COUNT}:\n" + "\n".join(wrong)
    assert outcomes["accepted"] and outcomes["refused"]
