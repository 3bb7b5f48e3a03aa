"""What MkDocs builds beside the committed pages: the reference of settings, recipes and modules, notebooks as pages,
formulas as MathML, diagrams as SVG.  Nothing that a page shows is fetched when it is read."""

from __future__ import annotations

import html
import itertools
import json
import posixpath
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from omegaconf import OmegaConf

from pgsuite.__main__ import COMMANDS
from pgsuite.app.help import Section, first_sentence, sections
from pgsuite.app.recipes import written
from pgsuite.app.schema import locate, register, schema
from pgsuite.nn.schedules import Scheduled

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
SCHEMA = re.compile(r"/schema/([\w.]+)")
REPOSITORY_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\./[^)\s#]+)(#[^)\s]*)?\)")
NOTEBOOK_LINK = re.compile(r"\]\(([\w./-]+)\.ipynb\)")
DIAGRAM = re.compile(r"^```mermaid\n(.*?)^```$", re.M | re.S)
MODULES = ("algorithms", "functional", "nn", "envs", "rollout", "training", "testing")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    register()
    for path, text in pages():
        files.append(File.generated(config, path, content=text))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        text = as_page(json.loads(notebook.content_string), posixpath.basename(notebook.src_uri))
        files.append(File.generated(config, notebook.src_uri.replace(".ipynb", ".md"), content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to notebooks become links to their pages, links to files outside the documentation the paths of these in a
    clone, and diagrams SVG."""
    if posixpath.basename(page.file.src_uri).replace(".md", ".ipynb)") not in markdown:  # a notebook names its file
        markdown = NOTEBOOK_LINK.sub(r"](\1.md)", markdown)

    def outside(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), link[2]))
        if path.startswith("docs/"):
            return link[0]
        return link[1] if link[1].strip("`") == path else f"{link[1]} (`{path}`)"

    return DIAGRAM.sub(lambda found: flowchart(found[1]), REPOSITORY_LINK.sub(outside, markdown))


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """LaTeX becomes MathML, which browsers draw themselves."""

    def formula(found: re.Match[str]) -> str:
        latex = html.unescape(found[2]).strip()
        display = "block" if found[1] == "div" else "inline"
        return latex2mathml.converter.convert(latex[2:-2].strip(), display=display)

    return re.sub(r'<(div|span) class="arithmatex">(.*?)</\1>', formula, content, flags=re.S)


# Reference pages


def pages() -> Iterator[tuple[str, str]]:
    """The generated pages by their path."""
    place = "reference/settings"
    yield f"{place}/run.md", run_page()
    yield f"{place}/methods.md", methods_page()
    yield f"{place}/environments.md", environments_page()
    yield f"{place}/commands.md", commands_page()
    yield f"{place}/recipes.md", recipes_page()
    for name in ("pgsuite", *MODULES):
        yield f"reference/modules/{name}.md", module_page(name)


def run_page() -> str:
    lead = """# Settings of a run

        Every setting of `pgsuite train` that belongs neither to a method nor to an environment. Write `name=value`
        on the command line, or `"name": value` in `pgsuite.train`. A wrong name or value is answered with what would
        be right. These pages are generated from the classes that check the settings; `pgsuite train --help` prints
        the same with the values of one method and environment.
        """
    return "\n".join([*paragraphs(lead), *tables("pgsuite.app.schema.Run")])


def methods_page() -> str:
    lead = """# Settings of methods and estimators

        A choice `algo=<name>` brings the settings `algo.*`, and `algo/estimator=<name>` the settings
        `algo.estimator.*`. The defaults below are those of the classes; a [recipe](recipes.md) may set others, and is
        named when a run starts. [The methods](../../explanation/algorithms.md) gives the equations.

        A number marked with ~ may be a schedule: `{linear: [3e-4, 0]}`, `{cosine: [3e-4, 0]}`,
        `{piecewise: {0: 0, 0.1: 3e-4, 1: 0}}` or `{adaptive: {start: 3e-4, kl: 0.01}}`.
        """
    lines = paragraphs(lead)
    for name, path in choices("algo"):
        lines += [f"## `algo={name}`", "", *tables(path, "algo")]
    for name, path in choices("algo/estimator"):
        lines += [f"## `algo/estimator={name}`", "", *tables(path, "algo.estimator")]
    return "\n".join(lines)


def environments_page() -> str:
    lead = """# Settings of environments

        A choice `env=<name>` brings the settings `env.*`. [Environments](../environments.md) describes the kinds of
        environments and their differences from gymnasium; `pgsuite envs` lists the choices.
        """
    lines = paragraphs(lead)
    for name, path in choices("env"):
        lines += [f"## `env={name}`", "", *tables(path, "env")]
    return "\n".join(lines)


def commands_page() -> str:
    lead = """# Commands

        `pgsuite <command>`, `python -m pgsuite <command>` and, in a clone, `python scripts/<command>.py` do the same.
        Each describes itself with `--help`. The settings of `pgsuite train` are on the pages before this one;
        `pgsuite report` takes run directories and `--out`, and `pgsuite envs` takes nothing.

        | command | |
        |---|---|
        """
    lines = paragraphs(lead)[:-1]
    lines += [f"| `pgsuite {name}` | {text} |" for name, (_, text) in COMMANDS.items()]
    for name in ("evaluate", "export", "replay", "pretrain", "reward_model"):
        (path,) = SCHEMA.findall((CONFIGS / f"{name}.yaml").read_text())
        lines += ["", f"## `pgsuite {name.replace('_', '-')}`", "", *tables(path)]
    return "\n".join(lines)


def recipes_page() -> str:
    lead = """# Recipes

        The measured settings that `algo=<method> env=<environment>` starts with. `~tuned` leaves a recipe out, and a
        setting of your own goes before it. `defaults: [ppo-mujoco]` takes over the settings of that file first. What
        the recipes reach is in [Results](../results.md).
        """
    lines, method = paragraphs(lead), ""
    for path in sorted((CONFIGS / "tuned").glob("*.yaml")):
        if path.stem.partition("-")[0] != method:
            method = path.stem.partition("-")[0]
            lines += ["", f"## {method}"]
        lines += ["", f'??? note "{path.stem}"', "", "    ```yaml"]
        lines += [
            *(f"    {line}" for line in path.read_text().splitlines() if line != "# @package _global_"),
            "    ```",
        ]
    return "\n".join(lines)


def module_page(name: str) -> str:
    """The public names of the modules of a package, from their docstrings."""
    if name == "pgsuite":
        named = ["pgsuite.app.api", "pgsuite.app.policy_io", "pgsuite.types", "pgsuite.settings", "pgsuite.errors"]
        return "\n".join(["# pgsuite", "", *(f"::: {module}\n" for module in named)])
    folder = ROOT / "pgsuite" / name
    modules = [path for path in sorted(folder.rglob("*.py")) if not path.stem.startswith("_")]
    dotted = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules]
    return "\n".join([f"# pgsuite.{name}", "", *(f"::: {module}\n" for module in dotted)])


def choices(group: str) -> Iterator[tuple[str, str]]:
    """The choices of a group of configurations, each with the class whose fields are its settings."""
    for path in sorted((CONFIGS / group).glob("*.yaml")):
        found = SCHEMA.findall(path.read_text())
        if not found:  # short for another choice
            other = OmegaConf.load(path)["defaults"][0]  # pyright: ignore[reportArgumentType]
            found = SCHEMA.findall((CONFIGS / group / f"{other}.yaml").read_text())
        yield path.stem, found[0]


def tables(path: str, name: str = "") -> list[str]:
    """The settings of a class and of those within it, in Markdown."""
    plain: Any = OmegaConf.to_container(OmegaConf.structured(schema(locate(path))))
    if name == "algo":
        plain = {key: x for key, x in plain.items() if key != "estimator"}  # a group of its own
    return [line for part in sections(plain, name) for line in table(part)]


def table(part: Section) -> list[str]:
    said, inner = first_sentence(part.cls), part.name not in ("", "algo", "algo.estimator", "env")
    lines = [f"### `{part.name}`", ""] if inner else []
    lines += [said, ""] if said else []
    lines += ["| setting | default | type and range | meaning |", "|---|---|---|---|"]
    for x in part.settings:
        scheduled = "~" if issubclass(part.cls, Scheduled) and "number" in x.kind and "whole" not in x.kind else ""
        cells = f"`{x.name}`", f"`{written(x.value)}`", f"{x.kind} {scheduled}".strip(), x.description or "-"
        lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return [*lines, "", f"Class: `{part.cls.__module__}.{part.cls.__qualname__}`", ""]


def paragraphs(text: str) -> list[str]:
    first, _, rest = text.partition("\n")
    return [first, *textwrap.dedent(rest).splitlines(), ""]


# Notebooks and diagrams


def as_page(notebook: dict[str, Any], name: str) -> str:
    """A notebook with its outputs in Markdown."""
    lines: list[str] = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            lines += [source, ""]
            continue
        lines += ["```python", source, "```", ""]
        said = ""
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                image = data["image/png"].replace("\n", "")
                lines += [f'<img alt="figure" src="data:image/png;base64,{image}">', ""]
            else:
                said += "".join(output.get("text", data.get("text/plain", ""))).rstrip() + "\n"
        lines += ["```text", said.rstrip(), "```", ""] if said else []
    return "\n".join([*lines, f"This page is a notebook: [{name}]({name})."])


def flowchart(text: str) -> str:
    """A mermaid flowchart from top to bottom, as SVG.  A node is one row below the lowest of those that point to it."""
    labels: dict[str, str] = {}
    arrows: list[tuple[str, str]] = []
    for line in text.splitlines():
        sides = [re.findall(r'(\w+)(?:\["?(.*?)"?\])?(?: & |$)', side) for side in line.strip().split(" --> ")]
        labels |= {name: label for side in sides for name, label in side if label}
        arrows += [(a, b) for left, right in itertools.pairwise(sides) for a, _ in left for b, _ in right]
    names = list(dict.fromkeys(name for arrow in arrows for name in arrow))
    row = dict.fromkeys(names, 0)
    for _ in names:
        for a, b in arrows:
            row[b] = max(row[b], row[a] + 1)
    rise, gap = 62, 24
    width = {name: 20 + 7.4 * len(labels.get(name, name)) for name in names}
    rows = [[name for name in names if row[name] == r] for r in range(max(row.values()) + 1)]
    total = max(sum(width[name] + gap for name in inside) for inside in rows)
    middle: dict[str, float] = {}
    shapes: list[str] = []
    for y, inside in zip(itertools.count(0, rise), rows, strict=False):
        x = (total - sum(width[name] + gap for name in inside) + gap) / 2
        for name in inside:
            middle[name] = x + width[name] / 2
            shapes.append(f'<rect x="{x:.0f}" y="{y + 2}" width="{width[name]:.0f}" height="30" rx="4"/>')
            label = html.escape(labels.get(name, name))
            shapes.append(f'<text x="{middle[name]:.0f}" y="{y + 22}" text-anchor="middle">{label}</text>')
            x += width[name] + gap
    for a, b in arrows:
        top, bottom, xa, xb = row[a] * rise + 32, row[b] * rise, round(middle[a]), round(middle[b])
        half = (top + bottom) // 2
        shapes.append(f'<path d="M{xa} {top} C{xa} {half} {xb} {half} {xb} {bottom}"/>')
        shapes.append(f'<path d="M{xb - 4} {bottom - 6} l4 7 l4 -7"/>')
    drawn = f'<svg viewBox="0 0 {total:.0f} {len(rows) * rise}" width="{total:.0f}" role="img">{"".join(shapes)}</svg>'
    return f'<div class="flowchart">{drawn}</div>'
