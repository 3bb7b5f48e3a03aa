"""The page of a report in HTML, and its tables in Markdown."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from pgsuite.reports import pictures
from pgsuite.reports.pictures import Look
from pgsuite.reports.runs import FACTS, FEW, Group, differences, listed, show
from pgsuite.reports.scores import ALL, MANY, Comparison, Ends, Score, comparisons, overall, scores, shared, verdict

STYLE = """
:root { color-scheme: light; --ink: #1d1d1f; --soft: #5f6368; --line: #dfe1e5; --ground: #f6f7f8 }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 74rem; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .25rem }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem }
p, ul { max-width: 46rem; margin: .5rem 0 }
ul { padding-left: 1.2rem }
li { margin: .25rem 0; overflow-wrap: anywhere }
.soft, figcaption { color: var(--soft); font-size: .875rem }
.box { background: var(--ground); border-radius: 8px; padding: .75rem 1.1rem; margin: 1rem 0; max-width: 48.2rem }
.box h2 { border: 0; margin: 0; padding: 0; font-size: 1rem }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr));
  gap: 1.25rem 2rem; margin: 1rem 0 }
figure { margin: 0; break-inside: avoid; max-width: 36rem }
img { width: 100%; height: auto; display: block }
.table { overflow-x: auto; margin: .75rem 0; max-width: 100% }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .65rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
thead th { white-space: normal; color: var(--soft); font-weight: 600; vertical-align: bottom;
  border-bottom: 1px solid #9aa0a6 }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
tbody th { font-weight: 400 }
tbody th[scope=rowgroup] { font-weight: 700; padding-top: .9rem }
.words td { text-align: left; white-space: normal; min-width: 8rem; overflow-wrap: anywhere }
.words thead th { text-align: left }
.key { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .45em }
code { font-size: .875em; overflow-wrap: anywhere }
dt { font-weight: 600; margin-top: .6rem }
dd { margin: 0; max-width: 46rem }
@media (max-width: 40rem) {
  body { padding: 1.25rem 1rem 3rem }
  h1 { font-size: 1.4rem }
  th, td { padding: .3rem .6rem }
  tbody th[scope=row] { position: sticky; left: 0; background: #fff }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10pt }
  h2, h3, h2 + p { break-after: avoid }
  tr, .box { break-inside: avoid }
  .box { border: 1px solid var(--line) }
  .table { overflow: visible }
  th, td { padding: .2rem .4rem; white-space: normal }
  .pictures { grid-template-columns: 1fr 1fr }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact }
}
"""

INTRODUCTION = (
    "Every method was trained several times with the same settings and different random seeds, because one "
    "training run says little: luck moves its outcome. The <em>return</em> is the sum of rewards in an "
    "episode; more is better. A run's <em>score</em> is its mean return over the training episodes that ended "
    "in the last tenth of its steps. This page shows which scores were reached, how the return grew on the "
    "way there, over steps and over time, and how sure one can be that one method is better than another. "
    "Brackets and shaded bands say how far a number may move by the luck of the seeds: where two of them "
    "overlap much, the difference may be luck."
)

TERMS = {
    "Interquartile mean": (
        "the mean of the middle half of the scores, without the lowest and the highest quarter (each rounded "
        "down to whole runs). One lucky or failed run moves it less than the mean."
    ),
    "95% interval": (
        "runs are drawn again with replacement 10,000 times, and the middle 95% of what comes out is shown "
        "(percentile bootstrap). Over several environments, each environment's runs are drawn among "
        "themselves (stratified). With fewer than ten seeds such intervals are too narrow."
    ),
    "Deviation": ("standard deviation of the scores over seeds."),
    "Probability of improvement": (
        "the share of all pairs of runs, one of each method, in which the first has the higher score; a tie "
        "counts half. 50% means that neither is better. Over several environments it is the mean of theirs. "
        "It says how often one method wins, not by how much."
    ),
    "Normalized score": (
        "over several environments scores are scaled first, so that 0 is the lowest and 1 the highest run on "
        "this page in each environment. It compares the methods here, and nothing else."
    ),
    "Learning curves": (
        "from four seeds on, the interquartile mean at each point and its 95% interval; for two or three the "
        "mean, and the range from the lowest to the highest seed. Training returns are means over a window of "
        "3% of the steps. A curve ends where the shortest of its runs does. Unfinished runs are drawn only "
        "where no run of their group has finished."
    ),
    "Steps per second": (
        "environment steps over training time, median over seeds. It depends on the machine and what else ran on it."
    ),
}


@dataclass(frozen=True)
class Picture:
    name: str
    png: bytes
    alt: str
    caption: str = ""


def build(groups: Sequence[Group], remarks: Sequence[str], skipped: Sequence[str], command: str) -> dict[str, bytes]:
    """Contents of all files of a report, by file name."""
    look = pictures.looks(list(dict.fromkeys(sorted(g.method for g in groups))))
    ranking = [*overall(groups), *scores(groups)]
    compared = comparisons(groups, ranking)
    words = [*_general(groups), *remarks, *(f"Skipped {line}." for line in skipped)]
    score_pictures = _score_pictures(ranking, look)
    curves = {
        (of, against): _curve_pictures(groups, look, of, against)
        for of in ("training", "evaluations")
        for against in ("steps", "seconds")
    }
    chances = _chance_pictures(compared, look)
    envs, methods = list(dict.fromkeys(g.env for g in groups)), list(look)
    title = f"{count(len(methods), 'method')} on {envs[0] if len(envs) == 1 else f'{len(envs)} environments'}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{_extent(groups)}</p>',
        f"<p>{INTRODUCTION}</p>",
        _box("In short", _verdicts(ranking, compared)),
        _box("Before you read on", [escape(line) for line in words]),
        "<h2>Final scores</h2>",
        _score_table(ranking, look),
        '<p class="soft">Points: interquartile means. Bars: 95% intervals.</p>' if score_pictures else "",
        _show(score_pictures),
        _section(
            "Learning curves",
            "Return of training episodes over environment steps: the higher the better, and the earlier it rises the "
            "less experience it took.",
            curves["training", "steps"],
        ),
        _section(
            "Evaluation",
            "Return of evaluation episodes, which are played apart from training.",
            curves["evaluations", "steps"],
        ),
        _section(
            "Over time",
            "The same returns over training time. It depends on the machine, and on what else ran there.",
            [*curves["training", "seconds"], *curves["evaluations", "seconds"]],
        ),
        _chance_section(compared, chances, look),
        _configurations(groups, look),
        _origins(groups),
        "<h2>How the numbers are made</h2>",
        "<dl>" + "".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in TERMS.items()) + "</dl>",
        '<p class="soft">After Agarwal et al. (2021), Deep Reinforcement Learning at the Edge of the Statistical '
        "Precipice.</p>",
        f'<p class="soft">Made by <code>{escape(command)}</code></p>',
    ]
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, parts))
        + "\n</body>\n</html>\n"
    )
    every = [*score_pictures, *chances, *(p for some in curves.values() for p in some)]
    markdown = _markdown(title, ranking, compared, words)
    return {"index.html": _bytes(page), "table.md": _bytes(markdown)} | {p.name: p.png for p in every}


def _bytes(text: str) -> bytes:
    return text.encode(errors="backslashreplace")  # a file name may hold what is no character


def count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _extent(groups: Sequence[Group]) -> str:
    runs = [run for g in groups for run in (*g.runs, *g.others)]
    methods = dict.fromkeys(g.method for g in groups)
    steps = sum(run.steps for run in runs)
    return escape(f"{listed(list(methods))}; {count(len(runs), 'run')}, {steps:,} environment steps in all")


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


def _box(title: str, lines: Sequence[str]) -> str:
    if not lines:
        return ""
    return f'<section class="box"><h2>{title}</h2><ul>{"".join(f"<li>{line}</li>" for line in lines)}</ul></section>'


def _verdicts(ranking: Sequence[Score], compared: Sequence[Comparison]) -> list[str]:
    """One sentence per environment on the best method, in HTML."""
    lines = []
    for env in dict.fromkeys(s.env for s in ranking):
        here = [s for s in ranking if s.env == env and s.seeds]
        if not here:
            lines.append(f"<strong>{escape(env)}</strong>: no run has a score.")
            continue
        best, others = verdict(env, ranking, compared)
        value = f"{number(here[0].center, digits(here))} {between(here[0].ends, digits(here))}".strip(" -")
        what = "normalized score" if env == ALL else "score"
        if len(here) == 1:
            lines.append(f"<strong>{escape(env)}</strong>: {escape(best)} reaches a score of {value}.")
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
        lines.append(f"<strong>{escape(env[0].upper() + env[1:])}</strong>: {escape('; '.join(said))}.")
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
        row += [f"{s.seeds} runs" if s.env == ALL else str(s.seeds)]
        row += [f"{s.steps:,}" if s.steps else "-", number(s.speed, 0)]
        rows.append((s, row))
    return columns, rows


def _score_table(ranking: Sequence[Score], look: Look) -> str:
    columns, rows = _cells(ranking)
    body = ""
    for env in dict.fromkeys(s.env for s in ranking):
        body += f'<tbody><tr><th scope="rowgroup" colspan="{len(columns) + 1}">{escape(_heading(env))}</th></tr>'
        for s, row in rows:
            if s.env == env:
                body += _row(_key(s.method, look), row)
        body += "</tbody>"
    head = "".join(f'<th scope="col">{escape(c)}</th>' for c in ["method", *columns])
    caption = "Score of a run: mean return of training episodes in the last tenth of its steps. Best first."
    if "evaluation" in columns:
        caption += " Evaluation: interquartile mean of the runs' last evaluation."
    return f'<p class="soft">{caption}</p>{_table(head, body)}'


def _row(heading: str, cells: Sequence[str]) -> str:
    """heading: HTML.  cells: text."""
    return f'<tr><th scope="row">{heading}</th>{"".join(f"<td>{escape(x)}</td>" for x in cells)}</tr>'


def _table(head: str, body: str, *, words: bool = False) -> str:
    kind = ' class="words"' if words else ""
    return f'<div class="table"><table{kind}><thead><tr>{head}</tr></thead>{body}</table></div>'


def _heading(env: str) -> str:
    return "All environments, normalized from 0 to 1" if env == ALL else env


def _key(method: str, look: Look) -> str:
    return f'<span class="key" style="background:{look[method][0]}"></span>{escape(method)}'


def _chance_section(compared: Sequence[Comparison], shown: Sequence[Picture], look: Look) -> str:
    if not compared:
        return ""
    body = ""
    for env in dict.fromkeys(c.env for c in compared):
        body += f'<tbody><tr><th scope="rowgroup" colspan="3">{escape(env[0].upper() + env[1:])}</th></tr>'
        for c in compared:
            if c.env == env:
                body += _row(f"{_key(c.x, look)} over {escape(c.y)}", (percent(c.probability), percents(c.ends)))
        body += "</tbody>"
    return (
        "<h2>Probability of improvement</h2><p>How often a run of the first method scores higher than a run of the "
        "second. 50% means that neither is better; an interval that holds 50% leaves it open.</p>"
        '<div class="table"><table><thead><tr><th scope="col">first over second</th><th scope="col">probability</th>'
        f'<th scope="col">95% interval</th></tr></thead>{body}</table></div>{_show(shown)}'
    )


def _configurations(groups: Sequence[Group], look: Look) -> str:
    """Table of the settings in which the groups of an environment differ; environments with equal differences share
    one."""
    tables: dict[str, list[str]] = {}
    for env in dict.fromkeys(g.env for g in groups):
        here = [g for g in groups if g.env == env]
        settings = [{k: v for k, v in g.runs[0].identity.items() if k not in FACTS} for g in here]
        keys = differences(settings)
        if not keys:
            continue
        head = "".join(f'<th scope="col">{_key(g.method, look)}</th>' for g in here)
        body = "".join(
            _row(f"<code>{escape(key)}</code>", [show(s[key]) if key in s else "-" for s in settings]) for key in keys
        )
        table = _table(f'<th scope="col">setting</th>{head}', f"<tbody>{body}</tbody>")
        tables.setdefault(table, []).append(env)
    if not tables:
        return ""
    text = "".join(f"<h3>{escape(listed(envs))}</h3>{table}" for table, envs in tables.items())
    return (
        "<h2>Configurations</h2><p>The settings in which the methods differ; all others are equal. "
        f"A dash: the method has no such setting.</p>{text}"
    )


def _origins(groups: Sequence[Group]) -> str:
    """Versions, back ends, devices, commits and run directories."""
    found: dict[str, dict[str, list[Group]]] = {}
    runs = [(g, run) for g in groups for run in (*g.runs, *g.others)]
    keys = dict.fromkeys(key for _, run in runs for key in (*run.origin, *run.facts))
    first = [k for k in ("commit", "pgsuite", "backend", "device", "processes") if k in keys or k == "commit"]
    for key in [*first, *(k for k in keys if k not in first)]:
        for g, run in runs:
            value = (run.origin | run.facts).get(key, "not recorded")
            holders = found.setdefault(key, {}).setdefault(value, [])
            holders += [g] if g not in holders else []
    body = ""
    for key, values in found.items():
        said = [
            escape(v) if len(values) == 1 else f"{escape(v)} ({escape(_where(g, groups))})" for v, g in values.items()
        ]
        body += (
            f'<tr><th scope="row">{escape({"backend": "back end"}.get(key, key))}</th><td>{"<br>".join(said)}</td></tr>'
        )
    kept = ""
    for g in groups:
        folders = "<br>".join(f"<code>{escape(str(run.folder))}</code>" for run in (*g.runs, *g.others))
        kept += f'<tr><th scope="row">{escape(g.name)}</th><td>{folders}</td></tr>'
    origins = _table('<th scope="col">what</th><th scope="col">as recorded</th>', f"<tbody>{body}</tbody>", words=True)
    folders = _table('<th scope="col">group</th><th scope="col">runs</th>', f"<tbody>{kept}</tbody>", words=True)
    return f"<h2>Where it comes from</h2>{origins}<details><summary>Run directories</summary>{folders}</details>"


def _where(some: Sequence[Group], groups: Sequence[Group]) -> str:
    """Names of groups, or of environments all of whose groups are included."""
    names = []
    for env in dict.fromkeys(g.env for g in some):
        here = [g for g in groups if g.env == env]
        names += [env] if all(g in some for g in here) else [g.name for g in some if g.env == env]
    return ", ".join(names)


def _markdown(title: str, ranking: Sequence[Score], compared: Sequence[Comparison], words: Sequence[str]) -> str:
    columns, rows = _cells(ranking)
    lines = [
        f"# {title}",
        "",
        "Score: mean return of the training episodes that ended in the last tenth of a run's steps.",
        "",
        f"| environment | method | {' | '.join(columns)} |",
        f"|---|---|{'---:|' * len(columns)}",
        *(f"| {' | '.join((*map(_plain, (_heading(s.env), s.method)), *row))} |" for s, row in rows),
    ]
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
        title = env[0].upper() + env[1:]
        png = pictures.intervals(title, rows, label)
        said = "; ".join(f"{s.method} {number(s.center, digits(here))} {between(s.ends, digits(here))}" for s in here)
        found.append(Picture(_file("score", env), png, f"Final scores on {env}: {said}"))
    return found


def _chance_pictures(compared: Sequence[Comparison], look: Look) -> list[Picture]:
    found = []
    for env in dict.fromkeys(c.env for c in compared):
        here = [c for c in compared if c.env == env]
        rows = [(f"{c.x} over {c.y}", look[c.x][0], c.probability, c.ends) for c in here]
        png = pictures.intervals(env[0].upper() + env[1:], rows, "probability of improvement", probability=True)
        said = "; ".join(f"{c.x} over {c.y} {percent(c.probability)} {percents(c.ends)}" for c in here)
        found.append(Picture(_file("improvement", env), png, f"Probability of improvement on {env}: {said}"))
    return found


def _section(title: str, text: str, shown: Sequence[Picture]) -> str:
    return f"<h2>{title}</h2><p>{text}</p>{_show(shown)}" if shown else ""


def _show(shown: Sequence[Picture]) -> str:
    figures = ""
    for p in shown:
        image = f'<img alt="{escape(p.alt)}" src="data:image/png;base64,{base64.b64encode(p.png).decode()}">'
        figures += f"<figure>{image}{f'<figcaption>{escape(p.caption)}</figcaption>' if p.caption else ''}</figure>"
    return f'<div class="pictures">{figures}</div>' if figures else ""
