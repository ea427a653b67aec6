"""The examples, run as their reader runs them, from another folder."""

from __future__ import annotations

import ast
import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import onnx
import pytest
import torch
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(name: str, folder: Path, *flags: str) -> str:
    """What an example prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "YOLO_CONFIG_DIR": str(folder)}
    command = [sys.executable, str(ROOT / "examples" / name), *flags]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def numbers(text: str, pattern: str) -> list[float]:
    """The groups of a pattern that must occur, as numbers."""
    found = re.search(pattern, text)
    assert found is not None, text
    return [float(number.replace(",", "")) for number in found.groups()]


@pytest.mark.slow
def test_a_classifier(tmp_path: Path) -> None:
    out = run("classifier.py", tmp_path, "--out", "net.onnx")
    dense, narrow, *params = numbers(out, r"MACs ([\d,]+) -> ([\d,]+), parameters ([\d,]+) -> ([\d,]+)")
    assert narrow <= 0.3 * dense
    before, cut, after = numbers(out, r"dense ([\d.]+), right after the cut ([\d.]+), fine-tuned ([\d.]+)")
    assert before > 0.9 and cut > 0.8 and after > 0.9
    assert "equal to" in out
    assert numbers(out, r"differs from torch by (\S+)")[0] < 1e-3
    stored = sum(torch.Size(tensor.dims).numel() for tensor in onnx.load(tmp_path / "net.onnx").graph.initializer)
    assert stored < 1.05 * params[1] < 0.5 * params[0]


@pytest.mark.slow
def test_a_segmentation_network(tmp_path: Path) -> None:
    out = run("segmentation.py", tmp_path, "--out", "net.pt")
    dense, narrow, before, after = numbers(out, r"MACs ([\d,]+) -> ([\d,]+); IoU ([\d.]+) -> ([\d.]+)")
    assert narrow <= 0.41 * dense
    assert before > 0.7 and after > 0.7
    assert out.count("pruned = masked, equal to") == 2
    assert "net.pt: differs from the network in memory by 0.0e+00" in out


@pytest.mark.slow
def test_the_notebook_prints_what_stands_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many lines from every cell, since scores are other numbers with another release of torch."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    stored = nbformat.read(ROOT / "examples" / "slim_a_resnet.ipynb", as_version=4)
    ran = copy.deepcopy(stored)
    NotebookClient(ran, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    before, after = ([printed(cell) for cell in notebook.cells] for notebook in (stored, ran))
    assert [text.count("\n") for text in after] == [text.count("\n") for text in before]
    assert "pruned = masked: True" in "".join(after) and "0.0" in after
    assert sum(map(len, after)) > 3000


def printed(cell: Any) -> str:
    """What a cell printed, and the value of its last line."""
    outputs = cell.get("outputs", ())
    return "".join(output.get("text") or output["data"]["text/plain"] for output in outputs)


@pytest.mark.zoo
def test_yolo11_in_ultralytics_trainer(tmp_path: Path) -> None:
    pytest.importorskip("ultralytics", reason="needs the extra 'zoo' (pip install '.[zoo]')")
    out = run("yolo11.py", tmp_path)
    dense, narrow = numbers(out, r"MACs ([\d,]+) -> ([\d,]+)")
    assert narrow <= 0.5 * dense
    difference, largest = numbers(out, r"differs from torch by ([\d.e+-]+), of ([\d.e+-]+)")
    assert difference <= 1e-4 * largest
    before, after = numbers(out, r"AP: dense ([\d.]+), slim ([\d.]+)")
    assert before > 0.1 and after > 0.1
    assert "equal to" in out


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_uses_what_is_public(path: Path) -> None:
    """Who copies it takes slim along, and nothing else of ours but the drawn data set."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    ours = {
        name
        for node in found
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        if (ROOT / name.split(".")[0]).is_dir()
    }
    assert ours <= {"slim", "data.shapes"}
    assert "slim._" not in text
