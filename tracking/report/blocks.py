"""What a report is made of; plain data that the renderers turn into HTML and Markdown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(frozen=True)
class Bar:
    """A text beside bars drawn over each other; ``shares`` of the full length, 0 to 1, the longest first."""

    text: str
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Link:
    """A text that leads to a file beside the report."""

    text: str
    target: str


Cell: TypeAlias = str | Bar | Link


@dataclass(frozen=True)
class Table:
    """Rows under column titles; titles that start with '>' are of numbers, which stand at the right."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    kind: str = field(default="table", init=False)

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows)

    @property
    def titles(self) -> list[str]:
        return [column.removeprefix(">") for column in self.columns]

    @property
    def numeric(self) -> list[bool]:
        return [column.startswith(">") for column in self.columns]


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = field(default="text", init=False)


@dataclass(frozen=True)
class Facts:
    """(label, value, remark) of the headline's figures."""

    items: tuple[tuple[str, str, str], ...]
    kind: str = field(default="facts", init=False)


@dataclass(frozen=True)
class Command:
    """A command line with a remark."""

    remark: str
    line: str
    kind: str = field(default="command", init=False)


@dataclass(frozen=True)
class Chart:
    """An SVG element; ``title`` says what it shows to those who cannot see it."""

    title: str
    svg: str
    kind: str = field(default="chart", init=False)


@dataclass(frozen=True)
class Picture:
    """A picture of the run folder, with its content as a data URI."""

    title: str
    file: str
    uri: str
    width: int
    height: int
    kind: str = field(default="picture", init=False)


Block: TypeAlias = Table | Text | Facts | Command | Chart | Picture


@dataclass(frozen=True)
class Section:
    """A titled part of a report."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Report:
    """A whole report; ``problems`` are lines about what could not be shown."""

    title: str
    sections: tuple[Section, ...]
    problems: tuple[str, ...]
