"""export.py: what it leaves equals torch on the data set's images, and carries what its users need."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou

import export
from data import DataSettings, DetectionDataset
from data.images import read_image
from deploy import Decoded, EngineNetwork, WithNms, open_exported, prove_same_detections
from detection.datasets import open_data, real_images
from detection.detector import open_detector
from detection.evaluator import AsModel, Evaluator
from detection.export import out_path
from detection.network import read_network
from detection.write_file import with_half_weights
from slim import max_difference
from tests.deploy.test_exports import Given
from tests.scripts.runs import NAMES, ROOT, Runner
from tests.scripts.test_failures import fails

SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="module")
def exported(small_run: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the sparse run in every format, two images of 32 x 64 pixels."""
    project = tmp_path_factory.mktemp("export")
    formats = ("--include", "onnx", "openvino", "torchscript")
    given = ("--data", tiny, "--img", 32, 64, "--batch-size", 2, "--project", project)
    command = ("--weights", small_run / "weights" / "best.pt", *formats, *given)
    assert export.cli([str(word) for word in command]) == 0
    return project / "exp"


def test_half_and_opset(small_run: Path, tiny: Path, script: Runner, tmp_path: Path) -> None:
    """Weights of 16 bits, stored so and nowhere else rounded; the operator set that was asked for."""
    weights = small_run / "weights" / "best.pt"
    given = ("--weights", weights, "--data", tiny, "--img", 64, "--project", tmp_path)
    formats = ("--include", "onnx", "openvino")
    for name, more in (("full", ()), ("half", ("--half", "--opset", 17))):
        done = script("export", *given, *formats, *more, "--out", tmp_path / name)
        assert done.code == 0, done.err
    proto = onnx.load(tmp_path / "half.onnx")
    assert [entry.version for entry in proto.opset_import] == [17]
    stored = {tensor.name: tensor.data_type for tensor in proto.graph.initializer if len(tensor.dims) == 4}
    assert stored and set(stored.values()) == {onnx.TensorProto.FLOAT16}
    network = read_network(weights).model
    images = real_images(DetectionDataset(open_data(DataSettings(data=str(tiny))), "val", 64), 1)
    rounded = Decoded(with_half_weights(network))
    difference = max_difference(Decoded(network), rounded, images)
    assert 1e-5 < difference < 1e-2
    for suffix in (".onnx", ".xml"):
        half = open_exported(tmp_path / f"half{suffix}", precision="float32")
        assert half.bytes_on_disk < open_exported(tmp_path / f"full{suffix}").bytes_on_disk
        assert max_difference(rounded, half, images) < 1e-4
    rows = json.loads((max(tmp_path.glob("exp*"), key=str) / "export.json").read_text())
    assert [row["max_difference"] for row in rows] == pytest.approx([difference] * 2)
    fails(
        script("export", *given, "--half", "--include", "torchscript"), "--half: for onnx and openvino files in float"
    )
    fails(script("export", *given, "--opset", 17, "--include", "openvino"), "--opset 17: of ONNX files alone")
    fails(script("export", *given, "--opset", 12), "--opset 12: expected 15 to 23")


def test_every_format_equals_torch_and_names_its_classes(exported: Path, small_run: Path, tiny: Path) -> None:
    network = read_network(small_run / "weights" / "best.pt")
    images = real_images(DetectionDataset(open_data(DataSettings(data=str(tiny))), "val", 64), 2)[:, :, 16:48]
    with torch.no_grad():
        wanted = network.model.eval()(images)[0]
    made = json.loads((exported / "export.json").read_text())
    assert [row["format"] for row in made] == ["onnx", "openvino", "torchscript"]
    for row in made:
        with open_detector(row["file"], precision="float32") as detector:
            found = detector(images)
            assert found.shape == wanted.shape == (2, wanted.shape[1], 5 + len(NAMES))
            difference = float((found - wanted).abs().max() / wanted.abs().max())
            assert difference == pytest.approx(row["max_difference"], abs=1e-7) and difference < 1e-4
            assert (detector.names, detector.stride_px) == (list(NAMES), max(network.model.stride_px))
            assert detector.sides_px == (32, 64) and detector.network.bytes_on_disk == row["bytes"]
            metadata = detector.network.metadata
            assert ast.literal_eval(metadata["names"]) == dict(enumerate(NAMES)) and metadata["imgsz"] == "[32, 64]"
            assert json.loads(metadata["anchors_px"]) == network.model.anchors_px.tolist()
    assert (exported / "config.yaml").is_file()


def test_a_detector_is_the_same_under_every_engine(exported: Path, small_run: Path, tiny: Path) -> None:
    """A checkpoint too, which is exported for an engine that does not run it."""
    images = real_images(DetectionDataset(open_data(DataSettings(data=str(tiny))), "val", 64), 3)[:, :, 16:48]
    pixels = (images * 255).round().to(torch.uint8)
    checkpoint, onnx_file = str(small_run / "weights" / "best.pt"), str(exported / "weights" / "best.onnx")
    found = {}
    for weights, engine in (
        (checkpoint, "torch"),
        (checkpoint, "openvino"),
        (onnx_file, "onnxruntime"),
        (onnx_file, "openvino"),
    ):
        with open_detector(weights, engine, num_cores=1, precision="float32", images=images[:1]) as detector:
            assert (detector.engine, detector.precision) == (engine, "float32")
            for given in (images, pixels):
                found[weights, engine, given.dtype] = detector(given)
    first, *others = found.values()
    assert all(torch.allclose(first, other, atol=1e-3) for other in others) and len(others) == 7


def test_final_detections_come_out_of_the_file(small_run: Path, tiny: Path, script: Runner, tmp_path: Path) -> None:
    weights, out = small_run / "weights" / "best.pt", tmp_path / "ends.onnx"
    suppression = ("--nms", "--conf", 1e-5, "--iou", 0.5, "--max-det", 20)
    given = (
        *suppression,
        "--uint8-input",
        "--dynamic",
        "--data",
        tiny,
        "--img",
        64,
        "--out",
        out,
        "--project",
        tmp_path,
    )
    done = script("export", "--weights", weights, *given)
    assert done.code == 0, done.err
    assert "input 1 x 3 x any x any bytes" in done.out
    images = real_images(DetectionDataset(open_data(DataSettings(data=str(tiny))), "val", 64), 1)[:, :, 16:48]
    with open_detector(str(out)) as detector:
        assert detector.has_nms and detector.sides_px is None
        (found,) = detector.detections(detector((images * 255).round().to(torch.uint8)), conf=1e-5)
        (some,) = detector.detections(detector(images), conf=1e-5, classes=[1])
    assert len(found) > 1
    assert torch.equal(some, found[found[:, 5] == 1])
    network = WithNms(Decoded(read_network(weights).model.eval()), 1e-5, 0.5, 20)
    assert prove_same_detections(network, Given(found[None]), images) < 1e-4


def as_opencv_has_it(image: Tensor, session: onnxruntime.InferenceSession, side: int) -> list[tuple[int, list[float]]]:
    """(class, box) as OpenCV's tutorials decode YOLOv5: the image in the corner of a square, rows read one by one.

    The consumer knows nothing of this project. https://docs.opencv.org/4.x/da/d9d/tutorial_dnn_yolo.html
    """
    longest = max(image.shape[1:])
    square = torch.zeros(3, longest, longest)
    square[:, : image.shape[1], : image.shape[2]] = image
    blob = F.interpolate(square[None], (side, side), mode="bilinear", antialias=True) / 255
    (rows,) = session.run(None, {"images": blob.numpy()})[0]
    boxes, scores, classes = [], [], []
    for row in rows:
        best = int(row[5:].argmax())
        if row[4] * row[5 + best] > 0.25:
            x, y, width, height = row[:4] * longest / side
            boxes.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
            scores.append(row[4] * row[5 + best])
            classes.append(best)
    order, kept = sorted(range(len(scores)), key=lambda i: -scores[i]), []
    for i in order:
        if all(
            classes[i] != classes[k] or float(box_iou(torch.tensor([boxes[i]]), torch.tensor([boxes[k]]))) <= 0.45
            for k in kept
        ):
            kept.append(i)
    return [(classes[i], boxes[i]) for i in kept]


@pytest.mark.skipif(not SHARED.is_dir(), reason="no published checkpoint beside the project")
def test_a_consumer_of_yolov5_files_sees_the_published_detections(script: Runner, tmp_path: Path, tiny: Path) -> None:
    weights = SHARED / "weights" / "yolov5n.pt"
    given = ("--img", 640, "--data", tiny, "--project", tmp_path, "--out", tmp_path / "n.onnx")
    done = script("export", "--weights", weights, *given)
    assert done.code == 0, done.err
    session = onnxruntime.InferenceSession(tmp_path / "n.onnx", providers=["CPUExecutionProvider"])
    names = ast.literal_eval(session.get_modelmeta().custom_metadata_map["names"])
    for name, reference in json.loads((SHARED / "reference" / "detections.json").read_text()).items():
        image = torch.from_numpy(np.array(Image.open(SHARED / "reference" / name))).permute(2, 0, 1).float()
        found = as_opencv_has_it(image, session, 640)
        surely = [row for row in reference if row["conf"] > 0.3]
        for row in surely:
            same = [box for number, box in found if names[number] == row["cls"]]
            assert float(box_iou(torch.tensor([row["xyxy"]]), torch.tensor(np.array(same))).max()) > 0.8, (name, row)
        assert len(surely) <= len(found) <= len(reference) + 1


def test_impossible_exports_are_refused(small_run: Path, tiny: Path, script: Runner, tmp_path: Path) -> None:
    common = ("export", "--weights", small_run / "weights" / "best.pt", "--data", tiny, "--project", tmp_path)
    fails(script(*common, "--img", 65), "--img 65: expected a multiple")
    fails(script(*common, "--batch-size", 0), "--batch-size 0: expected at least 1")
    fails(script(*common, "--include", "caffe"), "include", "caffe")
    fails(script(*common, "--img", 64, 64, 64), "--img 64 64 64: expected one side, or height and width")
    fails(script(*common, "--nms", "--conf", 2), "--conf 2: expected 0 to 1")
    fails(script(*common, "--dynamic", "--include", "torchscript"), "--dynamic: TorchScript files take one size")
    assert not list(tmp_path.rglob("*.torchscript"))


def test_int8_files_say_what_they_cost(small_weights: Path, tiny: Path, script: Runner, tmp_path: Path) -> None:
    given = ("--weights", small_weights, "--data", tiny, "--img", 64, "--project", tmp_path, "--int8")
    done = script("export", *given, "--include", "onnx", "openvino", "--calibration-images", 8, "--max-drop", 1)
    assert done.code == 0, done.err
    made = json.loads((tmp_path / "exp" / "export.json").read_text())
    assert [Path(row["file"]).name for row in made] == ["last-int8.onnx", "last-int8.xml"]
    config = open_data(DataSettings(data=str(tiny)))
    evaluator = Evaluator(DetectionDataset(config, "val", 64), batch_size=1, workers=0, device=torch.device("cpu"))
    for row in made:
        with open_detector(row["file"]) as detector:
            assert detector.precision == "int8"
            assert row["ap_int8"] == pytest.approx(evaluator(AsModel(detector.network)).ap)
        assert f"AP on val {row['ap_float']:.4f} in float, {row['ap_int8']:.4f} in INT8" in done.out
        assert row["ap_float"] > 0.01 and row["max_difference"] < 1e-4


def test_impossible_quantisations_are_refused(small_weights: Path, tiny: Path, script: Runner, tmp_path: Path) -> None:
    common = ("export", "--weights", small_weights, "--data", tiny, "--img", 64, "--project", tmp_path, "--int8")
    fails(script(*common, "--calibration-images", 0), "--calibration-images 0: expected at least 1")
    fails(script(*common, "--include", "torchscript"), "--int8: TorchScript files stay in float")
    fails(script(*common, "--keep-float", "stem.*"), "--keep-float stem.*: matches no module of the network")
    fails(script(*common, "--max-drop", -1), "--max-drop -1: expected 0 to 1")
    fails(script(*common[:-1], "--max-drop", 0.01), "--keep-float, --int8-target and --max-drop are for --int8")
    fails(script(*common, "--include", "openvino", "--int8-target", "vnni"), "--int8-target vnni: OpenVINO's files are")
    empty = tmp_path / "empty.yaml"
    (tmp_path / "none").mkdir()
    empty.write_text(f"path: {tmp_path}\ntrain: none\nval: none\nnames: [a, b, c, d]\n")
    fails(
        script("export", "--weights", small_weights, "--data", empty, "--img", 64, "--project", tmp_path, "--int8"),
        "none",
    )
    assert not list(tmp_path.rglob("*.onnx")) + list(tmp_path.rglob("*.xml"))


def test_a_file_that_loses_too_much_is_not_published(
    small_weights: Path, tiny: Path, script: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.5 in float, 0.4 in INT8: more than the default allows, then as much as --max-drop does."""

    def ap(exported: EngineNetwork) -> float:
        return 0.4 if exported.precision == "int8" else 0.5

    monkeypatch.setattr("detection.export.measure_on", lambda *given: (ap, ""))
    monkeypatch.setattr("detection.quantise.noisiest_blocks", lambda *given: ["model.0", "model.1", "model.2.cv1"])
    given = ("export", "--weights", small_weights, "--data", tiny, "--img", 64, "--project", tmp_path, "--int8")
    common = (*given, "--calibration-images", 2, "--out", tmp_path / "int8.onnx")
    (tmp_path / "int8.onnx").write_text("of before")
    fails(
        script(*common),
        "--max-drop 0.02: AP 0.5000 falls by 0.1000 to 0.4000 in INT8, also with 1 of 3 blocks in float",
    )
    assert (tmp_path / "int8.onnx").read_text() == "of before"
    (tmp_path / "int8.onnx").unlink()
    fails(script(*common), "--max-drop 0.02")
    assert not list(tmp_path.rglob("*.onnx"))
    done = script(*common, "--max-drop", 0.11)
    assert done.code == 0, done.err
    assert "AP on val 0.5000 in float, 0.4000 in INT8" in done.out and (tmp_path / "int8.onnx").exists()


def test_without_labels_an_int8_file_says_what_it_changes(
    small_weights: Path, tiny: Path, script: Runner, tmp_path: Path
) -> None:
    shutil.copytree(tiny.parent / "tiny" / "images" / "train", tmp_path / "images")
    data = tmp_path / "unlabelled.yaml"
    names = yaml.safe_load(tiny.read_text())["names"]
    data.write_text(yaml.safe_dump({"path": str(tmp_path), "train": "images", "val": "images", "names": names}))
    done = script("export", "--weights", small_weights, "--data", data, "--img", 64, "--project", tmp_path, "--int8")
    assert done.code == 0, done.err
    (row,) = json.loads((tmp_path / "exp" / "export.json").read_text())
    changed, total = row["changed_detections"]
    assert row["ap_int8"] is None and total > 0
    said = f"of {total} detections in float {changed} were lost or gained in INT8, on 16 training images"
    assert f"AP not measured, since the val split of {data} has no labels; {said}" in done.out


def test_out_is_taken_at_its_word(small_weights: Path, tiny: Path, script: Runner, tmp_path: Path) -> None:
    given = ("export", "--weights", small_weights, "--data", tiny, "--img", 64, "--project", tmp_path / "runs")
    int8 = ("--int8", "--calibration-images", 2, "--max-drop", 1)
    done = script(*given, *int8, "--out", tmp_path / "slim.onnx")
    assert done.code == 0, done.err
    assert [path.name for path in tmp_path.glob("*.*")] == ["slim.onnx"]
    assert open_exported(tmp_path / "slim.onnx").precision == "int8"
    assert out_path("slim-0.3", "onnx", several=False) == Path("slim-0.3.onnx")
    both = [out_path("a/slim.onnx", kind, several=True) for kind in ("onnx", "openvino")]
    assert both == [Path("a/slim.onnx"), Path("a/slim.xml")]
    fails(
        script(*given, "--out", tmp_path / "slim.xml"), "slim.xml: --include onnx writes .onnx files; give that suffix"
    )


def test_one_image_is_decoded_for_the_proof(
    small_weights: Path, tiny: Path, script: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Path] = []

    def counted(path: Path, max_pixels: int) -> Tensor:
        decoded.append(path)
        return read_image(path, max_pixels)

    monkeypatch.setattr("data.dataset.read_image", counted)
    done = script(
        "export",
        "--weights",
        small_weights,
        "--data",
        tiny,
        "--img",
        64,
        "--project",
        tmp_path,
        "--include",
        "torchscript",
    )
    assert done.code == 0, done.err
    assert len(decoded) == 1
