"""A stranger's run directory runs no code of its own, wherever it is given; one's own is never questioned."""

import importlib
import io
import json
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fuzz
import pytest
import torch
import yaml
from toys import mostly_long

import pgsuite
from pgsuite import trust
from pgsuite.errors import UserError
from pgsuite.nn.transformer import LanguageModel, Transformer
from pgsuite.rlhf import files
from pgsuite.training import checkpoint

HARM = Path("harmed")
LINK = Path("mean")  # what os.symlink makes if it is called as a reward is
RUN = Path("runs", "stranger")  # importable from the working directory, as runs.stranger
EVIL = "runs.stranger.evil"
CODE = f"""
import pathlib
pathlib.Path("{HARM}").touch()
from dataclasses import dataclass
from pgsuite.algorithms import PPO
from pgsuite.envs.tasks import CartPole
from pgsuite.nn.configs import CriticConfig, MLPPolicyConfig
from pgsuite.nn.heads import CategoricalHead
from pgsuite.nn.network import Body
from pgsuite.nn.optim import Adam
from pgsuite.nn.recurrent import GRU
from pgsuite.training.callbacks import Checkpoint
from pgsuite.training.trainer import Callback
@dataclass(kw_only=True)
class Watch(Callback):
    x: int = 0
"""
TARGETS = {
    "checkpoint": "Checkpoint",
    "critic": "CriticConfig",
    "policy": "MLPPolicyConfig",
    "algo": "PPO",
    "algo.estimator": "Adam",
    "env": "CartPole",
    "evaluation": "Checkpoint",
    "logging.wandb": "Checkpoint",
    "recover": "Checkpoint",
    "reference": "Checkpoint",
    "": "Checkpoint",
}
COMPONENTS = {
    "algo.optim": "Adam",
    "critic.body": "Body",
    "critic.recurrent": "GRU",
    "policy.body": "Body",
    "policy.distribution": "CategoricalHead",
    "policy.recurrent": "GRU",
}
GYM = {"_target_": "pgsuite.envs.Gym", "id": "CartPole-v1"}
LANGUAGE = {
    "_target_": "pgsuite.rlhf.Language",
    "prompts": "pgsuite.rlhf.corpus:prompts",
    "tokens": "pgsuite.rlhf.corpus:vocabulary",
    "reward": "pgsuite.rlhf.scorer:score",
    "held_out": None,
}
PLACES: dict[str, Any] = {f"{key}._target_".lstrip("."): f"{EVIL}.{name}" for key, name in TARGETS.items()}
PLACES |= {key: f"{EVIL}.{name}" for key, name in COMPONENTS.items()}
PLACES |= {
    "policy.distribution.settings": {"policy.distribution": {"_target_": f"{EVIL}.CategoricalHead"}},
    "callbacks": {"callbacks": {"mine": {"_target_": f"{EVIL}.Watch"}}},
    "loggers": {"loggers": {"mine": {"_target_": f"{EVIL}.Watch"}}},
    "env.import": {"env": GYM | {"import": EVIL}},
    "env.import in workers": {"env": GYM | {"import": EVIL, "workers": 1}},
    "env.id": {"env": GYM | {"id": f"{EVIL}:CartPole-v1"}},
    "env.wrappers": {"env": GYM | {"wrappers": [f"{EVIL}.Wrapper"]}},
    "env.wrappers in workers": {"env": GYM | {"wrappers": [f"{EVIL}.Wrapper"], "workers": 1}},
    "env.id native": {"env": GYM | {"id": f"{EVIL}:CartPole-v1", "native": True}},
    "env.entry": {"env": {"_target_": "pgsuite.envs.TorchNative", "entry": f"{EVIL}:CartPole"}},
    "env.entry of ours": {
        "env": {
            "_target_": "pgsuite.envs.TorchNative",
            "entry": "pgsuite.app.build:subprocess.Popen",
            "options": {"args": ["touch", str(HARM)]},
        }
    },
    **{f"env.{key}": {"env": LANGUAGE | {key: f"{EVIL}:x"}} for key in ("prompts", "tokens", "reward", "scorer")},
    "env.held_out": {"env": LANGUAGE | {"held_out": f"{EVIL}:x"}},
    "env.reward of ours": {
        "env": LANGUAGE | {"reward": "pgsuite.app.build:subprocess.os.symlink", "rewards": ["anything"]}
    },
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, with a crash bundle."""
    home = tmp_path_factory.mktemp("made")
    short = ["env=CartPole", "num_envs=2", "horizon=8", "total_steps=64", "policy.hidden=[4]", "critic.hidden=[4]"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert fuzz.answer("train", [*short, "hydra.run.dir=run"], iterations=2).kind == "trained"
        crash = ["algo.lr=1e30", "algo.max_grad_norm=null", "recover.attempts=0", "hydra.run.dir=crashed"]
        fuzz.answer("train", [*short, *crash], iterations=2)
    shutil.copy(home / "crashed" / "crash.pt", home / "run" / "crash.pt")
    return home / "run"


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory, importable, with a stranger's run in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(trust, "_foreign", set())
    shutil.copytree(made, tmp_path / RUN)
    (tmp_path / RUN / "evil.py").write_text(CODE)
    (tmp_path / "mine.py").write_text(CODE.split("\n", 3)[3])
    importlib.invalidate_caches()
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in ("runs", "mine")]:
        del sys.modules[name]


def put(config: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        config = config[parent]
    config[last] = value


def alter(changes: dict[str, Any], signature: str | None = None, run: Path = RUN) -> None:
    """Change settings in all files of a run, which are sealed again."""
    for path in [*run.glob("checkpoints/*.pt"), run / "crash.pt"]:
        state = torch.load(path, weights_only=True)
        for key, value in changes.items():
            put(state["config"], key, value)
        if signature is not None:
            state["signature"] = signature
        seal(path, state)
        (run / "config.yaml").write_text(yaml.safe_dump(state["config"]))


def seal(path: Path, state: Any, **options: Any) -> None:
    torch.save(state, path, **options)
    with path.open("r+b") as file:
        checkpoint.seal(file)


def doors(*arguments: str) -> dict[str, Callable[[], str]]:
    """What each way in says of the stranger's run."""

    def command(script: str, *own: str) -> Callable[[], str]:
        def ask() -> str:
            found = fuzz.answer(script, [*own, *arguments], iterations=1)
            assert not found.wrong, found
            return found.said

        return ask

    def load() -> str:
        try:
            pgsuite.load(RUN)
        except UserError as error:
            return str(error)
        return ""

    return {
        "load": load,
        "evaluate": command("evaluate", f"run={RUN}", "episodes=1", "deterministic=false"),
        "export": command("export", f"run={RUN}", "format=torch"),
        "replay": command("replay", f"crash={RUN}"),
        "resume": command("train", f"resume={RUN}", "total_steps=640"),
    }


EVERYWHERE = {"policy.distribution", "env.import", "callbacks", "algo.optim"}
# What is not needed to act is not even looked at.
SEES = {
    "load": {"policy._target_", "critic._target_", "policy.body", "policy.distribution", "policy.recurrent"},
    "resume": set(PLACES) - {"critic.recurrent"},
}


@pytest.mark.parametrize(
    "place", mostly_long(PLACES, *list(PLACES)[::4], "env.wrappers", "env.import", "policy.distribution")
)
def test_code_of_a_stranger_is_not_imported(folder: Path, place: str) -> None:
    change: Any = PLACES[place]
    alter(change if isinstance(change, dict) else {place: change})
    many = doors()
    few = {door: many[door] for door in ("evaluate" if place.startswith("env") else "load", "resume")}
    for door, ask in (many if place in EVERYWHERE else few).items():
        said = ask()
        assert not HARM.exists() and EVIL not in sys.modules and not LINK.is_symlink(), door
        if place in SEES.get(door, ()):
            assert said, door
            if EVIL in said:
                assert re.search(rf"{RUN}.* names {EVIL}[.:\w]* for [\w. ]+, which is not of pgsuite, .* trust=", said)


def test_it_would_be_if_nothing_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above prove nothing otherwise."""
    monkeypatch.setattr(trust.Source, "permits", lambda self, path: True)
    alter({"policy.distribution": f"{EVIL}.CategoricalHead"})
    pgsuite.load(RUN)
    assert HARM.exists()


@pytest.mark.parametrize(
    "given", mostly_long([True, f"{EVIL}.CategoricalHead", EVIL, ["elsewhere", "runs.stranger"]], True, EVIL)
)
def test_what_the_user_names_is_trusted(folder: Path, given: Any) -> None:
    alter({"policy.distribution": f"{EVIL}.CategoricalHead"})
    assert pgsuite.load(RUN, trust=given).restored.policy and HARM.exists()
    said = str(given).lower() if given is True else str(given).replace("'", "")
    for door, ask in doors(f"trust={said}").items():
        assert door == "load" or "trust" not in ask(), door
    assert pgsuite.evaluate(RUN, 1, trust=given)["episodes"] == 1
    assert pgsuite.Run(RUN, trust=given).evaluate(1)["episodes"] == 1


@pytest.mark.parametrize("given", [False, "evil", [f"{EVIL}.Body"], "runs.strange", ""])
def test_what_the_user_does_not_name_is_not(folder: Path, given: Any) -> None:
    alter({"policy.distribution": f"{EVIL}.CategoricalHead", "trust": True})
    with pytest.raises(UserError, match=f"trust={EVIL}.CategoricalHead, or trust=true"):
        pgsuite.load(RUN, trust=given)
    assert not HARM.exists()


def test_trust_is_of_one_call_and_not_kept_with_the_run(folder: Path) -> None:
    small = ["env=CartPole", "num_envs=2", "horizon=8", "total_steps=16", "trust=true", "hydra.run.dir=x"]
    assert fuzz.answer("train", small, iterations=2).kind == "trained"
    assert checkpoint.newest(Path("x"), print)[1]["config"]["trust"] is False and not pgsuite.Run("x").config["trust"]


def test_what_this_command_line_names_is_trusted_on_resume(folder: Path) -> None:
    shutil.copy(folder / "mine.py", RUN / "own.py")
    alter({"policy.distribution": "mine.CategoricalHead"})
    found = fuzz.answer("train", [f"resume={RUN}", "total_steps=640"], iterations=1)
    assert "mine.CategoricalHead for policy.distribution" in found.said and "mine" not in sys.modules
    named = [f"resume={RUN}", "total_steps=640", "policy.distribution=mine.CategoricalHead"]
    assert fuzz.answer("train", named, iterations=1).kind == "trained"


@pytest.mark.long
def test_a_run_of_ones_own_is_not_questioned_and_changed_by_another_is(folder: Path) -> None:
    own = ["env=CartPole", "num_envs=2", "horizon=8", "policy.distribution=mine.CategoricalHead"]
    train = [*own, "+callbacks.mine._target_=mine.Watch", "hydra.run.dir=mine_run"]
    assert fuzz.answer("train", [*train, "total_steps=64"], iterations=1).kind == "trained"
    run = Path("mine_run")
    assert pgsuite.load(run).restored.policy.head
    for script, option in (("evaluate", "episodes=1"), ("export", "format=torch")):
        assert fuzz.answer(script, ["run=mine_run", option]).kind == "accepted"
    assert fuzz.answer("train", ["resume=mine_run", "total_steps=640"], iterations=1).kind == "trained"
    (run / "crash.pt").symlink_to(checkpoint.newest(run, print)[0].absolute())
    alter({"policy.hidden": [4]}, run=run)
    with pytest.raises(UserError, match=r"trust=mine.CategoricalHead"):
        pgsuite.load(run)


def test_a_run_of_ones_own_in_this_process_is_trusted_without_a_signature(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "_key", lambda create: None)
    small: dict[str, Any] = {"policy.distribution": "mine.CategoricalHead"}
    run = pgsuite.train("ppo", "CartPole", num_envs=2, horizon=8, total_steps=16, folder="x", **small)
    assert run.policy and run.evaluate(1)
    with pytest.raises(UserError, match=r"trust=mine.CategoricalHead"):
        assert pgsuite.Run("x").policy


@pytest.mark.parametrize("signature", ["", "0" * 64, "\N{SNOWMAN}", 3])
def test_a_forged_signature_proves_nothing(folder: Path, signature: Any) -> None:
    alter({"policy.distribution": f"{EVIL}.CategoricalHead"}, signature)
    with pytest.raises(UserError, match="trust="):
        pgsuite.load(RUN)


def test_the_key_is_made_once_and_for_its_owner_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(trust, "_foreign", set())
    config = {"a": [1, 2.5, None], "b": "x"}
    assert trust.sign(config) is None and not list(tmp_path.iterdir())  # nothing of anybody's: no key in the home
    trust._foreign.add("mine.X")
    signature, path = trust.sign(config), tmp_path / "pgsuite" / "key"
    assert signature == trust.sign(dict(reversed(config.items()))) and path.stat().st_mode & 0o777 == 0o600
    assert [path] == list(path.parent.iterdir())
    assert trust._signed(config, signature) and not trust._signed(config | {"b": "y"}, signature)
    path.chmod(0o644)  # another could have read it
    assert not trust._signed(config, signature) and trust.sign(config) is None
    path.unlink()
    assert not trust._signed(config, signature) and not path.exists()


def test_optimizers_of_torch_are_fine() -> None:
    assert trust.Source("x").permits("torch.optim.AdamW") and not trust.Source("x").permits("torch.hub.load")
    assert not trust.Source("x").permits("torch.optimal.X") and not trust.Source("x").permits("pgsuites.X")


def test_everything_that_ships_is_permitted() -> None:
    """The names in configs/, so that a run with them is anybody's to load."""
    names = set()
    for path in (Path(__file__).parents[1] / "configs").rglob("*.yaml"):
        text = path.read_text()
        names |= set(re.findall(r"(?:/schema/|_target_: |import: |: )((?:pgsuite|ale_py)[\w.]*(?::[\w.]+)?)", text))
    assert len(names) > 30 and "pgsuite.rlhf.reward:RewardModel.load" in names
    assert all(map(trust.Source("x").permits, names))


def test_modules_are_imported_by_name_at_one_place() -> None:
    """Elsewhere only by names that are written in the code."""
    root = Path(pgsuite.__file__).parent
    found = [
        (str(path.relative_to(root)), call)
        for path in root.rglob("*.py")
        for call in re.findall(r"(?:import_module|__import__|run_path|locate_object)\((.*?)\)", path.read_text())
    ]
    by_name = {(path, call) for path, call in found if not call.startswith('"')}
    assert by_name == {
        ("__init__.py", "_HOMES[name]"),
        ("__main__.py", "COMMANDS[name][0]"),
        ("envs/physics/mujoco_warp.py", "name"),
        ("trust.py", "module"),
    }


# Files that are small until they are opened.


def bomb(path: Path, how: str) -> None:
    """A checkpoint in its form, with a hundred megabytes of zeros that take a hundred kilobytes or none."""
    state = torch.load(path, weights_only=True)
    buffer = io.BytesIO()
    torch.save(state | {"algorithm": torch.zeros(25_000_000)}, buffer)
    source = zipfile.ZipFile(buffer)
    if how == "compressed":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
            for member in source.infolist():
                target.writestr(member.filename, source.read(member))
    else:  # each member of the directory is the same bytes
        with zipfile.ZipFile(path, "w") as target:
            target.writestr("archive/data/0", bytes(100_000))
            for i in range(1, 1_000):
                info = zipfile.ZipInfo(f"archive/data/{i}")
                info.file_size = info.compress_size = 100_000
                info.header_offset, info.CRC = 0, target.infolist()[0].CRC
                target.filelist.append(info)
            target._didModify = True  # pyright: ignore[reportAttributeAccessIssue]
    assert path.stat().st_size < 1_000_000
    with path.open("r+b") as file:
        checkpoint.seal(file)


@pytest.mark.parametrize("how", ["compressed", "overlapping"])
def test_an_archive_that_unpacks_to_much_more_is_refused_unopened(
    folder: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = sorted(RUN.glob("checkpoints/*.pt"))[-1:]
    bomb(path, how)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened"))
    for given in (path, RUN / "crash.pt"):
        shutil.copy(path, given) if given != path else None
        with pytest.raises(UserError, match=r"bytes unpacks to 1\d\d,\d{3},\d{3}, which no file of ours does"):
            checkpoint.load(given)
    with pytest.raises(UserError, match="unpacks to"):
        files.load(path, "reward.pt", "reward model", "x")
    with pytest.raises(ValueError, match="unpacks to"):
        LanguageModel.load(path)


@pytest.mark.parametrize("door", ["load", "evaluate", "export", "replay", "resume"])
def test_settings_that_are_none_and_parts_that_do_not_fit_are_refused(folder: Path, door: str) -> None:
    paths = [*RUN.glob("checkpoints/*.pt"), RUN / "crash.pt"]
    states = [torch.load(path, weights_only=True) for path in paths]
    for path, state in zip(paths, states, strict=True):
        seal(path, state | {"config": [1]})
    assert "holds no settings by name, but list" in doors()[door]()
    for path, state in zip(paths, states, strict=True):
        seal(path, state | {"rollout": {"obs": torch.zeros(1)}} if path.name == "crash.pt" else state)
    assert door != "replay" or "does not fit the run that it says it is of: TypeError" in doors()[door]()


@pytest.mark.parametrize("how", ["within itself", "a billion times"])
def test_settings_without_end_are_refused(folder: Path, how: str) -> None:
    nest: list[Any] = [1]
    if how == "within itself":
        nest.append(nest)
    else:
        for _ in range(30):
            nest = [nest, nest]
    alter_last = sorted(RUN.glob("checkpoints/*.pt"))[-1]
    state = torch.load(alter_last, weights_only=True)
    state["config"]["policy"]["hidden"] = nest
    for path in (*RUN.glob("checkpoints/*.pt"), RUN / "crash.pt"):
        seal(path, state)
    for door, ask in doors().items():
        assert "settings without end" in ask(), door


def test_a_language_model_of_a_stranger_runs_no_code_either(folder: Path) -> None:
    model = LanguageModel(Transformer(8, 8, 1, 2, torch.Generator()), torch.Generator())
    model.save(folder / "model.pt")
    assert LanguageModel.load(folder / "model.pt").body.vocabulary == 8
    transformers = pytest.importorskip("transformers")
    from pgsuite.rlhf.env import PretrainedTokens
    from pgsuite.rlhf.policy import load

    config = transformers.GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained("directory")
    load("directory")
    weights = Path("directory", "model.safetensors")
    torch.save({"a": torch.zeros(1)}, weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(ValueError, match="is no causal language model of transformers"):
        load("directory")
    code = {"AutoConfig": "evil.X", "AutoModelForCausalLM": "evil.X", "AutoTokenizer": ["evil.X", None]}
    for name in ("config.json", "tokenizer_config.json"):
        Path("directory", name).write_text(json.dumps({"model_type": "x", "auto_map": code, "tokenizer_class": "X"}))
    shutil.copy(RUN / "evil.py", "directory/evil.py")
    for read in (load, PretrainedTokens):
        with pytest.raises(ValueError, match=r"trust_remote_code|is no causal language model"):
            read("directory")
    assert not HARM.exists()


def test_the_page_names_a_test_for_each_line() -> None:
    page = (Path(__file__).parents[1] / "docs" / "howto" / "security.md").read_text()
    rows = re.findall(r"^\| (?!-|\|)([^|]+) \| ([^|]+) \|$", page, re.M)
    assert len(rows) == 14
    for line, tests in rows:
        named = re.findall(r"`(?:(\w+\.py): )?(test_\w+)`", tests)
        assert named, line
        for file, name in named:
            assert f"def {name}(" in (Path(__file__).parent / (file or "test_trust.py")).read_text(), name
