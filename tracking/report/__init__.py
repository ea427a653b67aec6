"""Reports: report.md and a self-contained report.html, made from what a run folder holds, at any time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from slim import write_text_atomically

from ..run_folder import RunFolder
from . import loop, sections
from .blocks import Report, Section
from .contents import Contents
from .gates import gates_section, summarise_gates
from .loop import COMPARISON_FILE
from .rendering import to_html, to_markdown

__all__ = [
    "COMPARISON_FILE",
    "read_report",
    "summarise_gates",
    "write_report",
]

LOGGER = logging.getLogger(__name__)
_SECTIONS: dict[str, Callable[[Contents], Section | None]] = {
    "Summary": sections.headline,
    "Networks": loop.comparison,
    "Before and after": sections.before_after,
    "Candidates": loop.pareto,
    "Phases": loop.phases,
    "Widths": sections.widths,
    "Gates": gates_section,
    "Curves": sections.training_curves,
    "Classes": sections.classes,
    "Pictures": sections.pictures,
}


def write_report(run: RunFolder) -> Path:
    """Write report.md and report.html from the files of a run folder; returns the latter.

    Each section is there when its data are; a file that is damaged gives a line in the report. The same files give the
    same bytes. OSError where the folder cannot be written.
    """
    report = read_report(run)
    write_text_atomically(run.path / "report.md", to_markdown(report))
    page = run.path / "report.html"
    write_text_atomically(page, to_html(report))
    return page


def read_report(run: RunFolder) -> Report:
    """The report as plain data."""
    contents = Contents(run)
    found, failed = list[Section](), list[str]()
    for title, build in _SECTIONS.items():
        try:
            section = build(contents)
        except Exception as error:  # a report must not end the run that it tells of, hours after its start
            LOGGER.debug("section %s of %s", title, run.path, exc_info=True)
            failed.append(f"{title}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        if section is not None:
            found.append(section)
    kind = f"{contents.script.removesuffix('.py')}: " if contents.script else ""
    return Report(f"{kind}{run.path.resolve().name}", tuple(found), (*contents.problems, *failed))
