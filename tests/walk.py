"""Walk through the documentation as a newcomer: every command of README and tutorials, as typed.

    python tests/walk.py                         # in a fresh clone and a new virtual environment; an hour or more
    python tests/walk.py --wheel                 # in an empty directory, with the wheel in a new virtual environment
    python tests/walk.py --bin .venv/bin         # with what is installed there: installs nothing
    python tests/walk.py --bin .venv/bin --quick README.md docs/tutorials/onnx.md     # short runs, some pages

A page begins in a clone of its own, with nothing installed beyond what the README installs.  Blocks of Python whose
first line is a comment with a file's name are written to that file, and so are blocks after a sentence with a file's
name; lines of ``sh`` blocks are typed, one after the other.  With --wheel the installations name the wheel instead of
the clone.  Before each command stand its seconds and the longest time in which it printed nothing.

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
ENVIRONMENT = ("python3 -m venv", ". .venv/bin/activate", "pip install -c constraints.txt -e .\n")  # as in the README
INSTALL = re.compile(r"pip install -c constraints.txt -e (\"?)\.")
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


def typed(line: str, folder: Path, environment: dict[str, str]) -> tuple[int, float, float, str]:
    """Type a command.  Returns its exit code, its seconds, the longest time without output, and the output."""
    begun = last = time.perf_counter()
    silence, said = 0.0, ""
    with subprocess.Popen(
        line, shell=True, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for text in process.stdout:
            now = time.perf_counter()
            silence, last, said = max(silence, now - last), now, said + text
    now = time.perf_counter()
    return process.returncode, now - begun, max(silence, now - last), said


def walk(page: str, home: Path, programs: Path | None, wheel: Path | None, *, quick: bool) -> bool:
    """Type every command of a page in the folder ``home``, which is made anew.  Returns whether all succeeded.

    Exactly one of these is the case: a clone with its own environment, one with ``programs`` that are there, or an
    empty directory with an environment in which the ``wheel`` is installed.
    """
    shutil.rmtree(home, ignore_errors=True)
    environment = os.environ | {"VIRTUAL_ENV": str(home / ".venv"), "PYTHONUNBUFFERED": "1"}
    environment["PATH"] = f"{home / '.venv/bin'}{os.pathsep}{os.environ['PATH']}"
    environment.pop("PYTHONPATH", None)
    if wheel is None:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(home)], check=True)
    else:
        home.mkdir()
    if programs is not None:
        environment["PATH"] = f"{programs.absolute()}{os.pathsep}{os.environ['PATH']}"
        environment["PYTHONPATH"] = str(home)
    installed = home.parent / "installed"  # kept, so that each page has one without the extras of other pages
    if programs is None and (wheel is not None or page != "README.md"):  # which installs by itself
        if not installed.exists():
            what = f"-e {home}" if wheel is None else str(wheel)
            make = f"python3 -m venv {home}/.venv && {home}/.venv/bin/pip install -q -c constraints.txt {what}"
            subprocess.run(make, shell=True, cwd=ROOT, check=True)
            subprocess.run(["cp", "-al", home / ".venv", installed], check=True)
        else:
            subprocess.run(["cp", "-al", installed, home / ".venv"], check=True)
    for name, text in commands((ROOT / page).read_text()):
        if name:
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text(text)
            continue
        line, left_out = shortened(text) if quick else text, "device=cuda" in text and not shutil.which("nvidia-smi")
        if programs is not None:
            left_out |= text.startswith("pip install") or f"{text}\n".startswith(ENVIRONMENT)
        elif wheel is not None:
            left_out |= f"{text}\n".startswith(ENVIRONMENT)
            line = INSTALL.sub(lambda found: f"pip install -c {ROOT}/constraints.txt {found[1]}{wheel}", line)
        if left_out:
            print(f"       -        {line}", flush=True)
            continue
        expected = "blocks: 0" not in line  # the one command that is shown with its error
        serves = line.startswith(SERVES)
        code, seconds, silence, said = typed(f"timeout 20 {line}" if serves else line, home, environment)
        print(f"  {seconds:5.0f}s {silence:5.0f}s  {line}", flush=True)
        if (code == 0) != expected and not (serves and code == 124):
            print(f"  failed with {code}:\n{said[-3000:]}")
            return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tutorials = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs" / "tutorials").glob("*.md"))]
    parser.add_argument("pages", nargs="*", default=["README.md", *tutorials])
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--bin", type=Path, help="programs of an environment in which everything is installed")
    where.add_argument("--wheel", action="store_true", help="the wheel, from an empty directory")
    parser.add_argument("--quick", action="store_true", help="few steps in every run")
    args = parser.parse_args()
    wrong, wheel = [], None
    with tempfile.TemporaryDirectory() as folder:
        if args.wheel:
            subprocess.run(
                [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, str(ROOT)], check=True
            )
            wheel = next(Path(folder).glob("*.whl"))
        for page in args.pages:
            print(page, flush=True)
            wrong += [] if walk(page, Path(folder) / "pgsuite", args.bin, wheel, quick=args.quick) else [page]
    sys.exit(f"not walked to the end: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
