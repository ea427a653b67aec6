"""The cache on disk: what is not read again, what is, and that no damage to it is ever more than lost time."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import data.cache
import data.dataset
import data.sources
from data import Augment, DataConfig, DataError, DetectionDataset, build_loader, make_shapes
from data.cache import FOLDER, DiskCache, MemoryCache, find_folder
from data.dataset import Cache
from tests.data.scenes import write_rectangles, write_set

SIZE = 64


@pytest.fixture
def rectangles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return write_rectangles(tmp_path / "set")


class Counted:
    """How many images were decoded and looked at for their size, and how many label files parsed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.decoded = self.measured = self.parsed = 0
        for module, name, counter in (
            (data.dataset, "read_image", "decoded"),
            (data.dataset, "read_size", "measured"),
            (data.sources, "read_labels", "parsed"),
        ):
            monkeypatch.setattr(module, name, self._counting(getattr(module, name), counter))

    def _counting(self, function: Any, counter: str) -> Any:
        def call(*arguments: Any) -> Any:
            setattr(self, counter, getattr(self, counter) + 1)
            return function(*arguments)

        return call

    def take(self) -> tuple[int, int, int]:
        taken = (self.decoded, self.measured, self.parsed)
        self.decoded = self.measured = self.parsed = 0
        return taken


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def open_set(config: DataConfig, cache: Cache = "disk", **extra: Any) -> DetectionDataset:
    return DetectionDataset(config, "train", SIZE, cache=cache, **extra)


def filled(config: DataConfig, cache: Cache = "disk", **extra: Any) -> DetectionDataset:
    """A data set of which every image was asked for once."""
    dataset = open_set(config, cache, **extra)
    assert len(list(dataset)) == len(dataset)
    return dataset


def same(one: DetectionDataset, other: DetectionDataset) -> None:
    assert one.files == other.files and one.problems == other.problems
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.image, b.image) and torch.equal(a.targets, b.targets) and a.letterbox == b.letterbox
    assert one.ground_truth() == other.ground_truth()


def image_file(config: DataConfig, number: int) -> Path:
    return config.path / "images" / "train" / f"image{number}.png"


def cached_files(config: DataConfig, kind: str = "evaluated") -> list[Path]:
    return sorted((config.path / FOLDER / f"{kind}-{SIZE}").glob("*.pixels"))


@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
@pytest.mark.parametrize("augment", [None, Augment(mosaic=0)], ids=["plain", "augmented"])
def test_opening_decodes_nothing_and_drawing_what_is_drawn(
    rectangles: DataConfig, counted: Counted, cache: Cache, augment: Augment | None
) -> None:
    dataset = open_set(rectangles, cache, augment=augment)
    assert counted.take() == (0, 6, 6)
    _ = [dataset[index] for index in (4, 1, 4)]
    assert counted.take() == (3 if cache == "none" else 2, 0, 0)


@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
def test_a_loader_decodes_what_its_batches_hold(rectangles: DataConfig, counted: Counted, cache: Cache) -> None:
    batches = iter(build_loader(open_set(rectangles, cache), 2, shuffle=True))
    assert len(next(batches).image_ids) == 2 == counted.take()[0]


def test_a_second_start_decodes_nothing(rectangles: DataConfig, counted: Counted) -> None:
    plain = open_set(rectangles, "none")
    counted.take()
    first = filled(rectangles)
    assert counted.take() == (6, 6, 6)
    same(first, plain)
    counted.take()
    filled(rectangles)
    assert counted.take() == (0, 6, 6)
    assert isinstance(open_set(rectangles)._cache, DiskCache)
    augment = Augment(mosaic=0.5)
    same_samples = zip(
        open_set(rectangles, augment=augment), open_set(rectangles, "none", augment=augment), strict=True
    )
    assert all(torch.equal(a.image, b.image) for a, b in same_samples)


def test_evaluation_and_training_do_not_share_what_they_shrink_differently(tmp_path: Path) -> None:
    stripes = torch.zeros(3, 96, 96, dtype=torch.uint8)
    stripes[:, ::3] = 255
    config = write_set(tmp_path, {"a": stripes}, {"a": ["0 0.5 0.5 1 1"]})
    still = Augment(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    for _ in range(2):
        evaluated, trained = (filled(config, augment=augment)[0].image for augment in (None, still))
        # Of rows 255, 0, 0, ...: (255 + 0 / 2) / 1.5, and a quarter of the way from the first row to the second.
        assert (evaluated[0, 0, 0], trained[0, 0, 0]) == (170, 191)
        assert torch.equal(evaluated, open_set(config, "none")[0].image)
        assert torch.equal(trained, open_set(config, "none", augment=still)[0].image)


def test_an_edit_between_two_starts_is_seen(rectangles: DataConfig) -> None:
    filled(rectangles)
    shutil.copyfile(image_file(rectangles, 1), image_file(rectangles, 0))
    (rectangles.path / "labels" / "train" / "image2.txt").write_text("0 0.5 0.5 0.5 0.5")
    same(open_set(rectangles), open_set(rectangles, "none"))


@pytest.mark.parametrize("keep_time", [False, True])
def test_a_changed_image_is_decoded_again(rectangles: DataConfig, counted: Counted, keep_time: bool) -> None:
    file = image_file(rectangles, 0)
    with Image.open(file) as image:
        pixels = np.array(image)
    file = file.rename(file.with_suffix(".bmp"))
    Image.fromarray(pixels).save(file)
    before = filled(rectangles)[0].image
    status = file.stat()
    with file.open("r+b") as opened:  # in place, of the same length
        opened.seek(-300, os.SEEK_END)
        opened.write(b"\xff" * 300)
    if keep_time:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    counted.take()
    after = filled(rectangles)
    assert counted.take()[0] == 1
    same(after, open_set(rectangles, "none"))
    assert not torch.equal(before, after[0].image)


def test_a_touched_or_moved_set_is_not_decoded_again(rectangles: DataConfig, counted: Counted, tmp_path: Path) -> None:
    filled(rectangles)
    for path in rectangles.path.rglob("*.png"):
        os.utime(path, ns=(10**18, 10**18))
    counted.take()
    filled(rectangles)
    assert counted.take() == (0, 6, 6)
    shutil.copytree(rectangles.path, tmp_path / "moved")
    shutil.rmtree(rectangles.path)
    moved = DataConfig(rectangles.names, train=(tmp_path / "moved" / "images" / "train",), path=tmp_path / "moved")
    assert len(filled(moved)) == 6 and counted.take() == (0, 6, 6)


def test_images_that_come_and_go(rectangles: DataConfig, counted: Counted) -> None:
    filled(rectangles)
    counted.take()
    Image.new("RGB", (30, 50), "red").save(image_file(rectangles, 10))
    image_file(rectangles, 3).unlink()
    image_file(rectangles, 4).write_bytes(b"none")
    again = filled(rectangles)
    assert counted.take()[0] == 1  # the new one
    assert [file.stem for file in again.files] == ["image0", "image1", "image10", "image2", "image5"]
    same(again, open_set(rectangles, "none"))


def test_a_changed_label_file_is_seen(rectangles: DataConfig, counted: Counted) -> None:
    file = rectangles.path / "labels" / "train" / "image2.txt"
    text = file.read_text()
    filled(rectangles)
    for change in (text.replace("2 ", "1 ", 1), None, "3 9 0.5 1 1\n" + text):
        file.unlink() if change is None else file.write_text(change)
        counted.take()
        dataset = filled(rectangles)
        assert counted.take() == (0, 6, 6)
        assert dataset[2].targets[:, 0].tolist() == ([] if change is None else [1] if change[0] == "1" else [2])
        same(dataset, open_set(rectangles, "none"))
        assert len(dataset.problems) == (change is not None and change[0] == "3")


def test_other_names_and_sizes_are_other_caches(rectangles: DataConfig) -> None:
    filled(rectangles)
    few = rectangles.select([0, 1])
    assert sum(len(s.targets) for s in open_set(few)) == 4 and sum(len(s.targets) for s in open_set(rectangles)) == 6
    for size in (32, SIZE):
        large, plain = (DetectionDataset(rectangles, "train", size, cache=cache) for cache in ("disk", "none"))  # type: ignore[arg-type]
        same(large, plain)


def test_pixels_of_another_way_of_decoding_are_made_anew(
    rectangles: DataConfig, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(data.cache, "_DECODING", b"")
        filled(rectangles)
    counted.take()
    filled(rectangles)
    assert counted.take() == (6, 6, 6)
    filled(rectangles)
    assert counted.take()[0] == 0


@pytest.mark.parametrize("damage", ["truncated", "emptied", "garbled", "removed"])
def test_damage_costs_time_and_a_line(rectangles: DataConfig, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    plain = open_set(rectangles, "none")
    filled(rectangles)
    file = sorted((rectangles.path / FOLDER).rglob("*.pixels"))[0]
    content = file.read_bytes()
    if damage == "removed":
        file.unlink()
    else:
        middle = len(content) // 2
        garbled = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        file.write_bytes({"truncated": content[:middle], "emptied": b"", "garbled": garbled}[damage])
    same(open_set(rectangles), plain)
    assert len(caplog.records) == (damage != "removed")
    assert damage == "removed" or ".pixels: damaged" in caplog.text
    caplog.clear()
    same(open_set(rectangles), plain)
    assert not caplog.records and file.stat().st_size == len(content)


def test_several_at_once_do_not_disturb_each_other(rectangles: DataConfig) -> None:
    """As several ranks or trainings that start together."""
    plain = open_set(rectangles, "none")
    with ThreadPoolExecutor(4) as pool:
        for dataset in pool.map(lambda _: filled(rectangles), range(4)):
            same(dataset, plain)
    assert len(cached_files(rectangles)) == len(list((rectangles.path / FOLDER / f"evaluated-{SIZE}").iterdir())) == 6


def test_a_writer_that_is_interrupted_leaves_what_was_there(
    rectangles: DataConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, counted: Counted
) -> None:
    dataset = open_set(rectangles)
    _ = dataset[0], dataset[1]
    before = cached_files(rectangles)
    real = Path.write_bytes

    def interrupted(path: Path, content: bytes) -> int:
        real(path, content[:50])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _ = dataset[2]
    assert sorted(before[0].parent.iterdir()) == before and len(before) == 2
    counted.take()
    same(open_set(rectangles), open_set(rectangles, "none"))
    assert counted.take()[0] == 4 + 6 and not caplog.records


def test_a_folder_that_cannot_be_written(
    rectangles: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, counted: Counted
) -> None:
    """A file in the folder's place stands for missing rights, which an administrator has everywhere."""
    (rectangles.path / FOLDER).touch()
    plain = open_set(rectangles, "none")
    same(open_set(rectangles), plain)
    assert len(list((tmp_path / "user" / "slim").rglob("*.pixels"))) == 6 and not caplog.records
    shutil.rmtree(tmp_path / "user")
    (tmp_path / "user").touch()
    dataset = open_set(rectangles)
    same(dataset, plain)
    assert isinstance(dataset._cache, MemoryCache)
    assert "can be written: going on without a cache on disk" in caplog.text


def test_a_full_disk_means_no_more_cache_and_one_line(
    rectangles: DataConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    dataset = open_set(rectangles)
    monkeypatch.setattr(Path, "write_bytes", full)
    same(dataset, open_set(rectangles, "none"))
    assert [record.getMessage() for record in caplog.records] == [
        f"{rectangles.path / FOLDER / f'evaluated-{SIZE}'}: no further images are cached on disk (No space left on device)"
    ]
    assert not list((rectangles.path / FOLDER / f"evaluated-{SIZE}").iterdir())


def test_none_and_ram_write_nothing(rectangles: DataConfig) -> None:
    for cache in ("none", "ram"):
        filled(rectangles, cache)  # type: ignore[arg-type]
    assert not (rectangles.path / FOLDER).exists()
    with pytest.raises(DataError, match=r"^cache 'tape', expected one of ram, disk, none$"):
        open_set(rectangles, "tape")  # type: ignore[arg-type]


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_a_sample_cannot_spoil_the_cache(rectangles: DataConfig, cache: Cache) -> None:
    for augment in (None, Augment(), Augment(mosaic=0)):
        dataset = filled(rectangles, cache, augment=augment)
        before = dataset[0].image.clone()
        dataset[0].image.zero_()
        assert torch.equal(dataset[0].image, before)


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_a_pickled_data_set_brings_no_images(rectangles: DataConfig, cache: Cache) -> None:
    """What a worker gets where processes are not forked."""
    dataset = filled(rectangles, cache)
    text = pickle.dumps(dataset._cache)
    assert len(text) < 3 * SIZE**2
    dataset._cache = pickle.loads(text)
    same(dataset, open_set(rectangles, "none"))


def test_workers_share_the_memory_cache(rectangles: DataConfig) -> None:
    dataset = open_set(rectangles, "ram")
    assert isinstance(dataset._cache, MemoryCache)
    assert [dataset._cache.get(index) for index in range(6)] == [None] * 6
    batches = list(build_loader(dataset, 2, shuffle=False, workers=2))
    assert len(batches) == 3
    for index in range(6):
        found = dataset._cache.get(index)
        assert found is not None and torch.equal(found, dataset._resized(index)[0]) and found.any()


def test_two_loaders_over_one_folder(rectangles: DataConfig) -> None:
    plain, shared = (open_set(rectangles, cache, augment=Augment()) for cache in ("none", "disk"))  # type: ignore[arg-type]
    loaders = [
        build_loader(dataset, 2, shuffle=True, workers=workers) for dataset, workers in ((plain, 0), (shared, 2))
    ]
    for one, other in zip(*loaders, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.targets, other.targets)


def test_the_folder_lies_in_the_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert find_folder(tmp_path) == tmp_path / FOLDER
    assert not caplog.records


def test_shapes_are_drawn_anew_beside_a_cache(tmp_path: Path) -> None:
    make_shapes(tmp_path / "shapes", 2, 1, 1, 32)
    config = DataConfig(
        ("a", "b", "c", "d"), train=(tmp_path / "shapes" / "images" / "train",), path=tmp_path / "shapes"
    )
    filled(config)
    make_shapes(tmp_path / "shapes", 3, 1, 1, 32)
    assert len(open_set(config)) == 3
    same(open_set(config), open_set(config, "none"))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_breaks_during_training_is_named(rectangles: DataConfig, workers: int) -> None:
    dataset = open_set(rectangles, "none", augment=Augment())
    loader = build_loader(dataset, 2, shuffle=True, workers=workers)
    assert isinstance(loader, DataLoader)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        assert len(list(loader)) == 3
    file = image_file(rectangles, 4)
    file.write_bytes(file.read_bytes()[:60])
    dataset.set_epoch(2)
    with pytest.raises(DataError) as error:
        list(loader)
    text = str(error.value)
    assert text.startswith(f"{file}: the image cannot be read (") and text.endswith("); restore or remove it")
    assert "\n" not in text
