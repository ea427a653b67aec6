"""ONNX files: equal to torch at every size, without gates or batch norms, and refused when they are not equal."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import slim
from deploy import DeployError, OnnxNetwork, export_onnx, onnx_file
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
        for module in model:
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.uniform_(-1, 1)
                module.running_var.uniform_(0.5, 2)
        slim.add_gates(model, slim.trace(model, torch.zeros(1, 3, 8, 8)))
        for vector in slim.gate_vectors(model).values():
            vector.uniform_(0, 2)
    return model


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dynamic") / "net.onnx"
    images = torch.rand(1, 3, 8, 8)
    assert export_onnx(gated_network(), path, images, stride_px=2, dynamic=True, metadata=META) < 1e-4
    return path


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (4, 3, 8, 12), (1, 3, 64, 32)])
def test_one_file_serves_every_size(dynamic: Path, shape: tuple[int, ...]) -> None:
    images = torch.rand(shape)
    with torch.no_grad():
        wanted = gated_network().eval()(images)
    found = OnnxNetwork(dynamic, num_cores=1)(images)
    assert found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-5)


def test_gates_and_batch_norms_are_gone_and_metadata_stay(dynamic: Path) -> None:
    assert {node.op_type for node in onnx.load(dynamic).graph.node} == {"Conv", "Relu"}
    assert OnnxNetwork(dynamic).metadata == META


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = gated_network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_onnx(model, tmp_path / "net.onnx", torch.rand(2, 3, 8, 8))
    assert model.training and len(list(slim.gate_vectors(model))) == 2
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(DeployError, match=r"net.onnx: the input is \[1, 3, 8, 8\], expected \[2, 3, 8, 8\]"):
        OnnxNetwork(tmp_path / "net.onnx")(torch.rand(1, 3, 8, 8))


def test_a_file_that_differs_from_torch_does_not_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = onnx_file._converted

    def wrong(model: nn.Module, images: Tensor, stride: int | None) -> onnx.ModelProto:
        with torch.no_grad():
            next(model.parameters()).mul_(1.01)
        proto = right(model, images, stride)
        with torch.no_grad():
            next(model.parameters()).div_(1.01)
        return proto

    monkeypatch.setattr(onnx_file, "_converted", wrong)
    (tmp_path / "net.onnx").write_text("the one before")
    with pytest.raises(DeployError, match=r"differs from torch by .* nothing was written"):
        export_onnx(gated_network(), tmp_path / "net.onnx", torch.rand(1, 3, 8, 8))
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    assert (tmp_path / "net.onnx").read_text() == "the one before"


def test_a_network_that_magnifies_rounding_is_not_refused_for_it() -> None:
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert 1e-4 < onnx_file._difference(Shifted(1e5), lambda x: x, images) < 1e-2
    with pytest.raises(DeployError, match="differs from torch by"):
        onnx_file._difference(Shifted(0.0), lambda x: 1.001 * x, images)


def test_what_is_no_onnx_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeployError, match=r"none\.onnx: no such file"):
        OnnxNetwork(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("not a network")
    with pytest.raises(DeployError, match=r"text\.onnx: not an ONNX network"):
        OnnxNetwork(tmp_path / "text.onnx")
