"""What a table compares: its specification in a grid's YAML, the rows that it takes, and the pairs among them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from slim import SlimError

from .rows import COLUMNS
from .statistics import Equivalence, PairedDifference, equivalence, holm, paired_difference

BOOTSTRAP = "bootstrap.csv"
"""Of the files with results the one that is not rows of runs."""
NUMBERS = ("ap", "ap50", "ap75", "cliff_ap", "macs", "params", "epochs", "training_macs", "seconds")
PAIR_COLUMNS = ("grid", "keep", "axes", "seed", "data", "split", "method", "against", "hash", "against_hash")
BOOTSTRAP_COLUMNS = (*PAIR_COLUMNS[:8], "difference", "low", "high", "resamples", *PAIR_COLUMNS[8:])
"""Of `bootstrap.csv`, one a pair of runs: AP of ``hash`` minus that of ``against_hash``, over resamples of the images."""


@dataclass(frozen=True)
class EquivalenceSpec:
    """The claim of no loss: within ± ``margin`` (AP, 0..1) of the row ``to``."""

    to: str
    margin: float = 0.01


@dataclass(frozen=True)
class TableSpec:
    """An entry of ``tables:`` in a grid's YAML.

    Attributes:
        grid: the YAML's name without its suffix, as in the rows' column of that name
        name: between the markers in a document, and of the LaTeX and picture files
        title: above the table
        split: whose AP
        rows: what a row is: ``method``, or an axis; runs that lack the axis, such as the dense ones, are rows by their method
        columns: of what each value is a block of its own: ``keep``, an axis, ``data``, or nothing; runs without a value
            stand in every block
        order: rows in this order, also those that have no run yet; others follow, numbers ascending, else as they come
        where: by column or axis the value, or list of values, of the runs to take; runs without a value are taken
        against: the row that every other one is compared with
        equivalent: the row that ``against``, or without it every row, is tested against for no loss
        runs: how many runs the table waits for, where known
    """

    grid: str
    name: str
    title: str
    split: str = "val"
    rows: str = "method"
    columns: str = ""
    order: tuple[str, ...] = ()
    where: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    against: str = ""
    equivalent: EquivalenceSpec | None = None
    runs: int | None = None


@dataclass(frozen=True)
class Contrast:
    """One row against the reference of its block.

    Attributes:
        runs: (run, run of the reference) of each seed that both have, as rows of the CSV
        difference: of AP, the row's minus the reference's
        adjusted_p: Holm's, over all contrasts of the table; None where there is no test
    """

    runs: list[tuple[Any, Any]]
    difference: PairedDifference
    adjusted_p: float | None = None


@dataclass(frozen=True)
class Block:
    """The runs of one value of the table's ``columns``.

    Attributes:
        value: of the column; empty where the table has none
        rows: (label, its runs by seed), in order; a row that is asked for and has no run yet has an empty frame
        contrasts: by row label
        equivalences: (label, pairs, difference, test); the test is None where there is no spread to judge by
    """

    value: str
    rows: list[tuple[str, pd.DataFrame]]
    contrasts: dict[str, Contrast]
    equivalences: list[tuple[str, PairedDifference, Equivalence | None]]


def read_rows(folder: Path) -> pd.DataFrame:
    """The rows of all runs, ``folder``/*.csv; text stays text, an empty number is NaN.

    Raises SlimError for missing columns, for what is no number, and for a run that has two rows of one split and class.
    """
    files = sorted(path for path in folder.glob("*.csv") if path.name != BOOTSTRAP)
    frames = [_read_csv(path, COLUMNS, NUMBERS) for path in files]
    rows = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(COLUMNS))
    twice = rows[rows.duplicated(["grid", "hash", "split", "class"])]
    if len(twice):
        run = twice.iloc[0]
        raise SlimError(
            f"{folder}: run {run['hash']} of grid {run['grid']} has two rows of split {run['split']}; leave one of them"
        )
    return rows


def read_bootstrap(path: Path) -> pd.DataFrame:
    """The rows of a bootstrap.csv; none where it is missing."""
    if not path.exists():
        return pd.DataFrame(columns=list(BOOTSTRAP_COLUMNS))
    return _read_csv(path, BOOTSTRAP_COLUMNS, ("difference", "low", "high"))


def read_specs(folder: Path) -> list[TableSpec]:
    """The specifications of all grids, ``folder``/*.yaml. Raises SlimError for keys that there are not, and names used twice."""
    specs: dict[str, TableSpec] = {}
    for path in sorted(folder.glob("*.yaml")):
        for entry in (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("tables") or ():
            spec = _spec(path, entry)
            if spec.name in specs:
                raise SlimError(f"{path}: table {spec.name} stands in grid {specs[spec.name].grid}, too; rename one")
            specs[spec.name] = spec
    return list(specs.values())


def blocks_of(spec: TableSpec, rows: pd.DataFrame) -> list[Block]:
    """The table as data: blocks (``keep`` descending), their rows, and all comparisons, corrected over the table.

    Raises SlimError where a row of a block has two runs of one seed, or the row to compare with isn't there.
    """
    runs = select(spec, rows)
    columns = _values(spec, runs, spec.columns) if spec.columns else pd.Series("", index=runs.index)
    labels = _values(spec, runs, spec.rows)
    labels = labels.where(labels != "", runs["method"])
    order = [*spec.order, *(label for label in _ordered(labels) if label not in spec.order)]
    for name in (spec.against, spec.equivalent.to if spec.equivalent else ""):
        if name and len(runs) and name not in order:
            raise SlimError(
                f"grid {spec.grid}, table {spec.name}: no row {name} to compare with; expected one of {', '.join(order)} "
                "(where its runs are still to come, name it in `order`)"
            )
    values = _ordered(columns[columns != ""])
    blocks = []
    for value in (reversed(values) if spec.columns == "keep" else values) if values else [""]:
        inside = (columns == value) | (columns == "")
        by_label = {label: _by_seed(spec, value, label, runs[inside & (labels == label)]) for label in order}
        found = [(label, of) for label, of in by_label.items() if len(of) or label in spec.order]
        blocks.append(Block(value, found, _contrasts(spec, by_label), _equivalences(spec, by_label)))
    return _corrected(blocks)


def select(spec: TableSpec, rows: pd.DataFrame) -> pd.DataFrame:
    """The rows over all classes that a table takes."""
    runs = rows[(rows["grid"] == spec.grid) & (rows["split"] == spec.split) & (rows["class"] == "")]
    for name, allowed in spec.where.items():
        values = _values(spec, runs, name)
        runs = runs[values.isin(allowed) | (values == "")]
    return runs


def compared_runs(spec: TableSpec, rows: pd.DataFrame) -> pd.DataFrame:
    """The pairs of runs behind a table's differences (`PAIR_COLUMNS`): what `append_bootstrap_rows` takes."""
    pairs = [
        {
            **{name: run[name] for name in PAIR_COLUMNS if name in run},
            **{"keep": run["keep"] or reference["keep"], "against": reference["method"]},
            "against_hash": reference["hash"],
        }
        for block in blocks_of(spec, rows)
        for contrast in block.contrasts.values()
        for run, reference in contrast.runs
    ]
    return pd.DataFrame(pairs, columns=list(PAIR_COLUMNS))


def _read_csv(path: Path, columns: tuple[str, ...], numbers: tuple[str, ...]) -> pd.DataFrame:
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    if missing := [name for name in columns if name not in frame]:
        raise SlimError(f"{path}: no column {', '.join(missing)}; expected {', '.join(columns)}")
    for name in ("seed", *numbers):
        try:
            frame[name] = pd.to_numeric(frame[name].replace("", None)).astype(int if name == "seed" else float)
        except ValueError as error:
            raise SlimError(f"{path}: column {name}: {error}; expected numbers or nothing") from None
    return frame


def _spec(path: Path, entry: Mapping[str, Any]) -> TableSpec:
    known = [one.name for one in fields(TableSpec) if one.name != "grid"]
    if unknown := [key for key in entry if key not in known]:
        raise SlimError(f"{path}: tables: no key {', '.join(unknown)}; expected {', '.join(known)}")
    if missing := [key for key in ("name", "title") if key not in entry]:
        raise SlimError(f"{path}: tables: an entry without {', '.join(missing)}; give it one")
    given: dict[str, Any] = {key: value for key, value in entry.items() if value is not None}
    given["order"] = tuple(map(str, given.get("order", ())))
    given["where"] = {
        name: tuple(map(str, values if isinstance(values, list) else [values]))
        for name, values in given.get("where", {}).items()
    }
    if "against" in given:
        given["against"] = str(given["against"])
    if "equivalent" in given:
        claim = given["equivalent"]
        if not isinstance(claim, dict) or "to" not in claim or claim.keys() - {"to", "margin"}:
            raise SlimError(f"{path}: table {given['name']}: equivalent: {claim}; expected {{to: ROW, margin: 0.01}}")
        given["equivalent"] = EquivalenceSpec(str(claim["to"]), float(claim.get("margin", 0.01)))
    return TableSpec(path.stem, **given)


def _values(spec: TableSpec, runs: pd.DataFrame, name: str) -> pd.Series:
    """Of a column or an axis, as text; empty for runs without it."""
    if name in runs:
        return runs[name]
    axes = [dict(pair.split("=", 1) for pair in text.split()) for text in runs["axes"]]
    if axes and not any(name in of for of in axes):
        known = sorted({axis for of in axes for axis in of})
        raise SlimError(
            f"grid {spec.grid}, table {spec.name}: no axis {name!r}; expected {', '.join([*known, 'or a column'])}"
        )
    return pd.Series([of.get(name, "") for of in axes], index=runs.index, dtype=object)


def _ordered(values: pd.Series) -> list[str]:
    """Each value once: numbers ascending, and behind them the others as they come."""
    found = list(dict.fromkeys(values))
    numbers = pd.to_numeric(pd.Series(found, dtype=object), errors="coerce").fillna(np.inf)
    return [found[position] for position in np.argsort(numbers.to_numpy(dtype=float), kind="stable")]


def _by_seed(spec: TableSpec, value: str, label: str, runs: pd.DataFrame) -> pd.DataFrame:
    twice = runs[runs.duplicated("seed", keep=False)]
    if len(twice):
        raise SlimError(
            f"grid {spec.grid}, table {spec.name}: row {label}{value and f' at {spec.columns} {value}'} has runs "
            f"{', '.join(twice['hash'])} of the same seed; say by `where` which ones, or make what differs its rows or columns"
        )
    return runs.set_index("seed", drop=False).sort_index()


def _paired(runs: pd.DataFrame, references: pd.DataFrame) -> Iterator[tuple[Any, Any]]:
    """(run, reference) of each seed that both have."""
    for seed in runs.index.intersection(references.index):
        yield runs.loc[seed], references.loc[seed]


def _aps(pairs: list[tuple[Any, Any]]) -> tuple[list[float], list[float]]:
    return [float(run["ap"]) for run, _ in pairs], [float(reference["ap"]) for _, reference in pairs]


def _contrasts(spec: TableSpec, by_label: Mapping[str, pd.DataFrame]) -> dict[str, Contrast]:
    if spec.against not in by_label:
        return {}
    reference = by_label[spec.against]
    pairs = {label: list(_paired(runs, reference)) for label, runs in by_label.items() if label != spec.against}
    return {label: Contrast(of, paired_difference(*_aps(of))) for label, of in pairs.items() if of}


def _equivalences(
    spec: TableSpec, by_label: Mapping[str, pd.DataFrame]
) -> list[tuple[str, PairedDifference, Equivalence | None]]:
    if spec.equivalent is None or spec.equivalent.to not in by_label:
        return []
    to, margin = spec.equivalent.to, spec.equivalent.margin
    asked = [label for label in ([spec.against] if spec.against else by_label) if label != to]
    pairs = {label: list(_paired(by_label[label], by_label[to])) for label in asked if label in by_label}
    return [
        (label, paired_difference(*_aps(of)), equivalence(*_aps(of), margin=margin))
        for label, of in pairs.items()
        if of
    ]


def _corrected(blocks: list[Block]) -> list[Block]:
    """The blocks with Holm's p over all of them."""
    family = [contrast for block in blocks for contrast in block.contrasts.values()]
    adjusted = iter(holm([contrast.difference.p for contrast in family]))
    corrected = []
    for block in blocks:
        contrasts = {label: replace(of, adjusted_p=next(adjusted)) for label, of in block.contrasts.items()}
        corrected.append(replace(block, contrasts=contrasts))
    return corrected
