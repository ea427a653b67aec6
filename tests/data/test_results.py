"""The ids under which images and classes stand in COCO results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from data import DataConfig, DataError
from data.results import ResultIds, result_ids
from tests.data.scenes import ROOT


def images(folder: Path, *names: str) -> tuple[Path, ...]:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name)
    return tuple(folder / name for name in names)


def coco(folder: Path, ids: dict[str, int | str], categories: dict[str, int]) -> Path:
    images(folder, *ids)
    content = {
        "images": [{"id": key, "file_name": name} for name, key in ids.items()],
        "annotations": [],
        "categories": [{"id": key, "name": name} for name, key in categories.items()],
    }
    (folder / "all.json").write_text(json.dumps(content))
    return folder / "all.json"


def test_a_coco_file_gives_its_own(tmp_path: Path) -> None:
    file = coco(tmp_path, {"b.png": 70, "7.png": "x9", "a.png": 0}, {"dog": 18, "cat": 3, "cow": 0})
    config = DataConfig(("cat", "dog", "horse"), val=(file,), path=tmp_path)
    files = [tmp_path / name for name in ("7.png", "a.png", "b.png")]
    ids = result_ids(config, "val", files)
    assert ids == ResultIds(("x9", 0, 70), (3, 18, 19)), "no category of the file is called horse"
    # Images that were left out have no index.
    assert result_ids(config, "val", files[1:]).images == (0, 70)
    assert result_ids(config.select(["dog", "cat"]), "val", files).categories == (18, 3)
    assert result_ids(config.single(), "val", files).categories == (19,), "all as one"
    assert result_ids(config.select(["dog"]).single(), "val", files).categories == (18,)
    found = [{"image_id": 2, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]
    written = [{"image_id": 70, "category_id": 18, "bbox": [1, 2, 3, 4], "score": 0.5}]
    assert ids.results(found) == written and ids.indices(written) == found


def test_without_one_they_are_yolov5s(tmp_path: Path) -> None:
    files = images(tmp_path / "images", "0012.png", "b 1.png", "7.5.png")
    config = DataConfig(("cat", "dog"), val=(tmp_path / "images",), path=tmp_path)
    assert result_ids(config, "val", files) == ResultIds((12, "b 1", "7.5"), (0, 1))
    # COCO's classes alone do not make an image one of COCO's.
    config = DataConfig(("person", "stop sign"), val=(tmp_path / "images",), path=tmp_path)
    assert result_ids(config, "val", files).categories == (0, 1)


def test_coco_as_text_has_the_ids_of_coco(tmp_path: Path) -> None:
    """https://cocodataset.org: 91 categories, of which 80 have objects."""
    files = images(tmp_path / "images", "000000000139.png", "000000000285.png")
    names = tuple(yaml.safe_load((ROOT / "data" / "coco.yaml").read_text())["names"].values())
    config = DataConfig(names, val=(tmp_path / "images",), path=tmp_path)
    ids = result_ids(config, "val", files)
    assert ids.images == (139, 285) and len(ids.categories) == 80
    by_name = dict(zip(names, ids.categories, strict=True))
    wanted = {"person": 1, "fire hydrant": 11, "stop sign": 13, "backpack": 27, "wine glass": 46, "potted plant": 64,
              "dining table": 67, "toilet": 70, "tv": 72, "refrigerator": 82, "book": 84, "toothbrush": 90}  # fmt: skip
    assert {name: by_name[name] for name in wanted} == wanted and sorted(ids.categories) == list(ids.categories)
    assert result_ids(config.select(["tv", "person"]), "val", files).categories == (72, 1)
    config = DataConfig(("cat", "unicorn"), val=(tmp_path / "images",), path=tmp_path)
    assert result_ids(config, "val", files).categories == (17, 91)
    config = DataConfig(("griffin", "unicorn"), val=(tmp_path / "images",), path=tmp_path)
    assert result_ids(config, "val", files).categories == (0, 1)


def test_ids_that_name_two_things_are_refused(tmp_path: Path) -> None:
    files = images(tmp_path / "a", "1.png") + images(tmp_path / "b", "01.png")
    config = DataConfig(("cat",), val=(tmp_path / "a", tmp_path / "b"), path=tmp_path)
    with pytest.raises(
        DataError, match=r"^--save-json: .*a/1\.png and .*b/01\.png both have the id 1; evaluate the parts"
    ):
        result_ids(config, "val", files)
    sources = (coco(tmp_path / "c", {"1.png": 1}, {"cat": 1}), coco(tmp_path / "d", {"2.png": 2}, {"cat": 5}))
    config = DataConfig(("cat",), val=sources, path=tmp_path)
    with pytest.raises(
        DataError, match=r"^--save-json: the class 'cat' has the category ids 1 and 5 in the files of the"
    ):
        result_ids(config, "val", [tmp_path / "c" / "1.png", tmp_path / "d" / "2.png"])
