"""The sections about the slimming loop: its candidates and phases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..plots import plot_trade_off
from ..run_folder import number
from .contents import Contents, is_accepted
from .markdown import ABSENT, duration, link, share, table, written


def candidates(contents: Contents) -> list[str]:
    """The loop's candidates: AP against MACs and milliseconds, and a row for each; the first is the dense network."""
    rows = contents.candidates
    if not rows:
        return []
    labels = ["dense" if k == 0 else _label(row) for k, row in enumerate(rows)]
    kinds = {label: "accepted" if is_accepted(row) else "rejected" for label, row in zip(labels, rows, strict=True)}
    cells = []
    for label, row in zip(labels, rows, strict=True):
        verdict = "baseline" if label == "dense" else kinds[label]
        reason = "" if label == "dense" else row.get("reason", "").strip()
        cells.append(
            (
                label if label == "dense" else _report_link(contents, row, label),
                *(written(row, "ap"), written(row, "ap50")),
                *(row.get("worst_class", ""), written(row, "worst_class_ap")),
                *_costs(row, rows[0], "ms"),
                f"{verdict}: {reason}" if reason else verdict,
            )
        )
    columns = ("candidate", ">AP", ">AP50", "worst class", ">its AP", *_COSTS, ">ms", "verdict")
    return [
        *_trade_off(contents, dict(zip(labels, rows, strict=True)), "ms", kinds | {"dense": "dense"}),
        table(columns, cells),
    ]


def phases(contents: Contents) -> list[str]:
    """A row for each phase of a loop, in their order."""
    if not contents.phases:
        return []
    rows = []
    for name, found, seconds in contents.phases:
        rows.append(
            (
                _report_link(contents, {"folder": name}, name),
                written(found, "pruned_ap" if number(found, "ap") is None else "ap"),
                written(found, "macs"),
                written(found, "params"),
                written(found, "closed_share"),
                f"{seconds:.1f}" if seconds else ABSENT,
            )
        )
    total = duration(sum(seconds for *_, seconds in contents.phases))
    columns = ("phase", ">AP", ">M MACs", ">M parameters", ">gates closed", ">seconds")
    return [f"All phases: {total}, of those that were interrupted their last attempt alone.", table(columns, rows)]


_COSTS = (">M MACs", ">share", ">M parameters")


def _costs(row: Mapping[str, Any], first: Mapping[str, Any], milliseconds: str) -> tuple[str, ...]:
    of_first = share(number(row, "macs"), number(first, "macs"))
    return written(row, "macs"), of_first, written(row, "params"), written(row, milliseconds)


def _trade_off(
    contents: Contents, rows: Mapping[str, Mapping[str, Any]], milliseconds: str, kinds: Mapping[str, str]
) -> list[str]:
    """The chart of AP against each cost that is known."""
    panels: dict[str, dict[str, tuple[float, float]]] = {}
    for label, row in rows.items():
        for title, column, unit in (("M MACs", "macs", 1e6), ("ms an image", milliseconds, 1.0)):
            cost, ap = number(row, column), number(row, "ap")
            if cost is not None and ap is not None:
                panels.setdefault(title, {})[label] = cost / unit, ap
    if not panels:
        return []
    plot_trade_off(panels, contents.path / "trade_off.png", kinds=kinds)
    return contents.picture(contents.path / "trade_off.png", "AP of the networks against their cost")


def _label(row: Mapping[str, str]) -> str:
    """Round and attempt; attempt 0 is the network at the end."""
    return "final" if row.get("attempt") == "0" else f"{row.get('round', '')}.{row.get('attempt', '')}"


def _folder(row: Mapping[str, Any]) -> str:
    """The name of the run folder, inside this one, that made a network."""
    return Path(str(row.get("folder", ""))).name


def _report_link(contents: Contents, row: Mapping[str, Any], text: str) -> str:
    """A link to the report of a run inside this one, where there is one."""
    folder = _folder(row)
    return (
        link(text, f"{folder}/report.html") if folder and (contents.path / folder / "report.html").is_file() else text
    )
