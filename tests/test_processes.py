"""Training in several processes, which are one to whoever looks at what was learned."""

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kills
import pytest
import torch
from torch._C._distributed_c10d import TCPStore
from toys import ALL, PointMass, build, collector, mostly_long

from pgsuite import distributed
from pgsuite.algorithms import A2C, NPG, PPO, TRPO, Algorithm, Reinforce
from pgsuite.distributed import LostProcessError
from pgsuite.training import checkpoint

ROOT = Path(__file__).parents[1]
RUN = ["env=CartPole", "num_envs=4", "horizon=16", "total_steps=640", "checkpoint.every=128", "hydra.run.dir=run"]
LINUX = pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks into /proc")


class Two:
    """Two processes that are told what torchrun would tell them."""

    def __init__(self, start: Callable[[int, dict[str, str]], Any]) -> None:
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        told |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        self.processes = [start(rank, told | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]

    def join(self) -> list[int]:
        """The codes that they ended with."""
        for process in self.processes:
            process.join()
        return [process.exitcode for process in self.processes]


def train(folder: Path, *arguments: str) -> tuple[list[int], str]:
    """What two training processes end with, and what they say."""
    output = folder / "output.txt"
    output.unlink(missing_ok=True)
    codes = Two(lambda rank, told: kills.start(folder, list(arguments), variables=told)).join()
    return codes, output.read_text()


# Two equal one

CASES: dict[str, tuple[type[Algorithm], dict[str, Any]]] = {
    **{cls.__name__: (cls, {}) for cls in ALL},
    "REINFORCE with a critic": (
        Reinforce,
        {"baseline": "critic", "normalize_advantage": "batch", "max_grad_norm": 0.1},
    ),
    "PPO that stops early": (PPO, {"target_kl": 1e-4, "lr": {"adaptive": {"start": 3e-3, "kl": 1e-3}}}),
    "PPO, remembering": (PPO, {"recurrent": "lstm"}),
    "TRPO, remembering": (TRPO, {"recurrent": "gru"}),
    "A2C on one body": (A2C, {"shared": True}),
    "NPG on one body, remembering": (NPG, {"recurrent": "gru", "shared": True}),
    "TRPO, its switches the other way": (TRPO, {"fisher": "gauss-newton", "backtracking": "batched"}),
}


def learn(name: str) -> dict[str, torch.Tensor]:
    """What two updates come to, each from a rollout that the process sees its own environments of, which have more or
    less to show than those of the other one."""
    cls, given = CASES[name]
    options: dict[str, Any] = {"minibatches": 2, "epochs": 3} if issubclass(cls, PPO) else {}
    options |= {"critic_minibatches": 2, "critic_epochs": 2} if issubclass(cls, NPG | Reinforce) else {}
    look = {key: x for key, x in given.items() if key == "recurrent"}
    env, rank, world = PointMass(8, max_episode_steps=20), distributed.rank(), distributed.size()
    algorithm = build(cls, env, look=look | {"recurrent_size": 8}, **options | given)
    acting = collector(algorithm, env)
    scale = algorithm.reward_scale
    scale.discounted_return = scale.discounted_return[rank::world]
    for critic in algorithm.critics:
        critic.hidden_state = critic.hidden_state[rank::world]

    class Share:
        def collect(self, policy: Any) -> Any:
            whole = acting.collect(policy)
            whole.mask[10:, ::3] = False
            return whole[:, rank::world]

    found: dict[str, torch.Tensor] = {}
    for i in range(2):
        metrics = algorithm.iterate(Share())  # pyright: ignore[reportArgumentType]
        found |= {f"{key} {i}": distributed.mean(x.double()) for key, x in metrics.items()}
    parts = {"policy": algorithm.policy, "rewards": algorithm.reward_scale.moments}
    parts |= {f"critic {i}": part for i, part in enumerate(algorithm.critics)}
    state = {f"{key}.{name}": x for key, part in parts.items() for name, x in part.state_dict().items()}
    return found | {name: x for name, x in state.items() if not name.endswith(("hidden_state", "discounted_return"))}


def learn_everything(folder: str, told: dict[str, str]) -> None:
    """Leave what each process comes to in a file."""
    os.environ.update(told)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    shuffle = torch.randperm

    def in_pairs(size: int, **given: Any) -> torch.Tensor:
        """An order that puts in each minibatch what two processes have in theirs."""
        return (2 * shuffle(size // 2, **given).unsqueeze(1) + torch.arange(2)).flatten()

    if not told:
        torch.randperm = in_pairs
    with distributed.group():
        ends = distributed.gather({name: learn(name) for name in CASES})
        if ends is not None:
            torch.save(ends, Path(folder) / str(len(ends)))


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    """By case, what one process comes to, and then each of two."""
    folder = tmp_path_factory.mktemp("ends")
    alone = kills.fork(learn_everything, str(folder), {})
    assert Two(lambda rank, told: kills.fork(learn_everything, str(folder), told)).join() == [0, 0]
    alone.join()
    return torch.load(folder / "1") + torch.load(folder / "2")


@pytest.mark.parametrize("name", mostly_long(CASES, *list(CASES)[::2]))
def test_two_processes_equal_one(name: str, ends: list[dict[str, dict[str, torch.Tensor]]]) -> None:
    one, first, second = (end[name] for end in ends)
    assert not kills.differences(first, second)
    assert one.keys() == first.keys()
    for key, x in one.items():
        assert torch.allclose(x, first[key], rtol=1e-11, atol=1e-12), (key, float((x - first[key]).abs().max()))
    if "early" in name:
        assert any(float(one[f"epochs {i}"]) < 3 for i in range(2))


def leave(folder: str, told: dict[str, str]) -> None:
    """Lose the other process, and write down how many threads there were before, meanwhile and after."""
    os.environ.update(told)
    tasks, lost = Path("/proc/self/task"), None
    sys.modules.pop(late := "torch.distributed.nn.functional", None)  # the first optimizer brings it into a new process
    threads = [len(list(tasks.iterdir()))]
    try:
        with distributed.group():
            threads.append(len(list(tasks.iterdir())))
            importlib.import_module(late)
            if distributed.rank() == 1:
                sys.exit()
            distributed.gather(torch.ones(1000))
            distributed.gather(torch.ones(1000))
    except (LostProcessError, SystemExit) as error:
        lost = error
    threads.append(len(list(tasks.iterdir())))
    (Path(folder) / told["RANK"]).write_text(json.dumps([type(lost).__name__, threads]))


@LINUX
def test_who_leaves_too_early_is_missed_and_no_thread_stays_behind(tmp_path: Path) -> None:
    """A thread of gloo's that lives when Python shuts down now and then aborts the process."""
    assert Two(lambda rank, told: kills.fork(leave, str(tmp_path), told)).join() == [0, 0]
    names, threads = zip(*(json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)), strict=True)
    assert names == ("LostProcessError", "SystemExit")
    assert all(before == after < meanwhile for before, meanwhile, after in threads)


# From end to end

ENDS = {
    "ppo": [*kills.CASES["ppo"], "scale_reward=true", "algo.target_kl=0.01"],
    "trpo": kills.CASES["trpo"],
}
ENDS |= {case: kills.CASES[case] for case in kills.CASES if case not in ENDS and case != "ppo-overlap"}


@pytest.mark.parametrize("case", mostly_long(ENDS, "ppo"))
def test_two_processes_make_one_run_and_go_on_with_it_bit_for_bit(tmp_path: Path, case: str) -> None:
    codes, said = train(tmp_path, *ENDS[case], "hydra.run.dir=run")
    assert codes == [0, 0], said
    assert said.count("\nenv ") + said.startswith("env ") == 1 and "| 2 environments" in said
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["processes"]) == ("finished", 2) and summary["steps"] >= 960
    reference = kills.left_behind(run)
    parts = [reference["state"], *reference["state"]["others"]]
    assert [part["tracker"]["reward"].shape[0] for part in parts] == [2, 2]
    assert not kills.differences(*(part["algorithm"]["policy"] for part in parts))
    assert kills.differences(*(part["collector"]["env"] for part in parts))  # their environments are their own
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output.txt", "run"]

    (run / "summary.json").write_text(json.dumps(summary | {"status": "running"}))  # as if it had been killed
    checkpoint.numbered(run)[-1].unlink()
    codes, said = train(tmp_path, "resume=run")
    assert codes == [0, 0] and said.count("| exact") == 1, said
    again = kills.left_behind(run)
    assert not kills.differences(reference, again)

    if case == "ppo":
        kills.finish(tmp_path, ["resume=run", "total_steps=1200"])
        assert "| weights" in (tmp_path / "output.txt").read_text()  # alone


def test_what_does_not_divide_is_said_once(tmp_path: Path) -> None:
    codes, said = train(tmp_path, *RUN, "num_envs=5")
    assert codes == [1, 1]
    assert said.count("error:") == 1
    assert "num_envs=5, which counts those of all 2 processes" in said and "4, 6" in said
    assert not list(tmp_path.rglob("*.yaml"))


def test_what_went_wrong_in_both_is_said_once_and_names_what_is_there(tmp_path: Path) -> None:
    codes, said = train(tmp_path, "algo=ppo", *RUN, "algo.lr=1e30", "recover.attempts=0")
    assert codes == [1, 1]
    assert said.count("error: training diverged") == 1
    bundle = tmp_path / "run" / "crash.pt"
    assert f"crash={bundle} " in said and bundle.exists()


def member(folder: str, told: dict[str, str]) -> None:
    """Train; the second process is lost in its first life, once something is saved."""
    os.environ.update(told)
    arguments = ["algo=a2c", *RUN, "total_steps=6000", "resume=auto"]
    if os.environ["RANK"] == "1" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        threading.Thread(target=lose, args=(Path(folder) / "run",), daemon=True).start()
    kills.child(folder, arguments, None, {})


def lose(run: Path) -> None:
    while not list((run / checkpoint.FOLDER).glob("*.pt")):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_lost_process_ends_all_with_one_message(tmp_path: Path) -> None:
    codes = Two(lambda rank, told: kills.fork(member, str(tmp_path), told)).join()
    said = (tmp_path / "output.txt").read_text()
    assert codes == [1, -signal.SIGKILL], said
    assert said.count("error:") == said.count("error: a process of this run was lost (") == 1
    assert "Traceback" not in said
    checkpoint.load(checkpoint.numbered(tmp_path / "run")[-1])


def launch(folder: str) -> None:
    """What torchrun does, but for starting python anew."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    wanted = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id="test",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=1,
        monitor_interval=0.2,
        start_method="fork",
    )
    elastic_launch(wanted, member)(folder, {})


@pytest.mark.long
def test_a_restart_goes_on_by_itself(tmp_path: Path) -> None:
    process = kills.fork(launch, str(tmp_path))
    process.join()
    said = (tmp_path / "output.txt").read_text()
    assert process.exitcode == 0, said
    assert said.count("error:") <= 1  # where it was not killed before it could say so
    assert said.count("resumed at") == 1 and "| exact" in said
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"


@pytest.mark.long
@pytest.mark.parametrize("algo", kills.METHODS)
def test_torchrun_trains_with_every_method(tmp_path: Path, algo: str) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [str(ROOT / "scripts" / "train.py"), *kills.CASES[algo], "hydra.run.dir=run"]
    done = subprocess.run([*launch, *script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("so in each of 2 processes") == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"
