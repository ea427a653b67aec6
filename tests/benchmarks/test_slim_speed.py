"""The comparison with torch-pruning measures what it says, shows failures and says what is missing. No timings here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from benchmarks import slim_speed
from benchmarks.slim_speed import KEEP, TOLERANCE, Subject, ToolRun, ToolSpeed
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


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def assert_complete(row: ToolSpeed) -> None:
    assert not row.failure
    assert row.seconds > 0 and row.cpu_s > 0 and row.prunings > 0
    assert 0 < row.macs < 1


@pytest.mark.usefixtures("baseline")
def test_cut_rows_are_complete(tiny: Subject) -> None:
    rows = slim_speed.compare_cuts(tiny, repeats=1)
    assert [row.tool for row in rows] == ["slim", "torch-pruning"]
    for row in rows:
        assert_complete(row)
        assert row.runs == 1
    assert [m.out_channels for m in tiny.model if isinstance(m, nn.Conv2d)] == [32, 64], "the given network is whole"


@pytest.mark.usefixtures("baseline")
def test_both_tools_keep_the_outputs_and_remove_half_of_the_rest(tiny: Subject) -> None:
    trials = (slim_speed.slim_cut(tiny, channels=KEEP), slim_speed.torch_pruning_cut(tiny))
    for trial, widths in zip(trials, ([48], [40, 48]), strict=True):
        assert trial.model(tiny.image).shape == (1, 32)
        # torch-pruning rounds every width down.
        assert sum(m.out_channels for m in trial.model.modules() if isinstance(m, nn.Conv2d)) in widths


@pytest.mark.usefixtures("baseline")
def test_searches_end_at_the_target() -> None:
    network = slim_speed.build("resnet18", img=64, seed=0)
    rows = slim_speed.compare_searches(network, repeats=1)
    assert [row.tool for row in rows] == ["slim", "torch-pruning"]
    for row in rows:
        assert_complete(row)
        # torch-pruning counts norms and activations too, hence the rest.
        assert abs(row.macs - KEEP) < TOLERANCE + 0.005


@pytest.mark.usefixtures("baseline")
def test_yolo_keeps_its_outputs_in_torch_pruning() -> None:
    network = slim_speed.build("yolov5n", img=64, seed=0)
    pruned = slim_speed.torch_pruning_cut(network).model
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
    cuts, searches = lines[:4], lines[4:]
    assert [cells(line)[1] for line in cuts[2:]] == ["slim", "torch-pruning"]
    assert cells(searches[2])[1] == "slim" and len(searches) == 4
    for table in (cuts, searches):
        assert len({len(cells(line)) for line in table}) == 1, "as many cells as titles"
    slim_cells = cells(cuts[2])
    assert slim_cells[3] == slim_cells[5] == "1.00"


def test_missing_torch_pruning_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    assert slim_speed.cli(["--models", "resnet18"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "error: torch-pruning is not installed; pip install '.[bench]' brings it\n"


def test_unknown_network_is_named() -> None:
    with pytest.raises(SlimError, match="--models yolov9: neither a YAML"):
        slim_speed.build("yolov9", img=64, seed=0)


def scripted(steps: list[float], model: nn.Module) -> Callable[[], ToolRun]:
    """A job that reports these seconds, run after run."""
    left: Iterator[float] = iter(steps)

    def job() -> ToolRun:
        seconds = next(left)
        return ToolRun(seconds, 2 * seconds, model)

    return job


def test_medians_leave_the_warm_up_out_and_jobs_take_turns(tiny: Subject) -> None:
    order = []

    def noted(name: str, job: Callable[[], ToolRun]) -> Callable[[], ToolRun]:
        return lambda: (order.append(name), job())[1]

    first, second = scripted([99, 5, 1, 3], tiny.model), scripted([99, 8, 2, 4], tiny.model)
    rows = slim_speed.interleaved(tiny, {"a": noted("a", first), "b": noted("b", second)}, repeats=3)
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert [(row.seconds, row.cpu_s, row.runs, row.macs) for row in rows] == [(3, 6, 3, 1.0), (4, 8, 3, 1.0)]


def test_failures_are_shown_not_hidden(tiny: Subject) -> None:
    def broken() -> ToolRun:
        raise RuntimeError("no such thing\nand more")

    unfit = nn.Sequential(nn.Conv2d(4, 8, 3))
    jobs = {"slim": scripted([1, 1], tiny.model), "raises": broken, "unfit": scripted([1, 1], unfit)}
    rows = slim_speed.interleaved(tiny, jobs, repeats=1)
    lines = [row.line(rows[0]) for row in rows]
    assert cells(lines[0])[2] == "1.000"
    assert cells(lines[1])[2] == "fails: no such thing"
    assert cells(lines[2])[2].startswith("fails: the pruned network does not run: ")
    assert len({len(cells(line)) for line in lines}) == 1


def test_false_position_starts_at_the_rule_and_ends_near_the_target() -> None:
    ratios: list[float] = []

    def kept_at(ratio: float) -> float:
        ratios.append(ratio)
        return (1 - ratio) ** 1.6

    tries = slim_speed.false_position(kept_at)
    assert tries == len(ratios) > 1
    assert ratios[0] == pytest.approx(1 - KEEP**0.5)
    assert (1 - ratios[-1]) ** 1.6 == pytest.approx(KEEP, abs=TOLERANCE)
    with pytest.raises(SlimError, match=r"0\.9000 of the MACs left after 20 prunings"):
        slim_speed.false_position(lambda _: 0.9)
