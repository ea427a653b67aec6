"""Reports: report.md, and report.html, the same page in one file, from what a run folder holds at any time."""

from __future__ import annotations

import html
import logging
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from slim import write_text_atomically

from ..run_folder import RunFolder
from . import sections, several
from .contents import Contents
from .markdown import escape

__all__ = ["write_report"]

if TYPE_CHECKING:
    from markdown_it.token import Token

LOGGER = logging.getLogger(__name__)
_SECTIONS: dict[str, Callable[[Contents], list[str]]] = {
    "Summary": sections.summary,
    "Before and after": sections.before_after,
    "Candidates": several.candidates,
    "Phases": several.phases,
    "Widths": sections.widths,
    "Channels": sections.channels,
    "Gates": sections.gates,
    "Curves": sections.curves,
    "Classes": sections.classes,
    "Precision and recall": sections.precision_recall,
    "Pictures": sections.pictures,
}


def write_report(run: RunFolder) -> Path:
    """Write report.md, report.html and their charts from the files of a run folder; returns report.html.

    Each section is there when its data are; a file that is damaged gives a line in the report. The same files give the
    same bytes. Raises SlimError where the folder cannot be written.
    """
    contents = Contents(run.path)
    parts, failed = list[str](), list[str]()
    for title, section in _SECTIONS.items():
        try:
            blocks = section(contents)
        except Exception as error:  # a report must not end the run that it tells of, hours after its start
            LOGGER.debug("section %s of %s", title, run.path, exc_info=True)
            failed.append(f"{title}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        parts += [f"## {title}", *blocks] if blocks else []
    if problems := [*contents.problems, *failed]:
        parts += ["## Not shown", "\n".join(f"- {escape(problem)}" for problem in problems)]
    kind = f"{contents.script.removesuffix('.py')}: " if contents.script else ""
    title = f"{kind}{run.path.resolve().name}"
    text = "\n\n".join([f"# {escape(title)}", *parts]) + "\n"
    write_text_atomically(run.path / "report.md", text)
    page = run.path / "report.html"
    write_text_atomically(page, to_html(title, text, contents.embedded))
    return page


_MOST_COLUMNS = 5
"""Of a table that a phone's screen holds."""


def to_html(title: str, markdown: str, embedded: dict[str, str]) -> str:
    """Markdown as a page that needs neither network nor JavaScript; ``embedded`` are its pictures by their addresses."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    for image in (child for token in tokens for child in token.children or () if child.type == "image"):
        image.attrSet("src", embedded[str(image.attrGet("src"))])
    _title_cells(tokens)
    shell = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    return shell.substitute(title=html.escape(title), body=parser.renderer.render(tokens, parser.options, {}))


def _title_cells(tokens: Sequence[Token]) -> None:
    """Mark tables of many columns, whose rows a narrow screen shows one cell below the other, each with its title; in place."""
    titles, column, opened = list[str](), 0, tokens[0] if tokens else None
    for token, content in pairwise(tokens):
        if token.type == "table_open":
            titles, opened = [], token
        elif token.type == "th_open":
            titles.append("".join(part.content for part in content.children or ()))
        elif token.type == "tbody_open" and opened is not None and len(titles) > _MOST_COLUMNS:
            opened.attrSet("class", "wide")
        elif token.type == "tr_open":
            column = 0
        elif token.type == "td_open":
            token.attrSet("data-title", titles[column])
            column += 1
