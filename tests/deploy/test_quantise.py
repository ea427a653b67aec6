"""INT8 files: what is quantised and what is not, how near they stay, and how a bound of accuracy is kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from deploy import (
    DeployError,
    OnnxQuantiser,
    OpenVinoQuantiser,
    Quantiser,
    export_onnx,
    export_openvino,
    open_exported,
    quantise,
)
from deploy.accuracy import noisiest
from deploy.openvino_file import read_openvino

LAYERS = ("0", "2", "4")
"""The convolutions' paths."""


def network(act: type[nn.Module] = nn.SiLU) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), act(), nn.Conv2d(8, 8, 3, 1, 1), act(), nn.Conv2d(8, 4, 1))
    return model.eval()


def pixels(count: int) -> list[Tensor]:
    """Images as a data set has them, smooth enough to be alike."""
    generator = torch.Generator().manual_seed(2)
    rough = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = nn.functional.interpolate(rough, (16, 16), mode="bilinear")
    return list((smooth * 255).round() / 255)


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("floats")
    images = torch.stack(pixels(1))
    export_onnx(network(), folder / "net.onnx", images, metadata={"names": "{}"})
    export_openvino(network(), folder / "net.xml", images, metadata={"names": "{}"})
    export_onnx(network(), folder / "bytes.onnx", images, uint8_input=True)
    return folder


KINDS = [(OnnxQuantiser, "net.onnx"), (OpenVinoQuantiser, "net.xml")]


def on_integers(path: Path) -> set[str]:
    """The paths of convolutions whose maps and weights are both rounded to 8 bits."""
    if path.suffix == ".onnx":
        nodes = onnx.load(path).graph.node
        made_by = {name: node.op_type for node in nodes for name in node.output}
        convolutions = [node for node in nodes if node.op_type == "Conv"]
        return {
            node.name.split("/")[0]
            for node in convolutions
            if [made_by.get(name) for name in node.input[:2]] == ["DequantizeLinear"] * 2
        }
    operators = read_openvino(path)[0].get_ordered_ops()
    found = set()
    for operator in operators:
        if operator.get_type_name() == "Convolution":
            sources = [value.get_node().get_type_name() for value in operator.input_values()]
            if sources == ["FakeQuantize"] * 2 or (sources[0] == "FakeQuantize" and sources[1] != "Constant"):
                found.add(operator.get_friendly_name().split("/")[0])
    return found


@pytest.mark.parametrize(("kind", "name"), KINDS)
@pytest.mark.parametrize("kept", [["4"], ["4", "2"]])
def test_all_but_the_kept_layers_compute_on_integers(
    kind: type[Quantiser], name: str, kept: list[str], floats: Path, tmp_path: Path
) -> None:
    made = tmp_path / name
    result = quantise(kind(floats / name, pixels(12)), made, kept)
    assert (result.ap, result.ap_float, result.kept) == (None, None, ())
    assert on_integers(floats / name) == set()
    assert on_integers(made) == set(LAYERS) - set(kept)
    exact, rounded = open_exported(floats / name), open_exported(made)
    assert rounded.precision == "int8" and rounded.metadata == exact.metadata
    images = torch.stack(pixels(4))
    with torch.no_grad():
        wanted = network()(images)
    error = float((rounded(images) - wanted).abs().max() / wanted.abs().max())
    assert 1e-4 < error < 0.05


def test_bytes_enter_an_int8_network_as_they_are(floats: Path, tmp_path: Path) -> None:
    quantise(OnnxQuantiser(floats / "bytes.onnx", pixels(8)), tmp_path / "bytes.onnx", ["4"])
    proto = onnx.load(tmp_path / "bytes.onnx")
    onnx.checker.check_model(proto, full_check=True)
    readers = [node.op_type for node in proto.graph.node if "images" in node.input]
    assert readers == ["DequantizeLinear"]
    images = torch.stack(pixels(2))
    found = open_exported(tmp_path / "bytes.onnx")((images * 255).round().to(torch.uint8))
    with torch.no_grad():
        wanted = network()(images)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 0.05


def test_a_relu_network_is_quantised_too(tmp_path: Path) -> None:
    images = torch.stack(pixels(1))
    export_onnx(network(nn.ReLU), tmp_path / "net.onnx", images)
    quantise(OnnxQuantiser(tmp_path / "net.onnx", pixels(8)), tmp_path / "made.onnx", ["4"])
    assert on_integers(tmp_path / "made.onnx") == {"0", "2"}


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_what_cannot_be_quantised_is_told(kind: type[Quantiser], name: str, floats: Path, tmp_path: Path) -> None:
    with pytest.raises(DeployError, match=r"no images to calibrate on; INT8 needs some of those"):
        kind(floats / name, [])
    with pytest.raises(DeployError, match=r"images of 3 x 8 x 8 were given, expected 3 x 16 x 16"):
        kind(floats / name, [torch.rand(3, 8, 8)])
    with pytest.raises(
        DeployError, match=r"--keep-float 9.\*: matches no module of the network; its modules are such as 0"
    ):
        quantise(kind(floats / name, pixels(2)), tmp_path / name, ["9.*"])
    assert not list(tmp_path.iterdir())


def test_a_bound_of_accuracy_keeps_the_noisiest_blocks_in_float(floats: Path, tmp_path: Path) -> None:
    """AP as three measurements give it: of the float file, of all in INT8, of INT8 with one block in float."""
    quantiser, made = OnnxQuantiser(floats / "net.onnx", pixels(8)), tmp_path / "net.onnx"
    order = noisiest(quantiser, quantiser.operators.within(["4"]))
    assert sorted(order) == ["0", "2"]
    values = iter([0.5, 0.4, 0.495])
    result = quantise(quantiser, made, ["4"], lambda exported: next(values), 0.01)
    assert (result.ap_float, result.ap, result.kept) == (0.5, 0.495, (order[0],))
    assert on_integers(made) == {order[1]}
    assert quantise(quantiser, made, ["4"], measured(0.5, 0.495), 0.01).kept == ()
    with pytest.raises(
        DeployError, match=r"--max-drop 0.01: AP 0.5000 falls by 0.0800 to 0.4200 in INT8, also with 1 of 2"
    ):
        quantise(quantiser, made, ["4"], measured(0.5, 0.4, 0.42), 0.01)


def measured(*values: float) -> Any:
    given: Iterator[float] = iter(values)
    return lambda exported: next(given)
