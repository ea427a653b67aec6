"""From every format to every other, and what the command refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from data import DataConfig, DataError, DetectionDataset, load_data_config
from data.convert import convert, main
from data.sources import FORMATS
from tests.data.scenes import rectangle, write_rectangles, write_set

LINES = [
    "1 0.5 0.25 0.2 0.1",
    "0 0.12345678 0.87654321 0.01234567 0.1",
    "3 0.333333 0.666667 0.5 0.25",
    "2 0.5 0.5 1 1",
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No set of the person who runs the tests is found."""
    monkeypatch.setenv("SLIM_DATA_ROOT", str(tmp_path / "nowhere"))


@pytest.fixture
def lines(tmp_path: Path) -> DataConfig:
    images = {name: rectangle(37, 53, (3, 4, 20, 30)) for name in ("a", "b", "c")}
    return write_set(tmp_path / "set", images, {"a": LINES, "b": LINES[:1]})


def labels(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((folder / "labels" / "train").iterdir())}


@pytest.mark.parametrize(
    "way", [("coco", "voc"), ("voc", "coco"), ("coco",), ("voc",), ("yolo",), ("coco", "coco", "voc", "voc")]
)
def test_labels_survive_any_way_round_unchanged(lines: DataConfig, tmp_path: Path, way: tuple[str, ...]) -> None:
    config = lines
    for step, to in enumerate((*way, "yolo")):
        out = tmp_path / f"step{step}"
        done = convert(config, to, out)
        assert (done.images, done.objects, done.ignored, done.problems) == ({"train": 3}, 5, 0, ())
        config = load_data_config(out / "data.yaml")
        assert config.names == lines.names
    expected = {"a.txt": "\n".join(LINES) + "\n", "b.txt": LINES[0] + "\n", "c.txt": ""}
    assert labels(out) == expected
    for image in (tmp_path / "set" / "images" / "train").iterdir():
        assert (out / "images" / "train" / image.name).read_bytes() == image.read_bytes()


@pytest.mark.parametrize("to", FORMATS)
def test_all_samples_stay_the_same(tmp_path: Path, to: str) -> None:
    config = write_rectangles(tmp_path / "set")
    convert(config, to, tmp_path / "out")
    new = load_data_config(tmp_path / "out" / "data.yaml")
    for one, other in zip(*(DetectionDataset(c, "train", 64) for c in (config, new)), strict=True):
        assert torch.equal(one.image, other.image)
        torch.testing.assert_close(one.targets, other.targets, rtol=0, atol=1e-6)


def test_crowds_and_difficult_objects_become_each_other(lines: DataConfig, tmp_path: Path) -> None:
    convert(lines, "coco", tmp_path / "coco")
    file = tmp_path / "coco" / "annotations" / "train.json"
    content = json.loads(file.read_text())
    content["annotations"][1]["iscrowd"] = 1
    file.write_text(json.dumps(content))
    config = load_data_config(tmp_path / "coco" / "data.yaml")
    for to in ("voc", "coco", "yolo"):
        done = convert(config, to, tmp_path / f"{to}2")
        assert (done.objects, done.ignored) == (4, 1)
        config = load_data_config(tmp_path / f"{to}2" / "data.yaml")
    assert "<difficult>1</difficult>" in (tmp_path / "voc2" / "Annotations" / "a.xml").read_text()
    assert [a["iscrowd"] for a in json.loads((tmp_path / "coco2/annotations/train.json").read_text())["annotations"]] == [
        0, 0, 0, 1, 0,
    ]  # fmt: skip
    assert labels(tmp_path / "yolo2")["a.txt"].splitlines() == [LINES[0], *LINES[2:]]


def test_images_of_one_name_are_kept_apart(tmp_path: Path) -> None:
    one, other = (write_rectangles(tmp_path / name, 2) for name in ("one", "other"))
    assert one.train and other.train
    config = DataConfig(one.names, train=(*one.train, *other.train), val=one.train, path=tmp_path)
    for to, name in (("voc", "val_3_image0"), ("coco", "image0"), ("yolo", "image0")):
        convert(config, to, tmp_path / to)
        new = load_data_config(tmp_path / to / "data.yaml")
        train, val = (DetectionDataset(new, split, 32) for split in ("train", "val"))
        assert len(train) == 4 and sorted(f.stem for f in train.files)[-1] == "train_2_image1"
        assert name in {f.stem for f in val.files} and len(val) == 2


def test_a_selection_of_classes_is_what_is_written(lines: DataConfig, tmp_path: Path) -> None:
    done = convert(lines.select(["class3", 1]), "coco", tmp_path / "out")
    assert done.objects == 3 and load_data_config(tmp_path / "out" / "data.yaml").names == ("class3", "class1")


def test_hard_links_save_the_copies(lines: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = tmp_path / "set" / "images" / "train" / "a.png"
    convert(lines, "voc", tmp_path / "linked", link=True)
    convert(lines, "voc", tmp_path / "copied")
    image = Path("JPEGImages", "a.png")
    assert (tmp_path / "linked" / image).samefile(original) and not (tmp_path / "copied" / image).samefile(original)

    def refused(*_: object) -> None:
        raise OSError("another disk")

    monkeypatch.setattr(os, "link", refused)
    convert(lines, "voc", tmp_path / "far", link=True)
    assert (tmp_path / "far" / image).read_bytes() == original.read_bytes()


def test_what_is_there_is_not_replaced(lines: DataConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(lines, "voc", out)
    with pytest.raises(DataError, match=r"out: is already there; choose another --out, or --overwrite"):
        convert(lines, "coco", out)
    assert (out / "Annotations").is_dir()
    convert(lines, "coco", out, overwrite=True)
    assert not (out / "Annotations").exists() and (out / "annotations" / "train.json").is_file()
    with pytest.raises(DataError, match=r"out: holds the images that are converted, such as .*a\.png; choose another"):
        convert(load_data_config(out / "data.yaml"), "voc", out, overwrite=True)
    with pytest.raises(DataError, match=r"set: was not written by a conversion, so it is not replaced; choose another"):
        convert(lines, "coco", tmp_path / "set", overwrite=True)
    (tmp_path / "empty").mkdir()
    convert(lines, "coco", tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "out", "set"]


def test_a_conversion_that_fails_leaves_nothing(
    lines: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(lines, "voc", tmp_path / "out")
    before = sorted(path.name for path in (tmp_path / "out").rglob("*"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(
        DataError, match=r"out: cannot be written \(No space left on device\); what was there is untouch"
    ):
        convert(lines, "coco", tmp_path / "out", overwrite=True)
    monkeypatch.undo()
    real = os.replace

    def third(one: Path, other: Path) -> None:
        if Path(one).name == "new":
            raise OSError(5, "Input/output error")
        real(one, other)

    monkeypatch.setattr(os, "replace", third)
    with pytest.raises(DataError, match=r"Input/output error"):
        convert(lines, "coco", tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "set"]
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == before


def write_yaml(tmp_path: Path, *more: str) -> Path:
    file = tmp_path / "set.yaml"
    lines = ["path: set", "train: images/train", "names: [class0, class1, class2, class3]", *more]
    file.write_text("\n".join(lines))
    return file


def test_the_command(lines: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "set" / "labels" / "train" / "c.txt").write_text("9 0.5 0.5 1 1")
    (tmp_path / "set" / "images" / "train" / "d.png").touch()
    file = write_yaml(tmp_path, "val: images/val")
    assert main([str(file), "--from", "yolo", "--to", "coco", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 4
    assert out[0].endswith("c.txt:1: class 9, expected 0 to 3; the line was left out")
    assert out[1].endswith(
        "d.png: the image cannot be read (the file has 0 bytes); restore or remove it; the image was left out"
    )
    assert out[2].startswith("left out: split 'val': ") and "does not exist" in out[2]
    assert out[3] == f"{tmp_path / 'out'}: 3 train images, 5 objects; use it by --data {tmp_path / 'out' / 'data.yaml'}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "voc", "--to", "coco", "--out", "out"], "images/train: its annotations are yolo, not voc"),
        (["--to", "coco", "--out", "set"], "set: is already there; choose another --out"),
    ],
)
def test_mistakes_end_in_one_line(
    lines: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    arguments = [str(tmp_path / a) if a in ("out", "set") else a for a in arguments]
    assert main([str(write_yaml(tmp_path)), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "out").exists()


def test_a_missing_description_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "absent.yaml"), "--to", "voc", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("error: cannot read the data set description ")


def test_labels_that_cannot_be_used_are_an_error(lines: DataConfig, tmp_path: Path) -> None:
    config = DataConfig(("only",), train=lines.train, path=lines.path)
    (lines.path / "labels" / "train" / "a.txt").write_text(LINES[0])
    with pytest.raises(DataError, match=r"^split 'train': the class of every label is outside 0 to 0"):
        convert(config, "coco", tmp_path / "out")
