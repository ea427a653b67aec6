"""Some classes of a data set, and all of them as one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data import DataConfig, DataError, DetectionDataset
from tests.data.scenes import rectangle, write_set

LINES = ["2 0.5 0.5 0.2 0.2", "0 0.25 0.5 0.2 0.2", "3 0.75 0.5 0.2 0.2", "1 0.5 0.25 0.2 0.2"]


@pytest.fixture
def four(tmp_path: Path) -> DataConfig:
    image = rectangle(32, 32, (8, 8, 20, 20))
    return write_set(tmp_path, {"a": image, "b": image}, {"a": LINES, "b": ["1 0.5 0.5 0.2 0.2"]})


def classes(config: DataConfig) -> list[list[int]]:
    return [sample.targets[:, 0].int().tolist() for sample in DetectionDataset(config, "train", 32)]


def test_chosen_classes_are_numbered_in_the_given_order(four: DataConfig) -> None:
    for chosen in (["class2", "class0"], (2, 0), ["2", "class0"]):
        config = four.select(chosen)
        assert config.names == ("class2", "class0") and config.class_map == (1, -1, 0, -1)
        assert classes(config) == [[0, 1], []]
    dataset = DetectionDataset(four.select([2, 0]), "train", 32)
    assert dataset.names == ("class2", "class0")
    truth = dataset.ground_truth()
    assert [c["name"] for c in truth["categories"]] == ["class2", "class0"]
    assert [a["category_id"] for a in truth["annotations"]] == [0, 1]
    torch.testing.assert_close(dataset[0].targets[0, 1:], torch.tensor([0.5, 0.5, 0.2, 0.2]))


def test_all_classes_as_one(four: DataConfig) -> None:
    assert four.single().names == ("object",) and classes(four.single()) == [[0, 0, 0, 0], [0]]
    assert four.single("cell").names == ("cell",)


def test_selections_follow_each_other(four: DataConfig) -> None:
    config = four.select([3, 2, 1]).select(["class1", "class3"])
    assert config.names == ("class1", "class3") and classes(config) == [[1, 0], [0]]
    assert classes(four.select([3, 1]).single()) == [[0, 0], [0]]
    assert classes(four.select([0, 1, 2, 3])) == classes(four)


def test_a_name_that_is_a_number_wins(four: DataConfig) -> None:
    config = DataConfig(("1", "0", "x", "y"), train=four.train, path=four.path)
    assert classes(config.select(["0"])) == [[0], [0]] and classes(config.select(["2"])) == [[0], []]


def test_a_class_out_of_range_is_still_an_error(four: DataConfig) -> None:
    (four.path / "labels" / "train" / "b.txt").write_text("4 0.5 0.5 0.2 0.2")
    with pytest.raises(DataError, match=r"1 of 5 labels are of none of the 4 classes .*: class 4, expected 0 to 3; "):
        DetectionDataset(four.select([1]), "train", 32)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (["cat"], "class 'cat' is not there; expected names or numbers of class0, class1, class2, class3 (0 to 3)"),
        ([4], "class '4' is not there; expected"),
        ([-1], "class '-1' is not there; expected"),
        ([1, "class1"], "class 'class1' is chosen twice; give each class once"),
        ([], "no class is chosen; expected some of class0, class1, class2, class3"),
    ],
)
def test_wrong_choices_are_named(four: DataConfig, chosen: list[str | int], message: str) -> None:
    with pytest.raises(DataError) as error:
        four.select(chosen)
    assert str(error.value).startswith(message)


def test_classes_without_an_object_are_an_error(four: DataConfig) -> None:
    (four.path / "labels" / "train" / "a.txt").unlink()
    with pytest.raises(DataError, match=r"^split 'train': no object of class2, class0; choose other classes$"):
        DetectionDataset(four.select([2, 0]), "train", 32)
