"""Exported files: equal to torch at every size, without gates or batch norms, and refused when they are not equal."""

from __future__ import annotations

import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import slim
from deploy import (
    OnnxNetwork,
    WithNms,
    export_network,
    onnx_file,
    open_exported,
    openvino_file,
    prove_equal,
    prove_same_detections,
)
from models import non_max_suppression
from slim import SlimError
from tests.models.networks import draw_statistics
from tests.slim.networks import Shifted

META = {"names": "{0: 'cell'}", "stride": "2"}


def gated_network() -> nn.Module:
    """No operator of its own multiplies or normalises."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 2, 1),
    )  # fmt: skip
    with torch.no_grad():
        draw_statistics(model)
        slim.add_gates(model, slim.trace(model, torch.zeros(1, 3, 8, 8)))
        for vector in slim.gate_vectors(model).values():
            vector.uniform_(0, 2)
    return model


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the same network in both formats that leave sizes free."""
    folder = tmp_path_factory.mktemp("dynamic")
    images = torch.rand(1, 3, 8, 8)
    for name in ("net.onnx", "net.xml"):
        assert export_network(gated_network(), folder / name, images, dynamic_stride_px=2, metadata=META) < 1e-4
    return folder


def test_no_thread_of_onnx_runtime_waits_for_the_next_run_at_work(dynamic: Path) -> None:
    """In interleaved measurements it would take the next engine's cores."""
    session = OnnxNetwork(dynamic / "net.onnx", num_cores=2).session
    assert session.get_session_options().get_session_config_entry("session.force_spinning_stop") == "1"


RUNS = [("net.onnx", "onnxruntime"), ("net.onnx", "openvino"), ("net.xml", "openvino")]


@pytest.mark.parametrize(("name", "engine"), RUNS)
@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (4, 3, 8, 12), (1, 3, 64, 32)])
def test_one_file_serves_every_size(dynamic: Path, name: str, engine: Any, shape: tuple[int, ...]) -> None:
    images = torch.rand(shape)
    with torch.no_grad():
        wanted = gated_network().eval()(images)
    network = open_exported(
        dynamic / name, engine, num_cores=1, precision="float32" if engine == "openvino" else "auto"
    )
    assert (network.engine, network.precision, network.input_shape) == (engine, "float32", (None, 3, None, None))
    found = network(images)
    assert found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-5)


def test_gates_and_batch_norms_are_gone_and_operators_carry_their_modules_names(dynamic: Path) -> None:
    proto = onnx.load(dynamic / "net.onnx")
    names = ["0/Conv", "2/Relu", "3/Conv", "5/Relu", "6/Conv"]
    assert [node.name for node in proto.graph.node] == names
    onnx.checker.check_model(proto, full_check=True)
    network, _ = openvino_file.read_openvino(dynamic / "net.xml")
    kinds = {operator.get_type_name() for operator in network.get_ops()}
    assert kinds == {"Parameter", "Constant", "Convolution", "Add", "Relu", "Result"}
    friendly = {operator.get_friendly_name() for operator in network.get_ops()}
    assert all(any(name in other for other in friendly) for name in names)


def test_metadata_travel_in_every_format(dynamic: Path, tmp_path: Path) -> None:
    export_network(gated_network(), tmp_path / "net.torchscript", torch.rand(1, 3, 8, 8), metadata=META)
    for path in (dynamic / "net.onnx", dynamic / "net.xml", tmp_path / "net.torchscript"):
        assert open_exported(path).metadata.items() >= META.items(), path


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the same network in every format, for two images of 8 x 12 pixels in bytes."""
    folder = tmp_path_factory.mktemp("fixed")
    for name in ("net.onnx", "net.xml", "net.torchscript"):
        assert export_network(gated_network(), folder / name, pixels(2), uint8_input=True) < 1e-4
    return folder


def pixels(count: int) -> Tensor:
    """Images as a data set has them: steps of 1/255."""
    return torch.randint(256, (count, 3, 8, 12), generator=torch.Generator().manual_seed(1)) / 255


@pytest.mark.parametrize("name", ["net.onnx", "net.xml", "net.torchscript"])
def test_bytes_are_scaled_inside_and_any_number_of_images_runs(fixed: Path, name: str) -> None:
    options: dict[str, Any] = {"precision": "float32"} if name == "net.xml" else {}
    network = open_exported(fixed / name, **options)
    assert network.takes_bytes and network.input_shape == (2, 3, 8, 12)
    images = pixels(5)
    with torch.no_grad():
        wanted = gated_network().eval()(images)
    for given in (images, (images * 255).round().to(torch.uint8)):
        assert torch.allclose(network(given), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "engine"),
    [("net.onnx", "onnxruntime"), ("net.onnx", "openvino"), ("net.xml", "openvino"), ("net.torchscript", "torch")],
)
def test_several_threads_may_call_a_network_at_once(fixed: Path, name: str, engine: Any) -> None:
    network = open_exported(fixed / name, engine, num_cores=2, at_once=2)
    images = [torch.rand(2, 3, 8, 12) for _ in range(200)]
    wanted = [network(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(network, images))
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", ["net.onnx", "net.xml", "net.torchscript"])
def test_an_image_of_another_size_is_refused_in_one_line(fixed: Path, name: str) -> None:
    with pytest.raises(SlimError, match=rf"{name}: images of 3 x 8 x 8 were given, expected 3 x 8 x 12; choose"):
        open_exported(fixed / name)(torch.rand(1, 3, 8, 8))


def test_an_engine_that_does_not_run_a_file_is_named(fixed: Path, tmp_path: Path) -> None:
    with pytest.raises(SlimError, match=r"net.xml: --engine onnxruntime does not run .xml files; use openvino"):
        open_exported(fixed / "net.xml", "onnxruntime")
    with pytest.raises(SlimError, match="bfloat16: onnxruntime computes exported networks in float32"):
        open_exported(fixed / "net.onnx", precision="bfloat16")
    with pytest.raises(SlimError, match=r"net.caffe: not an exported network; expected one of .onnx, .xml"):
        open_exported(tmp_path / "net.caffe")


class Boxes(nn.Module):
    """Boxes [B, 60, 5 + 3] that the images choose from 40 places, so that many overlap."""

    def forward(self, images: Tensor) -> Tensor:
        values = images.flatten(1)[:, : 60 * 8].reshape(-1, 60, 8)
        centres = (values[..., :2] * 6).round() * 20 + values[..., :2]
        return torch.cat([centres, 20 + 30 * values[..., 2:4], values[..., 4:]], -1)


@pytest.mark.parametrize("iou", [0.2, 0.6])
def test_a_suppression_inside_of_the_graph_is_that_of_the_scripts(iou: float, tmp_path: Path) -> None:
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    network = WithNms(Boxes(), conf=0.3, iou=iou, max_detections=30)
    wanted = non_max_suppression(Boxes()(images), 0.3, iou, max_detections=30)
    assert min(len(rows) for rows in wanted) > 5
    export_network(network, tmp_path / "net.onnx", images, prove=prove_same_detections)
    for found in (network(images), OnnxNetwork(tmp_path / "net.onnx")(images)):
        assert found.shape == (3, 30, 6)
        for rows, right in zip(found, wanted, strict=True):
            assert torch.allclose(rows[: len(right)], right, atol=1e-4)
            assert not rows[len(right) :].any()


def test_detections_that_are_no_suppression_are_no_proof() -> None:
    """Three candidates of one class, of which the second overlaps with the first, and one of another class."""
    decoded = torch.tensor(
        [
            [
                [20.0, 20, 20, 20, 0.9, 1, 0],
                [22, 20, 20, 20, 0.8, 1, 0],
                [60, 20, 20, 20, 0.7, 1, 0],
                [22, 20, 20, 20, 0.6, 0, 1],
            ]
        ]
    )
    network, nothing = WithNms(Given(decoded), conf=0.25, iou=0.5, max_detections=6), torch.zeros(1)
    right = network(nothing)
    assert right[0, :, 4].tolist() == pytest.approx([0.9, 0.7, 0.6, 0, 0, 0])
    near = right.clone()
    near[0, 0, 0] += 1e-4
    assert 0 < prove_same_detections(network, Given(near), nothing) < 1e-5
    moved, missing, doubled, wrong, too_many = (right.clone() for _ in range(5))
    moved[0, 0, 0] += 1
    missing[0, 2] = 0
    doubled[0, 3] = torch.tensor([12.0, 10, 32, 30, 0.8, 0])
    wrong[0, 2, 5] = 0
    too_many[0, 3] = torch.tensor([0.0, 0, 5, 5, 0.8, 1])
    for output in (moved, missing, doubled, wrong, too_many, torch.zeros(1, 6, 6)):
        with pytest.raises(SlimError, match=r"detections differ from torch's by .*, expected at most 0.0001; nothing"):
            prove_same_detections(network, Given(output), nothing)


class Given(nn.Module):
    """The same output whatever the images."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, images: Tensor) -> Tensor:
        return self.output


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = gated_network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_network(model, tmp_path / "net.onnx", torch.rand(2, 3, 8, 8))
    assert model.training and len(list(slim.gate_vectors(model))) == 2
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_file_that_differs_from_torch_does_not_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = onnx_file._converted

    def wrong(model: nn.Module, images: Tensor, shapes: Any) -> onnx.ModelProto:
        with torch.no_grad():
            next(model.parameters()).mul_(1.01)
        proto = right(model, images, shapes)
        with torch.no_grad():
            next(model.parameters()).div_(1.01)
        return proto

    monkeypatch.setattr(onnx_file, "_converted", wrong)
    (tmp_path / "net.onnx").write_text("the one before")
    with pytest.raises(SlimError, match=r"differs from torch by .* nothing was written"):
        export_network(gated_network(), tmp_path / "net.onnx", torch.rand(1, 3, 8, 8))
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    assert (tmp_path / "net.onnx").read_text() == "the one before"


def test_a_network_that_magnifies_rounding_is_not_refused_for_it() -> None:
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert 1e-4 < prove_equal(Shifted(1e5), nn.Identity(), images) < 1e-2
    with pytest.raises(SlimError, match="differs from torch by"):
        prove_equal(Shifted(0.0), Given(1.001 * images), images)


@pytest.mark.parametrize(
    ("name", "kind"), [("net.onnx", "ONNX"), ("net.xml", "OpenVINO"), ("net.torchscript", "TorchScript")]
)
def test_what_is_no_exported_file_is_named(name: str, kind: str, fixed: Path, tmp_path: Path) -> None:
    with pytest.raises(SlimError, match=rf"{name}: no such file; expected an? {kind}"):
        open_exported(tmp_path / name)
    whole = (fixed / name).read_bytes()
    for content in (b"not a network", b"", whole[: len(whole) // 2]):
        (tmp_path / name).write_bytes(content)
        (tmp_path / "net.bin").write_bytes((fixed / "net.bin").read_bytes())
        with pytest.raises(SlimError, match=rf"{name}: not a.* network") as refused:
            open_exported(tmp_path / name, trust=True)
        assert "\n" not in str(refused.value)


def test_weights_that_are_missing_or_cut_short_are_named(fixed: Path, tmp_path: Path) -> None:
    (tmp_path / "net.xml").write_bytes((fixed / "net.xml").read_bytes())
    with pytest.raises(SlimError, match=r"net.bin: no such file; expected an OpenVINO"):
        open_exported(tmp_path / "net.xml")
    (tmp_path / "net.bin").write_bytes((fixed / "net.bin").read_bytes()[:40])
    with pytest.raises(SlimError, match=r"net.xml: not a network that OpenVINO can read"):
        open_exported(tmp_path / "net.xml")


def test_operators_of_a_later_opset_are_named(fixed: Path, tmp_path: Path) -> None:
    proto = onnx.load(fixed / "net.onnx")
    proto.opset_import[0].version = 99
    onnx.save(proto, tmp_path / "late.onnx")
    for engine in ("onnxruntime", "openvino"):
        with pytest.raises(SlimError, match=r"late.onnx: its operators are those of ONNX opset 99, expected at most 2"):
            open_exported(tmp_path / "late.onnx", engine)


def test_a_file_of_two_outputs_without_boxes_is_refused(fixed: Path, tmp_path: Path) -> None:
    proto = onnx.load(fixed / "net.onnx")
    middle = next(node.output[0] for node in proto.graph.node if node.op_type == "Relu")
    proto.graph.output.append(onnx.helper.make_tensor_value_info(middle, onnx.TensorProto.FLOAT, None))
    onnx.save(proto, tmp_path / "two.onnx")
    for engine in ("onnxruntime", "openvino"):
        with pytest.raises(SlimError, match=r"two.onnx: its outputs are .* expected one of batch x boxes"):
            open_exported(tmp_path / "two.onnx", engine)


def test_a_graph_with_the_weights_of_another_network_is_refused(fixed: Path, tmp_path: Path) -> None:
    """What a process that died between the two leaves; a flipped bit is found by the same digest."""
    shutil.copy(fixed / "net.xml", tmp_path)
    other = gated_network()
    with torch.no_grad():
        other[0].weight.mul_(2)  # type: ignore[operator]
    export_network(other, tmp_path / "other.xml", pixels(2), uint8_input=True)
    flipped = bytearray((fixed / "net.bin").read_bytes())
    flipped[9] ^= 4
    assert open_exported(fixed / "net.xml").metadata["weights_sha256"]
    for content in ((tmp_path / "other.bin").read_bytes(), bytes(flipped)):
        (tmp_path / "net.bin").write_bytes(content)
        with pytest.raises(SlimError, match=r"net\.xml: its weights, net\.bin, are damaged or of another network"):
            open_exported(tmp_path / "net.xml")


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_only_our_own_programs_run_unless_they_are_trusted(fixed: Path, tmp_path: Path) -> None:
    """TorchScript is code: this one writes a file when it is opened."""
    program, written = tmp_path / "net.torchscript", tmp_path / "written"
    module = torch.jit.script(Writes(str(written)))
    torch.jit.save(module, str(program), _extra_files={"config.txt": json.dumps({"shape": [1, 3, 8, 8]})})
    written.unlink(missing_ok=True)
    with pytest.raises(SlimError, match=r"net\.torchscript: .* is a program.* no net\.torchscript\.sha256 .*--trust"):
        open_exported(program)
    shutil.copy(fixed / "net.torchscript.sha256", tmp_path)
    with pytest.raises(SlimError, match=r"net\.torchscript: its SHA-256 is not that in net\.torchscript\.sha256"):
        open_exported(program)
    assert not written.exists()
    open_exported(program, trust=True)
    assert written.exists(), "the check can fail: opened, it does write"
    shutil.copy(fixed / "net.torchscript", tmp_path)
    assert open_exported(program).input_shape == (2, 3, 8, 12)
    done = subprocess.run(["sha256sum", "-c", f"{program.name}.sha256"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Writes(nn.Module):
    """A module that saves a tensor when it is loaded."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, images: Tensor) -> Tensor:
        return images

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path = state[0]
        self.training = state[1]
        torch.save(torch.zeros(1), self.path)
