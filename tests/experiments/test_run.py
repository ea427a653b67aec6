"""A grid's runs, each once, with rows that tell what the scripts measured."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import grid as grid_module
from experiments import run, store
from experiments.comparisons import read_specs
from experiments.grid import DEFAULTS, Data, expand, read_grid, record_defaults
from experiments.rows import read_rows

Grid = Callable[..., Path]


def command(grid: Path, tmp_path: Path, *more: str) -> int:
    places = ["--store", str(tmp_path / "store"), "--results", str(tmp_path / "results"), "--at-once", "1"]
    return run.cli([str(grid), *places, *more])


def test_every_node_runs_once_and_its_rows_are_the_scripts_own_figures(
    write_grid: Grid, executed: list[str], tmp_path: Path
) -> None:
    grid = write_grid()
    assert command(grid, tmp_path, "--only", "gate", "keep=0.7") == 0
    assert executed == ["train_sparse", "prune", "finetune", "val", "val"]
    assert command(grid, tmp_path) == 0
    assert executed[5:].count("train_sparse") == 0 and sorted(executed[5:]) == sorted(
        ["prune", "finetune", "finetune", *["val"] * 4]
    )
    rows = [row for row in read_rows(tmp_path / "results" / "small.csv") if not row["class"]]
    assert [(r["method"], r["keep"], r["split"]) for r in rows] == [
        ("gate", "0.7", "val"), ("gate", "0.7", "test"),
        ("gate", "0.5", "val"), ("gate", "0.5", "test"),
        ("dense", "", "val"), ("dense", "", "test"),
    ]  # fmt: skip
    gate, dense = rows[0], rows[4]
    metrics = json.loads((tmp_path / "store" / gate["hash"] / "run" / "metrics.json").read_text())
    assert gate["ap"] == f"{metrics['ap']:.6f}" and gate["macs"] == str(metrics["macs"]) and gate["epochs"] == "3"
    assert rows[2]["parent"] == gate["parent"] != "" and dense["parent"] == "" and dense["cliff_ap"] == ""
    full = json.loads((tmp_path / "store" / gate["parent"] / "run" / "metrics.json").read_text())["macs"]
    # 16 training images; two epochs of the whole network and one of the narrow one; a step is three forward passes.
    assert int(gate["training_macs"]) == 3 * 16 * (2 * full + int(gate["macs"]))
    assert int(dense["training_macs"]) == 3 * 16 * 3 * int(dense["macs"])
    before = list(executed)
    assert command(grid, tmp_path) == 0 and executed == before
    # Rows alone are enough: another machine, without the folders, runs nothing twice.
    assert command(grid, tmp_path, "--store", str(tmp_path / "elsewhere")) == 0 and executed == before


def test_finished_runs_stand_in_a_table_and_under_their_names(
    write_grid: Grid, executed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(write_grid(splits=["val"]), tmp_path, "--only", "dense") == 0
    (row,) = [row for row in read_rows(tmp_path / "results" / "small.csv") if not row["class"]]
    costs = f"{int(row['macs']) / 1e6:.1f} | {int(row['params']) / 1e6:.3f}"
    assert f"| dense seed=0 tiny | val | {float(row['ap']):.4f} | " in capsys.readouterr().out.splitlines()[-1]
    assert command(write_grid(splits=["val"]), tmp_path, "--only", "dense") == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(f" |  | {costs} | 3 |")
    weights = tmp_path / "store" / "by-name" / "small" / "dense-seed=0-tiny" / "weights" / "last.pt"
    assert weights.resolve() == tmp_path / "store" / row["hash"] / "run" / "weights" / "last.pt"


def test_pairs_of_a_table_are_compared_on_resampled_images_once(
    write_grid: Grid, executed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = {"name": "t", "title": "T", "columns": "keep", "against": "gate"}
    grid = write_grid(splits=["val"], axes={"keep": [0.7]}, tables=[spec])
    assert command(grid, tmp_path, "--bootstrap") == 0
    assert "1 pairs compared" in capsys.readouterr().out
    gate, dense = (row["hash"] for row in read_rows(tmp_path / "results" / "small.csv") if not row["class"])
    (row,) = read_rows(tmp_path / "results" / "bootstrap.csv")
    assert (row["hash"], row["against_hash"], row["split"], row["resamples"]) == (dense, gate, "val", "1000")
    assert command(grid, tmp_path, "--bootstrap") == 0 and "0 pairs compared" in capsys.readouterr().out


def test_a_twin_with_a_teacher_that_is_trained_first_though_its_own_run_is_not_asked_for(
    write_grid: Grid, executed: list[str], tmp_path: Path
) -> None:
    grid = write_grid(splits=["val"], teacher="@dense", axes={"keep": [0.7]})
    assert command(grid, tmp_path, "--only", "gate+teacher") == 0
    assert executed == ["finetune", "train_sparse", "prune", "finetune", "val"]
    (row,) = [row for row in read_rows(tmp_path / "results" / "small.csv") if not row["class"]]
    assert (row["method"], row["epochs"]) == ("gate+teacher", "3")
    runs = {run.method: run for run in expand(read_grid(grid), lambda name: Data(name, "digest", 16), "")}
    assert list(runs) == ["gate", "dense", "gate+teacher", "dense+teacher"]
    taught = [dict(stage.parents).get("teacher") for stage in runs["gate+teacher"].stages]
    assert taught == [runs["dense"].key, None, runs["dense"].key]
    assert not any("teacher" in dict(stage.parents) for stage in runs["gate"].stages)


@pytest.mark.parametrize(
    "file", sorted((store.ROOT / "experiments" / "grids").glob("*.yaml")), ids=lambda file: file.stem
)
def test_every_grid_can_be_meant_and_keeps_its_budget(file: Path) -> None:
    runs = expand(read_grid(file), lambda name: Data(name, "digest", 100), "digest")
    assert len({run.key for run in runs}) == len(runs)
    for spec in read_specs(file.parent):
        if spec.grid == file.stem:
            assert {*spec.order} <= {run.method for run in runs}, spec.name


def test_hashes_rest_on_recorded_defaults() -> None:
    """A new flag must be recorded with the default that changes nothing: python -m experiments.grid."""
    assert record_defaults() == json.loads(DEFAULTS.read_text())


def test_a_key_follows_what_decides_and_nothing_else(write_grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    def keys(changed: dict[str, Any] | None = None, digest: str = "data", weights: str = "") -> list[str]:
        grid = read_grid(write_grid(**(changed or {})))
        return [run.key for run in expand(grid, lambda name: Data(name, digest, 16), weights)]

    before = keys()
    flags = read_grid(write_grid())["flags"]
    assert keys({"flags": flags | {"workers": 3, "eval-every": 2}}) == before
    for other in (
        keys({"flags": flags | {"lr": 0.02}}),
        keys({"seeds": [1]}),
        keys(digest="other"),
        keys(weights="other"),
    ):
        assert not set(other) & set(before)
    # A new default of a flag that the grid doesn't name makes other runs of it; naming the old one keeps them.
    recorded = json.loads(DEFAULTS.read_text())
    for script in recorded:
        recorded[script].pop("lr", None)
    changed = write_grid().with_name("defaults.json")
    changed.write_text(json.dumps(recorded))
    monkeypatch.setattr(grid_module, "DEFAULTS", changed)
    assert not set(keys()) & set(before)


def test_dry_run_tells_runs_epochs_and_hours_and_runs_nothing(
    write_grid: Grid, executed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(write_grid(seeds=[0, 1]), tmp_path, "--dry-run") == 0
    told = capsys.readouterr().out
    # Of the four runs with gates each two share their sparse training: 2 * 2 + 4 * 1 epochs.
    assert "small: 6 runs, 6 to do" in told and "gate: 4 runs, 8 epochs" in told and "in all: 14 epochs" in told
    assert not executed and not (tmp_path / "store").exists()


def test_failure_is_kept_with_its_reason_and_stops_what_needs_it_alone(
    write_grid: Grid, executed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = write_grid(axes={"keep": [0.7, 0.01]})
    assert command(grid, tmp_path) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: 1 of 3 runs failed: prune: the script's last word (exit code 1;")
    rows = read_rows(tmp_path / "results" / "small.csv")
    assert {(row["method"], row["keep"]) for row in rows} == {("gate", "0.7"), ("dense", "")}
    (failed,) = (tmp_path / "store" / "failed").glob("*.json")
    assert json.loads(failed.read_text())["flags"]["macs"] == 0.01
    before = len(executed)
    assert command(grid, tmp_path) == 1 and len(executed) == before
    assert command(grid, tmp_path, "--retry-failed") == 1 and executed[before:] == ["prune"]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"methods": {"x": [{"finetune": {"epoch": 1}}]}}, "did you mean --epochs"),
        ({"methods": {"x": [{"finetune": {"epochs": 2}}]}}, "trains for 2 epochs, the budget is 3"),
        ({"methods": {"x": [{"iterate": {}}]}}, "expected one of"),
        ({"budget": 3}, "unknown budget"),
        ({"flags": {"epoch": 3}}, "flags: no script takes epoch"),
    ],
)
def test_grid_that_cannot_be_meant_is_refused_in_a_line(
    write_grid: Grid, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, object], told: str
) -> None:
    assert command(write_grid(**changed), tmp_path, "--dry-run") == 1
    error = capsys.readouterr().err
    assert told in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(("executor", "extra"), [("ray", "ray"), ("submitit", "slurm")])
def test_executor_of_a_missing_extra_is_named_and_nothing_runs(
    executor: str,
    extra: str,
    write_grid: Grid,
    executed: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, executor, None)
    assert command(write_grid(), tmp_path, "--executor", executor) == 1
    assert capsys.readouterr().err.startswith(f"error: {executor} is not installed; pip install -e '.[{extra}]' has it")
    assert executed == []


def test_claim_lasts_as_long_as_any_process_that_holds_it(tmp_path: Path) -> None:
    with store.claimed(tmp_path, "x") as descriptor:
        child = subprocess.Popen(["sleep", "600"], pass_fds=[descriptor])
    try:
        probe = f"import fcntl; fcntl.flock(open({str(tmp_path / 'claims' / 'x')!r}), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        assert subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False).returncode != 0
        child.kill()
        child.wait()
        assert subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False).returncode == 0
    finally:
        child.kill()
