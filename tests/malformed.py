"""Makes run directories that are malformed in many ways, and reports on them: each is read or skipped with a reason.

    python tests/malformed.py --count 100 --out benchmarks/results/robustness/malformed.json

A seed determines a directory: it begins as a run leaves one, and one to three of its files are then harmed.  Each is
reported on beside two good runs, which must be in the report whatever the other one is.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

PATIENCE = 60  # seconds for a report
NAMES = ["_name", "__", "$", "$x_{", "a$b$c", "\\frac{", "a|b", "*a*", "<b>", "`x`", "[a](b)", "#", "~~", " ", "\n"]
NAMES += ["\0", "\ud800", "\u202e", "e\u0301", "\U0001f600", "x" * 5000, "../../up", "/", "-", "%s{0}", "", "."]
NUMBERS = ["1e308", "-1e308", "1e309", "inf", "-inf", "nan", "1e-320", "-1", "0", "", "x", "1" * 5000, "0x10", "½"]
VALUES: list[Any] = [None, True, [], {}, {1: {None: 2}}, [1, {2: 3, "a": 4}], -1, 1e308, float("nan"), 10**400]
VALUES += NAMES
YAML = [
    "",
    "[",
    "- 1",
    "{",
    "a: &a [*a]",
    "&a {b: *a}",
    "algo: &x {y: *x}\nenv: {}",
    "a: !!python/object/apply:os.system [true]",
    "? [1, 2]\n: 3",
    "a: 2020-01-01\nb: !!binary aGk=\nc: !!set {x}",
    "[" * 3000,
    "{a: " * 2000,
    "a: 1\n---\nb: 2",
    "\t",
    "a: ${b}",
    "\ufeffa: 1",
    "a: &a [1]\n" + "".join(f"{y}: &{y} [*{x}, *{x}, *{x}, *{x}]\n" for x, y in itertools.pairwise("abcdefghijkl")),
]
JSON = ["", "[", "[]", "1", "null", '{"steps": 1e999}', "[" * 100_000, '{"a": ' * 5000, '"x"']
JSON += ['{"steps": ' + "9" * 5000 + "}"]
CSV = [
    "",
    "\n",
    "steps",
    "a,b\n1,2",
    "steps,episode/return\n1,2,3,4\n",
    "steps,steps,episode/return\n1,2,3",
    'steps,episode/return\n"1,2',
    "steps,episode/return\n" + "1" * 200_000 + ",2",
    "steps,episode/return\n\0,1",
    "steps,episode/return\n5,1\n5,2\n4,3\n9,1",
    "steps,episode/return,episode/count\n10,1,-5\n20,1,-5\n30,1,5",
    "steps,episode/return,time/seconds\n10,1,9e29\n20,1,-9e29",
    "steps,episode/return,time/steps_per_second\n10,1,1e-320\n20,1,0",
]
FILES = ["config.yaml", "summary.json", "metrics.csv", "evaluation.csv"]


def good(folder: Path, algo: str, seed: int) -> None:
    """A run directory as training leaves it."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = {"seed": seed, "total_steps": 100, "algo": {"_target_": f"pgsuite.{algo}", "lr": 0.001}}
    config["env"] = {"_target_": "pgsuite.envs.tasks.classic.CartPole", "max_episode_steps": 500}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    facts = {"algo": algo, "env": "CartPole", "status": "finished", "steps": 100, "steps_per_second": 9.0}
    facts |= {"return_mean": 10.0 + seed, "return_std": 0.0, "versions": {"torch": "2"}, "backend": "torch"}
    (folder / "summary.json").write_text(json.dumps(facts))
    rows = [f"{steps},{steps / 10 + seed},4,{steps / 9}" for steps in range(10, 101, 10)]
    (folder / "metrics.csv").write_text("\n".join(["steps,episode/return,episode/count,time/seconds", *rows, ""]))
    rows = [f"{steps},{steps / 10}" for steps in (50, 100)]
    (folder / "evaluation.csv").write_text("\n".join(["steps,evaluation/return", *rows, ""]))


def harm(folder: Path, draw: random.Random) -> str:
    """Harm one file of a run directory; what was done."""
    name = draw.choice(FILES)
    path, kinds = folder / name, [special, contents, cut, fields, fields, fields]
    return f"{name}: {draw.choice(kinds)(path, draw)}"


def special(path: Path, draw: random.Random) -> str:
    """Something else than a file."""
    kind = draw.choice(["fifo", "directory", "device", "endless", "loop", "dangling", "absent", "sparse"])
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    elif kind != "absent":
        targets = {"device": "/dev/null", "endless": "/dev/zero", "loop": path.name, "dangling": "nowhere"}
        path.symlink_to(targets[kind])
    return kind


def contents(path: Path, draw: random.Random) -> str:
    """Other contents."""
    known = {".yaml": YAML, ".json": JSON, ".csv": CSV}[path.suffix]
    text = draw.choice(known)
    return overwrite(path, text.encode(errors="surrogatepass")) or f"holds {text[:40]!r}"


def cut(path: Path, draw: random.Random) -> str:
    """Cut off, or with other bytes."""
    if not path.is_file() or not (data := path.read_bytes()) or path.is_symlink():
        return contents(path, draw)
    at = draw.randrange(len(data))
    added = draw.choice([b"", b"\xff\xfe", b"\0", b"\x80", draw.randbytes(20)])
    return overwrite(path, data[:at] + added + (data[at:] if added else b"")) or f"cut at {at}, and then {added!r}"


def fields(path: Path, draw: random.Random) -> str:
    """Another value in one field."""
    try:
        if path.suffix == ".csv":
            lines = [line.split(",") for line in path.read_text().splitlines()]
            value = draw.choice(NUMBERS)
            row = draw.choice(lines[1:])
            column = draw.randrange(len(row))
            row[column] = value
            text = "\n".join(map(",".join, lines))
            return overwrite(path, text.encode()) or f"{lines[0][column]} = {value[:20]}"
        tree = (yaml.safe_load if path.suffix == ".yaml" else json.loads)(path.read_text())
        node, value = tree, draw.choice(VALUES)
        key = draw.choice([*node, *node])
        while isinstance(node[key], dict) and node[key] and draw.random() < 0.8:
            node = node[key]
            key = draw.choice([*node, "id"])
            node.setdefault(key, None)
        node[key] = value
        dump = yaml.safe_dump if path.suffix == ".yaml" else lambda tree: json.dumps(tree, skipkeys=True)
        return overwrite(path, dump(tree).encode(errors="surrogatepass")) or f"{key} = {str(value)[:20]!r}"
    except (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError, yaml.YAMLError):
        return contents(path, draw)  # it was harmed before


def overwrite(path: Path, data: bytes) -> str:
    special_before = path.is_symlink() or not path.is_file()
    if special_before:
        return special(path, random.Random(str(path.name)))
    path.write_bytes(data)
    return ""


def malformed(root: Path, seed: int) -> list[str]:
    """A directory with two good runs and a malformed one; what is wrong with that."""
    draw = random.Random(seed)
    for i in range(2):
        good(root / "good" / str(i), "a2c", i)
    name = draw.choice(["bad", "bad", "bad", "_bad", "$bad$", "q[y]", "a|b", "new\nline", "*", "\udcff"])
    good(bad := root / "bad" / name, draw.choice(["ppo", "a2c", "ppo"]), draw.choice([0, 1, 2]))
    return [f"named {name!r}", *(harm(bad, draw) for _ in range(draw.randint(1, 3)))]


def work(folder: str, seed: int, connection: Any) -> None:
    """Report on a malformed directory, and send what is wrong with it, how that ended, and with which words."""
    from pgsuite.errors import UserError
    from pgsuite.reports import report

    os.chdir(folder)
    harms = malformed(Path("runs"), seed)
    with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("always")
        try:
            lines = report(["runs"], Path("out"), "report")
            print("\n".join(lines).encode(errors="backslashreplace").decode(), file=io.StringIO())
            skipped = [line for line in lines if line.startswith("skipped ")]
            page = Path("out", "index.html").read_text()
            outcome = "skipped" if skipped else "reported"
            if "a2c" not in page or not Path("out", "table.md").is_file():
                outcome = "the good runs are lost"
            words = skipped[0] if skipped else ""
        except UserError as error:
            outcome, words = "refused", str(error)
        except BaseException:
            outcome, words = "traceback", traceback.format_exc()
    words += "".join(f" | warned: {x.message}" for x in warned)
    connection.send((harms, outcome, words.encode(errors="backslashreplace").decode()))


def trial(seed: int) -> dict[str, Any]:
    """One directory, read in a process of its own, since reading may never end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pgsuite.reports.page"])
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=work, args=(folder, seed, theirs))
        process.start()
        theirs.close()
        found: tuple[list[str], str, str] = ([], "hang", "")
        if ours.poll(PATIENCE):
            with contextlib.suppress(EOFError):
                found = ours.recv()
        process.kill()
        process.join()
    return {"seed": seed, **dict(zip(("harms", "outcome", "words"), found, strict=True))}


def right(result: dict[str, Any]) -> bool:
    return result["outcome"] in ("reported", "skipped") and "warned" not in result["words"]


def run(seeds: range, say: Callable[[str], None]) -> list[dict[str, Any]]:
    results = []
    for seed in seeds:
        results.append(trial(seed))
        if not right(results[-1]):
            say(json.dumps(results[-1], indent=1).replace("\\n", "\n"))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--out", type=Path)
    wanted = parser.parse_args()
    results = run(range(wanted.count), lambda line: print(line, flush=True))
    outcomes = dict(Counter(result["outcome"] for result in results))
    wrong = sum(not right(result) for result in results)
    print(f"{outcomes}, {wrong} wrong")
    if wanted.out is not None:
        sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
        from record import keep, source  # pyright: ignore[reportMissingImports]

        keep(source() | {"outcomes": outcomes, "wrong": wrong, "trials": results}, wanted.out)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
