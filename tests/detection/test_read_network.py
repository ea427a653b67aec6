"""Checkpoints as they are met: fused ones, other networks, heads that do not fit their names, and damaged files."""

from __future__ import annotations

import random
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

import models.yolo
import slim
from detection.network import build_network, make_build, read_network, save_network
from models import Detect, build_model
from models.blocks import Conv
from slim import SlimError
from tests.models.networks import draw_statistics, two_levels
from tests.scripts.runs import ROOT

NAMES = ["cat", "dog"]


class Model(nn.Module):
    """Pickled as ``models.yolo.Model``, a class that published files name and that we do not have."""


Model.__module__ = "models.yolo"
Publish = Callable[..., Path]


def network(**keys: Any) -> models.YOLO:
    """Weights as training leaves them, with statistics of its own in each norm."""
    torch.manual_seed(0)
    model = build_model(two_levels(**keys)).eval()
    draw_statistics(model)
    return model


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Writes a checkpoint as YOLOv5 does: the whole module, pickled by torch."""
    monkeypatch.setattr(models.yolo, "Model", Model, raising=False)

    def write(
        change: Callable[[Any], object] = lambda module: None,
        names: Any = NAMES,
        kind: type[nn.Module] = Model,
        **keys: Any,
    ) -> Path:
        built = network(**{key: value for key, value in keys.items() if key == "ch"})
        module: Any = kind()
        module.model, module.yaml, module.names = built.model, two_levels(**keys), names
        change(module)
        torch.save({"epoch": 3, "ema": None, "model": module}, tmp_path / "published.pt")
        return tmp_path / "published.pt"

    return write


def fuse(module: Any) -> None:
    """As ``export.py`` and ``detect.py`` of YOLOv5 leave a network: no norms, and the forward is a method of the module's own."""
    for block in module.modules():
        if isinstance(block, Conv):
            block.conv = fuse_conv_bn_eval(block.conv, block.bn)
            del block.bn
            block.forward = block.forward  # type: ignore[method-assign]


def test_a_fused_network_is_read_and_computes_the_same(publish: Publish) -> None:
    images = torch.rand(2, 3, 16, 16)
    read = read_network(publish(fuse))
    with torch.no_grad():
        wanted, found = network()(images)[0], read.model.eval()(images)[0]
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-4)
    assert "batch norms: fused" in read.note and "batch norms" not in read_network(publish()).note
    assert slim.layer_widths(build_network(read.build)) == slim.layer_widths(read.model), (
        "it can be saved and read again"
    )


def holds_a_function(module: Any) -> None:
    module.model[-1].detect = Detect.forward
    module.yaml["head"][-1] = [[5, 2], 1, "Segment", ["nc", "anchors", 32, 256]]


def of_module(name: str, qualified: str, monkeypatch: pytest.MonkeyPatch) -> type[nn.Module]:
    made = type(name, (nn.Module,), {"__module__": qualified})
    parts = qualified.split(".")
    for count in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:count]), types.ModuleType(parts[count - 1]))
    setattr(sys.modules[qualified], name, made)
    return made


def test_other_networks_are_called_what_they_are(publish: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        SlimError, match=r"published\.pt: a segmentation network \(models\.yolo\.Model\); expected a detector$"
    ):
        read_network(publish(holds_a_function))
    head = two_levels()["head"]
    for block in ("C3TR", "CBAM"):
        with pytest.raises(SlimError, match=rf"published\.pt: layer 5: block '{block}' is not known"):
            read_network(publish(head=[*head[:2], [-1, 1, block, [8]], head[3]]))
    names = {"DetectionModel": "a network", "SegmentationModel": "a segmentation network"}
    for name, what in names.items():
        kind = of_module(name, "ultralytics.nn.tasks", monkeypatch)
        said = rf"published\.pt: {what} of Ultralytics YOLOv8 or later \(ultralytics\.nn\.tasks\.{name}\); expected a YOLOv5"
        with pytest.raises(SlimError, match=said):
            read_network(publish(kind=kind))


def test_a_head_must_fit_its_names_and_its_images(publish: Publish, tmp_path: Path) -> None:
    for names in (["cat"], ["cat", "dog", "cow"]):
        with pytest.raises(
            SlimError, match=rf"published\.pt: {len(names)} names for the 2 classes that its head detects"
        ):
            read_network(publish(names=names))
    with pytest.raises(SlimError, match=r"published\.pt: its names have the keys \[0, 2\], expected 0 to 1"):
        read_network(publish(names={0: "cat", 2: "dog"}))
    with pytest.raises(SlimError, match=r"published\.pt: takes images of 1 channels, expected 3"):
        read_network(publish(ch=1))
    with pytest.raises(SlimError, match=r"published\.pt: its weights are not those of the network .* \(model\.6"):
        read_network(publish(nc=3, names=["cat", "dog", "cow"]))
    ours, model = tmp_path / "ours.pt", network()
    save_network(ours, model, make_build(model, NAMES))
    assert read_network(ours).names == NAMES
    save_network(ours, model, make_build(model, NAMES) | {"names": ["cat"]})
    with pytest.raises(SlimError, match=r"ours\.pt: 1 names for the 2 classes that its head detects"):
        read_network(ours)


@pytest.mark.parametrize(
    "change",
    [
        {"widths": None},
        {"params": "many"},
        {"state_dict": {"model.0.conv.weight": 1}},
        {"build": {"kind": "yolov5"}},
        {"build": {"kind": "yolov5", "description": {"nc": 2}, "num_classes": 2}},
        {"gates": [{"path": "model.0"}]},
        {"counts": {"model.0.nothing": 3}},
        {"norms": {"model.99": {"num_features": 3}}},
    ],
)
def test_entries_of_ours_that_are_missing_or_wrong_are_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    path, model = tmp_path / "ours.pt", network()
    save_network(path, model, make_build(model, NAMES))
    torch.save({**slim.read(path), **change}, path)
    with pytest.raises(SlimError, match=r"ours\.pt: ") as caught:
        read_network(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["format_version", "build", "widths", "gates", "params", "macs", "example", "state_dict"]
)
def test_an_entry_of_ours_that_is_missing_is_named(tmp_path: Path, key: str) -> None:
    path, model = tmp_path / "ours.pt", network()
    save_network(path, model, make_build(model, NAMES))
    content = slim.read(path)
    del content[key]
    torch.save(content, path)
    with pytest.raises(SlimError, match=rf"ours\.pt: its entry {key} is nothing"):
        read_network(path)


READ_ALL = """
import sys, torch
from pathlib import Path
from detection.network import read_network
from slim import SlimError
folder, refused, same = Path(sys.argv[1]), 0, 0
whole = {kind: read_network(folder / f"{kind}.pt").model.state_dict() for kind in ("ours", "published")}
for path in sorted(folder.glob("*-*.pt")):
    try:
        state = read_network(path).model.state_dict()
    except SlimError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1, error
        refused += 1
        continue
    wanted = whole[path.name.partition("-")[0]]
    assert state.keys() == wanted.keys() and all(torch.equal(state[k], wanted[k]) for k in wanted), path
    same += 1
print(refused, same)
"""


def damaged(whole: Path, way: str, draw: random.Random) -> bytes:
    """A file with one bit flipped, cut short, or whose pickle is cut short while its sums are right."""
    content = bytearray(whole.read_bytes())
    if way == "flip":  # every other one where the zip says what lies where
        start = int(len(content) * 0.8) if draw.random() < 0.5 else 0
        content[draw.randrange(start, len(content))] ^= 1 << draw.randrange(8)
    elif way == "truncate":
        del content[draw.randrange(len(content)) :]
    else:
        with zipfile.ZipFile(whole) as source:
            records = {info.filename: source.read(info) for info in source.infolist()}
        with zipfile.ZipFile(whole.with_name("cut"), "w") as target:
            for name, record in records.items():
                cut = draw.randrange(len(record)) if name.endswith("/data.pkl") else len(record)
                target.writestr(name, record[:cut])
        return whole.with_name("cut").read_bytes()
    return bytes(content)


@pytest.mark.parametrize("count", [8, pytest.param(84, marks=pytest.mark.long)])
def test_damage_is_found_and_never_other_weights(publish: Publish, tmp_path: Path, count: int) -> None:
    """Two kinds of file, three of damage: one line with its name, or the very tensors; in a process that may not crash."""
    model = network()
    save_network(tmp_path / "ours.pt", model, make_build(model, NAMES))
    publish()
    draw = random.Random(0)
    for kind in ("ours", "published"):
        for way in ("flip", "truncate", "cut"):
            for number in range(count):
                file = tmp_path / f"{kind}-{way}{number}.pt"
                file.write_bytes(damaged(tmp_path / f"{kind}.pt", way, draw))
    done = subprocess.run([sys.executable, "-c", READ_ALL, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refused, same = map(int, done.stdout.split())
    assert refused + same == 6 * count and refused >= 5 * count
