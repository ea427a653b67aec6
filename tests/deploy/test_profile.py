"""An engine's own times: every operator once, named after its module, whatever the engine."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deploy import Engine, LayerTime, export_network, open_exported, profile, profile_text
from slim import SlimError

IMAGES = torch.randint(256, (1, 3, 16, 16), generator=torch.Generator().manual_seed(0)) / 255
CONVOLUTIONS = {"Convolution", "Conv", "Conv2d", "FusedConv"}


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
    export_network(model, folder / "net.onnx", IMAGES)
    export_network(model, folder / "net.xml", IMAGES)
    export_network(model, folder / "net.torchscript", IMAGES)
    return folder


@pytest.mark.parametrize(
    ("name", "engine"),
    [("net.onnx", "onnxruntime"), ("net.onnx", "openvino"), ("net.xml", "openvino"), ("", "torch")],
)
def test_convolutions_are_named_after_their_modules(name: str, engine: Engine, files: Path) -> None:
    network = open_exported(files / name, engine, num_cores=1) if name else Branched().eval()
    layers = profile(network, IMAGES, runs=3)
    assert all(layer.milliseconds >= 0 for layer in layers) and sum(layer.milliseconds for layer in layers) > 0
    assert len({layer.name for layer in layers if layer.kind in CONVOLUTIONS}) == 3
    assert {layer.name for layer in layers if layer.kind in CONVOLUTIONS} == {"left", "right", "last.1"}
    assert {layer.precision for layer in layers if layer.kind in CONVOLUTIONS} <= {"float32", "bfloat16"}
    assert len({(layer.name, layer.kind) for layer in layers}) == len(layers)


def test_torchscript_is_measured_as_a_whole(files: Path) -> None:
    layers = profile(open_exported(files / "net.torchscript"), IMAGES, runs=2)
    assert [layer.kind for layer in layers] == ["TorchScriptNetwork"] and layers[0].milliseconds > 0


def test_a_torch_modules_time_is_without_its_childrens() -> None:
    class Slow(nn.Module):
        def __init__(self, seconds: float, inside: nn.Module) -> None:
            super().__init__()
            self.seconds, self.inside = seconds, inside

        def forward(self, images: Tensor) -> Tensor:
            time.sleep(self.seconds)
            found: Tensor = self.inside(images)
            return found

    layers = profile(Slow(0.002, Slow(0.02, nn.Identity())), IMAGES, runs=1)
    assert [layer.name for layer in layers] == ["inside.inside", "inside", ""]
    assert layers[0].milliseconds < 2 <= layers[2].milliseconds < 20 <= layers[1].milliseconds


@pytest.mark.parametrize(("name", "engine"), [("two.onnx", "onnxruntime"), ("two.xml", "openvino")])
def test_a_file_of_several_images_is_measured_on_as_many(name: str, engine: Engine, tmp_path: Path) -> None:
    export_network(Branched().eval(), tmp_path / name, IMAGES.expand(2, -1, -1, -1), uint8_input=True)
    assert profile(open_exported(tmp_path / name, engine), IMAGES, runs=1)


def test_a_module_is_left_without_hooks() -> None:
    model = Branched().eval()
    profile(model, IMAGES, runs=1)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_no_runs_are_refused() -> None:
    with pytest.raises(SlimError, match="0 runs, expected at least 1"):
        profile(Branched(), IMAGES, runs=0)


def test_tables_by_hand() -> None:
    layers = [
        LayerTime("a", "Conv", "int8", 1.0),
        LayerTime("b", "Add", "float32", 0.5),
        LayerTime("c", "Conv", "int8", 2.0),
        LayerTime("d", "Conv", "float32", 0.5),
    ]
    text = profile_text(layers, slowest=2)
    assert text.splitlines()[2:5] == [
        "| Conv | int8 | 2 | 3.000 | 75.0% |",
        "| Add | float32 | 1 | 0.500 | 12.5% |",
        "| Conv | float32 | 1 | 0.500 | 12.5% |",
    ]
    assert "| all | | 4 | 4.000 | 100.0% |" in text
    assert text.splitlines()[-2:] == ["| c | Conv | int8 | 2.000 | 50.0% |", "| a | Conv | int8 | 1.000 | 25.0% |"]
