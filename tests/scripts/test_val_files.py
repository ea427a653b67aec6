"""What val.py leaves and prints beside AP: precision and recall, the suggested --conf, pictures, and text of what it found."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from data import DataSettings, DetectionDataset
from data.dataset import Draw
from detection import evaluation_pictures
from detection.datasets import open_data
from detection.evaluation_pictures import draw_measured
from detection.evaluator import draw_truth
from tests.scripts.runs import NAMES, SMALL, Runner
from tests.scripts.test_failures import fails
from tracking import draw_detections, read_png


def test_it_says_how_sure_to_be(
    small_weights: Path, tiny: Path, script: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_pictures, "draw_measured", draw_measured)
    common = ("--weights", small_weights, "--data", tiny, *SMALL, "--project", tmp_path)
    done = script("val", *common, "--save-txt", "--save-conf", "--save-json")
    assert done.code == 0, done.err
    run, images = tmp_path / "exp", [f"shapes_{number:06d}" for number in range(6)]
    metrics = json.loads((run / "metrics.json").read_text())
    conf, of_class = metrics["suggested_conf"], metrics["at_conf"]["per_class"]
    assert 0.001 < conf < 1 and f"--conf {conf:g}, which is suggested" in done.out
    assert list(of_class) == list(metrics["per_class"])
    assert sum(row["ap50"] for row in of_class.values()) / len(of_class) == pytest.approx(metrics["ap50"], abs=1e-9)
    lines = {line.split()[0]: line.split()[1:] for line in done.out.splitlines() if line.strip()}
    assert lines["class"] == ["objects", "P", "R", "F1", "AP50", "AP"]
    means = [metrics["at_conf"][key] for key in ("precision", "recall", "f1")]
    assert lines["all"][1:] == [f"{figure:.4f}" for figure in (*means, metrics["ap50"], metrics["ap"])]
    for name, row in of_class.items():
        figures = [row["precision"], row["recall"], row["f1"], row["ap50"], metrics["per_class"][name]]
        assert lines[name] == [str(row["objects"]), *(f"{figure:.4f}" for figure in figures)]
    report = (run / "report.md").read_text()
    for picture in ("pr_curve", "f1_curve", "confusion_matrix", "truth", "detections"):
        assert f"({picture}.png)" in report
    truth, found = (read_png(run / f"{name}.png") for name in ("truth", "detections"))
    assert truth.shape == found.shape == (3, 64, 4 * 64)

    with (run / "confusion_matrix.csv").open() as file:
        title, *rows = csv.reader(file)
    assert title == ["object", *NAMES, "background"] and [row[0] for row in rows] == title[1:]
    above = [one for one in json.loads((run / "predictions.json").read_text()) if one["score"] > conf]
    detected = [sum(int(row[k + 1]) for row in rows) for k in range(len(NAMES))]
    assert detected == [sum(one["category_id"] == k for one in above) for k in range(len(NAMES))]
    assert {row[0]: sum(map(int, row[1:])) for row in rows[:-1]} == {
        **dict.fromkeys(NAMES, 0),
        **{name: row["objects"] for name, row in of_class.items()},
    }

    assert sorted(file.name for file in (run / "labels").iterdir()) == [f"{stem}.txt" for stem in images]
    written = [
        (stem, *map(float, line.split()))
        for stem in images
        for line in (run / "labels" / f"{stem}.txt").read_text().splitlines()
    ]
    wanted = []
    for one in json.loads((run / "predictions.json").read_text()):
        x, y, w, h = one["bbox"]
        shape = ((x + w / 2) / 64, (y + h / 2) / 64, w / 64, h / 64)
        wanted.append((one["image_id"], one["category_id"], *shape, one["score"]))
    assert len(written) == len(wanted) > 6
    for line, row in zip(written, wanted, strict=True):
        assert line[0] == row[0] and line[1:] == pytest.approx(row[1:], abs=2e-6)

    done = script("val", *common, "--save-txt", "--conf", conf, "--name", "plain")
    assert done.code == 0, done.err
    again = json.loads((tmp_path / "plain" / "metrics.json").read_text())
    assert len(above) == sum(len(file.read_text().splitlines()) for file in (tmp_path / "plain" / "labels").iterdir())
    assert {
        len(line.split()) for line in (tmp_path / "plain" / "labels" / "shapes_000000.txt").read_text().splitlines()
    } == {5}
    for name, row in again["at_conf"]["per_class"].items():
        assert row["objects"] == of_class[name]["objects"] and row["recall"] <= of_class[name]["recall"] + 1e-9
    assert again["suggested_conf"] >= conf, "nothing is said of what --conf left out"
    fails(script("val", *common, "--save-conf"), "add --save-txt")


def test_images_of_one_name_have_files_of_their_own(
    small_weights: Path, tiny: Path, script: Runner, tmp_path: Path
) -> None:
    """Of a split of two folders, as YOLOv5's data.yaml may list them."""
    text = tiny.read_text().replace("val: images/val", "val: [images/val, images/test]")
    (tmp_path / "two.yaml").write_text(text)
    flags = ("--weights", small_weights, "--data", tmp_path / "two.yaml", *SMALL, "--save-txt", "--project", tmp_path)
    done = script("val", *flags)
    assert done.code == 0, done.err
    names = {file.name for file in (tmp_path / "exp" / "labels").iterdir()}
    assert len(names) == 12 and {"shapes_000000.txt", "shapes_000000-2.txt"} <= names


@pytest.mark.parametrize(("canvas_hw", "top"), [((32, 64), 0), ((64, 64), 16)])
def test_truth_is_drawn_where_the_labels_are(tmp_path: Path, canvas_hw: tuple[int, int], top: int) -> None:
    """On the image as the network sees it, on a canvas that is no square, too; without a score."""
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    Image.new("RGB", (64, 32), "navy").save(tmp_path / "images" / "a.png")
    (tmp_path / "labels" / "a.txt").write_text("1 0.5 0.5 0.25 0.5")
    (tmp_path / "data.yaml").write_text(f"path: {tmp_path}\nval: images\nnames: [cat, dog]\n")
    dataset = DetectionDataset(open_data(DataSettings(data=str(tmp_path / "data.yaml"))), "val", 64)
    image, box = dataset[Draw(0, canvas_hw)].image, torch.tensor([[24.0, 8 + top, 40, 24 + top, 1, 1]])
    (drawn,) = draw_truth(dataset, 4, canvas_hw)
    assert torch.equal(drawn, draw_detections(image, box, ["cat", "dog"], scores=False))
    assert not torch.equal(drawn, draw_detections(image, box, ["cat", "dog"]))
