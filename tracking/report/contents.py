"""What a run folder holds, read leniently: what is absent is empty, what is damaged is named and left out."""

from __future__ import annotations

import base64
import csv
import functools
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from PIL import Image

from slim import SlimError

from ..journal import RESULT, SECONDS
from ..run_folder import RunFolder, number
from .markdown import escape

T = TypeVar("T")
_MOST_ANCESTORS = 20
_MOST_PICTURE_BYTES, _MOST_PICTURE_PX = 400_000, 1600
_STEPS = ("baseline", "latency", "sparse", "plan", "cut", "recovery", "finetune", "fold", "export", "evaluation")


class Contents:
    """The parts of one run folder; ``problems`` collects a line for each that cannot be read.

    ``config`` and ``metrics`` are those of config.yaml and metrics.json, ``rows`` the epochs of results.csv, ``script``
    what made the run, such as 'prune.py'; each is empty where there is none. ``embedded`` collects the content of the
    report's pictures as data URIs by their places in the run folder.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.run = path, RunFolder(path)
        self.problems: list[str] = []
        self.embedded: dict[str, str] = {}
        self.config: dict[str, Any] = self.read("config.yaml", lambda _: self.run.read_config(), dict)
        self.script = self.read("config.yaml", lambda _: self.run.read_script() or "", str) if self.config else ""
        self.metrics: dict[str, Any] = self.read("metrics.json", read_json, dict)
        epochs: list[dict[str, str]] = self.read("results.csv", functools.partial(_read_rows, needed=("epoch",)), list)
        self.rows = [row for row in epochs if number(row, "epoch") is not None]

    def read(self, name: str, read: Callable[[Path], Any], kind: Callable[[], T]) -> T:
        """What `read` makes of a file of the run; an empty `kind` where it is absent or damaged."""
        file = self.path / name
        if not file.is_file():
            return kind()
        try:
            found = read(file)
            if not isinstance(found, kind):  # type: ignore[arg-type]
                raise SlimError(f"found a {type(found).__name__}, expected a {kind.__name__}")
        except Exception as error:  # a damaged file of any kind is named, and the rest is shown
            self.problems.append(f"{file.name} cannot be read: {' '.join(str(error).split())[:200]}")
            return kind()
        return found  # type: ignore[no-any-return]

    @cached_property
    def ancestors(self) -> list[Contents]:
        """The runs that led to this one by their --weights, as far as their folders are found, the oldest first."""
        found: list[Contents] = []
        seen, current = {self.path.resolve()}, self._origin()
        while current is not None and current.path.resolve() not in seen and len(found) < _MOST_ANCESTORS:
            seen.add(current.path.resolve())
            found.insert(0, current)
            current = current._origin()
        return found

    def _origin(self) -> Contents | None:
        weights = self.config.get("weights")
        if not isinstance(weights, str) or not weights:
            return None
        for base in (Path(), *self.path.resolve().parents):
            folder = (base / weights).parent
            if folder.name == "weights" and (folder.parent / "metrics.json").is_file():
                return Contents(folder.parent)
        return None

    @cached_property
    def phases(self) -> list[tuple[str, dict[str, Any], float]]:
        """(name, findings, seconds of the last attempt) of a loop's finished phases in their order."""
        found = []
        for file in sorted(self.path.glob(f"*/{RESULT}"), key=lambda file: _place_in_loop(file.parent.name)):
            phase = Contents(file.parent)
            result = {**phase.read(RESULT, read_json, dict), **phase.metrics}
            found.append((phase.path.name, result, phase.read(SECONDS, lambda path: float(path.read_text()), float)))
            self.problems += [f"{phase.path.name}: {problem}" for problem in phase.problems]
        return found

    @cached_property
    def candidates(self) -> list[dict[str, str]]:
        """The rows of a loop's pareto.csv, the dense network first."""
        return self.read("pareto.csv", functools.partial(_read_rows, needed=("ap", "macs", "accepted")), list)

    @property
    def name(self) -> str:
        """The folder's name and the script that made it."""
        return f"{self.path.name} ({self.script.removesuffix('.py')})" if self.script else self.path.name

    @property
    def figures_before(self) -> Mapping[str, Any]:
        """metrics.json's figures of the network that a cut or a loop began with; empty for other runs."""
        found = self.metrics.get("before") or self.metrics.get("baseline")
        return found if isinstance(found, dict) else {}

    def picture(self, file: Path, title: str) -> list[str]:
        """A picture under its title, where there is one; one of many bytes is embedded as a smaller JPEG."""
        if not file.is_file():
            return []
        try:
            content, kind = file.read_bytes(), "png"
            with Image.open(file) as image:
                image.load()
                if len(content) > _MOST_PICTURE_BYTES:
                    smaller, packed, kind = image.convert("RGB"), io.BytesIO(), "jpeg"
                    smaller.thumbnail((_MOST_PICTURE_PX, _MOST_PICTURE_PX))
                    smaller.save(packed, kind, quality=85)
                    content = packed.getvalue()
        except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for a damaged file
            self.problems.append(f"{file.name} cannot be shown: {type(error).__name__}")
            return []
        place = quote(file.relative_to(self.path).as_posix())
        self.embedded[place] = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
        return [f"*{escape(title)}*", f"![{escape(title)}]({place})"]


def channels_of(figures: Any) -> dict[str, int]:
    """{layer: output channels} of a network's figures; empty where they have none."""
    channels = figures.get("channels") if isinstance(figures, dict) else None
    return {str(layer): int(count) for layer, count in channels.items()} if isinstance(channels, dict) else {}


def is_accepted(row: Mapping[str, str]) -> bool:
    """Whether a loop went on with a candidate."""
    return row.get("accepted", "").strip().lower() in ("true", "1", "yes")


def same_task(a: Contents, b: Contents) -> bool:
    """Whether two runs were evaluated on the same data at the same size, so that their APs compare."""
    return all(a.config.get(key) == b.config.get(key) for key in ("data", "img")) and (
        a.config.get("split", "val") == b.config.get("split", "val")
    )


def read_json(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def _read_rows(path: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file as text; SlimError where it lacks a column."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{str(k): v or "" for k, v in row.items() if k is not None} for row in csv.DictReader(file)]
    if rows and (missing := [column for column in needed if column not in rows[0]]):
        raise SlimError(f"no column {', '.join(missing)}")
    return rows


def _place_in_loop(name: str) -> tuple[Any, ...]:
    """Rounds in their order between the baseline and the end; within one attempts, and in these the method's steps."""
    numbers = [int(digits) for digits in re.findall(r"\d+", name)]
    step = name.rpartition("-")[2]
    rank = _STEPS.index(step) if step in _STEPS else len(_STEPS)
    place = numbers[0] if numbers else 0 if rank < 2 else math.inf
    return place, numbers[1:], rank, name
