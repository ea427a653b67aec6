"""The comparison with torch-pruning measures what it says, shows failures and says what is missing. No timings here."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

from benchmarks import slim_speed
from benchmarks.slim_speed import JOBS, KEEP, TOLERANCE, Pruned, Subject
from slim import SlimError


@pytest.fixture
def tiny() -> Subject:
    """Two convolutions and a classifier that keeps its width."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return Subject("tiny", nn.Sequential(*layers, nn.Linear(64, 32)).eval(), torch.rand(1, 3, 8, 8), ("5",))


@pytest.fixture
def baseline() -> None:
    pytest.importorskip("torch_pruning", reason="torch-pruning is not installed: pip install '.[bench]'")


@pytest.mark.usefixtures("baseline")
def test_both_tools_keep_the_outputs_and_remove_half_of_the_rest(tiny: Subject) -> None:
    made = (slim_speed.slim_cut(tiny, channels=KEEP), slim_speed.torch_pruning_cut(tiny, copy.deepcopy(tiny.model)))
    for (model, prunings), widths in zip(made, ([48], [40, 48]), strict=True):
        assert model(tiny.image).shape == (1, 32) and prunings == 1
        # torch-pruning rounds every width down.
        assert sum(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)) in widths
    assert [m.out_channels for m in tiny.model if isinstance(m, nn.Conv2d)] == [32, 64], "the given network is whole"


@pytest.mark.usefixtures("baseline")
def test_searches_end_at_the_target() -> None:
    network = slim_speed.build("resnet18", img=64, seed=0)
    ours, theirs = slim_speed.compare(network, list(JOBS)[1], repeats=1)
    assert (ours[1], theirs[1], ours[3]) == ("slim", "torch-pruning", "1.00") and int(theirs[4]) > 1
    for row in (ours, theirs):
        # torch-pruning counts norms and activations too, hence the rest.
        assert abs(float(row[5].rstrip("%")) / 100 - KEEP) < TOLERANCE + 0.006


@pytest.mark.usefixtures("baseline")
def test_a_search_that_does_not_end_is_given_up(tiny: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slim_speed, "torch_pruning_cut", lambda network, model, ratio: (model, 1))
    with pytest.raises(SlimError, match=r"1\.0000 of the MACs left after 20 prunings"):
        slim_speed.search_on_copies(tiny)


@pytest.mark.usefixtures("baseline")
def test_yolo_keeps_its_outputs_in_torch_pruning() -> None:
    network = slim_speed.build("yolov5n", img=64, seed=0)
    pruned, _ = slim_speed.torch_pruning_cut(network, copy.deepcopy(network.model))
    with torch.no_grad():
        assert pruned(network.image)[0].shape == network.model(network.image)[0].shape
    widths = [sum(p.numel() for p in m.parameters()) for m in (pruned, network.model)]
    assert widths[0] < 0.5 * widths[1]


@pytest.mark.usefixtures("baseline")
def test_command_prints_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        code = slim_speed.cli(["--models", "resnet18", "--repeats", "1", "--img", "32", "--num-cores", "1"])
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert code == 0
    assert f"torch {torch.__version__}, torch-pruning " in out and ", 1 threads" in out
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[1] for line in lines if "resnet18" in line] == ["slim", "torch-pruning"] * 2


def test_missing_torch_pruning_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    assert slim_speed.cli(["--models", "resnet18"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: torch_pruning is not installed; pip install -e '.[bench]' has it")


def test_unknown_network_is_named() -> None:
    with pytest.raises(SlimError, match="--models yolov9: neither a YAML"):
        slim_speed.build("yolov9", img=64, seed=0)


def test_tools_take_turns_and_failures_are_shown(tiny: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    def ours(network: Subject, spare: nn.Module) -> Pruned:
        order.append("slim")
        return spare, 3

    def theirs(network: Subject, spare: nn.Module) -> Pruned:
        order.append("other")
        if len(order) > 4:
            raise RuntimeError("no such thing\nand more")
        return spare, 1

    monkeypatch.setitem(JOBS, "job", {"slim": ours, "torch-pruning": theirs})
    first, second = slim_speed.compare(tiny, "job", repeats=3)
    assert order == ["slim", "other", "other", "slim", "slim", "other", "slim"]
    assert first[:2] == ["tiny", "slim"] and first[3:] == ["1.00", "3", "100.0%"]
    assert second == ["tiny", "torch-pruning", "fails: no such thing", "", "", ""]
