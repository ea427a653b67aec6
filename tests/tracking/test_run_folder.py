from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from engine import TrainConfig
from slim import SlimError
from tracking import METRIC_KEYS, RunFolder

METRICS: dict[str, Any] = {key: 0.5 for key in METRIC_KEYS} | {"per_class": {"cat": 0.5}}


def test_names_are_counted_up(tmp_path: Path) -> None:
    project = tmp_path / "runs" / "sparse"
    runs = [RunFolder.create(project, "exp") for _ in range(3)]
    assert not project.parent.exists(), "a folder appears with its first content"
    runs[2].write_config({"a": 1})
    assert [p.name for p in project.iterdir()] == ["exp"]
    assert [run.path.name for run in runs] == ["exp2", "exp3", "exp"]
    assert runs[1].last == project / "exp3" / "weights" / "last.pt"
    assert [p.name for p in runs[1].path.iterdir()] == []


def test_two_runs_at_once_get_a_folder_each(tmp_path: Path) -> None:
    runs = [RunFolder.create(tmp_path / "runs", "exp") for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda run: run.path, runs))
    assert sorted(p.name for p in paths) == sorted(["exp", *(f"exp{k}" for k in range(2, 9))])


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    for project in (tmp_path / "runs", tmp_path / "runs" / "sparse"):
        with pytest.raises(SlimError, match="runs: a file is in the way"):
            RunFolder.create(project, "exp")


def run_of(project: Path, folder: str, name: str | None) -> RunFolder:
    """A run folder with a checkpoint; ``name`` is what it was asked for, as config.yaml holds it."""
    run = RunFolder(project / folder)
    run.last.parent.mkdir(parents=True)
    run.last.write_bytes(b"")
    if name is not None:
        run.write_config({"name": name})
    return run


@pytest.mark.parametrize(
    ("folders", "name", "found"),
    [
        ({"run1": "run1", "run12": "run12"}, "run1", "run1"),
        ({"run1": "run1", "run12": "run1"}, "run1", "run12"),
        ({"finetune-0.3": "finetune-0.3", "finetune-0.35": "finetune-0.35"}, "finetune-0.3", "finetune-0.3"),
        ({"exp": "exp", "exp2": "exp", "exp10": "exp", "exp9": "exp"}, "exp", "exp10"),
        ({"exp": "exp", "exp2": "exp", "exp22": "exp2"}, "exp", "exp2"),
        ({"exp": "exp", "exp2": "exp"}, "exp2", "exp2"),
        ({"exp2": "exp", "exp22": "exp2"}, "exp2", "exp22"),
        ({"exp": None, "exp2": None}, "exp", "exp"),
        ({"exp2": "exp"}, "exp", "exp2"),
        ({"exp": "exp", "exp02": "exp", "exp1": "exp", "exp-3": "exp"}, "exp", "exp"),
        ({"a[b]": "a[b]", "a[b]2": "a[b]"}, "a[b]", "a[b]2"),
        ({"deep/exp": "deep/exp", "deep/exp2": "deep/exp"}, "deep/exp", "deep/exp2"),
        ({"run12": "run12", "run1x": "run1"}, "run1", None),
    ],
)
def test_the_newest_run_of_a_name(tmp_path: Path, folders: dict[str, str | None], name: str, found: str | None) -> None:
    for folder, recorded in folders.items():
        run_of(tmp_path, folder, recorded)
    RunFolder(tmp_path / f"{name}99").write_config({"name": name})  # has no checkpoint
    if found is not None:
        assert RunFolder.newest(tmp_path, name).path == tmp_path / found
        return
    with pytest.raises(SlimError, match=r"no run with weights/last\.pt to resume"):
        RunFolder.newest(tmp_path, name)


def test_a_damaged_configuration_records_no_name(tmp_path: Path) -> None:
    for folder in ("exp", "exp2"):
        run_of(tmp_path, folder, None).config_file.write_text("name: [")
    assert RunFolder.newest(tmp_path, "exp").path == tmp_path / "exp"


def test_a_new_run_is_held_from_its_first_file_on(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "exp")
    with run.held():
        assert not list(tmp_path.iterdir()), "nothing yet"
        run.write_config({})
        with pytest.raises(SlimError, match="in use by another process"), RunFolder(run.path).held():
            pass
    with RunFolder(run.path).held():
        pass


def test_config_is_plain_yaml(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "exp")
    run.write_config({"train": TrainConfig(epochs=3), "data": Path("data/x.yaml"), "size": (320, 320), "none": None})
    config = yaml.safe_load(run.config_file.read_text())
    assert config == run.read_config()
    assert config["train"]["optim"]["lr"] == 0.01
    assert (config["data"], config["size"], config["none"]) == ("data/x.yaml", [320, 320], None)


def test_rows_grow_new_columns_and_are_dropped_on_resume(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "exp")
    assert run.read_rows() == []
    run.append_row({"epoch": 0, "loss": 1.5})
    run.append_row({"epoch": 1, "loss": 1.0, "ap": None})
    run.append_row({"epoch": 2, "loss": 0.5, "ap": 0.25})
    assert run.results_file.read_text() == "epoch,loss,ap\n0,1.5,\n1,1.0,\n2,0.5,0.25\n"
    run.drop_rows_from(2)
    run.append_row({"epoch": 2, "loss": 0.75, "ap": 0.5})
    assert run.results_file.read_text() == "epoch,loss,ap\n0,1.5,\n1,1.0,\n2,0.75,0.5\n"
    run.drop_rows_from(0)
    assert run.read_rows() == []
    with pytest.raises(AssertionError):
        run.append_row({"loss": 1.0})


def test_channels_are_kept_by_step_and_dropped_on_resume(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "exp")
    assert run.read_channels() == {}
    for step, channels in enumerate(({"a.conv": 16, "b": 8}, {"a.conv": 12, "b": 8}, {"a.conv": 8, "b": 8})):
        run.log_channels(channels, step)
    assert run.channels_file.read_text() == "step,a.conv,b\n0,16,8\n1,12,8\n2,8,8\n"
    run.drop_rows_from(2)
    assert run.read_channels() == {0: {"a.conv": 16, "b": 8}, 1: {"a.conv": 12, "b": 8}}
    run.drop_rows_from(0)
    assert not run.channels_file.exists()
    run.close()


def test_metrics_must_be_complete_and_finite(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "exp")
    run.write_metrics(METRICS | {"ap": np.float64(0.25), "extra": torch.tensor(3)})
    written = json.loads(run.metrics_file.read_text())
    assert written == METRICS | {"ap": 0.25, "extra": 3}
    for key in METRIC_KEYS:
        with pytest.raises(SlimError, match=f"missing {key};"):
            run.write_metrics({name: value for name, value in METRICS.items() if name != key})
    with pytest.raises(SlimError, match="missing masked_ap, pruned_ap, max_difference, before, after"):
        run.write_metrics(METRICS, after_cut=True)
    with pytest.raises(SlimError, match="not finite"):
        run.write_metrics(METRICS | {"ap": float("nan")})
    assert json.loads(run.metrics_file.read_text()) == written


def test_events_carry_the_tags(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "exp")
    assert list(run.path.glob("events.out.*")) == []
    run.log_scalars({"metrics/ap": 0.5, "metrics/ap50": None}, 3)
    run.log_gates({"model.0": torch.ones(4, requires_grad=True)}, 3)
    run.log_channels({"model.1.conv": 24}, 1)
    run.log_picture("detections", torch.zeros(3, 8, 8, dtype=torch.uint8))
    run.close()
    events = EventAccumulator(str(run.path))
    events.Reload()
    assert events.Tags()["scalars"] == ["metrics/ap", "channels/model.1.conv"]
    assert events.Tags()["histograms"] == ["gates/model.0"]
    assert events.Tags()["images"] == ["detections"]
    assert [(event.step, event.value) for event in events.Scalars("channels/model.1.conv")] == [(1, 24)]


def test_settings_stand_beside_final_metrics_in_the_runs_own_events(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "exp")
    run.write_config({"project": "p", "lr": 0.5, "cos": True, "strength": "auto", "names": ["a", "b"], "none": None})
    run.write_metrics(METRICS | {"ap": 0.25, "ms": 3.5, "ap75": None})
    run.close()
    assert not any(p.is_dir() for p in run.path.iterdir()) and len(list(run.path.glob("events*"))) == 1
    events = EventAccumulator(str(run.path))
    events.Reload()
    tags = ["Final/ap", "Final/ap50", "Final/macs", "Final/ms", "Final/params"]
    assert events.Tags()["scalars"] == tags and events.Scalars("Final/ap")[0].value == 0.25
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    found = metadata.parse_session_start_info_plugin_data(content).hparams
    assert {name: found[name].number_value or found[name].string_value for name in found} == {
        "lr": 0.5,
        "cos": "True",
        "strength": "auto",
        "names": "a b",
    }


def test_config_says_which_script_it_is_of(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "exp")
    run.write_config({"a": 1}, "prune.py")
    assert run.read_script() == "prune.py" and run.read_config() == {"a": 1}
    run.write_config({"a": 1})
    assert run.read_script() is None
