"""Every example of docs/howto/extending.md, executed as it stands."""

import copy
import importlib
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gymnasium import spaces
from hydra.core.global_hydra import GlobalHydra
from toys import mostly_long

from pgsuite import algorithms
from pgsuite.app import cli
from pgsuite.app.train import train
from pgsuite.components import Component
from pgsuite.nn.configs import MLPPolicyConfig
from pgsuite.nn.normalize import Standardize
from pgsuite.nn.optim import make_optimizer
from pgsuite.settings import flatten
from pgsuite.training import checkpoint

PAGE = (Path(__file__).parents[1] / "docs" / "howto" / "extending.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.M | re.S)
FILES = {code.split("\n", 1)[0].removeprefix("# "): code for kind, code in BLOCKS if kind == "python"}
FILES |= dict(re.findall(r"^`(configs/\S+)`:\n\n```yaml\n(.*?)^```", PAGE, re.M | re.S))
COMMANDS = [line for kind, code in BLOCKS if kind == "sh" for line in code.splitlines()]
START = ["python", "-m", "pgsuite", "train"]
CHECKS = [
    (path.removesuffix(".py"), name)
    for path, code in FILES.items()
    for name in re.findall(r"^def (test_\w+)\(\)", code, re.M)
]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory outside the repository that holds every file of the page."""
    for path, code in FILES.items():
        sys.modules.pop(path.removesuffix(".py"), None)  # another test may have one of this name
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for path in FILES:
        sys.modules.pop(path.removesuffix(".py"), None)


def run(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    GlobalHydra.instance().clear()
    cli.main(train, "train")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_trains(package: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    words = shlex.split(command)
    assert words[:4] == START
    run(monkeypatch, [*words[4:], "num_envs=8", "horizon=32", "total_steps=512", "hydra.run.dir=run"])
    assert json.loads((package / "run" / "summary.json").read_text())["status"] == "finished"
    for own in re.findall(r"my_\w+\.\w+", command):
        assert own in (package / "run" / "config.yaml").read_text()
    assert ("own.txt" in command) == (package / "run" / "own.txt").exists()


@pytest.mark.parametrize(("module", "name"), mostly_long(CHECKS, *(x for x in CHECKS if "relies_on" not in x[1])))
def test_every_check_passes(package: Path, module: str, name: str) -> None:
    getattr(importlib.import_module(module), name)()


def test_every_file_is_used() -> None:
    """By a command, a configuration, or a check."""
    used = " ".join(COMMANDS) + " ".join(FILES.values())
    assert all(f"{path.removesuffix('.py')}" in used for path in FILES if path.startswith("my_"))
    assert len(COMMANDS) > 15 and len(CHECKS) == 3 and len(FILES) > 10


def test_the_methods_to_override_are_there() -> None:
    rows = re.findall(r"^\| [^|]+ \| ([^|]+) \| [^|]+ \|$", PAGE, re.M)
    named = [match for row in rows for match in re.findall(r"`(\w+)\(([\w, ]*)\)`", row)]
    assert len(named) > 8
    for name, parameters in named:
        found = [
            getattr(algorithms, cls) for cls in ("RND", "A2C", "PPO", "TRPO") if hasattr(getattr(algorithms, cls), name)
        ]
        assert found, name
        code = getattr(found[-1], name)
        code = getattr(code, "__wrapped__", code)
        assert code.__code__.co_varnames[1 : code.__code__.co_argcount] == tuple(parameters.split(", ")), name


def policy(**settings: Any) -> None:
    obs_norm = Standardize(spaces.Box(-1.0, 1.0, (4,)))
    MLPPolicyConfig(**settings).build(obs_norm, spaces.Discrete(2), torch.Generator())


def optimizer(optim: Component) -> None:
    make_optimizer([torch.nn.Linear(1, 1)], 1e-3, optim)


WRONG: list[tuple[Callable[..., None], dict[str, Any], str]] = [
    (policy, {"body": "my_networks.Furier"}, "is no subclass of pgsuite.nn.network.Body"),
    (policy, {"body": "my_netwroks.Fourier"}, "policy.body=my_netwroks.Fourier cannot be imported: No module named"),
    (policy, {"body": {"_target_": "my_networks.Fourier", "frequences": 3}}, "policy.body; did you mean frequencies"),
    (
        policy,
        {"body": {"_target_": "my_networks.Fourier", "frequencies": 0}},
        "policy.body.frequencies must be a whole",
    ),
    (policy, {"body": {"frequencies": 3}}, "no policy.body ''; a class by its dotted path"),
    (policy, {"body": 3}, "body must be a word or settings by name or null, got 3"),
    (policy, {"recurrent": "gruu"}, "no policy.recurrent 'gruu'; did you mean gru, or a class by its dotted path"),
    (policy, {"recurrent": "my_networks.Fourier"}, "is no subclass of pgsuite.nn.recurrent.Memory"),
    (policy, {"recurrent": {"_target_": "gru", "gates": 3}}, "no setting 'gates' in policy.recurrent"),
    (policy, {"distribution": "my_networks.Fourier"}, "is no subclass of pgsuite.nn.heads.Head"),
    (optimizer, {"optim": "torch.optim.LBFGS"}, "LBFGS computes the loss again by a closure"),
    (optimizer, {"optim": "torch.optim.Adamw"}, "is no subclass of"),
    (optimizer, {"optim": {"_target_": "torch.optim.AdamW", "weight_decoy": 1}}, "did you mean weight_decay"),
    (optimizer, {"optim": {"_target_": "adam", "beta1": 2}}, "algo.optim.beta1 must be a number from 0 to 1, got 2"),
    (optimizer, {"optim": {"_target_": "torch.optim.AdamW", "lr": 1}}, "no setting 'lr' in algo.optim"),
]


@pytest.mark.parametrize(("make", "settings", "message"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_mistakes_with_components_get_one_message(
    package: Path, make: Callable[..., None], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**settings)


def test_a_constructor_that_does_not_fit_is_told_of_by_name(package: Path) -> None:
    (package / "my_misfits.py").write_text(
        "from __future__ import annotations\n"
        "from pgsuite.nn.network import Body\n"
        "class Short(Body):\n    def __init__(self, obs_norm): ...\n"
        "class Unknown(Body):\n    def __init__(self, obs_norm, name, generator, *, width: Cuont = 3): ...\n"
    )
    with pytest.raises(ValueError, match=r"policy.body: the constructor of my_misfits.Short: too many positional"):
        policy(body="my_misfits.Short")
    with pytest.raises(ValueError, match=r"constructor of my_misfits.Unknown: name 'Cuont' is not defined"):
        policy(body={"_target_": "my_misfits.Unknown", "width": 3})


def test_components_are_shown_by_help_and_among_hyperparameters(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["env=CartPole", "algo.optim={_target_: torch.optim.AdamW, weight_decay: 0.01}"]
    run(monkeypatch, [*chosen, "--help"])
    text = capsys.readouterr().out
    assert "algo.optim" in text and "weight_decay: 0.01" in text and "the policy and its network" in text
    flat = flatten(
        {"algo": {"_target_": "pgsuite.algorithms.PPO", "optim": {"_target_": "torch.optim.AdamW", "eps": 1}}}
    )
    assert flat == {"algo": "PPO", "algo.optim": "torch.optim.AdamW", "algo.optim.eps": 1}


@pytest.mark.long
def test_a_run_with_an_optimizer_of_torch_is_resumed_bit_for_bit(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ["env=CartPole", "num_envs=8", "horizon=32", "algo.optim=torch.optim.AdamW", "algo.lr=1e-3"]
    run(monkeypatch, [*short, "total_steps=1024", "hydra.run.dir=whole"])
    run(monkeypatch, [*short, "total_steps=512", "hydra.run.dir=torn"])
    run(monkeypatch, ["resume=torn", "total_steps=1024"])
    one, two = (checkpoint.newest(package / name, print)[1]["algorithm"] for name in ("whole", "torn"))
    assert all(torch.equal(x, two["policy"][name]) for name, x in one["policy"].items())
    assert {"0.exp_avg", "0.step"} <= one["optimizer"].keys()


def test_a_body_whose_features_are_of_another_size_is_refused(package: Path) -> None:
    (package / "my_wide.py").write_text(FILES["my_networks.py"].replace("size=2 * frequencies", "size=frequencies"))
    with pytest.raises(ValueError, match=r"have the shape \(1, 128\), and by size=64 they must have \(1, 64\)"):
        policy(body="my_wide.Fourier")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["algo.optim={_target_: my_optimizers.Lion, beta1: x}"], "algo.optim.beta1 must be a number from 0 to 1"),
        (["policy.body=my_networks.Fourier", "policy.hidden=[8]"], "policy.hidden would have no effect with policy"),
        (["algo.optim=torch.optim.AdamW", "execution=cuda_graph"], "cuda_graph"),
    ],
)
def test_so_they_do_on_the_command_line(
    package: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match=re.escape(message)):
        run(monkeypatch, ["env=CartPole", "num_envs=8", "total_steps=256", "hydra.run.dir=run", *arguments])
    assert not (package / "run").exists()


def test_an_optimizer_of_torch_is_restored_and_skips_what_it_is_told_to() -> None:
    layers = [torch.nn.Linear(3, 2, dtype=torch.float64) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    choice: Component = {"_target_": "torch.optim.AdamW", "weight_decay": 0.1}
    one, two = (make_optimizer([layer], 0.1, choice) for layer in layers)

    def loss(layer: torch.nn.Linear, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return layer(x).square().mean(), {}

    x = torch.randn(5, 3, dtype=torch.float64)
    for _ in range(3):
        one.step(loss, layers[0], x)
    two.flat.copy_(one.flat)
    two.load_state_dict(one.state_dict())
    reference = copy.deepcopy(layers[0])
    torchs = torch.optim.AdamW(reference.parameters(), 0.05, weight_decay=0.1)
    state = {i: {k: v.clone() for k, v in one.inner.state[p].items()} for i, p in enumerate(one.params)}  # pyright: ignore
    torchs.load_state_dict({"state": state, "param_groups": torchs.state_dict()["param_groups"]})
    for optimizer, layer in ((one, layers[0]), (two, layers[1])):
        optimizer.lr_scale.fill_(0.5)
        optimizer.step(loss, layer, x)
    loss(reference, x)[0].backward()
    torchs.step()
    assert torch.equal(one.flat, two.flat)
    assert torch.allclose(reference.weight, layers[0].weight, atol=1e-12)
    before = one.flat.clone()
    one.skip_mask = torch.tensor(True)
    one.step(loss, layers[0], x)
    assert torch.equal(before, one.flat)
