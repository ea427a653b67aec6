"""A benchmark's names and tables, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from detection.benchmark_table import Row, machine_text, markdown, short_names, write

KEYS = [
    "weights",
    "network",
    "engine",
    "precision",
    "img",
    "batch_size",
    "num_cores",
    "milliseconds",
    "p10_ms",
    "p90_ms",
    "fps",
    "speed_up",
    "ap",
    "ap50",
    "bytes",
    "macs",
    "params",
    "activation",
    "runs",
    "warning",
]
FIRST: Row = dict(zip(KEYS, (
    "runs/dense/weights/last.pt", "dense/last", "torch", "float32", "416", 1, 2, 20.0, 19.0, 22.5, 50.0, 1.0, 0.5761,
    0.88, 7_120_000, 517_100_000, 1_768_000, "SiLU", 30, "",
), strict=True))  # fmt: skip
SECOND: Row = dict(zip(KEYS, (
    "slim.xml", "slim", "openvino", "int8", "416", 1, 2, 2.0, 1.9, 2.25, 500.0, 10.0, None, None, 700_000, None, None, "",
    30, "",
), strict=True))  # fmt: skip


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/dense.pt", "b/slim.xml"], ["dense", "slim"]),
        (["runs/x/weights/last.pt", "slim.pt"], ["x/last", "slim"]),
        (["last.pt"], ["last"]),
        (["a/slim.pt", "a/slim.xml", "a/dense.pt"], ["a/slim.pt", "a/slim.xml", "dense"]),
        (["a/slim.pt", "b/slim.xml"], ["a/slim.pt", "b/slim.xml"]),
        (["s0/d/weights/net.pt", "s1/d/weights/net.pt"], ["s0/d/weights/net.pt", "s1/d/weights/net.pt"]),
        (["net.pt", "net.pt"], ["net", "net"]),
        (["/net.pt", "/b/net.pt"], ["/net.pt", "/b/net.pt"]),
    ],
)
def test_names_are_as_short_as_they_can_be(paths: list[str], names: list[str]) -> None:
    assert [short_names(paths)[path] for path in paths] == names


def test_a_table_for_a_document() -> None:
    titles = "network | engine | precision | pixels | cores | batch | ms | 10 to 90 % | FPS | times faster"
    assert markdown([FIRST, SECOND], "A CPU") == (
        "A CPU; medians of 30 runs, interleaved.\n\n"
        f"| {titles} | AP | MB | M MACs | M parameters | activation |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| dense/last | torch | float32 | 416 | 2 | 1 | 20.00 | 19.00 to 22.50 | 50.0 | 1.00 | 0.5761 | 7.12 | 517.1 | 1.768 "
        "| SiLU |\n"
        "| slim | openvino | int8 | 416 | 2 | 1 | 2.00 | 1.90 to 2.25 | 500.0 | 10.00 |  | 0.70 |  |  |  |"
    )
    assert "| AP |" not in markdown([SECOND], "A CPU")


def test_a_table_warns_of_times_that_say_little() -> None:
    unsteady = {**SECOND, "warning": "the 90th percentile is 3.5 times the 10th"}
    head, warning, *_ = markdown([FIRST, unsteady], "A CPU").split("\n\n")
    assert head == "A CPU; medians of 30 runs, interleaved."
    assert warning == (
        "warning: times that say little (1 of 2 measurements): the 90th percentile is 3.5 times the 10th; measure again on an "
        "idle machine"
    )


def test_a_file_for_a_program(tmp_path: Path) -> None:
    write([SECOND], "A CPU", tmp_path, finished=False)
    assert {path.name for path in tmp_path.iterdir()} == {"benchmark.md"}
    write([FIRST, SECOND], "A CPU", tmp_path, finished=True)
    assert {path.name for path in tmp_path.iterdir()} == {"benchmark.md", "benchmark.json", "ap_against_ms.png"}
    assert json.loads((tmp_path / "benchmark.json").read_text()) == {"machine": "A CPU", "rows": [FIRST, SECOND]}


def test_the_machine_says_its_runtimes() -> None:
    text = machine_text()
    assert all(f"{name} " in text for name in ("torch", "onnxruntime", "openvino")) and " cores; " in text
