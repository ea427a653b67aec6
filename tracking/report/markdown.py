"""Parts of a report as Markdown: tables, links, bars and figures as they are written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from ..run_folder import number

ABSENT = "–"
_BAR_LENGTH = 12
_SPECS = {
    "macs": (".1f", 1e6),
    "params": (".3f", 1e6),
    "ms": (".1f", 1.0),
    "milliseconds": (".1f", 1.0),
    "closed_share": (".1%", 1.0),
    "suggested_conf": (".3f", 1.0),
}
"""How a figure is written, and in units of what; APs have four digits."""


class Markdown(str):
    """Text that is Markdown already; `table` escapes every other cell."""


def escape(text: object) -> str:
    """Text that Markdown shows as it is, in one line.

    >>> escape("a_b *c* <d>")
    'a_b \\\\*c\\\\* &lt;d&gt;'
    """
    line = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*\[\]|~$])", r"\\\1", line)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", line)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows under column titles, numbers at the right where a title starts with '>'."""
    rule = ["---:" if column.startswith(">") else "---" for column in columns]
    cells = [[cell if isinstance(cell, Markdown) else escape(cell) for cell in row] for row in rows]
    assert all(len(row) == len(columns) for row in cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in [[c.removeprefix(">") for c in columns], rule, *cells])


def link(text: str, target: str) -> Markdown:
    """A text that leads to a file beside the report."""
    return Markdown(f"[{escape(text)}]({quote(target)})")


def code(line: str) -> str:
    """A command line as a block of its own."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence}sh\n{line}\n{fence}"


def bar(text: str, part: float, before: float, full: float) -> str:
    """A bar of `part` in a lighter one of `before`, beside a text; `full` fills the column."""
    solid, length = (round(_BAR_LENGTH * min(1.0, max(0.0, value / full))) if full else 0 for value in (part, before))
    return f"{'█' * solid}{'░' * (length - solid)} {text}".strip()


def written(values: Mapping[str, Any], key: str) -> str:
    """A figure of metrics.json or a table as reports write it; a dash where there is none."""
    spec, unit = _SPECS.get(key, (".4f", 1.0))
    value = number(values, key)
    return ABSENT if value is None else format(value / unit, spec)


def change(value: float | None, since: float | None) -> str:
    """A signed difference, where there are two figures."""
    return "" if value is None or since is None else f"{round(value - since, 4) or 0.0:+.4f}"


def share(part: float | None, whole: float | None) -> str:
    """A part as percent of the whole, where there are both."""
    return "" if part is None or not whole else f"{part / whole:.1%}"


def duration(seconds: float) -> str:
    """Seconds below two minutes, else hours and minutes."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
