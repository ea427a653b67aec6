"""Training goes on with other classes: the structure stays, the head's outputs change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import slim
from detection.network import Network, build_network, read_network, start_network
from models import build_model, transfer_weights
from tests.scripts.runs import NAMES, ROOT, SMALL, Runner

SHARED = ROOT.parent / "shared"
PUBLISHED = SHARED / "weights" / "yolov5n.pt"
BCCD = SHARED / "data" / "bccd"
BCCD_NAMES = ["RBC", "WBC", "Platelets"]
IMAGE = torch.zeros(1, 3, 64, 64)
HEAD = "model.6"


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data.yaml of the first six images of BCCD's splits."""
    if not BCCD.is_dir():
        pytest.skip("no BCCD: ../shared/data/bccd is absent")
    root = tmp_path_factory.mktemp("cells")
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
            for file in sorted((BCCD / kind / split).iterdir())[:6]:
                shutil.copy(file, root / kind / split)
    file = root / "cells.yaml"
    file.write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnames: {BCCD_NAMES}\n")
    return file


def more_names(tiny: Path, tmp_path: Path) -> Path:
    """The tiny shapes under other names: crosses and circles changed places, two are new."""
    names = ["cross", "square", "triangle", "circle", "hexagon", "star"]
    file = tmp_path / "more.yaml"
    file.write_text(f"path: {tiny.parent / 'tiny'}\ntrain: images/train\nval: images/val\nnames: {names}\n")
    return file


def body_widths(network: Network) -> dict[str, list[int]]:
    """Of all but the head, whose inputs count."""
    widths = slim.layer_widths(network.model)
    return {path: width if not path.startswith(HEAD) else width[:1] for path, width in widths.items()}


def body_macs(network: Network) -> int:
    return sum(row.macs for row in slim.cost(network.model, IMAGE).layers if not row.path.startswith(HEAD))


def same_body(found: Network, expected: Network) -> None:
    """The structure is the same but for the head's outputs, and is what a checkpoint's ``build`` says."""
    assert body_widths(found) == body_widths(expected) and body_macs(found) == body_macs(expected)
    assert found.build["description"]["nc"] == found.build["num_classes"] == len(found.names)
    assert found.model.num_classes == len(found.names)
    assert found.build["anchors_px"] == found.model.anchors_px.tolist()
    ratio = slim.cost(found.model, IMAGE).macs / slim.cost(build_network(found.build), IMAGE).macs
    assert ratio < 0.7, "it is no slim network"


def finetune(script: Runner, weights: Path, data: Path, project: Path, name: str, *options: object) -> Network:
    done = script(
        "finetune", "--weights", weights, "--data", data, *SMALL, "--epochs", 1, *options, "--project", project,
        "--name", name,
    )  # fmt: skip
    assert done.code == 0, done.err
    return read_network(project / name / "weights" / "last.pt")


def test_shapes_to_cells_and_back(cut: Path, cells: Path, tiny: Path, script: Runner, tmp_path: Path) -> None:
    on_cells = finetune(script, cut, cells, tmp_path, "cells")
    assert on_cells.names == BCCD_NAMES and not slim.gate_vectors(on_cells.model)
    same_body(on_cells, read_network(cut))
    weights = tmp_path / "cells" / "weights" / "last.pt"
    done = script("val", "--weights", weights, "--data", cells, "--img", 64, "--project", tmp_path)
    assert done.code == 0, done.err

    again = script(
        "prune", "--weights", weights, "--img", 64, "--criterion", "l1", "--macs", 0.8, "--out", tmp_path / "twice.pt",
        "--project", tmp_path,
    )  # fmt: skip
    assert again.code == 0, again.err
    back = finetune(script, tmp_path / "twice.pt", tiny, tmp_path, "back")
    assert back.names == list(NAMES)
    same_body(back, read_network(tmp_path / "twice.pt"))


def test_resumed_after_a_change_of_classes(
    cut: Path, tiny: Path, script: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import engine.training

    data = more_names(tiny, tmp_path)
    whole = finetune(script, cut, data, tmp_path, "whole", "--epochs", 2)
    original = engine.training.train_one_epoch

    def interrupted(state, loss_fn, batches, epoch):  # type: ignore[no-untyped-def]
        if epoch.number == 1:
            raise KeyboardInterrupt
        return original(state, loss_fn, batches, epoch)

    arguments = ("--weights", cut, "--data", data, *SMALL, "--epochs", 2, "--project", tmp_path, "--name", "parts")
    monkeypatch.setattr(engine.training, "train_one_epoch", interrupted)
    assert script("finetune", *arguments).code == 130
    monkeypatch.setattr(engine.training, "train_one_epoch", original)
    assert script("finetune", "--resume", "--project", tmp_path, "--name", "parts").code == 0
    resumed = read_network(tmp_path / "parts" / "weights" / "last.pt")
    assert resumed.names == whole.names and len(whole.names) == 6
    found, expected = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_classes_of_one_name_keep_their_rows(cut: Path, small_run: Path) -> None:
    for weights in (cut, small_run / "weights" / "last.pt"):
        before = read_network(weights)
        after = start_network(str(weights), "", ["star", "cross", "circle"])
        assert after.names == ["star", "cross", "circle"]
        assert "head: 4 classes before, 3 now; kept are the rows of cross, circle" in after.note
        for old, new in zip(before.model.detect.m, after.model.detect.m, strict=True):
            for name in ("weight", "bias"):
                rows, kept = getattr(new, name).view(2, 8, -1), getattr(old, name).view(2, 9, -1)
                assert torch.equal(rows[:, :5], kept[:, :5])
                assert torch.equal(rows[:, 6], kept[:, 8]) and torch.equal(rows[:, 7], kept[:, 5])
        gates = slim.gate_vectors(after.model)
        assert {k: v.tolist() for k, v in gates.items()} == {
            k: v.tolist() for k, v in slim.gate_vectors(before.model).items()
        }
        assert body_widths(after) == body_widths(before) and body_macs(after) == body_macs(before)


def test_as_many_classes_keep_the_head_unless_one_moved(cut: Path) -> None:
    before = read_network(cut)
    renamed = start_network(str(cut), "", ["circle", "box", "triangle", "plus"])
    assert (
        renamed.names == ["circle", "box", "triangle", "plus"] and "2 of its classes have other names" in renamed.note
    )
    assert torch.equal(renamed.model.detect.m[0].weight, before.model.detect.m[0].weight)
    turned = start_network(str(cut), "", NAMES[::-1])
    rows, kept = (n.model.detect.m[0].weight.view(2, 9, -1) for n in (turned, before))
    assert torch.equal(rows[:, 5:], kept[:, 5:].flip(1)) and torch.equal(rows[:, :5], kept[:, :5])


def test_gated_network_goes_on_with_other_classes(cut: Path, tiny: Path, script: Runner, tmp_path: Path) -> None:
    done = script(
        "train_sparse", "--weights", cut, "--data", more_names(tiny, tmp_path), *SMALL, "--epochs", 1, "--sparse-from", 0,
        "--project", tmp_path, "--name", "s",
    )  # fmt: skip
    assert done.code == 0, done.err
    network = read_network(tmp_path / "s" / "weights" / "last.pt")
    same_body(network, read_network(cut))
    assert slim.gate_vectors(network.model).keys() == slim.gate_vectors(read_network(cut).model).keys()


@pytest.mark.skipif(
    not PUBLISHED.is_file(), reason=f"needs the published checkpoint at ../shared/weights/{PUBLISHED.name}"
)
def test_published_weights_start_on_cells_as_they_always_did() -> None:
    """README's figures rest on these draws: a new network of three classes that takes what fits of the checkpoint."""
    torch.manual_seed(0)
    source = read_network(PUBLISHED)
    wanted = build_model(source.build["description"], 3)
    transfer_weights(wanted, source.model.state_dict())
    random = torch.get_rng_state()

    torch.manual_seed(0)
    network = start_network(str(PUBLISHED), "", BCCD_NAMES)
    found, expected = network.model.state_dict(), wanted.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert torch.equal(torch.get_rng_state(), random)
    assert network.build["description"] == wanted.description and network.names == BCCD_NAMES
