"""Rows over seeds: exact means and deviations, one comparison a seed, with the flags that were given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import over_seeds
from experiments.slimming import ROWS, SlimmingFlags

APS = {0: (0.5, 0.4), 1: (0.6, 0.4), 2: (0.7, 0.7)}


def row(step: str, ap: float, test_ap: float | None, macs: int) -> dict[str, object]:
    return {"step": step, "ap": ap, "ap50": 0.9, "test_ap": test_ap, "macs": macs, "params": macs // 2}


def test_means_and_deviations_of_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def compare(flags: SlimmingFlags) -> None:
        seen.append(flags)
        dense, cut = APS[flags.seed]
        rows = [row("dense", dense, dense, 1000), row("cut", cut, None, 300)]
        folder = Path(flags.run.project) / flags.run.name
        folder.mkdir()
        (folder / ROWS).write_text(json.dumps(rows))

    monkeypatch.setattr(over_seeds, "compare", compare)
    given = ["macs=0.3,0.2", "train=lr=0.02,mosaic=0", "teacher=true", "img=64"]
    assert over_seeds.cli(["--project", str(tmp_path), "--seeds", "0", "1", "2", "--comparison", *given]) == 0
    assert [(f.seed, f.run.name, f.resume) for f in seen] == [
        (0, "seed0", True),
        (1, "seed1", True),
        (2, "seed2", True),
    ]
    assert seen[0].macs == (0.3, 0.2) and seen[0].train == ("lr=0.02", "mosaic=0")
    assert seen[0].teacher and seen[0].img == 64 and not seen[0].test
    out = capsys.readouterr().out
    assert "| dense | 0.6000 ± 0.1000 | +0.0000 | 0.6000 ± 0.1000 | 100% | 100% |" in out
    assert "| cut | 0.5000 ± 0.1732 | -0.1000 |  | 30% | 30% |" in out
    assert (tmp_path / "report.md").read_text() in out


def test_one_seed_has_no_spread() -> None:
    assert over_seeds.mean_and_deviation([0.5]) == (0.5, 0.0)


def test_unknown_flags_of_the_comparison_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert over_seeds.cli(["--project", str(tmp_path), "--comparison", "epochs=3"]) == 1
    assert "epochs" in capsys.readouterr().err
