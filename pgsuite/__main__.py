"""The commands of an installed package: ``pgsuite train algo=ppo env=CartPole``, or ``python -m pgsuite train ...``."""

from __future__ import annotations

import importlib
import sys

from pgsuite.settings import closest

COMMANDS = {
    "train": ("pgsuite.app.train", "Train: algo=ppo env=HalfCheetah seed=1"),
    "evaluate": ("pgsuite.app.evaluate", "Evaluate a trained policy: run=runs/ppo-HalfCheetah/... episodes=20"),
    "export": ("pgsuite.export.command", "Export a policy: run=runs/ppo-HalfCheetah/... format=onnx"),
    "report": ("pgsuite.app.report", "Compare runs: runs/ppo-CartPole runs/trpo-CartPole"),
    "replay": ("pgsuite.app.replay", "Repeat the update that a run failed at: crash=runs/.../crash.pt"),
    "envs": ("pgsuite.app.envs", "List the environments"),
    "pretrain": ("pgsuite.rlhf.pretraining", "Pretrain a language model on generated reviews"),
    "reward-model": ("pgsuite.rlhf.reward_training", "Make preference pairs and train a reward model on them"),
}
USAGE = "usage: pgsuite <command> [settings]\n\n" + "\n".join(
    f"  {name:<14}{text}" for name, (_, text) in COMMANDS.items()
)


def main() -> None:
    """Run the command that ``sys.argv`` names."""
    name, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in ("-h", "--help"):
        print(f"{USAGE}\n\npgsuite <command> --help describes one of them")
        return
    if name not in COMMANDS:
        sys.exit(f"error: no command {name!r}; {closest(name, COMMANDS)}")
    sys.argv = [f"pgsuite {name}", *rest]
    importlib.import_module(COMMANDS[name][0]).main()


if __name__ == "__main__":
    main()
