"""val.py on exported files: the AP of torch under every engine, and one line for each file that is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest
import yaml

from tests.scripts.runs import Done, Runner
from tests.scripts.test_failures import fails, other_classes


@pytest.fixture
def evaluate(script: Runner, tiny: Path, tmp_path: Path) -> Runner:
    """val.py on the tiny set."""

    def run(weights: Path, *more: object) -> Done:
        return script("val", "--weights", weights, "--data", tiny, "--project", tmp_path, "--name", weights.stem, *more)

    return run


def metrics(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "metrics.json").read_text())
    return found


def test_ap_is_torchs_under_every_engine(exported: Path, small_weights: Path, evaluate: Runner, tmp_path: Path) -> None:
    done = evaluate(small_weights, "--img", 64)
    assert done.code == 0, done.err
    wanted = metrics(tmp_path / small_weights.stem)
    assert float(wanted["ap"]) > 0.01  # type: ignore[arg-type]
    runs = [
        (exported / "net.onnx", (), "onnxruntime"),
        (exported / "net.onnx", ("--engine", "openvino", "--precision", "float32", "--num-cores", 1), "openvino"),
        (exported / "net.xml", ("--precision", "float32"), "openvino"),
        (exported / "bytes.xml", ("--precision", "float32"), "openvino"),
        (exported / "net.torchscript", (), "torch"),
        (exported / "dynamic.onnx", ("--img", 64), "onnxruntime"),
        (small_weights, ("--img", 64, "--engine", "torch"), "torch"),
        (small_weights, ("--img", 64, "--engine", "onnxruntime"), "onnxruntime"),
    ]
    for number, (file, more, engine) in enumerate(runs):
        done = evaluate(file, *more, "--name", number)
        assert done.code == 0, done.err
        found = metrics(tmp_path / str(number))
        assert found["ap"] == pytest.approx(wanted["ap"], abs=1e-4), (file.name, engine)
        assert (found["engine"], found["precision"], found["images"]) == (engine, "float32", 6)
        assert set(found) == set(wanted)
        assert (found["macs"], found["params"]) == (wanted["macs"], wanted["params"])
        assert (tmp_path / str(number) / "detections.png").stat().st_size > 1000
        assert yaml.safe_load((tmp_path / str(number) / "config.yaml").read_text())["img"] == 64


def test_a_file_with_its_suppression_inside(
    exported: Path, evaluate: Runner, small_weights: Path, tmp_path: Path
) -> None:
    """It gives each box its best class alone; with one class for all that is what everybody else does."""
    done = evaluate(exported / "nms.onnx")
    assert done.code == 0 and "AP is at the threshold and IoU inside of the file" in done.out, done.err
    assert 0 < metrics(tmp_path / "nms")["ap"] <= 1  # type: ignore[operator]
    cut = evaluate(exported / "nms.onnx", "--conf", 1, "--name", "none")
    assert cut.code == 0 and metrics(tmp_path / "none")["ap"] == 0


def test_rectangles(exported: Path, evaluate: Runner, small_weights: Path, tmp_path: Path) -> None:
    for weights in (small_weights, exported / "dynamic.onnx"):
        done = evaluate(weights, "--img", "32x64")
        assert done.code == 0, done.err
    torch_ap, onnx_ap = (metrics(tmp_path / stem)["ap"] for stem in (small_weights.stem, "dynamic"))
    assert onnx_ap == pytest.approx(torch_ap, abs=1e-4)
    assert yaml.safe_load((tmp_path / "dynamic" / "config.yaml").read_text())["img"] == "32x64"
    rect = evaluate(exported / "dynamic.onnx", "--img", 64, "--rect")
    assert rect.code == 0, rect.err


def test_what_does_not_fit_is_named(
    exported: Path, evaluate: Runner, small_weights: Path, tiny: Path, tmp_path: Path
) -> None:
    fails(
        evaluate(exported / "net.onnx", "--img", 96), "net.onnx: takes images of 64 x 64 pixels, 96 x 96 were asked for"
    )
    fails(evaluate(exported / "net.onnx", "--rect"), "--rect: ", "net.onnx takes images of 64 x 64 pixels alone")
    fails(evaluate(exported / "dynamic.onnx", "--img", "64x64x3"), "--img 64x64x3: expected one side in pixels")
    fails(evaluate(exported / "dynamic.onnx", "--img", "60"), "--img 60: expected a multiple of the largest stride")
    fails(evaluate(exported / "dynamic.onnx", "--img", "32x64", "--rect"), "--rect with --img 32x64: expected one side")
    fails(evaluate(exported / "net.xml", "--engine", "torch"), "net.xml: --engine torch does not run .xml files")
    fails(evaluate(exported / "net.onnx", "--precision", "bfloat16"), "--precision bfloat16: onnxruntime computes")
    more = other_classes(tiny, tmp_path)
    fails(evaluate(exported / "net.onnx", "--data", more), "net.onnx: detects 4 classes", "has 6")
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.parametrize("name", ["net.onnx", "net.xml", "net.bin", "net.torchscript"])
@pytest.mark.parametrize("kept", [0, 0.5], ids=["empty", "truncated"])
def test_damaged_files(name: str, kept: float, exported: Path, evaluate: Runner, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for part in ("net.xml", "net.bin"):
        shutil.copy(exported / part, folder)
    whole = (exported / name).read_bytes()
    (folder / name).write_bytes(whole[: int(len(whole) * kept)])
    opened = "net.xml" if name == "net.bin" else name
    fails(evaluate(folder / opened), opened, "export it anew")


def test_files_of_other_kinds(exported: Path, evaluate: Runner, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not a network")
    fails(evaluate(tmp_path / "text.onnx"), "text.onnx: not an ONNX network")
    newer = onnx.load(exported / "net.onnx")
    newer.opset_import[0].version = 99
    onnx.save(newer, tmp_path / "newer.onnx")
    for engine in ("onnxruntime", "openvino"):
        fails(
            evaluate(tmp_path / "newer.onnx", "--engine", engine),
            "newer.onnx: its operators are those of ONNX opset 99",
        )
    misnamed = onnx.load(exported / "net.onnx")
    next(entry for entry in misnamed.metadata_props if entry.key == "names").value = "{0: 'circle',"
    onnx.save(misnamed, tmp_path / "misnamed.onnx")
    fails(evaluate(tmp_path / "misnamed.onnx"), "misnamed.onnx: its metadata do not name its classes")
    fails(evaluate(tmp_path / "none.xml"), "none.xml: no such file")
    (tmp_path / "lonely.xml").write_bytes((exported / "net.xml").read_bytes())
    fails(evaluate(tmp_path / "lonely.xml"), "lonely.bin: no such file")
