"""A latency as the target of prune.py and iterate.py: what is recorded, consistent and refused; no test looks at a clock."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import slim
from data import DataSettings
from deploy import LatencySettings
from detection import latency as latency
from detection import loop as iterate
from detection.flags import IterateFlags
from detection.network import read_network, start_network
from tests.scripts.fake_clock import FakeClock
from tests.scripts.runs import SMALL, Runner
from tests.scripts.test_failures import fails
from tracking.settings import RunSettings


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    made = FakeClock()
    made.install(monkeypatch)
    return made


def base(sparse_run: Path, tmp_path: Path) -> tuple[Any, ...]:
    weights = sparse_run / "weights" / "last.pt"
    return ("prune", "--weights", weights, "--img", 64, "--criterion", "l1", "--project", tmp_path, "--num-cores", 1)


def test_the_plan_meets_the_milliseconds_and_its_search_is_recorded(
    clock: FakeClock, sparse_run: Path, tmp_path: Path, script: Runner
) -> None:
    done = script(*base(sparse_run, tmp_path), "--latency-ms", 6, "--engine", "onnxruntime")
    assert done.code == 0, done.err
    weights = tmp_path / "exp" / "weights" / "pruned.pt"
    example = torch.zeros(1, 3, 64, 64)
    macs, dense = (
        slim.cost(read_network(f).model, example).macs for f in (weights, sparse_run / "weights" / "last.pt")
    )
    found = json.loads((tmp_path / "exp" / "metrics.json").read_text())
    assert found["macs"] == macs and found["dense_ms"] == 10 and found["target_ms"] == pytest.approx(6)
    assert found["latency_ms"] == pytest.approx(2 + 8 * macs / dense) and 0.9 * 6 <= found["latency_ms"] <= 6
    assert (found["engine"], found["num_cores"], found["latency_share"]) == ("onnxruntime", 1, found["latency_ms"] / 10)
    record = json.loads((tmp_path / "exp" / "latency.json").read_text())
    rows = record["measurements"]
    assert [row["macs"] for row in rows] == clock.measured and clock.alone == 1
    assert [row["accepted"] for row in rows] == [False] * (len(rows) - 1) + [True]
    assert rows[-1]["macs"] == macs and rows[-1]["widths"] in [row["widths"] for row in rows[:-1]], "measured twice"
    assert len({row["widths"] for row in rows}) == len(rows) - 1 and {row["round_to"] for row in rows} == {8, 16}
    # No network that is fast enough keeps more.
    assert all(row["macs"] <= macs for row in rows if row["ratio"] <= 0.6)
    assert rows[0]["candidate"]["median_ms"] == pytest.approx(rows[0]["ratio"] * rows[0]["dense"]["median_ms"])
    assert record["reason"] == f"met: {found['latency_ms']:.2f} ms" and "| accepted |" in done.out
    assert "pruned = masked" in done.out


def test_a_share_and_one_rounding(clock: FakeClock, sparse_run: Path, tmp_path: Path, script: Runner) -> None:
    done = script(*base(sparse_run, tmp_path), "--latency-share", 0.7, "--round-to", 4, "--min-channels", 4)
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "exp" / "latency.json").read_text())
    assert {row["round_to"] for row in record["measurements"]} == {4}
    assert 0.95 * 0.7 <= record["chosen"]["latency_share"] <= 0.7
    widths = slim.layer_widths(read_network(tmp_path / "exp" / "weights" / "pruned.pt").model)
    assert any(out % 8 for path, (_, out) in widths.items() if not path.startswith("model.24"))


def test_a_busy_machine_is_told_in_one_line_and_in_every_file(
    clock: FakeClock, sparse_run: Path, tmp_path: Path, script: Runner
) -> None:
    clock.warning = "other processes used 1.9 of 2 cores meanwhile"
    done = script(*base(sparse_run, tmp_path), "--latency-share", 0.6)
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "exp" / "metrics.json").read_text())
    count = 1 + 2 * len(clock.measured)
    assert found["timing_warning"] == (
        f"warning: times that say little ({count} of {count} measurements): {clock.warning}; measure again on an idle machine"
    )
    assert done.out.count(found["timing_warning"]) == 1
    assert found["timing_warning"] in (tmp_path / "exp" / "report.md").read_text()
    record = json.loads((tmp_path / "exp" / "latency.json").read_text())
    assert record["measurements"][0]["candidate"]["warning"] == clock.warning


def test_the_rounding_that_measures_faster_is_taken(
    clock: FakeClock, sparse_run: Path, tmp_path: Path, script: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here whatever is not a multiple of 16 takes a quarter longer."""
    plain = latency.Measurer.against_dense

    def slower(measurer: latency.Measurer, model: torch.nn.Module) -> Any:
        found = plain(measurer, model)
        odd = any(out % 16 for path, (_, out) in slim.layer_widths(model).items() if not path.startswith("model.24"))
        return replace(found, ratio=found.ratio * (1.25 if odd else 1.0))

    monkeypatch.setattr(latency.Measurer, "against_dense", slower)
    done = script(*base(sparse_run, tmp_path), "--latency-share", 0.6)
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "exp" / "metrics.json").read_text())
    assert found["round_to"] == 16 and 0.5 < found["latency_share"] <= 0.6


def test_a_target_that_cannot_be_met_is_told_with_its_reason(
    clock: FakeClock, sparse_run: Path, tmp_path: Path, script: Runner
) -> None:
    clock.fixed = 0.5
    done = script(*base(sparse_run, tmp_path), "--latency-ms", 4)
    fails(
        done,
        "--latency-ms 4: cannot be met; the fastest network that --min-channels 8 and --round-to 8 or 16 allow keeps",
        "(dense: 10.00, target: 4.00), of which about 5.00 ms stay whatever is cut; lower",
    )
    record = json.loads((tmp_path / "exp" / "latency.json").read_text())
    assert (tmp_path / "exp" / "config.yaml").is_file()
    assert record["reason"] in done.err and len(record["measurements"]) >= 2 and "chosen" not in record
    assert not (tmp_path / "exp" / "weights").exists() and not (tmp_path / "exp" / "metrics.json").exists()
    assert "| share of MACs |" in done.out


def test_a_target_that_the_dense_network_meets_cuts_nothing(
    clock: FakeClock, sparse_run: Path, tmp_path: Path, script: Runner
) -> None:
    fails(script(*base(sparse_run, tmp_path), "--latency-ms", 12), "takes 10.00 ms, which meets it; nothing was cut")
    assert clock.measured == [] and not (tmp_path / "exp").exists()


def test_a_machine_that_contradicts_itself_is_not_believed(
    clock: FakeClock, sparse_run: Path, tmp_path: Path, script: Runner
) -> None:
    clock.again = 1.3
    fails(script(*base(sparse_run, tmp_path), "--latency-ms", 6), "took longer when they were measured again")
    again = len(clock.measured) - len(set(clock.measured))
    assert again == latency.ATTEMPTS, "each network once, and those that would do a second time"
    assert not (tmp_path / "exp" / "weights").exists()


def test_one_target_at_a_time(clock: FakeClock, sparse_run: Path, tmp_path: Path, script: Runner) -> None:
    given = base(sparse_run, tmp_path)
    fails(script(*given, "--latency-ms", 4, "--macs", 0.5), "--macs and --latency-ms: give exactly one target")
    fails(script(*given, "--latency-ms", 4, "--latency-share", 0.5), "--latency-ms and --latency-share: give one")
    fails(script(*given, "--latency-ms", 0), "--latency-ms 0: expected above 0")
    fails(script(*given, "--latency-share", 1), "--latency-share 1: expected above 0 to below 1")
    fails(script(*given, "--latency-int8", "--macs", 0.5), "--latency-int8: needs --latency-ms or --latency-share")
    fails(script(*given, "--latency-int8", "--latency-ms", 4, "--engine", "torch"), "torch runs no INT8 files")
    assert not list(tmp_path.iterdir()), "nothing was begun"


@pytest.mark.long
def test_the_engines_run_what_is_exported(small_cfg: Path) -> None:
    network = start_network("", str(small_cfg), ["a", "b"])
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        wanted = network.model.eval()(images[:1])[0]
    threads = torch.get_num_threads()
    for engine in ("torch", "onnxruntime", "openvino"):
        flags = LatencySettings(latency_share=0.5, engine=engine, num_cores=threads + 1, latency_precision="float32")
        measurer = latency.Measurer(flags, network, images)
        output = measurer.dense_run()
        assert isinstance(output, torch.Tensor) and (output - wanted).abs().max() <= 1e-3 * wanted.abs().max()
        assert measurer.setting() == {
            "engine": engine,
            "precision": "float32",
            "num_cores": threads + 1,
            "image_px": [64, 64],
        }
        if engine == "torch":
            found = measurer.against_dense(network.model)
            assert len(found.first.runs_ms) == len(found.second.runs_ms) >= 30 and found.ratio > 0
    assert torch.get_num_threads() == threads


def test_int8_networks_for_timing(small_cfg: Path) -> None:
    network = start_network("", str(small_cfg), ["a", "b"])
    images = torch.rand(2, 3, 64, 64)
    for engine in ("openvino", "onnxruntime"):
        flags = LatencySettings(latency_share=0.5, latency_int8=True, engine=engine, num_cores=1)
        measurer = latency.Measurer(flags, network, images)
        output = measurer.dense_run()
        assert isinstance(output, torch.Tensor) and output.shape[0] == 1 and output.shape[2] == 7
        assert measurer.setting()["precision"] == "int8"


def loop_arguments(sparse_run: Path, data: Path, project: Path, *more: Any) -> list[Any]:
    steps = ["--sparse-epochs", 2, "--recovery-epochs", 0, "--finetune-epochs", 0, "--export", "none", "--max-drop", 1]
    given = ["--weights", sparse_run / "weights" / "best.pt", "--data", data, *SMALL, "--recalibrate", 0, *steps]
    return ["iterate", *given, "--project", project, "--name", "loop", "--num-cores", 1, *more]


@pytest.mark.long
@pytest.mark.usefixtures("any_ap")
def test_a_loop_comes_down_to_its_milliseconds_and_measures_nothing_twice(
    clock: FakeClock, sparse_run: Path, tiny: Path, tmp_path: Path, script: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = loop_arguments(sparse_run, tiny, tmp_path, "--rounds", 2, "--latency-ms", 6)
    counted = latency.Measurer.against_dense

    def killed(measurer: latency.Measurer, model: torch.nn.Module) -> Any:
        if len(clock.measured) == 2:
            raise KeyboardInterrupt
        return counted(measurer, model)

    with monkeypatch.context() as patched:
        patched.setattr(latency.Measurer, "against_dense", killed)
        done = script(*given)
    assert done.code == 130 and "the same command continues" in done.err
    assert (tmp_path / "loop" / ".round1-try1-plan.unfinished" / "latency.json").is_file()
    done = script(*given)
    assert done.code == 0, done.err
    run = tmp_path / "loop"
    first, second = (json.loads((run / f"round{n}-try1-plan" / "latency.json").read_text()) for n in (1, 2))
    for record in (first, second):
        macs = [row["macs"] for row in record["measurements"]]
        assert len(macs) == len(set(macs)) + 1, "each network once, and the accepted one again"
    assert clock.alone == 3, "by the loop, and by each round's search"
    assert 0.95 * 0.6**0.5 <= first["chosen"]["latency_share"] <= 0.6**0.5
    assert 0.95 * 0.6 <= second["chosen"]["latency_share"] <= 0.6
    found = json.loads((run / "metrics.json").read_text())
    assert found["dense_ms"] == 10 and found["target_ms"] == pytest.approx(6)
    assert found["latency_ms"] == found["ms"] == pytest.approx(10 * second["chosen"]["latency_share"])
    assert found["macs"] == second["measurements"][-1]["macs"]
    assert "latency_ms 6" in (run / "report.html").read_text()
    measured = list(clock.measured)
    assert script(*given).code == 0 and clock.measured == measured, "a finished loop is only read"


def test_settings_of_a_loop_without_a_latency_are_as_they_were(sparse_run: Path, tiny: Path, tmp_path: Path) -> None:
    """So loops that were begun before there was one continue."""
    flags = IterateFlags(
        weights=str(sparse_run / "weights" / "best.pt"),
        dataset=DataSettings(data=str(tiny)),
        img=64,
        run=RunSettings(project=str(tmp_path)),
    ).resolved()
    _, opening = iterate.open_loop(flags, {})
    assert opening["settings"]["macs"] == 0.4 and opening["settings"]["round_to"] == 8
    assert not {"engine", "num_cores", "latency_ms", "latency_share", "latency_int8"} & set(opening["settings"])


@pytest.mark.usefixtures("any_ap")
def test_a_loop_refuses_what_it_cannot_mean(
    clock: FakeClock, small_run: Path, tiny: Path, tmp_path: Path, script: Runner
) -> None:
    fails(script(*loop_arguments(small_run, tiny, tmp_path, "--latency-ms", 6, "--macs", 0.5)), "give one target")
    fails(script(*loop_arguments(small_run, tiny, tmp_path, "--latency-ms", 60)), "which meets it; nothing to cut")
