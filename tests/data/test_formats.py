"""COCO and VOC beside YOLO text: equal labels, what is ignored, and every way in which the files can be wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data import DataConfig, DataError, DetectionDataset, load_data_config
from engine.evaluation import coco_ap
from tests.data.other_formats import write_again
from tests.data.scenes import BCCD, ROOT, write_rectangles

SIZE = 64
NAMES = ["cat", "dog"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No set of the person who runs the tests is found."""
    monkeypatch.setenv("SLIM_DATA_ROOT", str(tmp_path / "nowhere"))


def write_images(folder: Path, *names: str, size: tuple[int, int] = (40, 20)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", size).save(folder / name)


def write_yaml(root: Path, **content: Any) -> Path:
    """YAML is a superset of JSON."""
    file = root / "set.yaml"
    file.write_text(json.dumps(content))
    return file


def coco(root: Path, **changes: Any) -> dict[str, Any]:
    """Two images of 40x20 in ``root/val``, sparse ids, and an annotation file that says so with ``changes``."""
    write_images(root / "val", "a.png", "b.png")
    content = {
        "images": [
            {"id": 70, "file_name": "b.png", "width": 40, "height": 20},
            {"id": 9, "file_name": "a.png", "width": 40, "height": 20},
        ],
        "annotations": [
            {"id": 1, "image_id": 70, "category_id": 18, "bbox": [10, 5, 20, 10]},
            {"id": 2, "image_id": 9, "category_id": 3, "bbox": [0, 0, 4, 4], "iscrowd": 0},
            {"id": 3, "image_id": 9, "category_id": 3, "bbox": [20, 10, 20, 10], "iscrowd": 1},
        ],
        "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "cat"}],
        **changes,
    }
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / "instances_val.json").write_text(json.dumps(content))
    return content


def open_coco(root: Path, **keys: Any) -> DetectionDataset:
    keys = {"names": NAMES, "val": "annotations/instances_val.json", **keys}
    return DetectionDataset(load_data_config(write_yaml(root, **keys)), "val", SIZE)


def voc_object(name: str, corners: Sequence[object], extra: str = "") -> str:
    box = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
    return f"<object><name>{name}</name>{extra}<bndbox>{box}</bndbox></object>"


def voc(root: Path, objects: dict[str, str], size: str = "") -> Path:
    """Images of 40x20 and their XML in VOC's folders; the list of them."""
    write_images(root / "JPEGImages", *(f"{stem}.png" for stem in objects))
    (root / "Annotations").mkdir(exist_ok=True)
    for stem, text in objects.items():
        (root / "Annotations" / f"{stem}.xml").write_text(f"<annotation>\n{size}\n{text}\n</annotation>")
    (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    listed = root / "ImageSets" / "Main" / "val.txt"
    listed.write_text("".join(f"{stem}\n" for stem in objects))
    return listed


def open_voc(root: Path, **keys: Any) -> DetectionDataset:
    keys = {"names": NAMES, "val": "ImageSets/Main/val.txt", **keys}
    return DetectionDataset(load_data_config(write_yaml(root, **keys)), "val", SIZE)


def check_ground_truth_by_hand(dataset: DetectionDataset) -> None:
    truth = dataset.ground_truth()["annotations"]
    assert [(a["image_id"], a["category_id"], a["iscrowd"]) for a in truth] == [(0, 0, 0), (0, 0, 1), (1, 1, 0)]
    boxes = [[0, 0, 4, 4], [20, 10, 20, 10], [10, 5, 20, 10]]
    np.testing.assert_allclose([a["bbox"] for a in truth], boxes, rtol=0, atol=1e-5)


def test_coco_by_hand(tmp_path: Path) -> None:
    coco(tmp_path)
    dataset = open_coco(tmp_path)
    assert [file.name for file in dataset.files] == ["a.png", "b.png"] and dataset.problems == []
    # Class indices follow the names, not the ids; the crowd is no target.
    assert dataset[0].targets[:, 0].tolist() == [0] and dataset[1].targets[:, 0].tolist() == [1]
    np.testing.assert_allclose(dataset[1].targets[0, 1:], [0.5, 0.5, 0.5, 0.25])
    check_ground_truth_by_hand(dataset)


def test_voc_by_hand(tmp_path: Path) -> None:
    difficult = voc_object("cat", (21, 11, 40, 20), "<difficult>1</difficult>")
    voc(tmp_path, {"a": voc_object("cat", (1, 1, 4, 4)) + difficult, "b": voc_object("dog", (11, 6.0, 30, 15))})
    dataset = open_voc(tmp_path)
    assert [len(sample.targets) for sample in dataset] == [1, 1] and dataset.problems == []
    np.testing.assert_allclose(dataset[1].targets[0], [1, 0.5, 0.5, 0.5, 0.25])
    check_ground_truth_by_hand(dataset)


def test_what_lies_in_a_crowd_is_neither_right_nor_wrong(tmp_path: Path) -> None:
    coco(tmp_path)
    truth = open_coco(tmp_path).ground_truth()
    sure = [
        {"image_id": 0, "category_id": 0, "bbox": [0, 0, 4, 4], "score": 0.5},
        {"image_id": 1, "category_id": 1, "bbox": [10, 5, 20, 10], "score": 0.5},
    ]
    in_crowd = {"image_id": 0, "category_id": 0, "bbox": [22, 11, 6, 6], "score": 0.9}
    elsewhere = {"image_id": 0, "category_id": 0, "bbox": [5, 11, 6, 6], "score": 0.9}
    assert coco_ap(truth, [*sure, in_crowd], NAMES)[0] == pytest.approx(1)
    assert coco_ap(truth, [*sure, elsewhere], NAMES)[0] == pytest.approx(0.75)


def test_a_class_of_crowds_alone_has_no_ap(tmp_path: Path) -> None:
    content = coco(tmp_path)
    content["annotations"][1]["iscrowd"] = 1
    coco(tmp_path, annotations=content["annotations"])
    found = [{"image_id": 1, "category_id": 1, "bbox": [10, 5, 20, 10], "score": 0.5}]
    assert coco_ap(open_coco(tmp_path).ground_truth(), found, NAMES)[3] == {"dog": pytest.approx(1)}


def detections(truth: dict[str, Any]) -> list[dict[str, Any]]:
    """What a detector of middling skill would find: shifted boxes, a fifth of them missed, a tenth of a wrong class."""
    rng = np.random.default_rng(0)
    found = []
    for annotation in truth["annotations"]:
        x, y, w, h = annotation["bbox"]
        # Coordinates of a coarse grid: a last bit of the truth's boxes must not decide.
        dx, dy = (round(float(value), 2) for value in rng.uniform(-0.08, 0.08, 2))
        wrong, missed, score = rng.random() < 0.1, rng.random() < 0.2, float(rng.random())
        kind = (annotation["category_id"] + int(wrong)) % len(truth["categories"])
        if not missed:
            box = [x + dx * w, y + dy * h, w, h]
            found.append({"image_id": annotation["image_id"], "category_id": kind, "bbox": box, "score": score})
    return found


def same_in_every_format(config: DataConfig, split: str, tmp_path: Path, atol_px: float) -> list[DetectionDataset]:
    opened = [DetectionDataset(config, split, 32, cache="none")]
    for to in ("coco", "voc"):
        opened.append(
            DetectionDataset(load_data_config(write_again(config, to, tmp_path / to)), split, 32, cache="none")
        )
    truths = [dataset.ground_truth() for dataset in opened]
    found = detections(truths[0])
    first = coco_ap(truths[0], found, opened[0].names)
    assert 0 < first[0] < 1
    for dataset, truth in zip(opened, truths, strict=True):
        assert dataset.problems == [] and dataset.names == opened[0].names
        assert truth["images"] == truths[0]["images"]
        boxes = [np.array([a["bbox"] for a in t["annotations"]]) for t in (truths[0], truth)]
        np.testing.assert_allclose(boxes[0], boxes[1], rtol=0, atol=atol_px)
        for key in ("image_id", "category_id", "iscrowd"):
            assert [a[key] for a in truth["annotations"]] == [a[key] for a in truths[0]["annotations"]]
        assert coco_ap(truth, found, dataset.names) == first
    return opened


def test_three_formats_of_one_set_are_the_same(tmp_path: Path) -> None:
    opened = same_in_every_format(write_rectangles(tmp_path / "set", 12), "train", tmp_path, 1e-4)
    for dataset in opened[1:]:
        for one, other in zip(opened[0], dataset, strict=True):
            assert np.array_equal(one.image, other.image)
            np.testing.assert_allclose(one.targets, other.targets, rtol=0, atol=1e-6)


@pytest.mark.skipif(not BCCD.is_dir(), reason="the reference data ../shared/data/bccd is not there")
def test_three_formats_of_bccd_are_the_same(tmp_path: Path) -> None:
    config = replace(load_data_config(ROOT / "data" / "bccd.yaml", BCCD.parent), train=None, test=None)
    same_in_every_format(config, "val", tmp_path, 1e-4)


@pytest.mark.skipif(not BCCD.is_dir(), reason="the reference data ../shared/data/bccd is not there")
@pytest.mark.parametrize("split", ["val", "test"])
def test_the_coco_files_of_bccd_say_what_its_labels_say(tmp_path: Path, split: str) -> None:
    """Its label files hold 6 decimals, its COCO files whole pixels: they differ by 5e-4 pixels, and by clipping."""
    text = load_data_config(ROOT / "data" / "bccd.yaml", BCCD.parent)
    file = write_yaml(tmp_path, path=str(BCCD), **{split: f"annotations/{split}.json"})
    config = load_data_config(file)
    assert config.names == ("RBC", "WBC", "Platelets")
    one, other = (DetectionDataset(c, split, 320, cache="none") for c in (text, config))
    assert one.files == other.files and one.problems == other.problems == []
    truths = [one.ground_truth(), other.ground_truth()]
    rows = [[[a["image_id"], a["category_id"], *a["bbox"]] for a in truth["annotations"]] for truth in truths]
    by_pixel = [np.array(sorted(some, key=lambda row: [round(value) for value in row])) for some in rows]
    np.testing.assert_allclose(by_pixel[0], by_pixel[1], rtol=0, atol=2e-3)
    found = detections(truths[1])
    aps = [coco_ap(truth, found, one.names)[0] for truth in truths]
    assert aps[0] == pytest.approx(aps[1], abs=1e-3) and 0.3 < aps[0] < 0.9


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("annotations/instances_val2017.json", "images/val2017"),
        ("annotations/instances_val2017.json", "val2017"),
        ("annotations/person_keypoints_val2017.json", "val2017"),
        ("annotations/val.json", "images/val"),
        ("annotations/val.json", "images"),
        ("labels/val.json", "val/images"),
        ("val/_annotations.coco.json", "val"),
        ("val.json", "images"),
    ],
)
def test_where_the_images_of_coco_files_lie(tmp_path: Path, annotations: str, images: str) -> None:
    content = coco(tmp_path / "elsewhere")
    write_images(tmp_path / "set" / images, "a.png", "b.png")
    write_images(tmp_path / "set" / "images" / "train2017", "c.png")
    file = tmp_path / "set" / annotations
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    dataset = open_coco(tmp_path / "set", val=annotations)
    assert dataset.files[0] == tmp_path / "set" / images / "a.png"


def test_the_images_key_says_where_they_lie(tmp_path: Path) -> None:
    coco(tmp_path)
    (tmp_path / "val").rename(tmp_path / "pictures")
    for images in ("pictures", {"val": "pictures"}, {"val": str(tmp_path / "pictures")}):
        assert open_coco(tmp_path, images=images).files[0] == tmp_path / "pictures" / "a.png"
    with pytest.raises(
        DataError, match=r"instances_val\.json: its images \(b\.png, a\.png, \.\.\.\) are not found; looked"
    ):
        open_coco(tmp_path)
    with pytest.raises(DataError, match=r"^split 'val': images: .*/absent is no folder"):
        open_coco(tmp_path, images="absent")
    with pytest.raises(DataError, match=r"set\.yaml: images holds 'dev': 'pictures', expected a folder, or one for"):
        open_coco(tmp_path, images={"dev": "pictures"})


def test_names_may_be_left_out(tmp_path: Path) -> None:
    coco(tmp_path / "coco")
    assert open_coco(tmp_path / "coco", names=None).names == ("cat", "dog")
    voc(tmp_path / "voc", {"a": voc_object("zebra", (1, 1, 4, 4)), "b": voc_object("ant", (1, 1, 4, 4))})
    assert open_voc(tmp_path / "voc", names=None).names == ("ant", "zebra")
    content = coco(tmp_path / "two")
    other = {**content, "categories": [{"id": 3, "name": "cow"}, {"id": 18, "name": "dog"}]}
    (tmp_path / "two" / "train.json").write_text(json.dumps(other))
    with pytest.raises(DataError, match=r"category id 3 is 'cat', in another split 'cow'; say by names"):
        open_coco(tmp_path / "two", names=None, train="train.json")


def test_a_count_that_the_categories_contradict_is_named(tmp_path: Path) -> None:
    coco(tmp_path)
    with pytest.raises(DataError, match="nc is 3 but there are 2 names"):
        open_coco(tmp_path, names=None, nc=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [],\n "annotations": [,]}', ":2: not valid JSON (Expecting value); export the annotations again"),
        ("[]", ": no list 'images'; expected a COCO annotation file with images, annotations, categories"),
        ('{"images": []}', ": no list 'annotations'; expected a COCO annotation file with"),
        ('{"images": [3], "annotations": [], "categories": []}', ": images[0] is '3', expected a mapping with an id"),
        ('{"images": [], "annotations": [], "categories": []}', ": no image; its list 'images' is empty"),
    ],
)
def test_coco_files_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    coco(tmp_path)
    file = tmp_path / "annotations" / "instances_val.json"
    file.write_text(text)
    with pytest.raises(DataError) as error:
        open_coco(tmp_path)
    assert str(error.value).startswith(f"{file}{message}") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "a.png"}]},
         ": image ids 1 and 2 are both a.png; give each image one entry"),
        ({"images": [{"id": 1, "file_name": "a.png"}, {"id": 1, "file_name": "b.png"}]},
         ": image id 1 is no number or given twice"),
        ({"images": [{"id": 1}]}, ": image id 1: file_name is None, expected the image's file"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, ": category id 1 is both 'a' and 'b'"),
        ({"categories": [{"id": 1}]}, ": category {'id': 1}, expected an id, a whole number, and a name"),
    ],
)  # fmt: skip
def test_coco_files_that_contradict_themselves(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    coco(tmp_path, **changes)
    with pytest.raises(DataError) as error:
        open_coco(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image_id": 5}, "image id 5 is not among its images"),
        ({"image_id": None}, "image id None is not among its images"),
        ({"bbox": [50, 5, 20, 10]}, "a box outside the image of 40x20 pixels"),
        ({"bbox": [-30, 5, 20, 10]}, "a box outside the image of 40x20 pixels"),
        ({"bbox": [10, 5, 0, 10]}, "a box of zero area"),
        ({"bbox": [10, 5, 20, -1]}, "a box of zero area"),
        ({"bbox": [10, 5, 20]}, "bbox is [10, 5, 20], expected [x, y, width, height] in pixels"),
        ({"bbox": None}, "bbox is None, expected [x, y, width, height] in pixels"),
        ({"bbox": [10, 5, float("nan"), 3]}, "box [10.0, 5.0, nan, 8.0], expected finite numbers"),
        ({"category_id": 3, "image_id": 9, "bbox": [0, 0, 4, 4]}, "the same object twice"),
    ],
)
def test_a_bad_annotation_is_named_and_left_out(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    content = coco(tmp_path)
    bad = {**content["annotations"][0], "id": 77, **change}
    coco(tmp_path, annotations=[*content["annotations"], bad])
    dataset = open_coco(tmp_path)
    file = tmp_path / "annotations" / "instances_val.json"
    assert dataset.problems == [f"{file}: annotation 77: {reason}; the annotation was left out"]
    assert [len(sample.targets) for sample in dataset] == [1, 1]


def test_a_box_over_the_edge_is_clipped(tmp_path: Path) -> None:
    content = coco(tmp_path)
    content["annotations"][0]["bbox"] = [30, -5, 20, 10]
    coco(tmp_path, annotations=content["annotations"])
    assert open_coco(tmp_path).ground_truth()["annotations"][-1]["bbox"] == pytest.approx([30, 0, 10, 5])


def test_listed_images_that_are_missing_or_of_another_size(tmp_path: Path) -> None:
    coco(tmp_path)
    (tmp_path / "val" / "a.png").unlink()
    dataset = open_coco(tmp_path)
    assert [file.name for file in dataset.files] == ["b.png"] and len(dataset.problems) == 1
    assert "a.png: the image cannot be read (No such file or directory)" in dataset.problems[0]
    write_images(tmp_path / "val", "a.png", size=(20, 40))
    dataset = open_coco(tmp_path)
    assert [file.name for file in dataset.files] == ["b.png"] and len(dataset[0].targets) == 1
    file = tmp_path / "annotations" / "instances_val.json"
    assert dataset.problems == [
        f"{file}: a.png is said to have 40x20 pixels, the file has 20x40; the image was left out"
    ]


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (4, "category id 4 is not among its categories"),
        (None, "category id None is not among its categories"),
        ([4], "category id [4] is not among its categories"),
        (90, "category 'cow' is not among the names of the data.yaml"),
    ],
)
def test_annotations_of_other_classes_are_an_error(tmp_path: Path, key: object, reason: str) -> None:
    content = coco(tmp_path)
    bad = {**content["annotations"][0], "id": 77, "category_id": key}
    categories = [*content["categories"], {"id": 90, "name": "cow"}]
    coco(tmp_path, annotations=[*content["annotations"], bad], categories=categories)
    with pytest.raises(DataError) as error:
        open_coco(tmp_path)
    file = tmp_path / "annotations" / "instances_val.json"
    assert str(error.value) == (
        "split 'val': 1 of 4 labels are of none of the 2 classes that the data.yaml names; the first: "
        f"{file}: annotation 77: {reason}; correct names and nc, or the labels"
    )


def test_two_categories_of_one_name(tmp_path: Path) -> None:
    """Exports often have one for the whole set that no annotation uses."""
    content = coco(tmp_path)
    twice = [*content["categories"], {"id": 1, "name": "dog"}]
    coco(tmp_path, categories=twice)
    assert [sample.targets[0, 0].item() for sample in open_coco(tmp_path)] == [0, 1]
    assert open_coco(tmp_path, names=None).names == ("cat", "dog")
    annotations = [*content["annotations"], {**content["annotations"][0], "category_id": 1, "bbox": [1, 1, 9, 9]}]
    coco(tmp_path, categories=twice, annotations=annotations)
    with pytest.raises(DataError, match=r"instances_val\.json: category ids 18 and 1 are both named 'dog'; give each"):
        open_coco(tmp_path)


def test_annotations_of_other_images_alone_are_an_error(tmp_path: Path) -> None:
    content = coco(tmp_path)
    coco(tmp_path, annotations=[{**content["annotations"][0], "image_id": 5}])
    with pytest.raises(
        DataError, match=r"^split 'val': not one of its labels can be used: 1 problems, .*image id 5 is not"
    ):
        open_coco(tmp_path)


def test_no_annotation_at_all_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    coco(tmp_path / "coco", annotations=[])
    dataset = open_coco(tmp_path / "coco")
    assert dataset.ground_truth()["annotations"] == []
    with pytest.raises(
        DataError, match=r"no object in its 2 images; of their 1 label files all exist, but none .*val\.json"
    ):
        dataset.check_objects()
    assert "instances_val.json: no annotation at all; its 2 images count as background" in caplog.text
    listed = voc(tmp_path / "voc", {"a": ""})
    (tmp_path / "voc" / "Annotations" / "a.xml").unlink()
    assert len(open_voc(tmp_path / "voc")) == 1
    assert f"{listed}: no annotation at all; its 1 images count as background" in caplog.text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (voc_object("dog", (45, 1, 60, 4)), "object 2 (dog): a box outside the image of 40x20 pixels"),
        (voc_object("dog", (5, 4, 4, 9)), "object 2 (dog): a box of zero area"),
        (voc_object("dog", (1, "x", 4, 4)), "object 2 (dog): no number for ymin in its bndbox"),
        ("<object><name>dog</name></object>", "object 2 (dog): no number for xmin in its bndbox"),
        (voc_object("cat", (1, 1, 4, 4)), "object 2 (cat): the same object twice"),
    ],
)
def test_a_bad_object_is_named_and_left_out(tmp_path: Path, text: str, reason: str) -> None:
    voc(tmp_path, {"a": voc_object("cat", (1, 1, 4, 4)) + text})
    dataset = open_voc(tmp_path)
    assert dataset.problems == [f"{tmp_path / 'Annotations' / 'a.xml'}: {reason}; the object was left out"]
    assert len(dataset[0].targets) == 1


def test_an_object_of_another_class_is_an_error(tmp_path: Path) -> None:
    voc(tmp_path, {"a": voc_object("cat", (1, 1, 4, 4)) + voc_object("cow", (1, 1, 4, 4))})
    with pytest.raises(DataError) as error:
        open_voc(tmp_path)
    file = tmp_path / "Annotations" / "a.xml"
    assert str(error.value) == (
        "split 'val': 1 of 2 labels are of none of the 2 classes that the data.yaml names; the first: "
        f"{file}: object 2 (cow): class 'cow' is not among the names of the data.yaml; correct names and nc, or the labels"
    )


def test_an_image_whose_xml_is_broken_is_left_out(tmp_path: Path) -> None:
    good = voc_object("cat", (1, 1, 4, 4))
    voc(tmp_path, {"b": "</size>", "c": good, "d": good, "e": good})
    Image.new("RGB", (40, 20), "red").save(tmp_path / "JPEGImages" / "e.png")
    (tmp_path / "Annotations" / "c.xml").write_text("<html/>")
    (tmp_path / "Annotations" / "d.xml").write_text(
        f"<annotation><size><width>40</width><height>30</height></size>{good}</annotation>"
    )
    for cache in ("ram", "none", "disk"):
        config = load_data_config(write_yaml(tmp_path, names=NAMES, val="ImageSets/Main/val.txt"))
        dataset = DetectionDataset(config, "val", SIZE, cache=cache)  # type: ignore[arg-type]
        assert [file.stem for file in dataset.files] == ["e"] and len(dataset) == 1 and len(dataset[0].targets) == 1
        assert dataset[0].image[:, SIZE // 2, SIZE // 2].tolist() == [255, 0, 0]
        folder = tmp_path / "Annotations"
        assert dataset.problems == [
            f"{folder / 'b.xml'}:3: not valid XML (mismatched tag); the image was left out",
            f"{folder / 'c.xml'}: the outermost element is 'html', expected a VOC 'annotation'; the image was left out",
            f"{folder / 'd.xml'}: the image is said to have 40x30 pixels, the file has 40x20; the image was left out",
        ]


def test_lists_of_voc(tmp_path: Path) -> None:
    listed = voc(tmp_path, {"a": voc_object("cat", (1, 1, 4, 4)), "b c": "", "d": ""})
    listed.write_text("a  1\nb c\nd -1\na 1\nabsent\n")
    dataset = open_voc(tmp_path)
    assert [file.stem for file in dataset.files] == ["a", "b c"]
    assert (
        len(dataset.problems) == 1 and "JPEGImages/absent.jpg: the image cannot be read (No such" in dataset.problems[0]
    )


@pytest.mark.parametrize(
    ("images", "annotations"), [("JPEGImages", "Annotations"), ("images/val", "Annotations/val"), ("val", "val"),
                                ("pictures", "Annotations")],
)  # fmt: skip
def test_a_folder_with_xml_is_voc_unless_it_has_text(tmp_path: Path, images: str, annotations: str) -> None:
    write_images(tmp_path / images, "a.png", "b.png")
    (tmp_path / annotations).mkdir(parents=True, exist_ok=True)
    (tmp_path / annotations / "b.xml").write_text(f"<annotation>{voc_object('dog', (11, 6, 30, 15))}</annotation>")
    dataset = open_voc(tmp_path, val=images)
    assert [len(sample.targets) for sample in dataset] == [0, 1] and dataset[1].targets[0, 0] == 1
    text = tmp_path / images.replace("images", "labels") / "a.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text("0 0.5 0.5 0.5 0.5")
    assert [len(sample.targets) for sample in open_voc(tmp_path, val=images)] == [1, 0]
    assert [len(sample.targets) for sample in open_voc(tmp_path, val=images, format="voc")] == [0, 1]
    with pytest.raises(DataError, match=r"format is 'csv', expected yolo or voc"):
        open_voc(tmp_path, val=images, format="csv")


def test_a_coco_file_is_no_description(tmp_path: Path) -> None:
    coco(tmp_path)
    with pytest.raises(DataError, match=r"a COCO file is a split of a data\.yaml: val: FILE\.json$"):
        load_data_config(tmp_path / "annotations" / "instances_val.json")


def test_formats_may_be_mixed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    coco(tmp_path)
    voc(tmp_path, {"v": voc_object("dog", (1, 1, 4, 4))})
    with caplog.at_level(logging.WARNING):
        dataset = open_coco(tmp_path, val=["annotations/instances_val.json", "ImageSets/Main/val.txt"])
    assert [file.name for file in dataset.files] == ["a.png", "b.png", "v.png"] and not caplog.records
    assert [sample.targets[0, 0].item() for sample in dataset] == [0, 1, 1]
