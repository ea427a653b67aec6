"""Data sets that a yaml describes, from a server on this machine: forms, repetition, pins, interruption."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import yaml

import data.download
import data.transfer
from data import DataError, load_data_config
from data.download import download_data, main
from tests.data.file_server import serve
from tests.data.scenes import ROOT
from tests.data.test_archives import tarred, zipped


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    for name, value in {"TIMEOUT_S": 5, "ATTEMPTS": 2, "PAUSE_S": 0.001}.items():
        monkeypatch.setattr(data.transfer, name, value)
    monkeypatch.delenv("SLIM_DATA_ROOT", raising=False)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def describe(tmp_path: Path, download: object, **keys: object) -> Path:
    file = tmp_path / "set.yaml"
    content = {
        "path": "set",
        "train": "images/train",
        "val": "images/val",
        "names": ["a"],
        "download": download,
        **keys,
    }
    file.write_text(yaml.safe_dump(content))
    return file


def two_archives(tmp_path: Path) -> dict[str, bytes]:
    images = zipped(tmp_path / "i.zip", {"train/1.jpg": b"1" * 9000, "val/2.jpg": b"2"}).read_bytes()
    labels = tarred(
        tmp_path / "l.tgz", ("top/labels/train/1.txt", b"0"), ("top/about.md", b"x"), mode="w:gz"
    ).read_bytes()
    return {"i.zip": images, "l.tgz": labels}


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and not p.name.endswith(".lock")}


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_several_archives_then_nothing_to_do(tmp_path: Path) -> None:
    held, said = two_archives(tmp_path), list[str]()
    root = tmp_path / "root"
    with serve(held) as server:
        file = describe(
            tmp_path,
            [
                {
                    "url": f"{server.url}/i.zip",
                    "sha256": sha(held["i.zip"]),
                    "size": len(held["i.zip"]),
                    "into": "images",
                },
                {"url": f"{server.url}/l.tgz", "from": "top"},
            ],
        )
        with pytest.raises(
            DataError, match=r"or \$SLIM_DATA_ROOT says where data sets lie, --download fetches the data set"
        ):
            load_data_config(file, root)
        assert download_data(file, root, say=said.append) == root / "set"
        assert files(root) == {
            "set.download.json",
            *(f"set/{name}" for name in ("images/train/1.jpg", "images/val/2.jpg", "labels/train/1.txt", "about.md")),
        }
        record = json.loads((root / "set.download.json").read_text())["archives"]
        assert [entry["sha256"] for entry in record.values()] == [sha(held["i.zip"]), sha(held["l.tgz"])]
        pinned = [line for line in said if "pinned" in line]
        assert len(pinned) == 1 and sha(held["l.tgz"]) in pinned[0] and "l.tgz" in pinned[0]
        assert load_data_config(file, root).path == root / "set"
        asked = list(server.asked)
        download_data(file, root, say=said.append)
        assert said[-1] == f"{file}: the data set is there already; nothing was downloaded" and server.asked == asked


def test_what_was_put_there_by_hand_counts(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "set" / "images" / split).mkdir(parents=True)
    with serve({}) as server:
        download_data(describe(tmp_path, f"{server.url}/none.zip"), tmp_path / "root")
        assert server.asked == []


@pytest.mark.parametrize("outer", ["", "set/", "export-7/set/"])
def test_an_address_alone_finds_the_splits_below_outer_folders(tmp_path: Path, outer: str) -> None:
    members = {f"{outer}{name}": b"x" for name in ("images/train/1.jpg", "images/val/1.jpg", "README")}
    with serve({"a.zip": zipped(tmp_path / "a.zip", members).read_bytes()}) as server:
        download_data(describe(tmp_path, f"{server.url}/a.zip"), tmp_path / "root")
    assert files(tmp_path / "root" / "set") == {"images/train/1.jpg", "images/val/1.jpg", "README"}


def test_an_archive_of_something_else_leaves_nothing(tmp_path: Path) -> None:
    held = zipped(tmp_path / "a.zip", {"x/1.jpg": b"", "y/1.jpg": b""}).read_bytes()
    message = "expected images/train, images/val, found x, y in the archive"
    with serve({"a.zip": held}) as server, pytest.raises(DataError, match=message):
        download_data(describe(tmp_path, f"{server.url}/a.zip"), tmp_path / "root")
    assert not (tmp_path / "root" / "set").exists()


def test_a_pinned_digest_is_enforced_and_the_users_files_stay(tmp_path: Path) -> None:
    held = two_archives(tmp_path)
    root = tmp_path / "root"
    with serve(held) as server:
        file = describe(tmp_path, [{"url": f"{server.url}/i.zip", "into": "images"}])
        download_data(file, root)
        (root / "set" / "images" / "val" / "2.jpg").unlink()
        (root / "set" / "images" / "val").rmdir()
        (root / "set" / "mine.txt").write_text("kept")
        server.files["/i.zip"] = zipped(tmp_path / "j.zip", {"train/1.jpg": b"other", "val/2.jpg": b"2"}).read_bytes()
        with pytest.raises(DataError) as error:
            download_data(file, root)
        assert f"expected SHA-256 {sha(held['i.zip'])}, found {sha(server.files['/i.zip'])}" in str(error.value)
        assert str(error.value).endswith("set.download.json pins the digest)")
        assert {"images/train/1.jpg", "mine.txt"} == files(root / "set")
        server.files["/i.zip"] = held["i.zip"]
        download_data(file, root)
        assert {"images/train/1.jpg", "images/val/2.jpg", "mine.txt"} == files(root / "set")


def test_a_file_that_is_there_and_differs_is_never_overwritten(tmp_path: Path) -> None:
    held = two_archives(tmp_path)
    mine = tmp_path / "root" / "set" / "images" / "val" / "2.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with serve(held) as server, pytest.raises(DataError, match=r"val/2\.jpg: is there already and differs"):
        download_data(describe(tmp_path, [{"url": f"{server.url}/i.zip", "into": "images"}]), tmp_path / "root")
    assert files(tmp_path / "root" / "set") == {"images/val/2.jpg"} and mine.read_text() == "mine"


def test_an_interruption_between_archives_costs_none_of_them_twice(tmp_path: Path) -> None:
    held = two_archives(tmp_path)
    labels = held.pop("l.tgz")
    root = tmp_path / "root"
    with serve(held) as server:
        file = describe(
            tmp_path, [{"url": f"{server.url}/i.zip", "into": "images"}, {"url": f"{server.url}/l.tgz", "from": "top"}]
        )
        with pytest.raises(DataError, match="404"):
            download_data(file, root)
        # All splits exist by now, and still the set is not taken for whole.
        assert load_data_config(file, root).path == root / "set"
        server.files["/l.tgz"] = labels
        download_data(file, root)
        assert [path for path, _ in server.asked] == ["/i.zip", "/l.tgz", "/l.tgz"]
    assert (root / "set" / "labels" / "train" / "1.txt").exists() and not (root / "set.download").exists()


def test_killed_after_the_transfer_or_amid_moving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, root, move = two_archives(tmp_path), tmp_path / "root", data.download._move

    def half(files: list[Path], source: Path, target: Path) -> None:
        move(files[:1], source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(data.download, "_move", half)
    with serve(held) as server:
        file = describe(tmp_path, [{"url": f"{server.url}/i.zip", "into": "images"}])
        with pytest.raises(KeyboardInterrupt):
            download_data(file, root)
        assert files(root / "set") == {"images/train/1.jpg"}
        monkeypatch.setattr(data.download, "_move", move)
        download_data(file, root)
        assert len(server.asked) == 1
    assert files(root / "set") == {"images/train/1.jpg", "images/val/2.jpg"}


URL = "http://localhost/a.zip"


@pytest.mark.parametrize(
    ("download", "message"),
    [
        (
            "import os\nos.system('x')",
            "download is a script ('import os'), and scripts are never run",
        ),
        ("bash data/get_coco.sh", "download is a script"),
        ("ftp://localhost/a.zip", "scripts are never run; expected an http(s) address"),
        ("file:///etc/passwd", "expected an http(s) address"),
        (None, "has no download key"),
        (3, "download is 3; expected an http(s) address or a list"),
        ([URL], f"download[0] is '{URL}', expected a mapping of url, sha256"),
        ([{"url": URL, "md5": "x"}], "expected a mapping of url, sha256"),
        ([{"url": "a.zip"}], "download[0]: url is 'a.zip', expected an http(s) address"),
        ([{"url": URL, "sha256": "abc"}], "sha256 is 'abc', expected 64 hexadecimal digits"),
        ([{"url": URL, "size": "big"}], "size is 'big', expected a whole number"),
        ([{"url": URL, "from": "/abs"}], "from is '/abs', expected a relative path"),
        ([{"url": URL, "into": "../up"}], "into is '../up', expected a relative path without .."),
        ([{"url": URL, "voc": {"../up": "train"}}], "voc is '../up', expected a relative path"),
        ([{"url": URL, "voc": {"train": 7}}], "voc is 7, expected a relative path"),
        ([{"url": URL, "voc": "train"}], "voc is 'train', expected a mapping of folders"),
        ([{"url": URL}, {"url": URL}], f"names {URL} twice"),
    ],
)
def test_what_cannot_be_followed_is_named(tmp_path: Path, download: object, message: str) -> None:
    file = describe(tmp_path, download)
    with pytest.raises(DataError) as error:
        download_data(file, tmp_path / "root")
    assert str(error.value).startswith(f"{file}: ") and message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "root").exists()


def test_a_set_without_a_folder_of_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="path is '', expected the data set's folder"):
        download_data(describe(tmp_path, URL, path=""), tmp_path / "root")


def test_yolov5s_paths_beside_its_checkout(tmp_path: Path) -> None:
    members = {"set/images/train/1.jpg": b"x"}
    with serve({"a.zip": zipped(tmp_path / "a.zip", members).read_bytes()}) as server:
        file = describe(tmp_path, f"{server.url}/a.zip", path="../datasets/set")
        assert download_data(file, tmp_path / "root") == tmp_path / "root" / "set"


def test_room_for_archives_and_content_is_checked_first(tmp_path: Path) -> None:
    with serve({}) as server:
        file = describe(tmp_path, [{"url": f"{server.url}/a.zip", "size": 10**17}])
        with pytest.raises(DataError, match=r"the download needs 200PB, the disk has"):
            download_data(file, tmp_path / "root")
        assert server.asked == []


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.download, "fetch", full)
    with pytest.raises(
        DataError, match=r"root/set: No space left on device; what came so far is kept: free some space"
    ):
        download_data(describe(tmp_path, [{"url": "http://localhost/a.zip"}]), tmp_path / "root")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = {"set/images/train/1.jpg": b"x"}
    with serve({"a.zip": zipped(tmp_path / "a.zip", members).read_bytes()}) as server:
        file = describe(tmp_path, f"{server.url}/a.zip")
        assert main([str(file), "--data-root", str(tmp_path / "root")]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "root" / "set")
    assert main([str(tmp_path / "none.yaml")]) == 1
    assert capsys.readouterr().err.startswith("error: cannot read the data set description")


def devkit(outer: str, splits: dict[str, list[str]]) -> dict[str, bytes]:
    """A VOC layout below ``outer``, with what no detector needs."""
    members = {f"{outer}/SegmentationClass/9.png": b"mask", f"{outer}/JPEGImages/unlisted.jpg": b""}
    for split, names in splits.items():
        members[f"{outer}/ImageSets/Main/{split}.txt"] = "\n".join(names).encode()
        for name in names:
            members[f"{outer}/JPEGImages/{name}.jpg"] = name.encode()
            members[f"{outer}/Annotations/{name}.xml"] = f"<annotation>{name}</annotation>".encode()
    return members


SERVED = {
    "bccd": {"v1.0.zip": devkit("BCCD_Dataset-1.0/BCCD", {"train": ["1", "2"], "val": ["3"], "test": ["4"]})},
    "coco": {
        "coco2017labels.zip": {
            "coco/labels/train2017/1.txt": b"0 .5 .5 .5 .5",
            "coco/labels/val2017/2.txt": b"0 .5 .5 .5 .5",
            "coco/train2017.txt": b"./images/train2017/1.jpg",
            "coco/val2017.txt": b"./images/val2017/2.jpg",
        },
        "val2017.zip": {"val2017/2.jpg": b"2"},
        "train2017.zip": {"train2017/1.jpg": b"1"},
    },
    "coco128": {"coco128.zip": {"coco128/images/train2017/1.jpg": b"1", "coco128/labels/train2017/1.txt": b""}},
    "voc": {
        "VOCtrainval_06-Nov-2007.tar": devkit("VOCdevkit/VOC2007", {"train": ["1"], "val": ["2"]}),
        "VOCtest_06-Nov-2007.tar": devkit("VOCdevkit/VOC2007", {"test": ["3"]}),
        "VOCtrainval_11-May-2012.tar": devkit("VOCdevkit/VOC2012", {"train": ["2012_1"], "val": ["2012_2"]}),
    },
}


def both(*places: str) -> list[str]:
    """Image and XML of each SPLIT/NAME."""
    return [f"{kind}/{p}.{suffix}" for p in places for kind, suffix in (("images", "jpg"), ("Annotations", "xml"))]


COCO_FILES = ("labels/train2017/1.txt", "labels/val2017/2.txt", "train2017.txt", "val2017.txt")
PLACED = {
    "bccd": both("train/1", "train/2", "val/3", "test/4"),
    "coco": [*COCO_FILES, "images/train2017/1.jpg", "images/val2017/2.jpg"],
    "coco128": ["images/train2017/1.jpg", "labels/train2017/1.txt"],
    "voc": both("train2007/1", "val2007/2", "test2007/3", "train2012/2012_1", "val2012/2012_2"),
}


@pytest.mark.parametrize("name", SERVED)
def test_our_descriptions_lead_to_the_folders_that_they_describe(tmp_path: Path, name: str) -> None:
    """Archives laid out as the publishers' are served in their place; only host, digest and size are changed."""
    content = yaml.safe_load((ROOT / "data" / f"{name}.yaml").read_text())
    archives = {}
    for file, members in SERVED[name].items():
        path = tmp_path / file
        archives[file] = (
            zipped(path, members) if file.endswith("zip") else tarred(path, *members.items())
        ).read_bytes()
    assert [entry["url"].rpartition("/")[2] for entry in content["download"]] == list(archives)
    with serve(archives) as server:
        for entry, held in zip(content["download"], archives.values(), strict=True):
            assert (len(entry["sha256"]) == 64) == ("size" in entry)
            entry |= {"url": f"{server.url}/{entry['url'].rpartition('/')[2]}", "sha256": sha(held), "size": len(held)}
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(content))
        folder = download_data(file, tmp_path / "root")
    assert files(folder) == set(PLACED[name])
    config = load_data_config(file, tmp_path / "root")
    for split in ("train", "val"):
        assert all(source.exists() for source in config.split(split))


def test_a_voc_list_that_names_what_is_not_there(tmp_path: Path) -> None:
    members = devkit("d", {"train": ["1", "2"]})
    del members["d/Annotations/2.xml"]
    with serve({"a.zip": zipped(tmp_path / "a.zip", members).read_bytes()}) as server:
        file = describe(tmp_path, [{"url": f"{server.url}/a.zip", "from": "d", "voc": {"train": "train"}}])
        with pytest.raises(DataError, match=r"a\.zip: Annotations/2\.xml is missing or damaged in the archive"):
            download_data(file, tmp_path / "root")
        file = describe(tmp_path, [{"url": f"{server.url}/a.zip", "from": "elsewhere"}])
        with pytest.raises(DataError, match="expected elsewhere, found d in the archive"):
            download_data(file, tmp_path / "root")
    assert not (tmp_path / "root" / "set").exists()
