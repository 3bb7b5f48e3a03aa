"""List the environments of env=, with back ends, spaces and time limits: pgsuite envs"""

import argparse
from typing import Any

import gymnasium
from gymnasium import spaces
from rich.console import Console
from rich.table import Table

from pgsuite.envs import make, tasks
from pgsuite.errors import command, install


def actions(space: spaces.Space[Any]) -> str:
    if isinstance(space, spaces.Box):
        return f"{space.shape[0]} from {space.low.min():g} to {space.high.max():g}"
    return f"one of {space.n}" if isinstance(space, spaces.Discrete) else str(space)


def main() -> None:
    """The command line."""
    argparse.ArgumentParser(
        prog=command("envs"), description="List the environments of env=, with back ends, spaces and time limits."
    ).parse_args()
    table = Table("env=", "gymnasium's", "back ends", "observation", "action", "time limit", box=None)
    for name in sorted(set(tasks.__all__) - {"Task"}):
        env, cls = make(name, 1), getattr(tasks, name)
        size = f"{(env.observation_space.shape or (0,))[0]} numbers"
        limit = f"{env.max_episode_steps} steps"
        table.add_row(name, cls.gymnasium_id, " ".join(cls.backends), size, actions(env.action_space), limit)
    Console(width=110, markup=False, emoji=False).print(table)
    print(f"\nenv=gym env.id=<id>: any of the {len(gymnasium.registry)} that gymnasium knows here")
    print("env=gym env.import=<package> env.id=<id>: any that a package of yours registers")
    print(f"env=atari env.game=<Game>, env=Pong, env=Breakout: any Atari game: {install('atari')}")
    print(f"env=envpool env.id=<id>: any that envpool lists: {install('envpool')}")
    print("env=torch env.entry=<package>:<callable>: any that steps torch tensors itself")
    print(f"Options of one: {command('train')} env=<name> --help")
