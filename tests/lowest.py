"""Print the lowest versions that pyproject.toml permits, as constraints for pip: of pgsuite and of some of its extras.

python tests/lowest.py test > lowest.txt && pip install -c lowest.txt -e ".[test]"
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

BOUND = re.compile(r"(?P<name>[\w-]+)(?:\[(?P<extras>[\w,-]+)\])?(?:>=(?P<low>[\w.]+))?")


def numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def lowest(project: dict, extras: list[str]) -> dict[str, str]:
    """The lowest version of each package that ``project`` and these of its ``extras`` require, by name."""
    found: dict[str, str] = {}

    def add(requirements: list[str]) -> None:
        for requirement in requirements:
            match = BOUND.match(requirement)
            assert match is not None, requirement
            if match["name"] == project["name"]:
                for extra in match["extras"].split(","):
                    add(project["optional-dependencies"][extra])
                continue
            if match["low"] is None:
                raise SystemExit(f"pyproject.toml: {requirement} has no lower bound")
            found[match["name"]] = max(found.get(match["name"], "0"), match["low"], key=numbers)

    add(project["dependencies"])
    for extra in extras:
        add(project["optional-dependencies"][extra])
    return found


if __name__ == "__main__":
    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    print(*(f"{name}=={low}" for name, low in lowest(pyproject["project"], sys.argv[1:]).items()), sep="\n")
