"""Reports: report.md, and report.html, the same page in one file, from what a run folder holds at any time."""

from __future__ import annotations

import html
import logging
from collections.abc import Callable
from pathlib import Path
from string import Template

from slim import write_text_atomically

from ..run_folder import RunFolder
from . import sections, several
from .contents import Contents
from .markdown import escape

__all__ = ["write_report"]

LOGGER = logging.getLogger(__name__)
_SECTIONS: dict[str, Callable[[Contents], list[str]]] = {
    "Summary": sections.summary,
    "Before and after": sections.before_after,
    "Candidates": several.candidates,
    "Phases": several.phases,
    "Widths": sections.widths,
    "Gates": sections.gates,
    "Curves": sections.curves,
    "Classes": sections.classes,
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


def to_html(title: str, markdown: str, embedded: dict[str, str]) -> str:
    """Markdown as a page that needs neither network nor JavaScript; ``embedded`` are its pictures by their addresses."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    for image in (child for token in tokens for child in token.children or () if child.type == "image"):
        image.attrSet("src", embedded[str(image.attrGet("src"))])
    shell = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    return shell.substitute(title=html.escape(title), body=parser.renderer.render(tokens, parser.options, {}))
