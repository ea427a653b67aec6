"""The tables and plots of the documents, made from the rows in experiments/results.

python -m experiments.tables            writes them: Markdown between the markers in README.md and docs/*.md (NAME, or
                                        NAME:brief for AP alone), LaTeX, plots
python -m experiments.tables --check    writes nothing, and fails where one differs from its rows
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from detection.command import run_script
from slim import SlimError, write_atomically, write_text_atomically
from tracking import drawn_by

from .comparisons import BOOTSTRAP, Block, Contrast, TableSpec, blocks_of, read_bootstrap, read_rows, read_specs, select

MISSING = "–"
SIGNIFICANT = 0.05
_MARKERS = re.compile(r"^<!-- table (\S+) -->\n(.*?)^<!-- end \1 -->$", re.MULTILINE | re.DOTALL)
_MARKER = re.compile(r"^<!-- (?:table|end) (\S+) -->$", re.MULTILINE)


@dataclass(frozen=True)
class TablesFlags:
    """Options of the tables."""

    check: Annotated[bool, "write nothing; fail where a table differs from its rows"] = False
    root: Annotated[str, "folder of the repository"] = "."


@dataclass(frozen=True)
class Table:
    """A table that is ready to be written."""

    spec: TableSpec
    blocks: list[Block]
    cells: list[pd.DataFrame]
    notes: list[str]

    @property
    def points(self) -> dict[str, list[list[tuple[float, float]]]]:
        """By row label, for each block: (G MACs, AP) of every seed."""
        points: dict[str, list[list[tuple[float, float]]]] = {}
        for block in self.blocks:
            for label, runs in block.rows:
                found = sorted(
                    (float(macs) / 1e9, float(ap)) for macs, ap in zip(runs["macs"], runs["ap"], strict=True)
                )
                if found and found not in points.get(label, []):  # a dense network stands in every block
                    points.setdefault(label, []).append(found)
        return points

    def markdown(self, plot: str) -> str:
        """The title, a table for each block, the notes, and the plot where there are several blocks."""
        parts = [f"**{self.spec.title}**"]
        for block, cells in zip(self.blocks, self.cells, strict=True):
            parts += [_block_title(self.spec, block)] if block.value else []
            parts.append(_markdown(cells))
        parts += [note.replace("*", r"\*") for note in self.notes]
        parts += [f"![AP against MACs, every seed a point]({plot})"] if len(self.blocks) > 1 else []
        return "\n\n".join(parts) + "\n"

    def brief(self) -> str:
        """One table of AP alone, a column for each block."""
        ap = f"AP {self.spec.split}"
        columns = {
            _block_title(self.spec, block): cells.set_index(self.spec.rows)[ap]
            for block, cells in zip(self.blocks, self.cells, strict=True)
        }
        whole = pd.DataFrame(columns).fillna(MISSING).rename_axis(ap).reset_index()
        return f"{_markdown(whole)}\n\nMean ± standard deviation (number of seeds).\n"

    def latex(self) -> str:
        """A booktabs table; its blocks stand below one another."""
        lines: list[str] = []
        for position, (block, cells) in enumerate(zip(self.blocks, self.cells, strict=True)):
            made = cells.to_latex(index=False, escape=True, column_format="l" + "r" * (cells.shape[1] - 1)).splitlines()
            # A table of rows that aren't cut has one block, without a title.
            title = _block_title(self.spec, block).replace("%", r"\%") if block.value else ""
            head, body = made[: made.index(r"\midrule")], made[made.index(r"\midrule") : made.index(r"\bottomrule")]
            lines += [
                *(head if position == 0 else []),
                body[0],
                *([rf"\multicolumn{{{cells.shape[1]}}}{{l}}{{{title}}} \\"] if title else []),
                *body[1:],
            ]
        notes = "".join(f"% {note}\n" for note in self.notes)
        text = "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]).replace("±", r"$\pm$").replace(MISSING, "--")
        text = re.sub(r"(?<=[ \[])([+-]\d+\.\d+)", r"$\1$", text.replace("Δ", r"$\Delta$").replace("10¹²", "$10^{12}$"))
        return f"% {self.spec.title}; made by: python -m experiments.tables\n{notes}{text}\n"


def make_tables(root: Path, *, check: bool = False) -> list[Path]:
    """Write all tables and plots that differ from their rows; returns the files.

    With ``check`` nothing is written, and a SlimError names what differs.
    """
    results = root / "experiments" / "results"
    rows, bootstrap = read_rows(results), read_bootstrap(results / BOOTSTRAP)
    tables = {spec.name: make_table(spec, rows, bootstrap) for spec in read_specs(root / "experiments" / "grids")}
    docs, differs, written = root / "docs", [], []
    for document in sorted([*root.glob("README.md"), *docs.glob("*.md")]):
        before = document.read_text(encoding="utf-8")
        after, changed = _fill(before, document, tables, os.path.relpath(docs / "plots", document.parent))
        differs += [f"{document.relative_to(root)}: {name}" for name in changed]
        if changed and not check:
            write_text_atomically(document, after)
            written.append(document)
    for name, table in tables.items():
        if not table.points:
            continue
        latex, plot = docs / "tables" / f"{name}.tex", docs / "plots" / f"{name}.png"
        same_latex = latex.exists() and latex.read_text(encoding="utf-8") == table.latex()
        same_plot = len(table.blocks) == 1 or _digest_in(plot) == _digest(table)  # of one block nothing is plotted
        stale = [*([] if same_latex else [latex]), *([] if same_plot else [plot])]
        differs += [str(path.relative_to(root)) for path in stale]
        for path in [] if check else stale:
            write_text_atomically(path, table.latex()) if path == latex else draw(table, path)
            written.append(path)
    if check and differs:
        raise SlimError(f"tables that differ from their rows: {'; '.join(differs)}; run `make tables`")
    return written


def make_table(spec: TableSpec, rows: pd.DataFrame, bootstrap: pd.DataFrame) -> Table:
    """A table from the rows of all runs and of the bootstrap."""
    blocks = blocks_of(spec, rows)
    dense = rows[(rows["grid"] == spec.grid) & (rows["keep"] == "")].groupby("data")["macs"].max().to_dict()
    cells = [
        pd.DataFrame([_cells(spec, block, label, runs, dense, bootstrap) for label, runs in block.rows])
        for block in blocks
    ]
    whole = pd.concat(cells, ignore_index=True)
    empty = [name for name in whole.columns[2:] if whole[name].isin([MISSING, ""]).all()]
    return Table(spec, blocks, [one.drop(columns=empty) for one in cells], _notes(spec, blocks, select(spec, rows)))


def draw(table: Table, path: Path) -> None:
    """AP against MACs: every seed a point, means joined by a line for each row of the table."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for position, (label, groups) in enumerate(table.points.items()):
        colour, every = f"C{position % 10}", [point for group in groups for point in group]
        means = sorted(tuple(sum(values) / len(group) for values in zip(*group, strict=True)) for group in groups)
        axes.scatter([x for x, _ in every], [y for _, y in every], s=14, alpha=0.5, color=colour, linewidths=0)
        marker = "os^Dv"[position // 10 % 5]
        axes.plot(*zip(*means, strict=True), marker=marker, markersize=4, color=colour, label=label)
    axes.set(title=table.spec.title, xlabel="G MACs an image", ylabel=f"AP, {table.spec.split}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    metadata = {"Software": drawn_by(draw), "Description": _digest(table)}
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120, metadata=metadata))


def _cells(
    spec: TableSpec, block: Block, label: str, runs: pd.DataFrame, dense: dict[str, float], bootstrap: pd.DataFrame
) -> dict[str, str]:
    """A line of the table by column; an en dash where nothing is known."""
    contrast = block.contrasts.get(label)
    shares = [macs / dense[data] for macs, data in zip(runs["macs"], runs["data"], strict=True) if data in dense]
    macs = f"{runs['macs'].mean() / 1e9:.3g} G" + (f" ({100 * np.mean(shares):.1f} %)" if shares else "")
    compared = {
        f"Δ to {spec.against}, 95 % over seeds": _difference(contrast, len(runs)),
        f"Δ to {spec.against}, 95 % over images": _over_images(contrast, bootstrap),
    }
    reference = {name: "" for name in compared} if label == spec.against else compared
    cells = {
        f"AP {spec.split}": _spread(runs["ap"]),
        **(reference if spec.against else {}),
        "AP50": _mean(runs["ap50"], "{:.4f}"),
        "AP right after the cut": _mean(runs["cliff_ap"], "{:.4f}"),
        "MACs": macs if runs["macs"].notna().any() else MISSING,
        "M parameters": _mean(runs["params"] / 1e6, "{:.3f}"),
        "10¹² MACs of training": _mean(runs["training_macs"] / 1e12, "{:,.1f}"),
        "hours, all seeds": f"{runs['seconds'].sum() / 3600:.1f}" if runs["seconds"].notna().any() else MISSING,
    }
    return {spec.rows: label, **cells}


def _markdown(cells: pd.DataFrame) -> str:
    lines = [list(cells.columns), ["---"] * len(cells.columns), *cells.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("*", r"\*")


def _spread(values: pd.Series) -> str:
    """Mean ± sample standard deviation (number)."""
    if values.empty:
        return MISSING
    return f"{values.mean():.4f}" + (f" ± {values.std():.4f}" if len(values) > 1 else "") + f" ({len(values)})"


def _mean(values: pd.Series, form: str) -> str:
    known = values.dropna()
    return form.format(known.mean()) if len(known) else MISSING


def _difference(contrast: Contrast | None, runs: int) -> str:
    if contrast is None:
        return MISSING
    of, p = contrast.difference, contrast.adjusted_p
    text = f"{of.mean:+.4f}" + ("" if of.low is None else f" [{of.low:+.4f}, {of.high:+.4f}]")
    return text + ("*" if p is not None and p < SIGNIFICANT else "") + (f" ({of.n})" if of.n != runs else "")


def _over_images(contrast: Contrast | None, bootstrap: pd.DataFrame) -> str:
    """The ends of the bootstrap's interval, each a mean over the seeds that have one."""
    pairs = [] if contrast is None else [(run["hash"], other["hash"], run["split"]) for run, other in contrast.runs]
    keys = pd.MultiIndex.from_frame(bootstrap[["hash", "against_hash", "split"]])
    found = bootstrap[keys.isin(pairs)]
    return f"[{found['low'].mean():+.4f}, {found['high'].mean():+.4f}]" if len(found) else MISSING


def _block_title(spec: TableSpec, block: Block) -> str:
    return (
        f"{100 * float(block.value):.3g} % of the MACs" if spec.columns == "keep" else f"{spec.columns} {block.value}"
    )


def _notes(spec: TableSpec, blocks: list[Block], runs: pd.DataFrame) -> list[str]:
    """Below the table: equivalence, what the marks mean, and where the rows come from."""
    if runs.empty:
        return ["No run has finished yet."]
    notes = []
    for block in blocks:
        for label, of, test in block.equivalences:
            assert spec.equivalent is not None
            where = f" ({_block_title(spec, block)})" if block.value else ""
            line = f"{label} - {spec.equivalent.to}{where}: {of.mean:+.4f} over {of.n} pairs"
            if test is not None:
                verdict = "equivalent" if test.p < SIGNIFICANT else "not shown to be equivalent"
                line += f", {verdict} within ±{test.margin:g} (TOST p = {test.p:.3g})"
                line += f"; worse by less than {test.margin:g}: p = {test.not_worse_p:.3g}"
            notes.append(line + ".")
    tests = sum(of.adjusted_p is not None for block in blocks for of in block.contrasts.values())
    if tests:
        notes.append(
            f"Δ: AP minus that of {spec.against}, paired by seed; * p < {SIGNIFICANT} of the paired t test, after Holm's "
            f"correction for {tests} comparisons."
        )
    seeds = ", ".join(str(seed) for seed in sorted(set(runs["seed"])))
    facts = [f"`python -m experiments.run experiments/grids/{spec.grid}.yaml`", f"{len(runs)} runs", f"seeds {seeds}"]
    facts += [_each(runs["hardware"]), _each(runs["versions"]), f"commit {_each(runs['commit'].str[:7])}"]
    if spec.runs is not None and spec.runs > len(runs):
        facts.append(f"{spec.runs - len(runs)} of {spec.runs} runs are missing")
    return [*notes, "; ".join(facts) + "."]


def _each(values: Sequence[str]) -> str:
    return " / ".join(dict.fromkeys(value for value in values if value))


def _fill(text: str, document: Path, tables: dict[str, Table], plots: str) -> tuple[str, list[str]]:
    """The document with its tables made anew, and the names of those that were different."""
    changed: list[str] = []
    paired = [name for name, _ in _MARKERS.findall(text) for _ in range(2)]
    if _MARKER.findall(text) != paired:
        raise SlimError(f"{document}: unpaired table markers; each `<!-- table NAME -->` needs its `<!-- end NAME -->`")

    def anew(found: re.Match[str]) -> str:
        marked, before = found.groups()
        name, _, form = marked.partition(":")
        if name not in tables or form not in ("", "brief"):
            known = ", ".join(tables) or "there is none"
            raise SlimError(
                f"{document}: table {marked} stands in no grid of experiments/grids; expected one of: {known}, or with :brief"
            )
        after = tables[name].brief() if form else tables[name].markdown(f"{plots}/{name}.png")
        changed.extend([marked] if after != before else [])
        return f"<!-- table {marked} -->\n{after}<!-- end {marked} -->"

    return _MARKERS.sub(anew, text), changed


def _digest(table: Table) -> str:
    """Of what the plot shows, and how; it stands in the file: the picture's bytes differ between versions of matplotlib."""
    shown: list[Any] = [table.spec.title, table.spec.split, table.points, drawn_by(draw)]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def _digest_in(path: Path) -> str | None:
    if not path.exists():
        return None
    with Image.open(path) as picture:
        return picture.info.get("Description")


def main(flags: TablesFlags) -> None:
    for path in make_tables(Path(flags.root), check=flags.check):
        print(path)


def cli(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    return run_script(TablesFlags, main, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(cli())
