"""Walk through the documentation as a newcomer: every command of README and tutorials, as typed, in a fresh clone.

    python tests/walk.py                         # in a new virtual environment; downloads, and takes an hour or more
    python tests/walk.py --bin .venv/bin         # with what is installed there: installs nothing
    python tests/walk.py --bin .venv/bin --quick README.md docs/tutorials/onnx.md     # short runs, some pages

A page begins in a clone of its own.  Blocks of Python whose first line is a comment with a file's name are written to
that file, and so are blocks after a sentence with a file's name; lines of ``sh`` blocks are typed, one after the other.
A command that fails ends its page, and the walk exits with 1.  Commands for a GPU are left out where there is none.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
FILE = re.compile(r"`([\w./-]+\.(?:py|yaml))`[^`]*\Z")
INSTALLS = ("pip install", "python3 -m venv", ". .venv/bin/activate")
SERVES = ("tensorboard",)
QUICK = {
    "pgsuite pretrain": "reviews=256 batch=32 held_out=32 size.width=16 size.layers=1",
    "pgsuite reward-model": "count=128 held_out=64 batch=32",
}


def commands(page: str) -> list[tuple[str, str]]:
    """The files to write, as (name, text), and the lines to type, as ("", line), in order."""
    found: list[tuple[str, str]] = []
    for block in BLOCK.finditer(page):
        kind, text = block[1], block[2]
        named = re.match(r"# ([\w/]+\.py)\n", text) or FILE.search(page[: block.start()].rsplit("\n\n", 2)[-2])
        if kind == "sh":
            lines = text.replace("\\\n", " ").splitlines()
            found += [("", line.split(" # ")[0].strip()) for line in lines if line and not line.startswith("#")]
        elif kind in ("python", "yaml") and named:
            found.append((named[1], text))
    return found


def shortened(line: str) -> str:
    """The command with few steps."""
    for start, more in QUICK.items():
        if line.startswith(start):
            return f"{line} {more}"
    if re.search(r"(pgsuite|-m pgsuite) train\b", line) and "--help" not in line:
        if "env=rlhf" in line:
            return f"{line} total_steps=400 num_envs=8 algo.minibatches=2 algo.epochs=1"
        line = re.sub(r"total_steps=\S+", "total_steps=2_048", line)
        line = re.sub(r"sweep.trials=\d+", "sweep.trials=2", line)
        return line if "total_steps=" in line or "resume=" in line else f"{line} total_steps=2_048"
    return line


def walk(page: str, programs: Path | None, *, quick: bool) -> bool:
    """Type every command of a page.  Returns whether all of them succeeded."""
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "pgsuite"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        environment = os.environ | {"VIRTUAL_ENV": str(clone / ".venv")}
        environment["PATH"] = f"{clone / '.venv/bin'}{os.pathsep}{os.environ['PATH']}"
        if programs is None and page != "README.md":  # which installs by itself
            subprocess.run(
                "python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e .",
                shell=True,
                cwd=clone,
                check=True,
            )
        if programs is not None:
            environment["PATH"] = f"{programs.absolute()}{os.pathsep}{os.environ['PATH']}"
            environment["PYTHONPATH"] = str(clone)
        for name, text in commands((ROOT / page).read_text()):
            if name:
                (clone / name).parent.mkdir(parents=True, exist_ok=True)
                (clone / name).write_text(text)
                continue
            line = shortened(text) if quick else text
            if (programs is not None and line.startswith(INSTALLS)) or (
                "device=cuda" in line and not shutil.which("nvidia-smi")
            ):
                print(f"  -      {line}", flush=True)
                continue
            expected = "blocks: 0" not in line  # the one command that is shown with its error
            begun = time.perf_counter()
            limit = f"timeout 20 {line}" if line.startswith(SERVES) else line
            done = subprocess.run(limit, shell=True, cwd=clone, env=environment, capture_output=True, text=True)
            right = (done.returncode == 0) == expected or (limit != line and done.returncode == 124)
            print(f"  {time.perf_counter() - begun:5.0f}s {line}", flush=True)
            if not right:
                print(f"  failed with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
                return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tutorials = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs" / "tutorials").glob("*.md"))]
    parser.add_argument("pages", nargs="*", default=["README.md", *tutorials])
    parser.add_argument("--bin", type=Path, help="programs of an environment in which everything is installed")
    parser.add_argument("--quick", action="store_true", help="few steps in every run")
    args = parser.parse_args()
    wrong = []
    for page in args.pages:
        print(page, flush=True)
        wrong += [] if walk(page, args.bin, quick=args.quick) else [page]
    sys.exit(f"not walked to the end: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
