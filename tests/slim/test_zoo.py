"""Networks that others wrote, cut to half of their channels and proven: torchvision's, timm's and others.

A few run with every ``make test``; all of them run with ``make zoo``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.models as zoo
from torch import Tensor, nn
from torchvision.models import detection, segmentation

import slim
from tests.slim.networks import randomise, settle

OUTPUT = "a model output"
QUICK = {"squeezenet1_1", "resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "regnet_x_400mf", "lraspp"}

CLASSIFICATION = [
    "alexnet", "vgg11", "vgg16_bn", "resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "wide_resnet50_2",
    "densenet121", "densenet161", "googlenet", "inception_v3", "squeezenet1_0", "squeezenet1_1", "mobilenet_v2",
    "mobilenet_v3_small", "mobilenet_v3_large", "mnasnet0_5", "mnasnet1_0", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0",
    "efficientnet_b0", "efficientnet_b3", "efficientnet_v2_s", "regnet_x_400mf", "regnet_y_400mf", "regnet_y_1_6gf",
]  # fmt: skip


TIMM = [
    "cspdarknet53", "cspresnet50", "darknet53", "densenet121", "dla34", "dpn68", "efficientnet_b0",
    "ese_vovnet19b_dw", "fasternet_t0", "gernet_s", "ghostnet_100", "hardcorenas_a", "hrnet_w18_small", "inception_resnet_v2",
    "inception_v4", "lcnet_050", "legacy_seresnet18", "mixnet_s", "mobilenetv3_large_100", "mobileone_s0",
    "regnetv_040", "regnetz_b16", "repghostnet_050", "repvgg_a0", "res2net50_26w_4s", "res2next50", "resnest14d", "resnet50d",
    "resnext50_32x4d", "rexnet_100", "selecsls42b", "seresnet18", "skresnet18", "skresnext50_32x4d", "starnet_s1",
    "tf_efficientnet_b0", "tf_mobilenetv3_small_100", "tinynet_e", "tresnet_m", "vovnet39a", "wide_resnet50_2", "xception41",
]  # fmt: skip
"""Of the many in timm: at most a tenth of their MACs makes channels that cannot be cut."""


def named(names: list[str]) -> list[Any]:
    """Test parameters: what is not quick runs in ``make zoo`` alone."""
    return [pytest.param(name, marks=[] if name in QUICK else pytest.mark.zoo) for name in names]


def classifier(name: str) -> tuple[nn.Module, Tensor]:
    """With random weights, and norm statistics that make the output depend on every layer."""
    torch.manual_seed(0)
    plain = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    size = 299 if name == "inception_v3" else 64
    model = getattr(zoo, name)(weights=None, **plain)
    return settle_on(model, size), torch.rand(2, 3, size, size)


def settle_on(model: nn.Module, size_px: int) -> nn.Module:
    images = torch.randn(4, 3, size_px, size_px, generator=torch.Generator().manual_seed(3))
    if any(isinstance(m, nn.modules.batchnorm._NormBase) for m in model.modules()):
        return settle(randomise(model), images)
    return randomise(model)


def randomise_gates(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for vector in slim.gate_vectors(model).values():
            vector.uniform_(0.5, 1.5, generator=generator)


def half_of_the_channels(model: nn.Module, example: Any, seed: int = 0) -> tuple[slim.ChannelGraph, slim.Plan]:
    graph = slim.trace(model, example)
    assert frozen_share(graph) < 1
    scores = slim.score(model, graph, "random", seed=seed)
    return graph, slim.make_plan(graph, scores, channels=0.5, round_to=1, min_channels=1)


def assert_proven(model: nn.Module, plan: slim.Plan, inputs: Any, seen: Callable[[nn.Module], nn.Module]) -> None:
    """pruned = masked; and the comparison is not blind: the cut did change the output."""
    masked, pruned = slim.mask(model, plan), slim.apply_plan(model, plan)
    assert slim.max_difference(seen(masked), seen(pruned), inputs) <= 1e-4
    assert slim.max_difference(seen(model), seen(pruned), inputs) > 1e-3


def frozen_share(graph: slim.ChannelGraph) -> float:
    """Share of the MACs that make no channels that can be cut."""
    shares = graph.shares()
    assert sum(shares.values()) == pytest.approx(1, abs=1e-9)
    return 1 - shares["prunable"]


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    timm = pytest.importorskip("timm", reason="needs the extra 'zoo' (pip install '.[zoo]')")
    torch.manual_seed(0)
    model, x = settle_on(timm.create_model(name, pretrained=False), 96), torch.rand(1, 3, 96, 96)
    graph, plan = half_of_the_channels(model, x)
    assert frozen_share(graph) - graph.shares()["output"] <= 0.1
    assert_proven(model, plan, x, lambda network: network)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", named(CLASSIFICATION))
def test_classification(name: str) -> None:
    model, x = classifier(name)
    graph, plan = half_of_the_channels(model, x[:1])
    frozen = [g for g in graph.groups if not g.prunable]
    assert {g.frozen_reason for g in frozen} == {OUTPUT}, graph.report()
    assert len(frozen) == 1 and frozen[0].size == 1000
    assert all(layer.startswith(("aux", "AuxLogits")) for layer in graph.unused)
    assert_proven(model, plan, x, lambda m: m)
    cost = slim.cost(slim.apply_plan(model, plan), x)
    assert (cost.macs, cost.params) == (plan.macs[1], plan.params[1])
    # Every group is gated; the gates fold away but where DenseNet's norms come before its activations.
    slim.add_gates(model, graph)
    randomise_gates(model)
    assert set(slim.score(model, graph, "gate")) == {g.name for g in graph.groups if g.prunable}
    pruned = slim.apply_plan(model, plan)
    folded = slim.fold_gates(pruned)
    assert slim.max_difference(slim.mask(model, plan), folded, x) <= 1e-4
    assert not slim.gate_vectors(folded) or "densenet" in name


@pytest.mark.zoo
@pytest.mark.parametrize("inexact", [False, True])
def test_convnext(inexact: bool) -> None:
    """Layer norms hold the residual stream; the hidden widths of the blocks can go."""
    torch.manual_seed(0)
    model, x = randomise(zoo.convnext_tiny(weights=None)), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layer_scale"):
                parameter.fill_(1.0)
    graph = slim.trace(model, x, allow_inexact=inexact)
    if inexact:
        assert {g.frozen_reason for g in graph.groups if not g.prunable} == {OUTPUT}
        assert sum(g.inexact is not None for g in graph.groups) == 4
        plan = slim.make_plan(graph, slim.score(model, graph, "random"), macs=0.5)
        assert slim.apply_plan(model, plan)(x).shape == (1, 1000)
        assert slim.cost(slim.apply_plan(model, plan), x).macs == plan.macs[1]
    else:
        assert frozen_share(graph) == pytest.approx(0.533, abs=0.005)
        assert all(g.prunable or "layer_norm" in g.frozen_reason or g.frozen_reason == OUTPUT for g in graph.groups)  # type: ignore[operator]
        assert_proven(model, half_of_the_channels(model, x)[1], x, lambda m: m)


SEGMENTERS = [
    ("Unet", "resnet18"), ("Unet", "densenet121"), ("UnetPlusPlus", "mobilenet_v2"), ("MAnet", "resnet18"),
    ("Linknet", "vgg11_bn"), ("FPN", "se_resnext50_32x4d"), ("FPN", "mit_b0"), ("PSPNet", "resnet18"),
    ("PAN", "resnet18"), ("DeepLabV3", "resnet18"), ("DeepLabV3Plus", "mobilenet_v2"), ("UPerNet", "mobilenet_v2"),
    ("Segformer", "resnet18"),
]  # fmt: skip
"""Decoder and encoder, of segmentation-models-pytorch."""
ATTENTION = {"mit_b0": 0.15}
"""Share of the MACs that layer norms over channels and attention hold, where it is more than a tenth."""


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("decoder", "encoder"), SEGMENTERS, ids=["-".join(pair) for pair in SEGMENTERS])
def test_segmentation_models_pytorch(decoder: str, encoder: str) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch", reason="needs the extra 'zoo' (pip install '.[zoo]')")
    torch.manual_seed(0)
    model = settle_on(getattr(smp, decoder)(encoder, encoder_weights=None, classes=3), 128)
    x = torch.rand(1, 3, 128, 128)
    graph, plan = half_of_the_channels(model, x)
    assert frozen_share(graph) - graph.shares()["output"] <= ATTENTION.get(encoder, 0.1)
    assert_proven(model, plan, x, lambda network: network)


SEGMENTATION = {
    "lraspp": lambda: segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None),
    "deeplab": lambda: segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, aux_loss=True),
    "fcn": lambda: segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True),
}


@pytest.mark.parametrize("name", named(list(SEGMENTATION)))
def test_segmentation(name: str) -> None:
    torch.manual_seed(0)
    model, x = settle_on(SEGMENTATION[name](), 64), torch.rand(1, 3, 64, 64)
    graph, plan = half_of_the_channels(model, x)
    assert {g.frozen_reason for g in graph.groups if not g.prunable} == {OUTPUT}
    assert_proven(model, plan, x, lambda m: m)


class Heads(nn.Module):
    """A detector's raw outputs, before boxes are chosen by their scores (which round-off may reorder)."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, x: Tensor) -> Any:
        return self.detector.head(list(self.detector.backbone(x).values()))


DETECTION = {
    "ssdlite320_mobilenet_v3_large": 0.325,
    "retinanet_resnet50_fpn": 0.173,
    "retinanet_resnet50_fpn_v2": 0.173,
    "ssd300_vgg16": 0.233,
    "fcos_resnet50_fpn": 0.023,
}
"""Share of the MACs that make frozen channels: the heads' outputs, which the choice of boxes reads."""


@pytest.mark.zoo
@pytest.mark.parametrize("name", DETECTION)
def test_detection(name: str) -> None:
    torch.manual_seed(0)
    small = {} if name.startswith("ssd") else {"min_size": 128, "max_size": 160}
    model = randomise(getattr(detection, name)(weights=None, weights_backbone=None, **small))
    images = torch.randn(2, 3, 300, 300, generator=torch.Generator().manual_seed(3))
    settle(model.backbone, images)  # type: ignore[arg-type]
    graph, plan = half_of_the_channels(model, ([torch.rand(3, 128, 128)],))
    held = {layer for g in graph.groups if not g.prunable for m in g.members if m.role != "in" for layer in [m.layer]}
    # SSD scales its first map by that map's norm over the channels.
    assert all(layer.startswith("head") or "ssd300" in name for layer in held), graph.report()
    assert frozen_share(graph) == pytest.approx(DETECTION[name], abs=0.05)
    assert_proven(model, plan, images[:1], Heads)


@pytest.fixture
def detection_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], nn.Module]]:
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    tasks = pytest.importorskip("ultralytics.nn.tasks", reason="needs the extra 'zoo' (pip install '.[zoo]')")
    yield lambda name: tasks.DetectionModel(f"{name}.yaml", verbose=False)


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["yolov8n", "yolo11n", "yolov9t", "yolov10n", "yolo12n"])
def test_ultralytics_networks_as_they_are_published(detection_model: Callable[[str], nn.Module], name: str) -> None:
    torch.manual_seed(0)
    model = settle_on(detection_model(name), 64)
    x = torch.rand(1, 3, 64, 64)
    graph = slim.trace(model, x)
    plan = slim.make_plan(graph, slim.score(model, graph, "random"), macs=0.5, round_to=1, min_channels=4)
    assert plan.macs[1] / plan.macs[0] == pytest.approx(0.5, abs=0.005)
    reasons = {g.frozen_reason for g in graph.groups if not g.prunable and g.frozen_reason != OUTPUT}
    assert all("attn" in r or "model.10 does not run with fewer channels" in r for r in reasons if r), reasons  # type: ignore[operator]
    assert frozen_share(graph) < 0.13
    assert_proven(model, plan, torch.rand(2, 3, 96, 96), lambda m: m)
    types = [type(m) for m in model.modules()]
    assert [type(m) for m in slim.apply_plan(model, plan).modules()] == types
