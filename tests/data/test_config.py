"""The forms of a data.yaml, and where its data is looked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from data import DataError, find_root, load_data_config
from data.sources import find_images
from tests.data.scenes import ROOT

NAMES = "names: [red, green]\n"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No set of the person who runs the tests is found."""
    monkeypatch.delenv("SLIM_DATA_ROOT", raising=False)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def make_set(root: Path, *folders: str) -> Path:
    """Folders of two files each that are images by their names alone."""
    for folder in folders or ("images/train", "images/val"):
        (root / folder).mkdir(parents=True)
        for name in ("b.jpg", "a.PNG", "notes.md"):
            (root / folder / name).touch()
    return root


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "set.yaml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    "names",
    ["names: [red, green]", "names: {0: red, 1: green}", "names: {1: green, 0: red}", "nc: 2\nnames: [red, green]"],
)
def test_forms_of_names(tmp_path: Path, names: str) -> None:
    make_set(tmp_path)
    assert load_data_config(write(tmp_path, f"train: images/train\n{names}\n")).names == ("red", "green")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: {0: red, 2: green}", "names do not cover class 1; 2 names need the keys 0 to 1"),
        ("names: {red: 0}", "names do not cover class 0; 1 names need the keys 0 to 0"),
        ("nc: 3\nnames: [red, green]", "nc is 3 but there are 2 names; correct one of them or leave nc out"),
        ("nc: two\nnames: [red]", "nc is 'two', expected the number of classes, a whole number of at least 1"),
        ("nc: 2", "names is None, expected a list of class names or a mapping like {0: person}"),
        ("names: [red, '1', red, 1]", "classes 0 and 2 are both named 'red'; give each class a name of its own"),
        ("names: {0: 1, 1: '1'}", "classes 0 and 1 are both named '1'; give each class a name of its own"),
        ("names: []", "names is [], expected a list of class names or a mapping like {0: person}"),
        ("names: [a]\nval: [3]", "val holds 3, expected a folder, a list file or a list of these"),
        ("names: [a]\npath: 3", "path is 3, expected a folder"),
    ],
)
def test_wrong_entries_are_named(tmp_path: Path, text: str, message: str) -> None:
    make_set(tmp_path)
    file = write(tmp_path, f"train: images/train\n{text}\n")
    with pytest.raises(DataError) as error:
        load_data_config(file)
    assert str(error.value) == f"{file}: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [a]", "no train, val or test is given"),
        ("- a\n- b", "found list, expected keys such as"),
        ("names: [a", "is not valid YAML"),
        ("", "found NoneType, expected keys such as"),
    ],
)
def test_files_that_describe_no_set(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(DataError) as error:
        load_data_config(file)
    assert str(error.value).startswith(str(file)) and message in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        load_data_config(tmp_path / "absent.yaml")
    assert (
        str(error.value)
        == f"cannot read the data set description {tmp_path / 'absent.yaml'}: No such file or directory"
    )


def test_a_split_is_a_folder_a_list_file_or_a_list_of_folders(tmp_path: Path) -> None:
    make_set(tmp_path, "images/one", "images/two")
    listed = ["./images/two/b.jpg", "", "images/one/a.PNG", str(tmp_path / "images" / "one" / "b.jpg")]
    (tmp_path / "list.txt").write_text("\n".join(listed))
    text = f"path: {tmp_path}\ntrain: [images/two, images/one]\nval: list.txt\ntest: images\n{NAMES}"
    config = load_data_config(write(tmp_path, text))

    def found(split: str) -> list[str]:
        return [p.relative_to(tmp_path / "images").as_posix() for p in find_images(config.split(split), config.path)]

    assert found("train") == ["two/a.PNG", "two/b.jpg", "one/a.PNG", "one/b.jpg"]
    assert found("val") == ["two/b.jpg", "one/a.PNG", "one/b.jpg"]
    assert found("test") == ["one/a.PNG", "one/b.jpg", "two/a.PNG", "two/b.jpg"]


def test_a_list_file_may_be_relative_to_the_set_and_lie_elsewhere(tmp_path: Path) -> None:
    make_set(tmp_path / "set", "images/one")
    (tmp_path / "set" / "lists").mkdir()
    (tmp_path / "set" / "lists" / "val.txt").write_text("images/one/a.PNG\n")
    config = load_data_config(write(tmp_path, f"path: set\nval: lists/val.txt\n{NAMES}"))
    assert list(find_images(config.split("val"), config.path)) == [tmp_path / "set" / "images" / "one" / "a.PNG"]


def test_a_list_file_may_be_relative_to_its_own_folder(tmp_path: Path) -> None:
    make_set(tmp_path / "set", "images/one", "lists/images/one")
    (tmp_path / "set" / "lists" / "val.txt").write_text("images/one/a.PNG\n")
    config = load_data_config(write(tmp_path, f"path: set\nval: lists/val.txt\n{NAMES}"))
    found = find_images(config.split("val"), config.path)
    assert list(found) == [tmp_path / "set" / "lists" / "images" / "one" / "a.PNG"]


def test_links_to_folders_are_followed_and_circles_end(tmp_path: Path) -> None:
    make_set(tmp_path, "images/train/plain", "far/one", "far/two")
    train = tmp_path / "images" / "train"
    (train / "linked").symlink_to(tmp_path / "far", target_is_directory=True)
    (train / "again").symlink_to(train / "plain", target_is_directory=True)
    (train / "up").symlink_to(tmp_path / "images", target_is_directory=True)
    (tmp_path / "far" / "two" / "self").symlink_to(tmp_path / "far", target_is_directory=True)
    (tmp_path / "val").symlink_to(tmp_path / "far" / "one", target_is_directory=True)
    config = load_data_config(write(tmp_path, f"path: {tmp_path}\ntrain: images/train\nval: val\n{NAMES}"))
    found = [p.relative_to(train).as_posix() for p in find_images(config.split("train"), config.path)]
    folders = ("linked/one", "linked/two", "plain")
    assert found == [f"{folder}/{name}" for folder in folders for name in ("a.PNG", "b.jpg")]
    assert list(find_images(config.split("val"), config.path)) == [
        tmp_path / "val" / name for name in ("a.PNG", "b.jpg")
    ]


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests as root can read all folders."""
    make_set(tmp_path, "images/train/closed")

    def denied(place: str) -> object:
        if Path(place).name == "closed":
            raise PermissionError(13, "Permission denied", place)
        return scandir(place)

    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(
        DataError, match=r"images/train/closed: the folder cannot be read \(Permission denied\); make it"
    ):
        find_images([tmp_path / "images" / "train"], tmp_path)


def test_a_list_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_bytes(b"\xff\xfe")
    config = load_data_config(write(tmp_path, f"val: val.txt\n{NAMES}"))
    with pytest.raises(DataError, match=r"val\.txt: the list cannot be read"):
        find_images(config.split("val"), config.path)


def test_relative_paths_follow_data_root_then_the_variable_then_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, f"path: cells\ntrain: images/train\n{NAMES}")
    places = [tmp_path / "given", tmp_path / "variable", Path("datasets"), tmp_path]
    for place in places:
        make_set(place / "cells")
    monkeypatch.setenv("SLIM_DATA_ROOT", str(places[1]))
    assert find_root(places[0]) == places[0]
    assert load_data_config(file, places[0]).path == places[0] / "cells"
    assert load_data_config(file).train == (places[1] / "cells" / "images" / "train",)
    monkeypatch.delenv("SLIM_DATA_ROOT")
    assert find_root() == Path("datasets")
    assert load_data_config(file).path == Path("datasets/cells")
    assert load_data_config(file, tmp_path / "nowhere").path == tmp_path / "cells"


def test_an_absolute_path_is_taken_as_it_is(tmp_path: Path) -> None:
    make_set(tmp_path / "far")
    file = write(tmp_path, f"path: {tmp_path / 'far'}\ntrain: images/train\nval: images/val\n{NAMES}")
    config = load_data_config(file, tmp_path / "ignored")
    assert (config.train, config.val, config.test) == (
        (tmp_path / "far" / "images" / "train",),
        (tmp_path / "far" / "images" / "val",),
        None,
    )


def test_an_absolute_path_that_is_missing_is_looked_for_nowhere_else(tmp_path: Path) -> None:
    file = write(tmp_path, f"path: {tmp_path / 'far'}\ntrain: images/train\n{NAMES}")
    with pytest.raises(DataError) as error:
        load_data_config(file, tmp_path)
    assert f"looked in {tmp_path / 'far'}; --data-root" in str(error.value)


def test_yolov5_paths_beside_its_checkout_and_exports_with_dots(tmp_path: Path) -> None:
    make_set(tmp_path / "root" / "coco128")
    config = load_data_config(
        write(tmp_path, f"path: ../datasets/coco128\ntrain: images/train\n{NAMES}"), tmp_path / "root"
    )
    assert config.path == tmp_path / "root" / "coco128"
    make_set(tmp_path / "export", "train/images")
    config = load_data_config(write(tmp_path / "export", f"train: ../train/images\n{NAMES}"))
    assert config.split("train") == (tmp_path / "export" / "train" / "images",)


@pytest.mark.parametrize(
    ("entry", "place"),
    [
        ("../mydata/images/train", "mydata/images/train"),
        ("X-1/train/images", "cwd/X-1/train/images"),
        ("X-1/train/images", "elsewhere/X-1/train/images"),
        ("../train/images", "elsewhere/X-1/train/images"),
        ("train/images", "elsewhere/X-1/train/images"),
    ],
)
def test_without_a_path_splits_are_looked_for_around(tmp_path: Path, entry: str, place: str) -> None:
    """From the working folder, the YAML's own, and the one that holds it; an empty ``path`` is none."""
    (tmp_path / "elsewhere" / "X-1").mkdir(parents=True)
    make_set(tmp_path, place)
    for path in ("", "path:\n", "path: ''\n"):
        config = load_data_config(write(tmp_path / "elsewhere" / "X-1", f"{path}train: {entry}\n{NAMES}"))
        (found,) = config.split("train")
        assert found.resolve() == tmp_path / place
        assert len(find_images([found], config.path)) == 2


def test_splits_that_are_not_there(tmp_path: Path) -> None:
    make_set(tmp_path, "images/train")
    config = load_data_config(write(tmp_path, f"train: images/train\nval: images/val\n{NAMES}"))
    with pytest.raises(DataError, match=r"^unknown split 'dev': use one of train, val, test$"):
        config.split("dev")
    with pytest.raises(DataError, match=r"^the data set has no 'test' split: it describes train, val$"):
        config.split("test")
    with pytest.raises(DataError) as error:
        config.split("val")
    assert str(error.value).startswith(
        f"split 'val': {tmp_path / 'images' / 'val'} does not exist; --data-root or $SLIM"
    )


def test_data_that_is_nowhere_names_the_places(tmp_path: Path) -> None:
    file = write(tmp_path, f"path: cells\ntrain: images/train\n{NAMES}")
    with pytest.raises(DataError) as error:
        load_data_config(file, tmp_path / "root")
    assert str(error.value).startswith(
        f"{file}: none of images/train exists; looked in {tmp_path / 'root' / 'cells'}, "
    )
    assert str(error.value).endswith("--data-root or $SLIM_DATA_ROOT says where data sets lie")


@pytest.mark.parametrize(
    ("name", "count", "first", "last", "folder"),
    [
        ("bccd", 3, "RBC", "Platelets", "bccd"),
        ("coco", 80, "person", "toothbrush", "coco"),
        ("coco128", 80, "person", "toothbrush", "coco128"),
        ("voc", 20, "aeroplane", "tvmonitor", "VOC"),
        ("shapes", 4, "circle", "cross", "shapes"),
        ("cards", 6, "nine", "ace", "cards"),
    ],
)
def test_our_descriptions(tmp_path: Path, name: str, count: int, first: str, last: str, folder: str) -> None:
    """They load once anything of what they describe is there; every description in the folder is tried."""
    assert len(list((ROOT / "data").glob("*.yaml"))) == 6
    file = ROOT / "data" / f"{name}.yaml"
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    for split in ("train", "val", "test"):
        for entry in [content[split]] if isinstance(content.get(split), str) else content.get(split, []):
            place = tmp_path / folder / entry
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch() if entry.endswith(".txt") else place.mkdir(exist_ok=True)
    config = load_data_config(file, tmp_path)
    assert (len(config.names), config.names[0], config.names[-1]) == (count, first, last)
    assert len(set(config.names)) == count
    assert config.path == tmp_path / folder
    assert all(source.exists() for split in ("train", "val") for source in config.split(split))
    assert file.read_text(encoding="utf-8").count("# Licence: ") == 1


def test_coco_and_coco128_name_the_same_classes() -> None:
    names = [yaml.safe_load((ROOT / "data" / f"{n}.yaml").read_text())["names"] for n in ("coco", "coco128")]
    assert names[0] == names[1]
    assert [names[0][i] for i in (11, 24, 39, 56, 67, 74)] == [
        "stop sign", "backpack", "bottle", "chair", "cell phone", "clock",
    ]  # fmt: skip


def test_aliases_that_expand_without_end_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"bomb\.yaml: 78 aliases, which can expand without end"):
        load_data_config(tmp_path / "bomb.yaml")


def test_without_a_path_the_images_beside_the_yaml_come_before_another_set_in_the_root(tmp_path: Path) -> None:
    make_set(Path("datasets"), "train/images", "valid/images")
    (tmp_path / "export").mkdir()
    text = "train: ../train/images\nval: ../valid/images\n" + NAMES
    for path in ("", "path: .\n"):
        file = write(tmp_path / "export", path + text)
        assert load_data_config(file).path == Path("datasets")
    make_set(tmp_path / "export", "train/images", "valid/images")
    for path in ("", "path: .\n"):
        assert load_data_config(write(tmp_path / "export", path + text)).path == tmp_path / "export"


def test_hidden_files_and_folders_are_no_images(tmp_path: Path) -> None:
    folder = make_set(tmp_path / ".set", "images/.ipynb_checkpoints", "images/below") / "images"
    (folder / "below" / "._b.jpg").touch()
    assert [path.name for path in find_images([folder], tmp_path)] == ["a.PNG", "b.jpg"]
    assert len(find_images([folder / ".ipynb_checkpoints"], tmp_path)) == 2, "named explicitly"


def test_lists_may_name_images_from_the_working_folder(tmp_path: Path) -> None:
    make_set(Path("mine"))
    listed = Path("mine/train.txt")
    listed.write_text("mine/images/train/b.jpg\nimages/train/a.PNG\nimages/train/none.jpg\n")
    found = find_images([listed], Path("elsewhere"))
    places = ["mine/images/train/none.jpg", "elsewhere/images/train/none.jpg", "images/train/none.jpg"]
    assert {str(path): [str(place) for place in sought] for path, sought in found.items()} == {
        "mine/images/train/b.jpg": [], "mine/images/train/a.PNG": [], "elsewhere/images/train/none.jpg": places
    }  # fmt: skip
