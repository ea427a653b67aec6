from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from slim import SlimError
from tracking import (
    RunFolder,
    draw_detections,
    drawn_by,
    plot_channels,
    plot_class_curves,
    plot_confusions,
    plot_gates,
    plot_labels,
    plot_results,
    plot_runtimes,
    plot_trade_off,
    plot_widths,
    read_png,
    save_png,
    side_by_side,
    summarise_gates,
)
from tracking.plots import digest_of_code


def assert_picture(path: Path) -> None:
    """A PNG that is not one flat colour."""
    image = read_png(path)
    assert min(image.shape[1:]) > 100
    assert len(image.flatten(1).unique(dim=1).T) > 10


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved from now on."""
    saved: list[Figure] = []
    savefig = Figure.savefig

    def keep(figure: Figure, *arguments: Any, **named: Any) -> None:
        saved.append(figure)
        savefig(figure, *arguments, **named)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def overlaps(figure: Figure) -> list[str]:
    """Titles of the axes whose legends lie over their plot."""
    figure.canvas.draw()
    legends = [(axis, axis.get_legend()) for axis in figure.axes]
    return [
        axis.get_title()
        for axis, legend in legends
        if legend is not None and axis.get_window_extent().shrunk(0.99, 0.99).overlaps(legend.get_window_extent())
    ]


def test_every_panel_of_the_results_holds_one_thing(tmp_path: Path, drawn: list[Figure]) -> None:
    """The L1 step over the gradient, in thousands, beside a share; of an odd number of panels the last is wide."""
    row = {"loss/box": 0.5, "loss/obj": 0.1, "lr": 0.01, "loss/l1": 9.0, "gates/strength": 3.0}
    row |= {"gates/pull_over_gradient": 5000.0, "gates/closed_share": 0.5, "metrics/ap": 0.4}
    rows = [{key: str(value) for key, value in {"epoch": epoch, **row, "seconds": 2.0}.items()} for epoch in range(3)]
    rows[0]["metrics/ap"] = rows[1]["metrics/ap"] = ""
    plot_results(rows, tmp_path / "results.png")
    plot_results([{k: v for k, v in row.items() if k != "loss/l1"} for row in rows], tmp_path / "odd.png")
    axes = {axis.get_title(loc="left"): axis for axis in drawn[0].axes}
    lines = {title: [str(line.get_label()) for line in axis.get_lines()] for title, axis in axes.items()}
    assert lines.pop("L1 step over gradient: gates close above 1")[0] == "gates/pull_over_gradient"
    assert lines == {
        "loss": ["box", "obj"],
        "learning rate": ["lr"],
        "L1 of the gates that shrink": ["l1"],
        "share of closed gates": ["gates/closed_share"],
        "AP": ["ap"],
    }
    assert [title for title, axis in axes.items() if axis.get_yscale() == "log"] == [
        "L1 step over gradient: gates close above 1"
    ]
    assert len({axis.get_xlim() for axis in drawn[0].axes}) == 1, "an AP of the last epoch stands at the right"
    assert all(axis.axison for figure in drawn for axis in figure.axes) and overlaps(drawn[0]) == []
    *others, last = (axis.get_position().width for axis in drawn[1].axes)
    assert len(others) == 4 and last > 1.9 * max(others)


def test_results_with_gaps(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(SlimError, match="no finished epoch"):
        plot_results([], tmp_path / "results.png")
    for epoch, ap in enumerate([None, 0.2, None, 0.4]):
        run.append_row({"epoch": epoch, "loss/box": 1 / (epoch + 1), "loss/l1": 3.0, "lr": 0.01, "metrics/ap": ap})
    assert plot_results(run.read_rows(), tmp_path / "results.png") == tmp_path / "results.png"
    assert_picture(run.path / "results.png")


def test_labels(tmp_path: Path) -> None:
    ground_truth = {
        "images": [{"id": 0}, {"id": 1}],
        "categories": [{"id": 0}, {"id": 1}],
        "annotations": [{"image_id": 0, "category_id": 1, "bbox": [0, 0, width, 2 * width]} for width in (3, 5, 8)],
    }
    assert_picture(plot_labels(ground_truth, ["cat", "dog"], tmp_path / "labels.png"))


def test_gates_and_widths_and_trade_off(tmp_path: Path) -> None:
    gates = {"a": torch.tensor([0.0, 0.5, 1.0], requires_grad=True), "b": torch.tensor([0.001])}
    assert_picture(plot_gates(summarise_gates(gates), tmp_path / "gates.png"))
    assert_picture(plot_widths({"model.0": 16, "model.1": 32}, {"model.0": 8}, tmp_path / "widths.png"))
    assert_picture(plot_trade_off({"latency, ms": {"dense": (10.0, 0.5), "half": (6.0, 0.49)}}, tmp_path / "t.png"))


def test_no_axis_has_formulae_for_numbers_and_no_legend_lies_over_a_plot(tmp_path: Path, drawn: list[Figure]) -> None:
    gates = torch.cat([torch.zeros(2000), torch.rand(3000, generator=torch.Generator().manual_seed(0))])
    plot_gates(summarise_gates({"a": gates}), tmp_path / "gates.png")
    plot_widths({"first": 64, "last": 64}, {"first": 64, "last": 8}, tmp_path / "widths.png")
    for figure in drawn:
        assert overlaps(figure) == []
    labels = [text.get_text() for text in drawn[0].axes[0].get_yticklabels()]
    assert "1000" in labels and not any("$" in label for label in labels)


def test_channels_against_time(tmp_path: Path, drawn: list[Figure]) -> None:
    history = {0: {"a.conv": 16, "b": 8}, 1: {"a.conv": 12, "b": 8}, 2: {"a.conv": 4, "b": 8}}
    assert_picture(plot_channels(history, {"b": 8, "a.conv": 16}, tmp_path / "channels.png", "round"))
    axis = drawn[0].axes[0]
    assert axis.images[0].get_array().tolist() == [[1.0, 0.75, 0.25], [1.0, 1.0, 1.0]]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["a.conv", "b"]
    assert [text.get_text() for text in axis.texts] == ["16", "12", "4", "8", "8", "8"]
    assert axis.get_xlabel() == "round" and [text.get_text() for text in axis.get_xticklabels()] == ["0", "1", "2"]
    plot_channels({epoch: {"a": 3} for epoch in range(100)}, {"a": 4}, tmp_path / "long.png", "epoch")
    assert not drawn[1].axes[0].texts and len(drawn[1].axes[0].get_xticks()) == 10


def test_runtimes_have_a_colour_a_network_and_a_marker_an_engine(tmp_path: Path, drawn: list[Figure]) -> None:
    engines = ("torch, float32", "openvino, int8")
    points = [(name, engine, 3.0 + k, 0.5) for name in ("dense", "slim") for k, engine in enumerate(engines)]
    assert_picture(plot_runtimes(points, tmp_path / "t.png"))
    (axis,) = drawn[0].axes
    lines = [line for line in axis.get_lines() if len(line.get_xdata())]
    joined = [line for line in lines if line.get_linestyle() != "None"]
    assert [list(line.get_xdata()) for line in joined] == [[3.0, 3.0], [4.0, 4.0]], (
        "a line joins the networks of an engine"
    )
    looks = [(line.get_color(), line.get_marker()) for line in lines if line not in joined]
    assert len(looks) == 4 and len(set(looks)) == 4
    assert looks[0][0] == looks[1][0] != looks[2][0] == looks[3][0]
    assert looks[0][1] == looks[2][1] != looks[1][1] == looks[3][1]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["dense", "slim", *engines]
    assert overlaps(drawn[0]) == []


def test_a_picture_says_what_drew_it(tmp_path: Path) -> None:
    plot = plot_widths({"a": 4}, {"a": 2}, tmp_path / "widths.png")
    save_png(torch.zeros(3, 8, 8, dtype=torch.uint8), tmp_path / "blank.png", drawn_by(side_by_side, Path))
    for path, names in ((plot, ["plot_widths", "save_figure"]), (tmp_path / "blank.png", ["side_by_side", "Path"])):
        with Image.open(path) as image:
            *found, digest = image.info["Software"].split()
        assert [name.partition(":")[2] for name in found] == names
        assert digest == digest_of_code(found) != digest_of_code(found[:1])


def test_ground_truth_has_no_confidence() -> None:
    image, box = torch.zeros(3, 60, 80, dtype=torch.uint8), torch.tensor([[20.0, 30.0, 60.0, 50.0, 1.0, 1.0]])
    truth, found = (draw_detections(image, box, ["cat", "dog"], scores=scores) for scores in (False, True))
    assert 0 < truth[:, :30].any(0).sum() < found[:, :30].any(0).sum()


def test_detections_are_drawn_where_they_are(tmp_path: Path) -> None:
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    drawn = draw_detections(image, torch.tensor([[20.0, 30.0, 60.0, 50.0, 0.9, 1.0]]), ["cat", "dog"])
    assert drawn[:, 40, 20].any()
    assert drawn[:, 50, 40].any()
    assert not drawn[:, 40, 40].any()
    assert not drawn[:, :, 70:].any()
    assert not image.any()
    assert torch.equal(draw_detections(image, torch.zeros(0, 6), ["cat"]), image)
    assert torch.equal(read_png(save_png(drawn, tmp_path / "d.png")), drawn)


def test_columns_of_pictures_stand_side_by_side_under_their_titles(tmp_path: Path) -> None:
    red, blue = (torch.zeros(3, 40, 60, dtype=torch.uint8) for _ in range(2))
    red[0], blue[2] = 255, 255
    drawn = side_by_side({"dense": [red, red], "slim": [blue, blue]})
    assert drawn.shape == (3, 22 + 40 + 6 + 40, 60 + 6 + 60)
    assert drawn[:, 30, 30].tolist() == [255, 0, 0] and drawn[:, 30, 100].tolist() == [0, 0, 255]
    assert drawn[:, 30, 63].tolist() == [255, 255, 255]
    for left in (0, 66):
        assert (drawn[:, :22, left : left + 60].amin(0) < 100).any(), "a title"
    assert torch.equal(read_png(save_png(drawn, tmp_path / "s.png")), drawn)


def test_names_are_no_formulae(tmp_path: Path) -> None:
    ground_truth = {"images": [], "categories": [{"id": 0}], "annotations": []}
    assert_picture(plot_labels(ground_truth, ["$\\broken$"], tmp_path / "labels.png"))


def test_curves_of_few_classes_have_names_and_of_many_none(tmp_path: Path, drawn: list[Figure]) -> None:
    lines = {"cat": [0.2, 0.6], "dog": [0.4, 0.9]}
    assert_picture(plot_class_curves(("--conf", [0, 1]), ("F1", lines), tmp_path / "f1.png", mark=0.5))
    plot_class_curves(("recall", [0, 1]), ("precision", lines), tmp_path / "pr.png", areas=True)
    plot_class_curves(("recall", [0, 1]), ("precision", {str(k): [1, 0] for k in range(21)}), tmp_path / "p.png")
    labels = [[text.get_text() for text in figure.axes[0].get_legend().get_texts()] for figure in drawn]
    assert labels == [
        ["cat 0.600", "dog 0.900", "all classes 0.750", "--conf 0.5"],
        ["cat 0.400", "dog 0.650", "all classes 0.525"],
        ["all classes 1.000"],
    ]
    widths = [line.get_linewidth() for line in drawn[2].axes[0].lines]
    assert widths == [1] * 21 + [3] and overlaps(drawn[0]) == []


def test_confusions_show_counts_and_shares_of_each_row(tmp_path: Path, drawn: list[Figure]) -> None:
    counts = np.array([[3, 1, 0], [0, 0, 0], [0, 5, 0]])
    assert_picture(plot_confusions(counts, ["cat", "dog"], tmp_path / "few.png", "at --conf 0.5"))
    plot_confusions(np.diag([7] * 25 + [0]), [f"class {k}" for k in range(25)], tmp_path / "more.png", "")
    plot_confusions(np.diag([7] * 80 + [0]), [f"class {k}" for k in range(80)], tmp_path / "many.png", "")
    texts = [{text.get_position(): text.get_text() for text in figure.axes[0].texts} for figure in drawn]
    assert texts[0] == {(0, 0): "3\n75%", (1, 0): "1\n25%", (1, 2): "5\n100%"}, "columns are what is detected"
    assert texts[1] == {(k, k): "7" for k in range(25)} and texts[2] == {}
    axis = drawn[0].axes[0]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["cat", "dog", "background"]
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_title()) == ("detected as", "object", "at --conf 0.5")
