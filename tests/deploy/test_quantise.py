"""INT8 files: what is quantised and what is not, how near they stay, and how a bound of accuracy is kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from deploy import OnnxQuantiser, OpenVinoQuantiser, Quantiser, export_network, noisiest_blocks, open_exported, quantise
from deploy.onnx_file import INT8_TARGET, int8_saturates
from deploy.openvino_file import WEIGHTS_DIGEST, read_openvino
from deploy.quantise_onnx import Statistics, activation_ranges, round_convolutions, round_weights
from deploy.settings import Int8Target
from slim import SlimError

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
    export_network(network(), folder / "net.onnx", images, metadata={"names": "{}"})
    export_network(network(), folder / "net.xml", images, metadata={"names": "{}"})
    export_network(network(), folder / "bytes.onnx", images, uint8_input=True)
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
    found = set()
    for operator in read_openvino(path)[0].get_ordered_ops():
        if operator.get_type_name() == "Convolution":
            image, weight = (value.get_node() for value in operator.input_values())
            while image.get_type_name() in ("Concat", "Interpolate", "MaxPool"):  # which round no further
                image = image.input_value(0).get_node()
            if image.get_type_name() == "FakeQuantize" and weight.get_type_name() != "Constant":
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
    known = {INT8_TARGET: "any"} if made.suffix == ".onnx" else {WEIGHTS_DIGEST: rounded.metadata[WEIGHTS_DIGEST]}
    assert rounded.precision == "int8" and rounded.metadata == exact.metadata | known
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
    export_network(network(nn.ReLU), tmp_path / "net.onnx", images)
    quantise(OnnxQuantiser(tmp_path / "net.onnx", pixels(8)), tmp_path / "made.onnx", ["4"])
    assert on_integers(tmp_path / "made.onnx") == {"0", "2"}


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_what_cannot_be_quantised_is_told(kind: type[Quantiser], name: str, floats: Path, tmp_path: Path) -> None:
    with pytest.raises(SlimError, match=r"no images to calibrate on; INT8 needs some of those"):
        kind(floats / name, [])
    with pytest.raises(SlimError, match=r"images of 3 x 8 x 8 were given, expected 3 x 16 x 16"):
        kind(floats / name, [torch.rand(3, 8, 8)])
    with pytest.raises(
        SlimError, match=r"--keep-float 9.\*: matches no module of the network; its modules are such as 0"
    ):
        quantise(kind(floats / name, pixels(2)), tmp_path / name, ["9.*"])
    assert not list(tmp_path.iterdir())


def test_a_bound_of_accuracy_keeps_the_noisiest_blocks_in_float(floats: Path, tmp_path: Path) -> None:
    """AP as three measurements give it: of the float file, of all in INT8, of INT8 with one block in float."""
    quantiser, made = OnnxQuantiser(floats / "net.onnx", pixels(8)), tmp_path / "net.onnx"
    order = noisiest_blocks(quantiser, quantiser.operators.within(["4"]))
    assert sorted(order) == ["0", "2"]
    values = iter([0.5, 0.4, 0.495])
    result = quantise(quantiser, made, ["4"], lambda exported: next(values), 0.01)
    assert (result.ap_float, result.ap, result.kept) == (0.5, 0.495, (order[0],))
    assert on_integers(made) == {order[1]}
    assert quantise(quantiser, made, ["4"], measured(0.5, 0.495), 0.01).kept == ()
    with pytest.raises(
        SlimError, match=r"--max-drop 0.01: AP 0.5000 falls by 0.0800 to 0.4200 in INT8, also with 1 of 2"
    ):
        quantise(quantiser, made, ["4"], measured(0.5, 0.4, 0.42), 0.01)


def hand_set(folder: Path) -> Path:
    """A float file of one convolution: channel 0 has many large weights of one sign, channel 1 one."""
    model = nn.Sequential(nn.Conv2d(3, 2, 2))
    with torch.no_grad():
        model[0].weight[0], model[0].weight[1] = 0.5, -0.25
        model[0].weight[0, 0, 0, 0], model[0].weight[1, 0, 0, 0] = 0.3, 1.0
        model[0].bias.zero_()
    export_network(model.eval(), folder / "net.onnx", torch.stack(pixels(1)))
    return folder / "net.onnx"


def weights_in(path: Path) -> np.ndarray[Any, np.dtype[np.int8]]:
    (found,) = (
        onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(path).graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4
    )
    return found


def by_vpmaddubsw(bytes_in: int, weights: np.ndarray[Any, np.dtype[np.int8]]) -> list[int]:
    """Each channel's sum over bytes that are all alike, pair by pair in 16 bits, as AVX2 has it."""
    pairs = (bytes_in * weights.reshape(len(weights), -1, 2).astype(np.int64)).sum(2)
    return [int(total) for total in pairs.clip(-(2**15), 2**15 - 1).sum(1)]


@pytest.mark.parametrize(
    ("target", "integers", "on_avx2"), [("any", (64, -16), (189210, -28560)), ("vnni", (127, -32), (196602, -57375))]
)
def test_sums_of_weights_for_any_cpu_do_not_saturate(
    target: Int8Target, integers: tuple[int, int], on_avx2: tuple[int, int], tmp_path: Path
) -> None:
    """White, channel 0: 255 * (11 * 64 + 38) = 189210; of 127s and a 76, all 6 pairs stop at 32767."""
    quantise(OnnxQuantiser(hand_set(tmp_path), [torch.ones(3, 16, 16)], target), tmp_path / "made.onnx", [])
    weights = weights_in(tmp_path / "made.onnx")
    assert weights[0].max() == weights[1].max() == integers[0] and weights[1].min() == integers[1]
    assert by_vpmaddubsw(255, weights) == list(on_avx2)
    exact = [int(total) for total in 255 * weights.reshape(2, -1).astype(np.int64).sum(1)]
    assert (by_vpmaddubsw(255, weights) == exact) == (target == "any")
    network = open_exported(tmp_path / "made.onnx")
    assert network.metadata[INT8_TARGET] == target
    assert network(torch.ones(1, 3, 16, 16))[0, :, 0, 0].tolist() == pytest.approx([5.8, -1.75], abs=0.1)


@pytest.mark.parametrize(("saturates", "target", "warned"), [(True, "vnni", 1), (True, "any", 0), (False, "vnni", 0)])
def test_8_bits_are_warned_about_where_they_saturate(
    saturates: bool, target: Int8Target, warned: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, made = hand_set(tmp_path), tmp_path / "made.onnx"
    quantise(OnnxQuantiser(source, pixels(2), target), made, [])
    monkeypatch.setattr("deploy.onnx_file.int8_saturates", lambda: saturates)
    assert open_exported(source).warning == "" == open_exported(made, "openvino").warning
    said = open_exported(made).warning
    assert bool(said) == warned and ("made.onnx: its weights have 8 bits" in said) == warned
    proto = onnx.load(made)
    del proto.metadata_props[:]
    onnx.save(proto, made)
    assert bool(open_exported(made).warning) == saturates


def test_two_weights_of_a_sign_leave_each_other_room() -> None:
    """96 + 32 = 128, so the scale is 0.01; two that are equal get 64 each; alone in its sign, one gets 127."""
    weights = np.array([[0.96, 0.32, -0.1], [-0.5, -0.5, 0.5], [0, 0, 0], [1.27, -0.03, 0]], np.float32)
    integers, scales = round_weights(weights, "any")
    assert integers.tolist() == [[96, 32, -10], [-64, -64, 64], [0, 0, 0], [127, -3, 0]]
    assert scales.tolist() == pytest.approx([0.01, 0.5 / 64, 1 / 64, 0.01])
    integers, scales = round_weights(weights, "vnni")
    assert integers.tolist() == [[127, 42, -13], [-127, -127, 127], [0, 0, 0], [127, -3, 0]]
    assert scales.tolist() == pytest.approx([0.96 / 127, 0.5 / 127, 1 / 127, 0.01])


@pytest.mark.parametrize("inputs", [1, 2, 9, 500])
def test_no_pair_is_too_large_and_no_rounding_worse_than_7_bits(inputs: int) -> None:
    weights = np.random.default_rng(inputs).normal(size=(64, inputs, 1, 1)).astype(np.float32)
    integers, scales = round_weights(weights, "any")
    flat, rows = weights.reshape(64, -1), integers.reshape(64, -1)
    for sign in (1, -1):
        assert np.sort((sign * rows).clip(0), 1)[:, -2:].sum(1).max() <= 128
    coarse = np.abs(flat).max(1, keepdims=True) / 64
    by_7_bits = np.square(flat - np.round(flat / coarse) * coarse).sum(1)
    found = np.square(flat - rows * scales[:, None]).sum(1)
    assert (found <= by_7_bits * 1.0001 + 1e-12).all()
    assert inputs == 1 or found.sum() < by_7_bits.sum()


def test_what_saturates_is_what_has_no_vnni() -> None:
    """The runtime's own product against what the CPU says of itself."""
    flags = torch.cpu.get_capabilities()
    has_vnni = any(flags.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
    assert int8_saturates() == (bool(flags.get("avx2")) and not has_vnni)


def test_rounded_weights_leave_the_mean_output_where_it_was() -> None:
    """One channel of weights 1.27 and 0.304, which rounds to 0.30: 0.004 times its mean input of 50 is missing."""
    weight = np.array([1.27, 0.304], np.float32).reshape(1, 2, 1, 1)
    proto = graph(
        [onnx.helper.make_node("Conv", ["images", "w", "b"], ["y"], name="0/Conv")], {"w": weight, "b": [1.0]}
    )
    round_convolutions(proto, {"images": np.array([10, 50], np.float32)}, frozenset({"0/Conv"}), "vnni")
    assert constant(proto, "b") == pytest.approx([1.0])
    round_convolutions(proto, {"images": np.array([10, 50], np.float32)}, frozenset(), "vnni")
    assert constant(proto, "b") == pytest.approx([1.2], abs=1e-4)


def test_each_group_of_channels_is_corrected_by_its_own_inputs() -> None:
    weight = np.array([[1.27, 0.304], [1.27, 0.296]], np.float32).reshape(2, 2, 1, 1)
    node = onnx.helper.make_node("Conv", ["images", "w", "b"], ["y"], name="0/Conv", group=2)
    proto = graph([node], {"w": weight, "b": [0.0, 0.0]}, channels=4)
    round_convolutions(proto, {"images": np.array([1, 10, 1, 100], np.float32)}, frozenset(), "vnni")
    assert constant(proto, "b") == pytest.approx([0.04, -0.4], abs=1e-4)


def test_ranges_end_where_a_silu_is_as_good_as_0() -> None:
    nodes = [
        onnx.helper.make_node("Conv", ["images", "w", "b"], ["y"], name="0/Conv"),
        onnx.helper.make_node("Sigmoid", ["y"], ["s"], name="1/Sigmoid"),
        onnx.helper.make_node("Mul", ["y", "s"], ["z"], name="1/Mul"),
    ]
    proto = graph(nodes, {"w": np.ones((1, 2, 1, 1)), "b": [0.0]})
    low, high = {"images": 0.1, "y": -50.0, "s": 0.0, "z": -0.28}, {"images": 0.9, "y": 8.0, "s": 1.0, "z": 8.0}
    ranges = activation_ranges(proto, Statistics(low, high, {}))
    assert ranges["images"] == (0, 1) and ranges["z"] == (-0.28, 8)
    floor, highest = ranges["y"]
    step = 8.28 / 255
    assert highest == 8 and -50 < floor <= -4
    assert (
        abs(floor * torch.tensor(floor).sigmoid())
        <= step / 2
        < abs((floor + 0.25) * torch.tensor(floor + 0.25).sigmoid())
    )
    kept = activation_ranges(proto, Statistics({**low, "y": -3.0}, high, {}))
    assert kept["y"] == (-3, 8)


def graph(nodes: list[Any], constants: dict[str, Any], channels: int = 2) -> onnx.ModelProto:
    initial = [onnx.numpy_helper.from_array(np.array(value, np.float32), name) for name, value in constants.items()]
    kind = onnx.TensorProto.FLOAT
    entry = onnx.helper.make_tensor_value_info("images", kind, [1, channels, 2, 2])
    made = onnx.helper.make_tensor_value_info(nodes[-1].output[0], kind, None)
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [entry], [made], initial))


def constant(proto: onnx.ModelProto, name: str) -> list[float]:
    return [float(x) for t in proto.graph.initializer if t.name == name for x in onnx.numpy_helper.to_array(t)]


def measured(*values: float) -> Any:
    given: Iterator[float] = iter(values)
    return lambda exported: next(given)
