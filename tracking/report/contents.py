"""What a run folder holds, read leniently: what is absent is empty, what is damaged is told and left out."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from slim import SlimError

from ..journal import RESULT, SECONDS
from ..run_folder import RunFolder

T = TypeVar("T")
PARETO_FILE = "pareto.csv"
_MOST_ANCESTORS = 20


class Contents:
    """The parts of one run folder; ``problems`` collects a line for each that cannot be read."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.problems: list[str] = []

    @property
    def path(self) -> Path:
        return self.run.path

    @cached_property
    def script(self) -> str | None:
        """The script that made the run, such as 'prune.py'."""
        return self._read(self.run.config_file, lambda _: self.run.read_script(), None)

    @cached_property
    def config(self) -> dict[str, Any]:
        return self._read(self.run.config_file, lambda _: _mapping(self.run.read_config()), {})

    @cached_property
    def metrics(self) -> dict[str, Any]:
        return self._read(self.run.metrics_file, _read_json, {})

    @cached_property
    def rows(self) -> list[dict[str, str]]:
        """results.csv; epochs without a number are left out."""
        return self._read(self.run.results_file, _read_rows, [])

    def table(self, name: str) -> list[dict[str, str]]:
        """The rows of another CSV file of the run."""
        return self._read(self.path / name, _read_csv, [])

    def listed(self, name: str) -> list[dict[str, Any]]:
        """The entries of a JSON file of the run."""
        return self._read(self.path / name, _read_list, [])

    @cached_property
    def origin(self) -> Contents | None:
        """The run whose weights this one began with, where its folder is found."""
        weights = self.config.get("weights")
        if not isinstance(weights, str) or not weights:
            return None
        for base in (Path(), *self.path.resolve().parents):
            folder = (base / weights).parent
            if folder.name == "weights" and (folder.parent / "metrics.json").is_file():
                return Contents(RunFolder(folder.parent))
        return None

    @cached_property
    def ancestors(self) -> list[Contents]:
        """The runs that led to this one, the oldest first."""
        found: list[Contents] = []
        seen, current = {self.path.resolve()}, self.origin
        while current is not None and current.path.resolve() not in seen and len(found) < _MOST_ANCESTORS:
            seen.add(current.path.resolve())
            found.insert(0, current)
            current = current.origin
        return found

    @cached_property
    def phases(self) -> list[Phase]:
        """The finished phases of a loop's journal in their order."""
        found = []
        for file in sorted(self.path.glob(f"*/{RESULT}")):
            run = Contents(RunFolder(file.parent))
            result: dict[str, Any] = self._read(file, _read_json, {})
            seconds = self._read(file.parent / SECONDS, lambda p: float(p.read_text()), None)
            found.append(Phase(file.parent.name, {**result, **run.metrics}, seconds, run))
        return sorted(found, key=lambda phase: _place_in_loop(phase.name))

    @property
    def figures_before(self) -> Mapping[str, Any]:
        """metrics.json's figures of the network that a cut or a loop began with; empty for other runs."""
        found = self.metrics.get("before") or self.metrics.get("baseline")
        return found if isinstance(found, dict) else {}

    @property
    def widths(self) -> tuple[dict[str, int], dict[str, int]]:
        """{layer: output channels} before and after the cut that this run made; empty for other runs."""
        before, after = (self.metrics.get(side) for side in ("before", "after"))
        return channels_of(before), channels_of(after)

    def _read(self, file: Path, read: Callable[[Path], T], otherwise: T) -> T:
        if not file.is_file():
            return otherwise
        try:
            return read(file)
        except Exception as error:  # a damaged file of any kind is told, and the rest is shown
            problem = f"{file.name} cannot be read: {' '.join(str(error).split())[:200]}"
            if problem not in self.problems:
                self.problems.append(problem)
            return otherwise


def number(values: Mapping[str, Any], key: str) -> float | None:
    """A finite number; None for anything else."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        found = float(value)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


@dataclass(frozen=True)
class Phase:
    """One phase of a loop: what it found, and how long its last attempt took."""

    name: str
    found: Mapping[str, Any]
    seconds: float | None
    run: Contents


def channels_of(figures: Any) -> dict[str, int]:
    """{layer: output channels} of a network's figures."""
    channels = figures.get("channels") if isinstance(figures, dict) else None
    if not isinstance(channels, dict):
        return {}
    return {str(layer): count for layer, count in channels.items() if isinstance(count, int)}


def is_accepted(row: Mapping[str, str]) -> bool:
    """Whether the loop went on with a candidate."""
    return row.get("accepted", "").strip().lower() in ("true", "1", "yes")


def folder_of(row: Mapping[str, Any]) -> str:
    """The name of the run folder, inside the loop's, that made a candidate."""
    return Path(str(row.get("folder", ""))).name


def class_aps(metrics: Mapping[str, Any]) -> dict[str, float]:
    """AP by class name."""
    per_class = metrics.get("per_class")
    if not isinstance(per_class, dict):
        return {}
    return {str(name): ap for name in per_class if (ap := number(per_class, name)) is not None}


def same_task(a: Contents, b: Contents) -> bool:
    """Whether two runs were evaluated on the same data at the same size, so that their APs compare."""
    return all(a.config.get(key) == b.config.get(key) for key in ("data", "img")) and (
        a.config.get("split", "val") == b.config.get("split", "val")
    )


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SlimError(f"found a {type(value).__name__}, expected names with values")
    return {str(key): item for key, item in value.items()}


def _read_json(path: Path) -> dict[str, Any]:
    return _mapping(json.loads(path.read_text(encoding="utf-8")))


def _read_list(path: Path) -> list[dict[str, Any]]:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, list):
        raise SlimError(f"found a {type(found).__name__}, expected a list")
    return [_mapping(entry) for entry in found]


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [{str(k): v or "" for k, v in row.items() if k is not None} for row in csv.DictReader(file)]


def _read_rows(path: Path) -> list[dict[str, str]]:
    rows = _read_csv(path)
    if rows and "epoch" not in rows[0]:
        raise SlimError(f"no column 'epoch', found {', '.join(rows[0])}")
    return [row for row in rows if number(row, "epoch") is not None]


_STEPS = ("baseline", "sparse", "plan", "cut", "recovery", "finetune", "fold", "evaluation")


def _place_in_loop(name: str) -> tuple[Any, ...]:
    """Rounds in their order between the baseline and the end; within one attempts, and in these the method's steps."""
    numbers = [int(digits) for digits in re.findall(r"\d+", name)]
    step = name.rpartition("-")[2]
    rank = _STEPS.index(step) if step in _STEPS else len(_STEPS)
    place = numbers[0] if numbers else 0 if rank == 0 else math.inf
    return place, numbers[1:], rank, name
