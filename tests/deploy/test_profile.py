"""An engine's own times: every operator once, named after its module, whatever the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deploy import LayerTime, export_onnx, export_openvino, export_torchscript, open_exported
from deploy.profiling import KindTime, by_kind, profile, profile_text
from deploy.settings import Engine
from slim import SlimError

IMAGES = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
CONVOLUTIONS = {"Convolution", "Conv", "conv2d", "_convolution", "FusedConv"}


class Branched(nn.Module):
    """Two convolutions of the same input, whose sum no engine can leave out, and a third one."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(3, 8, 5, 1, 2)
        self.last = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 4, 3))

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.last(torch.sigmoid(self.left(images)) + self.right(images))
        return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profiled")
    torch.manual_seed(0)
    model = Branched().eval()
    export_onnx(model, folder / "net.onnx", IMAGES)
    export_openvino(model, folder / "net.xml", IMAGES)
    export_torchscript(model, folder / "net.torchscript", IMAGES)
    return folder


@pytest.mark.parametrize(
    ("name", "engine"),
    [("net.onnx", "onnxruntime"), ("net.onnx", "openvino"), ("net.xml", "openvino"), ("", "torch")],
)
def test_convolutions_are_named_after_their_modules(name: str, engine: Engine, files: Path) -> None:
    network = open_exported(files / name, engine, num_cores=1, profile=True) if name else Branched().eval()
    layers = profile(network, IMAGES, runs=3)
    assert all(layer.milliseconds >= 0 for layer in layers) and sum(layer.milliseconds for layer in layers) > 0
    assert len({layer.name for layer in layers if layer.kind in CONVOLUTIONS}) == 3
    assert {layer.name for layer in layers if layer.kind in CONVOLUTIONS} == {"left", "right", "last.1"}
    assert {layer.precision for layer in layers if layer.kind in CONVOLUTIONS} <= {"float32", "bfloat16"}
    assert len({(layer.name, layer.kind) for layer in layers}) == len(layers)


def test_torchscript_knows_no_modules(files: Path) -> None:
    layers = profile(open_exported(files / "net.torchscript", profile=True), IMAGES, runs=2)
    found = [layer.name for layer in layers if layer.kind in CONVOLUTIONS]
    assert len(found) == 3 == len(set(found))


def test_a_module_is_left_without_hooks() -> None:
    model = Branched().eval()
    profile(model, IMAGES, runs=1)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_was_not_opened_for_it_is_refused(files: Path) -> None:
    for name, engine in (("net.onnx", "ONNX Runtime"), ("net.xml", "OpenVINO")):
        with pytest.raises(SlimError, match=rf"{name}: {engine} measure\w* nothing; open it with profile=True"):
            profile(open_exported(files / name), IMAGES, runs=1)
    with pytest.raises(SlimError, match="0 runs, expected at least 1"):
        profile(Branched(), IMAGES, runs=0)


def test_tables_by_hand() -> None:
    layers = [
        LayerTime("a", "Conv", "int8", 1.0),
        LayerTime("b", "Add", "float32", 0.5),
        LayerTime("c", "Conv", "int8", 2.0),
        LayerTime("d", "Conv", "float32", 0.5),
    ]
    assert by_kind(layers) == [
        KindTime("Conv", "int8", 2, 3.0, 0.75),
        KindTime("Add", "float32", 1, 0.5, 0.125),
        KindTime("Conv", "float32", 1, 0.5, 0.125),
    ]
    text = profile_text(layers, slowest=2)
    assert "| Conv | int8 | 2 | 3.000 | 75.0% |" in text and "| all | | 4 | 4.000 | 100.0% |" in text
    assert text.splitlines()[-2:] == ["| c | Conv | int8 | 2.000 | 50.0% |", "| a | Conv | int8 | 1.000 | 25.0% |"]
