"""export.py: what it leaves equals torch on the data set's images, and carries what its users need."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import torch

from deploy import OnnxNetwork
from detection import DetectionDataset, open_data, read_network, real_images
from tests.scripts.runs import NAMES, Runner
from tests.scripts.test_failures import fails


def test_an_export_equals_torch_and_names_its_classes(
    sparse_run: Path, tiny: Path, script: Runner, tmp_path: Path
) -> None:
    weights = sparse_run / "weights" / "best.pt"
    where = ("--data", tiny, "--img", 64, "--project", tmp_path)
    done = script("export", "--weights", weights, *where, "--batch-size", 2)
    assert done.code == 0, done.err
    (made,) = json.loads((tmp_path / "exp" / "export.json").read_text())
    exported = OnnxNetwork(made["file"])
    images = real_images(DetectionDataset(open_data(str(tiny), None), "val", 64), 2)
    network = read_network(weights)
    with torch.no_grad():
        wanted = network.model.eval()(images)[0]
    assert exported(images).shape == wanted.shape == (2, wanted.shape[1], 5 + len(NAMES))
    assert float((exported(images) - wanted).abs().max()) == made["max_difference"] < 1e-4 * float(wanted.max())
    assert ast.literal_eval(exported.metadata["names"]) == dict(enumerate(NAMES))
    assert exported.metadata["stride"] == str(max(network.model.stride_px))
    assert exported.metadata["imgsz"] == "[64, 64]"
    assert (tmp_path / "exp" / "config.yaml").is_file() and made["bytes"] == Path(made["file"]).stat().st_size


def test_impossible_exports_are_refused(sparse_run: Path, tiny: Path, script: Runner, tmp_path: Path) -> None:
    common = ("export", "--weights", sparse_run / "weights" / "best.pt", "--data", tiny, "--project", tmp_path)
    fails(script(*common, "--img", 65), "--img 65: expected a multiple")
    fails(script(*common, "--batch-size", 0), "--batch-size 0: expected at least 1")
    fails(script(*common, "--include", "caffe"), "include", "caffe")
    assert not list(tmp_path.iterdir())
