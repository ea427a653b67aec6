"""torch-pruning cuts our checkpoints as slim would, and what it leaves is read by our scripts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import slim
from detection.network import make_build, read_network, save_network
from experiments import torch_pruning
from experiments.torch_pruning import BISECTIONS, cut_by_ratio, cut_to_macs, removed_when_rounded
from models import YOLO, build_model, load_description
from slim import SlimError
from tests.scripts.runs import NAMES, SMALL
from tests.slim.networks import randomise, settle

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def baseline() -> None:
    pytest.importorskip("torch_pruning", reason="torch-pruning is not installed: pip install '.[bench]'")


@pytest.fixture
def model(small_cfg: Path) -> YOLO:
    torch.manual_seed(0)
    built = build_model(load_description(small_cfg), len(NAMES))
    settle(randomise(built), IMAGES)
    return built


@pytest.fixture
def checkpoint(model: YOLO, tmp_path: Path) -> Path:
    """With gates, which are folded before the cut."""
    slim.add_gates(model, slim.trace(model, IMAGES[:1]))
    save_network(tmp_path / "gated.pt", randomise(model), make_build(model, NAMES))
    return tmp_path / "gated.pt"


@pytest.mark.usefixtures("baseline")
@pytest.mark.parametrize("scope", ["global", "local"])
def test_channels_of_zeros_are_what_goes(model: YOLO, scope: str) -> None:
    graph = slim.trace(model, IMAGES[:1])
    scores = slim.score(model, graph, "random", seed=1)
    plan = slim.make_plan(graph, scores, channels=0.5, round_to=8, scope=scope)  # type: ignore[arg-type]
    with torch.no_grad():
        for group in plan.groups:
            for member in (m for m in group.members if m.role != "width"):
                tensor = model.get_submodule(member.layer).state_dict()[member.param.rpartition(".")[2]]
                tensor.index_fill_(member.axis, torch.tensor(member.positions(group.removed, group.size)), 0.0)
    found = cut_to_macs(model, 64, plan.macs[1] / plan.macs[0] + 1e-9, scope, 8)
    assert slim.layer_widths(found.model) == slim.layer_widths(slim.apply_plan(model, plan))
    assert found.macs == plan.macs[1] < plan.macs[0] and slim.max_difference(model, found.model, IMAGES) < 1e-6


@pytest.mark.usefixtures("baseline")
@pytest.mark.parametrize("scope", ["global", "local"])
def test_macs_are_at_most_and_nearest_to_the_target(model: YOLO, scope: str) -> None:
    dense = slim.cost(model, IMAGES[:1]).macs
    found = cut_to_macs(model, 64, 0.6, scope, 4)
    wider = cut_by_ratio(model, 64, found.ratio - 0.5**BISECTIONS, scope, 4)
    assert found.macs <= 0.6 * dense < slim.cost(wider, IMAGES[:1]).macs
    assert found.macs == slim.cost(found.model, IMAGES[:1]).macs
    before, after = ({path: width for path, (_, width) in slim.layer_widths(m).items()} for m in (model, found.model))
    heads = {path for path in before if path.startswith("model.6.")}
    assert len(heads) == 2 and all(after[path] == before[path] for path in heads)
    kept = {(width, after[path]) for path, width in before.items() if path not in heads}
    assert all(4 <= width < wide and width % 4 == 0 for wide, width in kept)
    assert (len(kept) == len({wide for wide, _ in kept})) == (scope == "local"), "the same share of each group, or not"


@pytest.mark.usefixtures("baseline")
def test_a_target_below_the_floors_is_refused(model: YOLO) -> None:
    with pytest.raises(SlimError, match=r"--macs 0\.01: with --round-to 8 at least 0\.\d+ of the MACs stay"):
        cut_to_macs(model, 64, 0.01, "global", 8)


@pytest.mark.parametrize(
    ("removed", "channels", "gone"),
    [(0, 32, 0), (1, 32, 8), (8, 32, 8), (30, 32, 24), (32, 32, 24), (5, 6, 0), (0, 12, 4)],
)
def test_a_multiple_stays_and_no_layer_vanishes(removed: int, channels: int, gone: int) -> None:
    assert removed_when_rounded(removed, channels, 8) == gone


@pytest.mark.usefixtures("baseline")
def test_the_command_leaves_a_checkpoint_that_val_reads(
    checkpoint: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import val

    common = [*map(str, ("--data", tiny, *SMALL, "--device", "cpu", "--project", tmp_path / "runs"))]
    narrow = str(tmp_path / "narrow.pt")
    arguments = ["--weights", str(checkpoint), *common, "--macs", "0.5", "--name", "cut", "--out", narrow]
    assert torch_pruning.cli(arguments) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "runs" / "cut" / "metrics.json").read_text())
    network = read_network(narrow)
    before, after = (slim.cost(m, IMAGES[:1]) for m in (read_network(checkpoint).model, network.model))
    assert not slim.gate_vectors(network.model) and network.names == list(NAMES)
    assert (found["macs"], found["params"]) == (after.macs, after.params) and after.macs <= 0.5 * before.macs
    assert found["before"]["macs"] == before.macs and found["before"]["params"] == before.params
    widths = {path: wide[1] for path, wide in slim.layer_widths(network.model).items()}
    assert found["after"]["channels"] == widths and found["before"]["channels"].keys() == widths.keys()
    assert found["reload_difference"] == 0 and found["images"] == 6 and found["pruned_ap"] == found["ap"]
    assert val.cli(["--weights", narrow, *common, "--name", "val"]) == 0
    again = json.loads((tmp_path / "runs" / "val" / "metrics.json").read_text())
    assert [again[key] for key in ("ap", "ap50", "ap75", "per_class")] == [
        found[key] for key in ("ap", "ap50", "ap75", "per_class")
    ]


def test_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    assert torch_pruning.cli(["--weights", "a.pt"]) == 1
    assert capsys.readouterr().err.startswith("error: torch_pruning is not installed; pip install -e '.[bench]' has it")
