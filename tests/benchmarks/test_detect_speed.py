"""The comparison of detect.py with its engines: every way is measured, and the share is that of the table."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.detect_speed import DetectSpeedFlags, engines_of, measure
from detection.network import save_network, start_network
from slim import SlimError
from tests.scripts.runs import NAMES, ROOT


def test_a_row_an_engine(tmp_path: Path) -> None:
    network = start_network("", str(ROOT / "models" / "yolov5n.yaml"), NAMES)
    weights = tmp_path / "untrained.pt"
    save_network(weights, network.model, network.build)
    flags = DetectSpeedFlags(weights=str(weights), engines=("torch",), img=(32, 64), frames=6, repeats=1, num_cores=2)
    rows: list[object] = []
    (row,) = measure(flags, rows.append)
    assert rows == [row] and (row.engine, row.at_once) == ("torch", 2)
    assert row.share == row.end_to_end.fps / row.alone.fps > 0
    assert min(row.alone.cpu_ms, row.end_to_end.cpu_ms) > 0
    assert f"| {row.share:.0%} |" in str(row)


def test_engines_that_run_a_file() -> None:
    assert engines_of(DetectSpeedFlags(weights="a.onnx")) == ["onnxruntime", "openvino"]
    assert engines_of(DetectSpeedFlags(weights="a.pt")) == ["torch", "onnxruntime", "openvino"]
    with pytest.raises(SlimError, match="expected a height and a width"):
        measure(DetectSpeedFlags(img=(64,)))
