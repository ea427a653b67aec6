"""quantisation.py: calibration images as evaluation sees them, one ranking for all formats, suppression behind INT8."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data import DataSettings, DetectionDataset
from data.sampling import Draw
from deploy import Decoded, WithNms, open_exported, parts_of, prove_same_detections
from detection.datasets import open_data
from detection.network import Network, read_network
from detection.quantise import Calibrated, calibrate, noisiest_blocks, training_images, write_quantised
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
    return training_images(open_data(DataSettings(data=str(tiny))), (32, 64), 6, 0)


class Writer:
    """Writes the float file, each kind once, and counts."""

    def __init__(self, network: Network, images: list[Tensor], folder: Path) -> None:
        self.network, self.images, self.folder = network, images, folder
        self.asked: list[str] = []

    def __call__(self, path: Path, with_nms: bool) -> float:
        self.asked.append(path.suffix)
        known = self.folder / f"{with_nms}{path.suffix}"
        if not known.exists():
            write_file(self.network, known, self.images[0][None], nms=NMS if with_nms else None)
        for source, copied in zip(parts_of(known), parts_of(path), strict=True):
            shutil.copy(source, copied)
        return 1e-6


@pytest.fixture(scope="module")
def write(network: Network, images: list[Tensor], tmp_path_factory: pytest.TempPathFactory) -> Writer:
    return Writer(network, images, tmp_path_factory.mktemp("floats"))


def test_calibration_images_are_shuffled_training_images_letterboxed(tiny: Path, images: list[Tensor]) -> None:
    config = open_data(DataSettings(data=str(tiny)))
    dataset = DetectionDataset(config, "train", 64)
    known = [dataset[Draw(i, (32, 64))].image.float() / 255 for i in range(len(dataset))]
    places = [next(i for i, one in enumerate(known) if torch.equal(one, image)) for image in images]
    assert len(set(places)) == 6 and places != sorted(places)
    other = training_images(config, (32, 64), 6, 1)
    assert not all(torch.equal(a, b) for a, b in zip(images, other, strict=True))
    assert len(training_images(config, (64, 64), 99, 0)) == 16


def test_ap_is_measured_at_any_size_and_not_with_other_classes(tiny: Path, network: Network) -> None:
    config = open_data(DataSettings(data=str(tiny)))
    known = calibrate(network, config, (32, 64), 2, 0, "w.pt", "tiny.yaml")
    assert known.measure is not None
    detector, seen = Decoded(network.model.eval()), set()
    detector.register_forward_pre_hook(lambda module, given: seen.add(tuple(given[0].shape)))
    assert 0 <= known.measure(detector) < 1 and seen == {(1, 3, 32, 64)}
    other = calibrate(network, config.single(), (32, 64), 2, 0, "w.pt", "tiny.yaml")
    assert other.measure is None and "w.pt: detects 4 classes, tiny.yaml has 1" in other.not_measured


@pytest.mark.long
def test_the_first_of_a_ranking_stays_float_in_every_format(
    write: Writer, network: Network, images: list[Tensor], tmp_path: Path
) -> None:
    write.asked.clear()
    order = noisiest_blocks(write, images, [HEAD])
    assert write.asked == [".onnx"] and len(order) == len(set(order)) == 12
    paths = {block: {path for path in on_all(network) if f"{path}.".startswith(f"{block}.")} for block in order}
    for suffix in (".onnx", ".xml"):
        values = iter([0.5, 0.4, 0.499])
        calibrated = Calibrated(images, lambda exported, values=values: next(values))
        out = tmp_path / f"int8{suffix}"
        _, found = write_quantised(write, out, calibrated, [HEAD], max_drop=0.01, rank=lambda: order[::-1])
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
    write: Writer, images: list[Tensor], tmp_path: Path
) -> None:
    calibrated = Calibrated(images, None, "nothing is labelled")
    decoded, final = tmp_path / "decoded.onnx", tmp_path / "final.onnx"
    write_quantised(write, decoded, calibrated, [HEAD])
    write_quantised(write, final, calibrated, [HEAD], has_nms=True)
    given = images[0][None]
    wanted = WithNms(open_exported(decoded), NMS.conf, NMS.iou, NMS.max_det)
    found = open_exported(final)
    assert found(given).shape == (1, 20, 6) and found.precision == "int8"
    assert prove_same_detections(wanted, found, given) < 1e-4


def test_a_bound_without_labels_is_refused(write: Writer, images: list[Tensor], tmp_path: Path) -> None:
    calibrated = Calibrated(images, None, "the val split has no labels")
    with pytest.raises(ValueError, match=r"--max-drop 0.01: AP cannot be measured, since the val split has no labels"):
        write_quantised(write, tmp_path / "int8.onnx", calibrated, [HEAD], max_drop=0.01)
    assert not list(tmp_path.iterdir())
