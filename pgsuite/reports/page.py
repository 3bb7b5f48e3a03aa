"""The page of a report in HTML, and its tables in Markdown."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from pgsuite.errors import counted
from pgsuite.reports import pictures, sweeps
from pgsuite.reports.pictures import Look
from pgsuite.reports.runs import FACTS, FEW, Group, differences, listed, show
from pgsuite.reports.scores import ALL, MANY, Comparison, Ends, Score, comparisons, overall, scores, shared, verdict
from pgsuite.reports.sweeps import Sweep

TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, trim_blocks=True)


@dataclass(frozen=True)
class Picture:
    name: str
    png: bytes
    alt: str
    caption: str = ""

    @property
    def base64(self) -> str:
        return base64.b64encode(self.png).decode()


def build(
    groups: Sequence[Group], swept: Sequence[Sweep], remarks: Sequence[str], skipped: Sequence[str], command: str
) -> dict[str, bytes]:
    """Contents of all files of a report, by file name."""
    look = pictures.looks(list(dict.fromkeys(sorted(g.method for g in groups))))
    ranking = [*overall(groups), *scores(groups)]
    compared = comparisons(groups, ranking)
    words = [*_general(groups), *remarks, *(f"Skipped {line}." for line in skipped)]
    shown = {
        "score_pictures": _score_pictures(ranking, look),
        "learning": _curve_pictures(groups, look, "training", "steps"),
        "evaluation": _curve_pictures(groups, look, "evaluations", "steps"),
        "over_time": [
            *_curve_pictures(groups, look, "training", "seconds"),
            *_curve_pictures(groups, look, "evaluations", "seconds"),
        ],
        "chance_pictures": _chance_pictures(compared, look),
    }
    searches = [
        (sweep.name, sweeps.summary(sweep), *sweeps.table(sweep), _sweep_pictures(sweep, i), str(sweep.folder))
        for i, sweep in enumerate(swept, 1)
    ]
    envs = list(dict.fromkeys(g.env for g in groups))
    title = f"{counted(len(look), 'method')} on {envs[0] if len(envs) == 1 else f'{len(envs)} environments'}"
    title = title if groups else listed([sweep.name for sweep in swept])
    columns, rows = _cells(ranking)
    page = TEMPLATES.get_template("report.html").render(
        title=title,
        extent=_extent(groups) if groups else "",
        searches=searches,
        colors={method: color for method, (color, *_) in look.items()},
        verdicts=_verdicts(ranking, compared),
        caveats=[("", line) for line in words],
        evaluated=any(s.evaluated for s in ranking),
        columns=columns,
        scores=_by_env([(s.env, (s.method, row)) for s, row in rows], _heading),
        chances=_by_env([(c.env, (c.x, c.y, percent(c.probability), percents(c.ends))) for c in compared], _capital),
        configurations=_configurations(groups),
        origins=_origins(groups),
        directories=[(g.name, [str(run.folder) for run in (*g.runs, *g.others)]) for g in groups],
        command=command,
        **shown,
    )
    markdown = _markdown(title, ranking, compared, words, swept)
    drawn = {p.name: p.png for some in (*shown.values(), *(x[4] for x in searches)) for p in some}
    return {"index.html": _bytes(page), "table.md": _bytes(markdown)} | drawn


def _sweep_pictures(sweep: Sweep, number: int) -> list[Picture]:
    found = {
        "history": (sweeps.history, "Return of the trials in order, and the best up to then"),
        "importance": (sweeps.importance, "Share of each setting in how the returns of the finished trials differ"),
        "slices": (sweeps.slices, "Return of the trials over each setting; grey: pruned"),
        "lineage": (sweeps.lineage, "Who continued from whom; bold: the ancestors of the best"),
        "courses": (sweeps.courses, "The settings of all members over the turns; line: those of the best's ancestors"),
    }
    drawn = {kind: (draw(sweep), said) for kind, (draw, said) in found.items()}
    return [
        Picture(f"{kind}-sweep-{number}.png", png, f"{sweep.name}. {said}", said)
        for kind, (png, said) in drawn.items()
        if png is not None
    ]


def _bytes(text: str) -> bytes:
    return text.encode(errors="backslashreplace")  # a file name may hold what is no character


def _extent(groups: Sequence[Group]) -> str:
    runs = [run for g in groups for run in (*g.runs, *g.others)]
    methods = dict.fromkeys(g.method for g in groups)
    steps = sum(run.steps for run in runs)
    return f"{listed(list(methods))}; {counted(len(runs), 'run')}, {steps:,} environment steps in all"


def _general(groups: Sequence[Group]) -> list[str]:
    """Caveats of the comparison as a whole."""
    lines = []
    if few := [f"{g.name} ({len(g.scores)})" for g in groups if len(g.scores) < FEW]:
        lines.append(f"Fewer than {FEW} seeds with a score, too few for intervals to mean much: {listed(few)}.")
    envs, methods = shared(groups)
    if len(envs) > 1 and (missing := [m for m in dict.fromkeys(g.method for g in groups) if m not in methods]):
        lines.append(f"Not in the comparison over all environments, for want of scores on some: {listed(missing)}.")
    if any(sum(h.env == g.env and len(h.scores) > 0 for h in groups) > MANY for g in groups):
        lines.append(f"Of more than {MANY} methods, only the best is compared with each of the others.")
    return lines


def _by_env(rows: Sequence[tuple[str, Any]], heading: Callable[[str], str]) -> list[tuple[str, list[Any]]]:
    """Rows of a table, each with its environment, in blocks with headings."""
    return [(heading(env), [row for e, row in rows if e == env]) for env in dict.fromkeys(e for e, _ in rows)]


def _capital(env: str) -> str:
    return env[0].upper() + env[1:]


def _verdicts(ranking: Sequence[Score], compared: Sequence[Comparison]) -> list[tuple[str, str]]:
    """One sentence per environment on the best method, after the environment."""
    lines = []
    for env in dict.fromkeys(s.env for s in ranking):
        here = [s for s in ranking if s.env == env and s.seeds]
        if not here:
            lines.append((env, "no run has a score."))
            continue
        best, others = verdict(env, ranking, compared)
        value = f"{number(here[0].center, digits(here))} {between(here[0].ends, digits(here))}".strip(" -")
        what = "normalized score" if env == ALL else "score"
        if len(here) == 1:
            lines.append((env, f"{best} reaches a score of {value}."))
            continue
        level = [s.method for s in here if number(s.center, digits(here)) == number(here[0].center, digits(here))]
        if len(level) > 1:
            said = [f"{listed(level)} have the same highest {what}, {number(here[0].center, digits(here))}"]
        else:
            said = [f"{best} has the highest {what}, {value}"]
        for kind, words in (
            ("clear", "clearly better than"),
            ("unclear", "not clearly better than"),
            ("few", "too few seeds to tell from"),
        ):
            if names := [name for name in others[kind] if name not in level]:
                said.append(f"{words} {listed(names)}")
        lines.append((_capital(env), f"{'; '.join(said)}."))
    return lines


# --- numbers


def digits(here: Sequence[Score]) -> int:
    """Number of decimals of the scores of one environment."""
    largest = max((abs(s.center) for s in here if s.seeds), default=0.0)
    return 0 if largest >= 1000 else 1 if largest >= 10 else 2 if here[0].env != ALL else 3


def number(value: float | None, decimals: int) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:,.{decimals}f}"


def between(ends: Ends, decimals: int) -> str:
    return "-" if ends is None else f"[{ends[0]:,.{decimals}f}, {ends[1]:,.{decimals}f}]"


def percent(probability: float) -> str:
    return f"{probability:.0%}"


def percents(ends: Ends) -> str:
    return "-" if ends is None else f"[{ends[0]:.0%}, {ends[1]:.0%}]"


# --- tables


def _cells(ranking: Sequence[Score]) -> tuple[list[str], list[tuple[Score, list[str]]]]:
    """Columns and rows of the score table, without the column of methods."""
    evaluated = any(s.evaluated for s in ranking)
    columns = ["interquartile mean", "95% interval", "mean", "deviation"]
    columns += ["evaluation", "95% interval"] if evaluated else []
    columns += ["seeds", "steps", "steps/s"]
    rows = []
    for s in ranking:
        d = digits([r for r in ranking if r.env == s.env])
        row = [number(s.center, d), between(s.ends, d)]
        row += [number(s.mean, d), number(s.deviation, d)]
        if evaluated:
            partly = f" ({s.evaluated} of {s.seeds})" if 0 < s.evaluated < s.seeds else ""
            row += [number(s.evaluation, d) + partly, between(s.evaluation_ends, d)]
        row += [counted(s.seeds, "run") if s.env == ALL else str(s.seeds)]
        row += [f"{s.steps:,}" if s.steps else "-", number(s.speed, 0)]
        rows.append((s, row))
    return columns, rows


def _heading(env: str) -> str:
    return "All environments, normalized from 0 to 1" if env == ALL else env


def _configurations(groups: Sequence[Group]) -> list[tuple[str, list[str], list[tuple[str, list[str]]]]]:
    """Environments, their methods, and the settings in which these differ; environments with equal differences are
    together."""
    tables: list[tuple[list[str], list[tuple[str, list[str]]], list[str]]] = []
    for env in dict.fromkeys(g.env for g in groups):
        here = [g for g in groups if g.env == env]
        settings = [{k: v for k, v in g.runs[0].identity.items() if k not in FACTS} for g in here]
        rows = [(key, [show(s[key]) if key in s else "-" for s in settings]) for key in differences(settings)]
        methods = [g.method for g in here]
        equal = [envs for known, values, envs in tables if (known, values) == (methods, rows)]
        if equal:
            equal[0].append(env)
        elif rows:
            tables.append((methods, rows, [env]))
    return [(listed(envs), methods, rows) for methods, rows, envs in tables]


def _origins(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Versions, back ends, devices and commits, with those groups that have them where they differ."""
    found: dict[str, dict[str, list[Group]]] = {}
    runs = [(g, run) for g in groups for run in (*g.runs, *g.others)]
    keys = dict.fromkeys(key for _, run in runs for key in (*run.origin, *run.facts))
    first = [k for k in ("commit", "pgsuite", "backend", "device", "processes") if k in keys or k == "commit"]
    for key in [*first, *(k for k in keys if k not in first)]:
        for g, run in runs:
            value = (run.origin | run.facts).get(key, "not recorded")
            holders = found.setdefault(key, {}).setdefault(value, [])
            holders += [g] if g not in holders else []
    return [
        (
            "back end" if key == "backend" else key,
            [value if len(values) == 1 else f"{value} ({_where(g, groups)})" for value, g in values.items()],
        )
        for key, values in found.items()
    ]


def _where(some: Sequence[Group], groups: Sequence[Group]) -> str:
    """Names of groups, or of environments all of whose groups are included."""
    names = []
    for env in dict.fromkeys(g.env for g in some):
        here = [g for g in groups if g.env == env]
        names += [env] if all(g in some for g in here) else [g.name for g in some if g.env == env]
    return ", ".join(names)


def _markdown(
    title: str,
    ranking: Sequence[Score],
    compared: Sequence[Comparison],
    words: Sequence[str],
    swept: Sequence[Sweep],
) -> str:
    columns, rows = _cells(ranking)
    lines = [f"# {title}"]
    for sweep in swept:
        own, trials = sweeps.table(sweep)
        lines += ["", f"{_plain(sweep.name)}: {sweeps.summary(sweep)}", "", f"| | {' | '.join(map(_plain, own))} |"]
        lines += [f"|---|{'---:|' * len(own)}", *(f"| {what} | {' | '.join(map(_plain, x))} |" for what, x in trials)]
    lines += [
        "",
        "Score: mean return of the training episodes that ended in the last tenth of a run's steps.",
        "",
        f"| environment | method | {' | '.join(columns)} |",
        f"|---|---|{'---:|' * len(columns)}",
        *(f"| {' | '.join((*map(_plain, (_heading(s.env), s.method)), *row))} |" for s, row in rows),
    ] * bool(rows)
    if compared:
        lines += ["", "Probability that a run of the first method scores higher than one of the second:", ""]
        lines += ["| environment | first | second | probability | 95% interval |", "|---|---|---|---:|---:|"]
        lines += [
            f"| {' | '.join((*map(_plain, (c.env, c.x, c.y)), percent(c.probability), percents(c.ends)))} |"
            for c in compared
        ]
    if words:
        lines += ["", *(f"- {_plain(line)}" for line in words)]
    return "\n".join([*lines, ""])


def _plain(text: str) -> str:
    """Markdown that shows this text as it is.  An underscore within a word is no markup."""
    return re.sub(r"([\\`*<>\[\]|$~#]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


# --- pictures


def _file(kind: str, env: str) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", env)[:80]
    unique = "" if name == env.replace(" ", "_") else f"-{hashlib.sha256(env.encode()).hexdigest()[:8]}"
    return f"{kind}-{name}{unique}.png"


def _curve_pictures(groups: Sequence[Group], look: Look, of: str, against: str) -> list[Picture]:
    found = []
    for env in dict.fromkeys(g.env for g in groups):
        here = [g for g in groups if g.env == env]
        if (drawn := pictures.curves(here, look, of=of, against=against)) is not None:
            kind = {"steps": "learning", "seconds": "time"}[against] + ("" if of == "training" else "-evaluation")
            what = (
                f"Return of {of.removesuffix('s')} episodes on {env} over {against}: {listed([g.method for g in here])}"
            )
            found.append(Picture(_file(kind, env), drawn[0], what, f"{env}: {drawn[1]}"))
    return found


def _score_pictures(ranking: Sequence[Score], look: Look) -> list[Picture]:
    found = []
    for env in dict.fromkeys(s.env for s in ranking):
        here = [s for s in ranking if s.env == env and s.seeds]
        if not here:
            continue
        rows = [(s.method, look[s.method][0], s.center, s.ends) for s in here]
        label = "normalized score" if env == ALL else "return"
        title = _capital(env)
        png = pictures.intervals(title, rows, label)
        said = "; ".join(f"{s.method} {number(s.center, digits(here))} {between(s.ends, digits(here))}" for s in here)
        found.append(Picture(_file("score", env), png, f"Final scores on {env}: {said}"))
    return found


def _chance_pictures(compared: Sequence[Comparison], look: Look) -> list[Picture]:
    found = []
    for env in dict.fromkeys(c.env for c in compared):
        here = [c for c in compared if c.env == env]
        rows = [(f"{c.x} over {c.y}", look[c.x][0], c.probability, c.ends) for c in here]
        png = pictures.intervals(_capital(env), rows, "probability of improvement", probability=True)
        said = "; ".join(f"{c.x} over {c.y} {percent(c.probability)} {percents(c.ends)}" for c in here)
        found.append(Picture(_file("improvement", env), png, f"Probability of improvement on {env}: {said}"))
    return found
