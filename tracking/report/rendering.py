"""A report as one HTML file without outside parts, and as Markdown."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import assert_never
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from .blocks import Bar, Block, Cell, Chart, Command, Facts, Link, Picture, Report, Table, Text

_TEMPLATE = "report.html.j2"
_BAR_LENGTH = 12


def to_html(report: Report) -> str:
    """A page that needs neither network nor JavaScript."""
    return _template().render(report=report)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "anchor": _anchor,
        "svg": Markup,
        "address": quote,
        "kind": lambda cell: type(cell).__name__,
    }
    return environment.get_template(_TEMPLATE)


def to_markdown(report: Report) -> str:
    """Tables as tables, pictures as links into the run folder; charts are in the HTML report alone."""
    lines = [f"# {escape(report.title)}", ""]
    for section in report.sections:
        lines += [f"## {escape(section.title)}", ""]
        for block in section.blocks:
            lines += [*_markdown(block), ""]
    if report.problems:
        lines += ["## Not shown", "", *(f"- {escape(problem)}" for problem in report.problems), ""]
    return "\n".join(line for line, after in zip(lines, [*lines[1:], None], strict=True) if line or after) + "\n"


def _markdown(block: Block) -> list[str]:
    match block:
        case Text(text):
            return [escape(text)]
        case Facts(items):
            cells = tuple((label, value, remark) for label, value, remark in items)
            return _markdown(Table(("figure", ">value", ""), cells))
        case Command(remark, line):
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", line)), default=0))
            return [escape(remark), "", fence + "sh", line, fence]
        case Chart(title):
            return [f"*{escape(title)}: in [report.html](report.html).*"]
        case Picture(title, file):
            return [f"![{escape(title)}]({quote(file)})"]
        case Table():
            rule = ["---:" if numeric else "---" for numeric in block.numeric]
            rows = [map(escape, block.titles), rule, *(map(_cell, row) for row in block.rows)]
            return [f"| {' | '.join(row)} |" for row in rows]
    assert_never(block)


def _cell(cell: Cell) -> str:
    if isinstance(cell, Link):
        return f"[{escape(cell.text)}]({quote(cell.target)})"
    if isinstance(cell, Bar):
        solid, length = (
            round(_BAR_LENGTH * share) for share in (min(cell.shares, default=0), max(cell.shares, default=0))
        )
        bar = "█" * solid + "░" * (length - solid)
        return f"{bar} {escape(cell.text)}".strip()
    return escape(cell)


def escape(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~$])", r"\\\1", text)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")
