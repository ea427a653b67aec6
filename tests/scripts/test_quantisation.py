"""quantise.py: calibration images as evaluation sees them, one ranking for all formats, suppression behind INT8."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from data import DataSettings, DetectionDataset
from data.dataset import Draw
from deploy import (
    Decoded,
    Int8Target,
    Quantised,
    WithNms,
    open_exported,
    parts_of,
    prove_same_detections,
)
from detection import quantise
from detection.datasets import open_data
from detection.detector import open_detector
from detection.network import Network, read_network
from detection.quantise import Int8Writer, calibration_images, changed_detections, measure_on
from detection.write_file import write_file
from models import NmsSettings
from tests.deploy.test_quantise import on_integers

HEAD = "model.6"
NMS = NmsSettings(1e-5, 0.5, 20)


@pytest.fixture(scope="module")
def network(small_run: Path) -> Network:
    return read_network(small_run / "weights" / "last.pt")


@pytest.fixture(scope="module")
def images(tiny: Path) -> list[Tensor]:
    return calibration_images(open_data(DataSettings(data=str(tiny))), (32, 64), 6, 0)


class Writer:
    """Writes the float file in place of ``write_file``, each kind once, and counts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []

    def __call__(self, network: Network, path: Path, images: Tensor, *, nms: NmsSettings | None = None) -> float:
        self.asked.append(path.suffix)
        known = self.folder / f"{nms is not None}{path.suffix}"
        if not known.exists():
            write_file(network, known, images, nms=nms)
        for source, copied in zip(parts_of(known), parts_of(path), strict=True):
            shutil.copy(source, copied)
        return 1e-6


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("floats")


@pytest.fixture
def write(floats: Path, monkeypatch: pytest.MonkeyPatch) -> Writer:
    writer = Writer(floats)
    monkeypatch.setattr(quantise, "write_file", writer)
    return writer


def test_calibration_images_are_shuffled_training_images_letterboxed(tiny: Path, images: list[Tensor]) -> None:
    config = open_data(DataSettings(data=str(tiny)))
    dataset = DetectionDataset(config, "train", 64)
    known = [dataset[Draw(i, (32, 64))].image.float() / 255 for i in range(len(dataset))]
    places = [next(i for i, one in enumerate(known) if torch.equal(one, image)) for image in images]
    assert len(set(places)) == 6 and places != sorted(places)
    other = calibration_images(config, (32, 64), 6, 1)
    assert not all(torch.equal(a, b) for a, b in zip(images, other, strict=True))
    assert len(calibration_images(config, (64, 64), 99, 0)) == 16


def test_ap_is_measured_at_any_size_and_not_with_other_classes(tiny: Path, network: Network) -> None:
    config = open_data(DataSettings(data=str(tiny)))
    measure, _ = measure_on(network, config, (32, 64), "w.pt", "tiny.yaml")
    assert measure is not None
    detector, seen = Decoded(network.model.eval()), set()
    detector.register_forward_pre_hook(lambda module, given: seen.add(tuple(given[0].shape)))
    assert 0 <= measure(detector) < 1 and seen == {(1, 3, 32, 64)}
    other, why = measure_on(network, config.single(), (32, 64), "w.pt", "tiny.yaml")
    assert other is None and "w.pt: detects 4 classes, tiny.yaml has 1" in why


@pytest.mark.long
def test_the_first_of_a_ranking_stays_float_in_every_format(
    write: Writer, network: Network, images: list[Tensor], tmp_path: Path
) -> None:
    order = Int8Writer(network, images, [HEAD]).ranking
    assert write.asked == [".onnx"] and len(order) == len(set(order)) == 12
    paths = {block: {path for path in on_all(network) if f"{path}.".startswith(f"{block}.")} for block in order}
    for suffix in (".onnx", ".xml"):
        values = iter([0.5, 0.4, 0.499])
        writer = Int8Writer(network, images, [HEAD], "any", 0.01, lambda exported, values=values: next(values))
        writer.__dict__["ranking"] = order[::-1]
        out = tmp_path / f"int8{suffix}"
        _, found = writer.write(out)
        assert found.kept == (order[-1],) and found.ap == 0.499
        quantised = on_integers(out)
        assert quantised == on_all(network) - paths[order[-1]]
    before = sorted(path.name for path in tmp_path.iterdir())
    assert before == ["int8.bin", "int8.onnx", "int8.xml"]


def on_all(network: Network) -> set[str]:
    """The convolutions before the head."""
    found = {path for path, module in network.model.named_modules() if isinstance(module, torch.nn.Conv2d)}
    return {path for path in found if not path.startswith(HEAD)}


def test_the_suppression_stands_behind_the_same_int8_network(
    write: Writer, network: Network, images: list[Tensor], tmp_path: Path
) -> None:
    writer = Int8Writer(network, images, [HEAD], not_measured="nothing is labelled")
    decoded, final = tmp_path / "decoded.onnx", tmp_path / "final.onnx"
    writer.write(decoded)
    writer.write(final, NMS)
    given = images[0][None]
    wanted = WithNms(open_exported(decoded), NMS.conf, NMS.iou, NMS.max_det)
    found = open_exported(final)
    assert found(given).shape == (1, 20, 6) and found.precision == "int8"
    assert prove_same_detections(wanted, found, given) < 1e-4


def test_without_labels_detections_are_compared(
    write: Writer, network: Network, images: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A box that moves by a pixel is the same; one that takes another class is lost and gained."""
    far = [40.0, 40, 8, 8, 0.9]
    exact = [[10.0, 10, 8, 8, 0.9, 1, 0], [*far, 1, 0]]
    rounded = [[11.0, 10, 8, 8, 0.9, 1, 0], [*far, 0, 1]]
    assert changed_detections(Fixed(exact), Fixed(rounded), images[:3]) == (6, 6)
    assert changed_detections(Fixed(exact), Fixed(exact), images[:3]) == (0, 6)
    assert changed_detections(Fixed([[*far[:4], 0.0, 1, 0]]), Fixed(exact), images[:1]) == (2, 0)
    monkeypatch.setattr(quantise, "changed_detections", lambda one, other, given: (one.precision, other.precision))
    _, found = Int8Writer(network, images, [HEAD], not_measured="nothing is labelled").write(tmp_path / "int8.onnx")
    assert found == Quantised(None, None, (), ("float32", "int8"))


class Fixed(torch.nn.Module):
    """A network that sees the same in every image."""

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, images: Tensor) -> Tensor:
        return torch.tensor([self.rows] * len(images))


def test_a_file_for_another_cpu_is_warned_about_once(
    write: Writer,
    network: Network,
    images: list[Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("deploy.onnx_file.int8_saturates", lambda: True)
    for target in get_args(Int8Target):
        out = tmp_path / f"{target}.onnx"
        Int8Writer(network, images, [HEAD], target, not_measured="nothing is labelled").write(out)
        for _ in range(2):
            with open_detector(str(out)) as detector:
                assert detector.network.metadata["int8_target"] == target
    (said,) = (text for text in caplog.messages if text.startswith("warning:"))
    assert said.startswith(f"warning: {tmp_path / 'vnni.onnx'}: its weights have 8 bits") and "\n" not in said
