"""The sections of what consists of several runs: the slimming loop, and the comparison of networks."""

from __future__ import annotations

from . import charts, wording
from .blocks import Block, Cell, Chart, Link, Section, Table, Text
from .contents import PARETO_FILE, Contents, folder_of, is_accepted, number
from .sections import read_picture

COMPARISON_FILE = "rows.json"
"""A comparison's networks, the baseline first: step, ap, ap50, test_ap, macs, params, milliseconds, folder."""


def pareto(contents: Contents) -> Section | None:
    """The loop's candidates: AP against MACs and milliseconds, and a row for each; the first is the dense network."""
    rows = contents.table(PARETO_FILE)
    if not rows:
        return None
    missing = [column for column in ("ap", "macs", "accepted") if column not in rows[0]]
    if missing:
        contents.problems.append(f"{PARETO_FILE} has no column {', '.join(missing)}")
        return None
    panels: dict[str, list[charts.Point]] = {"M MACs": [], "ms an image": []}
    for place, row in enumerate(rows):
        accepted = is_accepted(row)
        kind = "dense" if place == 0 else "accepted" if accepted else "rejected"
        label = "dense" if place == 0 else _candidate(row)
        for title, column, unit in (("M MACs", "macs", 1e6), ("ms an image", "ms", 1.0)):
            cost, ap = number(row, column), number(row, "ap")
            if cost is not None and ap is not None:
                panels[title].append(charts.Point(label, cost / unit, ap, kind))
    shown = {title: points for title, points in panels.items() if points}
    blocks: list[Block] = []
    if shown:
        blocks.append(Chart("AP of the candidates against their cost", charts.trade_off(shown)))
    blocks.append(_candidates(contents, rows))
    return Section("Candidates", tuple(blocks))


def _candidate(row: dict[str, str]) -> str:
    """Round and attempt; attempt 0 is the network at the end."""
    attempt = row.get("attempt", "")
    return "final" if attempt == "0" else f"{row.get('round', '')}.{attempt}"


def _candidates(contents: Contents, rows: list[dict[str, str]]) -> Table:
    columns = (
        "candidate",
        ">AP",
        ">AP50",
        "worst class",
        ">its AP",
        ">M MACs",
        ">share",
        ">M parameters",
        ">ms",
        "verdict",
    )
    cells: list[tuple[Cell, ...]] = []
    for place, row in enumerate(rows):
        accepted = is_accepted(row)
        verdict = "baseline" if place == 0 else "accepted" if accepted else "rejected"
        reason = row.get("reason", "").strip()
        cells.append(
            (
                "dense" if place == 0 else _folder_link(contents, folder_of(row), _candidate(row)),
                wording.ap(number(row, "ap")),
                wording.ap(number(row, "ap50")),
                row.get("worst_class", ""),
                wording.ap(number(row, "worst_class_ap")),
                wording.millions(number(row, "macs")),
                wording.share(number(row, "macs"), number(rows[0], "macs")),
                wording.millions(number(row, "params"), 3),
                wording.milliseconds(number(row, "ms")),
                verdict if place == 0 or not reason else f"{verdict}: {reason}",
            )
        )
    return Table(columns, tuple(cells))


def _folder_link(contents: Contents, folder: str, text: str) -> Cell:
    """A link to the report of a run inside this one, where there is one."""
    written = bool(folder) and (contents.path / folder / "report.html").is_file()
    return Link(text, f"{folder}/report.html") if written else text


def phases(contents: Contents) -> Section | None:
    """A row for each phase of a loop, in their order."""
    if not contents.phases:
        return None
    rows: list[tuple[Cell, ...]] = []
    for phase in contents.phases:
        ap, closed = number(phase.found, "ap"), number(phase.found, "closed_share")
        rows.append(
            (
                _folder_link(contents, phase.name, phase.name),
                wording.ap(number(phase.found, "pruned_ap") if ap is None else ap),
                wording.millions(number(phase.found, "macs")),
                wording.millions(number(phase.found, "params"), 3),
                wording.ABSENT if closed is None else f"{closed:.1%}",
                wording.ABSENT if phase.seconds is None else f"{phase.seconds:.1f}",
            )
        )
        contents.problems += [f"{phase.name}: {problem}" for problem in phase.run.problems]
    total = sum(phase.seconds or 0.0 for phase in contents.phases)
    columns = ("phase", ">AP", ">M MACs", ">M parameters", ">gates closed", ">seconds")
    said = f"All phases: {wording.duration(total)}, of those that were interrupted their last attempt alone."
    return Section("Phases", (Text(said), Table(columns, tuple(rows))))


def comparison(contents: Contents) -> Section | None:
    """The networks of a comparison: cost against AP, a row for each, and their detections on the same images."""
    rows = contents.listed(COMPARISON_FILE)
    if not rows:
        return None
    first = rows[0]
    panels: dict[str, list[charts.Point]] = {"M MACs": [], "ms an image": []}
    cells: list[tuple[Cell, ...]] = []
    for place, row in enumerate(rows):
        ap, macs, ms = (number(row, key) for key in ("ap", "macs", "milliseconds"))
        kind, label = "dense" if place == 0 else "accepted", str(row.get("step", ""))
        if ap is not None and macs is not None:
            panels["M MACs"].append(charts.Point(label, macs / 1e6, ap, kind))
        if ap is not None and ms is not None:
            panels["ms an image"].append(charts.Point(label, ms, ap, kind))
        cells.append(
            (
                _folder_link(contents, folder_of(row), label),
                *(wording.ap(number(row, key)) for key in ("ap", "ap50", "test_ap")),
                *(wording.millions(macs), wording.share(macs, number(first, "macs"))),
                wording.millions(number(row, "params"), 3),
                wording.milliseconds(ms),
            )
        )
    columns = ("network", ">AP val", ">AP50 val", ">AP test", ">M MACs", ">share", ">M parameters", ">ms an image")
    shown = {title: points for title, points in panels.items() if points}
    blocks: list[Block] = [Table(columns, tuple(cells))]
    if shown:
        blocks.append(Chart("AP of the networks against their cost", charts.trade_off(shown)))
    for row in rows:
        file = contents.path / folder_of(row) / "detections.png"
        if folder_of(row) and (picture := read_picture(contents, file, f"The same images: {row.get('step', '')}")):
            blocks.append(picture)
    return Section("Networks", tuple(blocks))
