"""How figures and commands are written."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from .blocks import Bar

ABSENT = "–"
_LINE_LENGTH = 110
_NOT_REPEATED = ("resume", "debug")


def ap(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4f}"


def change(value: float | None, since: float | None) -> str:
    return "" if value is None or since is None else f"{round(value - since, 4) or 0.0:+.4f}"


def millions(value: float | None, digits: int = 1) -> str:
    return ABSENT if value is None else f"{value / 1e6:.{digits}f}"


def milliseconds(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.1f}"


def share(part: float | None, whole: float | None) -> str:
    return "" if part is None or not whole else f"{part / whole:.1%}"


def duration(seconds: float | None) -> str:
    """Seconds below two minutes, else hours and minutes."""
    if seconds is None:
        return ABSENT
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def file_size(size_bytes: int | None) -> str:
    return ABSENT if size_bytes is None else f"{size_bytes / 1e6:.2f} MB"


def bar(text: str, *values: float | None, full: float) -> Bar:
    """Bars of these values, each at most ``full``."""
    lengths = [min(1.0, max(0.0, value / full)) for value in values if value is not None and full > 0]
    return Bar(text, tuple(sorted(lengths, reverse=True)))


def gauge(text: str, value: float | None, full: float) -> Bar:
    """A bar before its whole length."""
    return Bar(text, ()) if value is None else bar(text, full, value, full=full)


def command_line(script: str, config: Mapping[str, Any]) -> str:
    """The command that gives a script all its flags, quoted for a shell, in lines of a readable length."""
    parts = [["python", *(["-m", script] if not script.endswith(".py") else [script])]]
    for name, value in config.items():
        option = "--" + name.replace("_", "-")
        if value is None or value is False or value == [] or name in _NOT_REPEATED:
            continue
        if value is True:
            parts.append([option])
        elif isinstance(value, list):
            parts.append([option, *map(str, value)])
        else:
            parts.append([f"{option}={value}"] if str(value).startswith("-") else [option, str(value)])
    lines = [""]
    for part in map(shlex.join, parts):
        if lines[-1] and len(lines[-1]) + len(part) > _LINE_LENGTH:
            lines.append("   ")
        lines[-1] += f" {part}" if lines[-1] else part
    return " \\\n".join(lines)


def config_command(script: str, config_file: str) -> str:
    """The same run from its configuration file."""
    return command_line(script, {"config": config_file})
