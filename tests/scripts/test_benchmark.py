"""benchmark.py: every combination that can run is measured and written; what cannot is told in one line."""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from deploy import threads_of
from detection import benchmark as benchmark
from detection.detector import open_detector
from tests.scripts.runs import Runner
from tests.scripts.test_failures import fails, other_classes

SHORT = ("--repeats", 3, "--warmup", 0, "--num-cores", 1)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "benchmark.json").read_text())["rows"]
    return found


def settings(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(row["network"], row["engine"], row["precision"], row["img"]) for row in rows]


def test_every_combination_is_in_the_table_and_the_files(
    exported: Path, small_weights: Path, tiny: Path, script: Runner, tmp_path: Path
) -> None:
    weights = [small_weights, *(exported / name for name in ("net.xml", "net.torchscript", "dynamic.onnx", "nms.onnx"))]
    before = torch.get_num_threads()
    done = script(
        "benchmark", "--weights", *weights, "--engine", "torch", "onnxruntime", "openvino", "--precision", "float32",
        "--img", 64, *SHORT, "--data", tiny, "--project", tmp_path, "--profile",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert torch.get_num_threads() == before
    rows = rows_of(tmp_path / "exp")
    engines = ("torch", "onnxruntime", "openvino")
    assert settings(rows) == [
        *(("small/last", engine, "float32", "64") for engine in engines),
        (str(exported / "net.xml"), "openvino", "float32", "64"),
        (str(exported / "net.torchscript"), "torch", "float32", "64"),
        *(("dynamic", engine, "float32", "64") for engine in engines[1:]),
        *(("nms", engine, "float32", "64") for engine in engines[1:]),
    ]
    aps = [row["ap"] for row in rows if row["network"] != "nms"]
    assert aps[0] > 0.01 and aps == pytest.approx([aps[0]] * len(aps), abs=1e-4)
    first = rows[0]
    for row in rows:
        assert row["p10_ms"] <= row["milliseconds"] <= row["p90_ms"] and row["runs"] == 3
        assert row["speed_up"] == pytest.approx(first["milliseconds"] / row["milliseconds"])
        assert row["fps"] == pytest.approx(1000 / row["milliseconds"])
        assert (row["macs"], row["params"], row["activation"]) == (first["macs"], first["params"], "SiLU")
    on_disk, weights_alone = small_weights.stat().st_size, 4 * first["params"]
    assert weights_alone < first["bytes"] < on_disk / 2, "last.pt carries the training state"
    assert rows[3]["bytes"] == sum((exported / f"net{suffix}").stat().st_size for suffix in (".xml", ".bin"))
    assert rows[4]["bytes"] == (exported / "net.torchscript").stat().st_size
    assert not (tmp_path / "exp" / "weights").exists()
    table = (tmp_path / "exp" / "benchmark.md").read_text()
    assert table in f"{done.out}\n" and table.count("\n| ") == len(rows) + 2
    assert "; medians of 3 runs" in table and "| small/last | torch | float32 | 64 | 1 | 1 |" in table
    assert done.out.count("| slowest operators |") == len(rows)
    assert (tmp_path / "exp" / "ap_against_ms.png").stat().st_size > 1000
    assert yaml.safe_load((tmp_path / "exp" / "config.yaml").read_text())["img"] == [64]


def test_sizes_of_a_dynamic_file(exported: Path, tiny: Path, script: Runner, tmp_path: Path) -> None:
    weights = ("--weights", exported / "dynamic.onnx", exported / "net.onnx")
    done = script(
        "benchmark", *weights, "--img", 64, "32x64", *SHORT, "--data", tiny, "--project", tmp_path, "--repeats", 1
    )
    assert done.code == 0, done.err
    whole, half, fixed = rows_of(tmp_path / "exp")
    assert [row["img"] for row in (whole, half, fixed)] == ["64", "32x64", "64"]
    assert half["macs"] == whole["macs"] // 2 and half["ap"] != whole["ap"] == pytest.approx(fixed["ap"], abs=1e-4)


def test_without_data_and_by_default(exported: Path, small_weights: Path, script: Runner, tmp_path: Path) -> None:
    """A file's own engine and size, torch and 416 pixels for a checkpoint; sizes, cores and batches in combination."""
    done = script(
        "benchmark", "--weights", small_weights, exported / "bytes.xml", "--repeats", 1, "--warmup", 0, "--precision", "auto",
        "float32", "--num-cores", 1, 2, "--batch-size", 1, 3, "--project", tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    rows = rows_of(tmp_path / "exp")
    in_torch = [row for row in rows if row["engine"] == "torch"]
    # There auto is float32, and measured once.
    assert [(row["img"], row["num_cores"], row["batch_size"]) for row in in_torch] == [
        ("416", 1, 1), ("416", 2, 1), ("416", 1, 3), ("416", 2, 3),
    ]  # fmt: skip
    others = [row for row in rows if row["engine"] == "openvino"]
    kinds = {row["precision"] for row in others}
    assert "float32" in kinds and len(others) == 4 * len(kinds) and {row["img"] for row in others} == {"64"}
    assert rows[0]["ap"] is None and "| AP |" not in done.out
    assert not (tmp_path / "exp" / "ap_against_ms.png").exists()


def test_what_cannot_be_measured_is_named(
    exported: Path, small_weights: Path, tiny: Path, script: Runner, tmp_path: Path
) -> None:
    common = ("benchmark", "--project", tmp_path / "runs", *SHORT, "--weights")
    xml, onnx = exported / "net.xml", exported / "net.onnx"
    fails(script(*common, xml, "--engine", "torch", "onnxruntime"), "net.xml: --engine torch does not run .xml files")
    fails(script(*common, onnx, "--engine", "caffe"), "engine", "caffe")
    fails(script(*common, xml, "--img", 96, "32x64"), "net.xml: takes images of 64 x 64 pixels, 96 x 96 were asked for")
    fails(script(*common, small_weights, "--img", 65), "--img 65: expected a multiple")
    fails(script(*common, onnx, "--precision", "bfloat16"), "--precision bfloat16: onnxruntime computes")
    fails(script(*common, onnx, "--batch-size", 0), "--batch-size 0: expected at least 1")
    fails(script(*common, onnx, "--num-cores", -1), "--num-cores -1: expected at least 0")
    fails(script(*common, onnx, "--repeats", 0), "repeats=0")
    more = other_classes(tiny, tmp_path)
    fails(script(*common, small_weights, onnx, "--img", 64, "--data", more), "last.pt: detects 4 classes", "has 6")
    (tmp_path / "empty.xml").touch()
    (tmp_path / "empty.bin").touch()
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "empty.torchscript").touch()
    for suffix in (".xml", ".onnx", ".torchscript"):
        fails(script(*common, tmp_path / f"empty{suffix}"), f"empty{suffix}", "export it anew")
    assert not (tmp_path / "runs").exists()


def test_a_busy_machine_is_told_once(
    exported: Path, script: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Other processes take 50 cores' time in every block."""
    started = time.perf_counter()
    busy = lambda: 50 * (time.perf_counter() - started)  # noqa: E731
    monkeypatch.setattr(benchmark, "InterleavedTimer", functools.partial(benchmark.InterleavedTimer, others=busy))
    weights = ("--weights", exported / "net.onnx", exported / "net.xml")
    done = script("benchmark", *weights, *SHORT, "--max-seconds", 1e-9, "--repeats", 9, "--project", tmp_path)
    assert done.code == 0, done.err
    text = f"other processes used 50.0 of {threads_of(0)} cores meanwhile"
    assert done.out.count("warning: times that say little (2 of 2 measurements): ") == 1 and text in done.out
    assert "warning: times that say little" in (tmp_path / "exp" / "benchmark.md").read_text()
    rows = rows_of(tmp_path / "exp")
    assert [row["warning"].startswith(text) for row in rows] == [True, True] and [row["runs"] for row in rows] == [3, 3]
    assert "measured 3 runs of each network, 6 fewer than asked for" in caplog.text


def test_an_interruption_leaves_what_was_measured(
    exported: Path, script: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[bool] = []
    original = benchmark.InterleavedTimer.round

    def stopped(self: Any, counts: bool = True) -> None:
        if len(rounds) == 2:
            raise KeyboardInterrupt
        rounds.append(counts)
        original(self, counts)

    monkeypatch.setattr(benchmark.InterleavedTimer, "round", stopped)
    done = script("benchmark", "--weights", exported / "net.onnx", "--repeats", 9, "--warmup", 1, "--project", tmp_path)
    assert done.code == 130 and done.err.count("interrupted: ") == 1
    assert "; medians of 3 runs" in (tmp_path / "exp" / "benchmark.md").read_text()
    assert not (tmp_path / "exp" / "benchmark.json").exists()


def test_a_quantised_files_other_layers_are_told(exported: Path) -> None:
    """OpenVINO computes what is not quantised in bfloat16 where it can."""
    with open_detector(str(exported / "net.xml"), num_cores=1, precision="float32") as detector:
        assert detector.precision_text == "float32"
        detector.network.precision = "int8"
        assert detector.precision_text == "int8"
        detector.network.floating_precision = "bfloat16"  # type: ignore[assignment]
        assert detector.precision_text == "int8 + bfloat16"
