"""predictions.json, scored by COCO's own tools against the annotation file that the data set came with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data import load_data_config
from data.images import read_size
from tests.data.other_formats import write_again
from tests.scripts.runs import ROOT, SMALL, Runner


@pytest.fixture
def annotations(tiny: Path, tmp_path: Path) -> Path:
    """The tiny set as COCO, its ids as a labelling tool may give them: neither positions nor in order."""
    write_again(load_data_config(tiny), "coco", tmp_path / "set")
    file = tmp_path / "set" / "annotations" / "val.json"
    content = json.loads(file.read_text())
    for image in content["images"]:
        image["id"] = 900 - 7 * image["id"]
    for category in content["categories"]:
        category["id"] = 40 - 3 * category["id"]
    for annotation in content["annotations"]:
        *_, w, h = annotation["bbox"]
        annotation |= {"image_id": 900 - 7 * annotation["image_id"], "category_id": 40 - 3 * annotation["category_id"]}
        annotation |= {"id": annotation["id"] + 1, "area": w * h}
    file.write_text(json.dumps(content))
    return file


def scored(truth: Path, predictions: Path) -> Any:
    """COCO's three main figures."""
    gold = COCO(str(truth))
    matching = COCOeval(gold, gold.loadRes(str(predictions)), "bbox")
    matching.evaluate()
    matching.accumulate()
    matching.summarize()
    return matching.stats[:3]


def evaluate(script: Runner, weights: Path, data: Path, project: Path, *more: object) -> tuple[dict[str, Any], Path]:
    done = script("val", "--weights", weights, "--data", data, *SMALL, "--save-json", "--project", project, *more)
    assert done.code == 0, done.err
    metrics = json.loads((project / "exp" / "metrics.json").read_text())
    assert f"AP {metrics['ap']:.4f}" in done.out and metrics["ap"] > 0.01
    return metrics, project / "exp" / "predictions.json"


def test_it_scores_as_val_says(small_weights: Path, annotations: Path, script: Runner, tmp_path: Path) -> None:
    metrics, predictions = evaluate(script, small_weights, tmp_path / "set" / "data.yaml", tmp_path / "runs")
    wanted = [metrics[name] for name in ("ap", "ap50", "ap75")]
    assert scored(annotations, predictions) == pytest.approx(wanted, abs=5e-5)


def test_text_labels_score_by_the_stems_of_the_images(
    small_weights: Path, annotations: Path, tiny: Path, script: Runner, tmp_path: Path
) -> None:
    """An annotation file that somebody made of YOLO's labels, as for YOLOv5's predictions."""
    content = json.loads(annotations.read_text())
    stems = {image["id"]: Path(image["file_name"]).stem for image in content["images"]}
    for image in content["images"]:
        image["id"] = stems[image["id"]]
    for annotation in content["annotations"]:
        annotation["image_id"] = stems[annotation["image_id"]]
        annotation["category_id"] = (40 - annotation["category_id"]) // 3 - 1
    for category in content["categories"]:
        category["id"] = (40 - category["id"]) // 3 - 1
    annotations.write_text(json.dumps(content))
    metrics, predictions = evaluate(script, small_weights, tiny, tmp_path / "runs")
    wanted = [metrics[name] for name in ("ap", "ap50", "ap75")]
    assert scored(annotations, predictions) == pytest.approx(wanted, abs=5e-5)


SHARED = ROOT.parent / "shared"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the reference images and checkpoint in ../shared are not there")
def test_coco_as_text_scores_by_cocos_own_ids(script: Runner, tmp_path: Path) -> None:
    """Two photographs named as COCO's are, with the boxes of the reference implementation, and the published checkpoint."""
    description = yaml.safe_load((ROOT / "data" / "coco.yaml").read_text())
    names, ids = list(description["names"].values()), {"person": 1, "bus": 6, "tie": 32}
    truth: dict[str, Any] = {"images": [], "annotations": [], "info": {}}
    truth["categories"] = [{"id": key, "name": name} for name, key in ids.items()]
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    reference = json.loads((SHARED / "reference" / "detections.json").read_text())
    for number, (name, found) in zip((139, 285), reference.items(), strict=True):
        picture = Path(shutil.copy(SHARED / "reference" / name, tmp_path / "images" / f"{number:012d}.jpg"))
        height, width = read_size(picture)
        truth["images"].append({"id": number, "file_name": picture.name, "height": height, "width": width})
        lines = []
        for one in found:
            x1, y1, x2, y2 = one["xyxy"]
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
            key = {"id": len(truth["annotations"]) + 1, "image_id": number, "category_id": ids[one["cls"]]}
            truth["annotations"].append({**key, **box})
            sides = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
            lines.append(f"{names.index(one['cls'])} " + " ".join(map(repr, sides)))
        (tmp_path / "labels" / f"{number:012d}.txt").write_text("\n".join(lines))
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    file = tmp_path / "coco.yaml"
    file.write_text(yaml.safe_dump({"path": str(tmp_path), "val": "images", "names": names}))
    published = SHARED / "weights" / "yolov5n.pt"
    metrics, predictions = evaluate(script, published, file, tmp_path / "runs", "--img", 640)
    assert metrics["ap"] > 0.8
    wanted = [metrics[name] for name in ("ap", "ap50", "ap75")]
    assert scored(tmp_path / "truth.json", predictions) == pytest.approx(wanted, abs=5e-5)
