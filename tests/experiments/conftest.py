"""A small grid on the tiny shapes, and its scripts run in this process."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments import store
from tests.scripts.conftest import without_plots


@pytest.fixture
def write_grid(tiny: Path, small_cfg: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a grid: two cuts of one sparse training, and a dense network of as many epochs."""

    def write(**changed: Any) -> Path:
        grid = {
            "data": str(tiny),
            "flags": {"cfg": str(small_cfg), "img": 64, "batch-size": 8, "workers": 0, "precision": "float32"},
            "splits": ["val", "test"],
            "epochs": 3,
            "axes": {"keep": [0.7, 0.5]},
            "methods": {
                "gate": [
                    {"train_sparse": {"epochs": 2, "sparse-from": 1}},
                    {"prune": {"macs": "$keep", "round-to": 4, "min-channels": 4}},
                    {"finetune": {"epochs": 1}},
                ],
                "dense": [{"finetune": {"epochs": 3}}],
            },
        } | changed
        file = tmp_path / "small.yaml"
        file.write_text(yaml.safe_dump(grid, sort_keys=False))
        return file

    return write


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The real scripts with the real arguments, without starting an interpreter for each; their names as they ran."""
    names: list[str] = []

    def execute(command: Sequence[str], log: Path, *_: Any) -> int:
        names.append(Path(command[0]).stem)
        log.write_text("the script's last word")
        return int(importlib.import_module(names[-1]).cli(list(command[1:])))

    monkeypatch.chdir(store.ROOT)
    monkeypatch.setattr(store, "execute", execute)
    with without_plots():
        yield names
