"""Exported files that others wrote, as they are in use, and ours as others read them."""

from __future__ import annotations

import ast
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import yaml
from torch import Tensor, nn

from detection.detector import open_detector
from detection.network import read_network
from tests.scripts.runs import NAMES, Done, Runner
from tests.scripts.test_failures import fails


class WithMaps(nn.Module):
    """What older exports give: decoded boxes and the maps of each level, in this order or with the boxes last."""

    def __init__(self, network: nn.Module, boxes_last: bool) -> None:
        super().__init__()
        self.network, self.boxes_last = network, boxes_last

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        boxes, maps = self.network(images / 255.0)
        return (*maps, boxes) if self.boxes_last else (boxes, *maps)


@pytest.fixture(scope="module")
def foreign(small_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ONNX files of four outputs that take bytes and say nothing of themselves."""
    folder, model = tmp_path_factory.mktemp("foreign"), read_network(small_weights).model.eval()
    bytes_in = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    for boxes_last in (False, True):
        wrapped = WithMaps(model, boxes_last).eval()
        file = folder / ("last.onnx" if boxes_last else "first.onnx")
        torch.onnx.export(wrapped, (bytes_in,), str(file), input_names=["input"], dynamo=True, verbose=False)
        proto = onnx.load(file)
        assert len(proto.graph.output) == 1 + model.detect.anchors.shape[0] and not proto.metadata_props
        onnx.save(proto, file)  # with its weights inside
    return folder


@pytest.fixture
def evaluate(script: Runner, tiny: Path, tmp_path: Path) -> Any:
    """val.py on the tiny set: AP of a file."""

    def run(weights: Path, *more: object) -> float:
        given = ("--weights", weights, "--data", tiny, "--img", 64, "--project", tmp_path, "--name", "val")
        done: Done = script("val", *given, *more)
        assert done.code == 0, done.err
        found: float = json.loads(max(tmp_path.glob("val*/metrics.json"), key=str).read_text())["ap"]
        return found

    return run


@pytest.mark.parametrize("file", ["first.onnx", "last.onnx"])
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_boxes_are_found_among_several_outputs(
    foreign: Path, small_weights: Path, evaluate: Any, file: str, engine: str
) -> None:
    more = ("--precision", "float32") if engine == "openvino" else ()
    wanted = evaluate(small_weights)
    assert wanted > 0.01
    assert evaluate(foreign / file, "--name", "val2", "--engine", engine, *more) == pytest.approx(wanted, abs=1e-4)


def test_names_of_a_file_that_has_none(foreign: Path, script: Runner, tiny: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    shutil.copy(next(path for path in tiny.parent.rglob("images/val/*")), images)

    def names_found(*more: object) -> set[str]:
        given = ("--weights", foreign / "first.onnx", "--source", images, "--conf", 0.01, "--save-json", "--nosave")
        done = script("detect", *given, "--project", tmp_path, "--name", "found", *more)
        assert done.code == 0, done.err
        rows = json.loads((max(tmp_path.glob("found*"), key=str) / "detections.json").read_text())
        assert rows
        return {row["name"] for row in rows}

    assert names_found() <= {f"class{i}" for i in range(len(NAMES))}
    assert names_found("--names", *NAMES) <= set(NAMES)
    assert names_found("--data", tiny) <= set(NAMES)
    done = script("detect", "--weights", foreign / "first.onnx", "--source", images, "--names", "a", "b")
    fails(done, "its boxes have 9 values each, expected 7", "2 classes (a, b)")


def test_a_torchscript_file_that_gives_a_tuple(small_weights: Path, evaluate: Any, tmp_path: Path) -> None:
    """YOLOv5's own: (boxes, maps) or (boxes,), names as a mapping and the stride as a number."""
    model = read_network(small_weights).model.eval()
    known = {"shape": [1, 3, 64, 64], "stride": 32, "names": dict(enumerate(NAMES))}

    class Alone(nn.Sequential):
        def forward(self, images: Tensor) -> tuple[Tensor]:
            return (self[0](images)[0],)

    for name, network in (("maps", model), ("alone", Alone(model))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            script = torch.jit.trace(network, torch.zeros(1, 3, 64, 64), strict=False, check_trace=False)
            torch.jit.save(
                script, str(tmp_path / f"{name}.torchscript"), _extra_files={"config.txt": json.dumps(known)}
            )
        found = evaluate(tmp_path / f"{name}.torchscript", "--trust", "--name", f"val-{name}")
        assert found == pytest.approx(evaluate(small_weights), abs=1e-4)


def test_our_torchscript_says_what_yolov5_reads(exported: Path) -> None:
    extra = {"config.txt": ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.load(str(exported / "net.torchscript"), _extra_files=extra)
    known = json.loads(extra["config.txt"])
    assert known["names"] == {str(index): name for index, name in enumerate(NAMES)} and known["stride"] == 8
    with open_detector(str(exported / "net.torchscript")) as detector:
        assert (detector.names, detector.stride_px) == (list(NAMES), 8)


@pytest.mark.parametrize("metadata", ["metadata.yaml", "best.yaml"])
def test_an_openvino_folder(exported: Path, evaluate: Any, tmp_path: Path, metadata: str) -> None:
    import openvino

    folder = tmp_path / "best_openvino_model"
    folder.mkdir()
    graph = openvino.Core().read_model(exported / "net.xml")
    text = graph.get_rt_info(["model_info", "names"]).astype(str)
    graph.set_rt_info({}, ["model_info"])
    openvino.save_model(graph, folder / "best.xml", compress_to_fp16=False)
    (folder / metadata).write_text(yaml.safe_dump({"stride": 32, "names": ast.literal_eval(text)}))
    with open_detector(str(folder)) as detector:
        assert (detector.names, detector.stride_px, detector.engine) == (list(NAMES), 32, "openvino")
    precise = ("--precision", "float32")
    assert evaluate(folder, *precise) == pytest.approx(
        evaluate(exported / "net.xml", *precise, "--name", "val2"), abs=1e-6
    )


def test_an_openvino_folder_of_ours(
    script: Runner, small_weights: Path, tiny: Path, evaluate: Any, tmp_path: Path
) -> None:
    """With the YAMLs in which YOLOv5 and Ultralytics' later tools look for classes and stride."""
    folder = tmp_path / "best_openvino_model"
    given = ("--weights", small_weights, "--include", "openvino", "--img", 64, "--data", tiny, "--project", tmp_path)
    done = script("export", *given, "--out", folder)
    assert done.code == 0, done.err
    assert {file.name for file in folder.iterdir()} == {"best.xml", "best.bin", "best.yaml", "metadata.yaml"}
    for name in ("best.yaml", "metadata.yaml"):
        known = yaml.safe_load((folder / name).read_text())
        assert (known["names"], known["stride"], known["imgsz"]) == (dict(enumerate(NAMES)), 8, [64, 64])
    assert evaluate(folder, "--precision", "float32") == pytest.approx(
        evaluate(small_weights, "--name", "val2"), abs=1e-4
    )


def test_a_folder_that_is_no_network(script: Runner, tmp_path: Path) -> None:
    fails(script("val", "--weights", tmp_path, "--data", "data/shapes.yaml"), "one .xml; found none")
