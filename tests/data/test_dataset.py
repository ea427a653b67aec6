"""Samples, what is left out, and the ground truth."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.ops import box_convert

import data.dataset
from data import Augment, DataConfig, DataError, DetectionDataset, load_data_config
from data.dataset import Cache, Draw
from data.letterbox import Letterbox
from tests.data.scenes import BCCD, ROOT, label_line, rectangle, visible_box, write_rectangles, write_set

SIZE = 64


@pytest.fixture
def rectangles(tmp_path: Path) -> DataConfig:
    return write_rectangles(tmp_path / "rectangles")


@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
@pytest.mark.parametrize(
    "augment", [None, Augment(mosaic=0, hsv_h=0, hsv_s=0, hsv_v=0)], ids=["letterboxed", "augmented"]
)
def test_targets_fit_the_pixels(rectangles: DataConfig, augment: Augment | None, cache: Cache) -> None:
    dataset = DetectionDataset(rectangles, "train", SIZE, augment, cache=cache)
    seen_targets = 0
    for epoch in range(6 if augment else 1):
        dataset.set_epoch(epoch)
        for sample in (dataset[i] for i in range(len(dataset))):
            assert sample.image.shape == (3, SIZE, SIZE) and sample.image.dtype == torch.uint8
            assert sample.targets.dtype == torch.float32
            assert (sample.letterbox is None) == (augment is not None)
            for row in sample.targets:
                assert row[0] == sample.image_id % 4
                box = visible_box(sample.image, int(row[0]))
                assert box is not None
                assert np.abs(box_convert(row[1:], "cxcywh", "xyxy").numpy() * SIZE - box).max() <= 1.5
                seen_targets += 1
    assert seen_targets >= (30 if augment else 6)


def test_a_letterboxed_sample_by_hand(tmp_path: Path) -> None:
    box = (10, 8, 30, 28)
    config = write_set(tmp_path, {"a": rectangle(32, 64, box, 2)}, {"a": [label_line(32, 64, box, 2)]})
    sample = DetectionDataset(config, "train", 128)[0]
    assert sample.letterbox == Letterbox(2.0, 2.0, 0, 32, (32, 64))
    assert sample.original_hw == (32, 64) and sample.image_id == 0
    # x 20 to 60, y 16 + 32 to 56 + 32, of 128
    np.testing.assert_allclose(sample.targets, [[2, 40 / 128, 68 / 128, 40 / 128, 40 / 128]], atol=1e-5)
    assert sample.image[:, :32].unique().tolist() == [114]


def test_caching_changes_no_sample(rectangles: DataConfig) -> None:
    for augment in (None, Augment(mosaic=0.5)):
        fast, slow = (DetectionDataset(rectangles, "train", SIZE, augment, cache=cache) for cache in ("ram", "none"))
        for one, other in zip(fast, slow, strict=True):
            assert torch.equal(one.image, other.image) and torch.equal(one.targets, other.targets)


def test_a_sample_cannot_spoil_the_cache(rectangles: DataConfig) -> None:
    for augment in (None, Augment(), Augment(mosaic=0)):
        dataset = DetectionDataset(rectangles, "train", SIZE, augment)
        before = dataset[0].image.clone()
        dataset[0].image.zero_()
        assert torch.equal(dataset[0].image, before)


def test_a_sample_depends_on_seed_epoch_and_index_alone(rectangles: DataConfig) -> None:
    def image(seed: int, epoch: int, index: int, noise: int = 0) -> torch.Tensor:
        torch.manual_seed(noise)
        np.random.seed(noise)
        dataset = DetectionDataset(rectangles, "train", SIZE, Augment(), seed=seed)
        dataset.set_epoch(epoch)
        _ = [dataset[i] for i in range(noise)]
        return dataset[index].image

    first = image(3, 5, 2)
    assert torch.equal(first, image(3, 5, 2, noise=4))
    for other in ((4, 5, 2), (3, 6, 2), (3, 5, 1)):
        assert not torch.equal(first, image(*other))


def test_targets_fit_the_pixels_at_any_size(rectangles: DataConfig) -> None:
    augment = Augment(mosaic=0, hsv_h=0, hsv_s=0, hsv_v=0)
    dataset = DetectionDataset(rectangles, "train", SIZE, augment)
    seen_targets = 0
    for size_px in (32, 96):
        for epoch in range(4):
            dataset.set_epoch(epoch)
            for index in range(len(dataset)):
                sample = dataset[Draw(index, (size_px, size_px))]
                assert sample.image.shape == (3, size_px, size_px)
                for row in sample.targets:
                    box = visible_box(sample.image, int(row[0]))
                    assert box is not None
                    assert np.abs(box_convert(row[1:], "cxcywh", "xyxy").numpy() * size_px - box).max() <= 1.5
                    seen_targets += 1
    assert seen_targets >= 30


def test_a_rectangular_sample_maps_back_exactly(rectangles: DataConfig) -> None:
    dataset = DetectionDataset(rectangles, "train", SIZE)
    truth = dataset.ground_truth()["annotations"]
    for index in range(len(dataset)):
        square = dataset[index]
        sample = dataset[Draw(index, (96, 80))]
        assert sample.image.shape == (3, 96, 80) and sample.letterbox is not None and square.letterbox is not None
        boxes = box_convert(sample.targets[:, 1:], "cxcywh", "xyxy") * torch.tensor([80.0, 96, 80, 96])
        x, y, w, h = truth[index]["bbox"]
        torch.testing.assert_close(
            sample.letterbox.to_original(boxes)[0], torch.tensor([x, y, x + w, y + h]), atol=1e-3, rtol=0
        )
        seen = visible_box(sample.image, index % 4)
        assert seen is not None and np.abs(seen - boxes[0].numpy()).max() <= 1
        (one, one_box), (other, other_box) = (
            (s.image[:, b.top_px :, b.left_px :], b)
            for s, b in ((square, square.letterbox), (sample, sample.letterbox))
        )
        height, width = (
            round(n * r) for n, r in zip(one_box.original_hw, (one_box.ratio_y, one_box.ratio_x), strict=True)
        )
        assert torch.equal(one[:, :height, :width], other[:, :height, :width])
        assert one_box.ratio_x == other_box.ratio_x


def test_mosaic_and_mixup_end_before_the_run_does(rectangles: DataConfig) -> None:
    """From then on a sample is that of a data set which never had them."""
    always, closing, never = (
        DetectionDataset(rectangles, "train", SIZE, augment, seed=2, mosaic_epochs=epochs)
        for augment, epochs in ((Augment(mixup=1), None), (Augment(mixup=1), 3), (Augment(mosaic=0, mixup=0), None))
    )
    for epoch in range(5):
        for dataset in (always, closing, never):
            dataset.set_epoch(epoch)
        for index in range(len(closing)):
            same_as = never if epoch >= 3 else always
            assert torch.equal(closing[index].image, same_as[index].image)
            assert torch.equal(closing[index].targets, same_as[index].targets)
        assert not torch.equal(always[0].image, never[0].image)


def test_mixup_shows_two_samples(rectangles: DataConfig) -> None:
    """Without other changes a sample is the blend of two letterboxed images, with the labels of both."""
    still = Augment(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    plain = DetectionDataset(rectangles, "train", SIZE, still)
    images = [plain[i] for i in range(len(plain))]
    mixed = DetectionDataset(rectangles, "train", SIZE, replace(still, mixup=1))
    shares = []
    for epoch in range(12):
        mixed.set_epoch(epoch)
        for index, sample in enumerate(mixed):
            first, second = sample.targets[0], sample.targets[1]
            assert len(sample.targets) == 2 and torch.equal(first, images[index].targets[0])
            other = next(i for i, image in enumerate(images) if torch.equal(image.targets[0], second))
            one, two = images[index].image.float(), images[other].image.float()
            if other != index:
                differs = (one - two).abs() > 100
                share = ((sample.image - two) / (one - two))[differs]
                assert share.std() < 0.01
                shares.append(float(share.mean()))
            else:
                assert torch.equal(sample.image, images[index].image)
    assert len(shares) > 40 and 0.45 < np.mean(shares) < 0.55 and 0.02 < np.std(shares) < 0.12


def test_mixup_is_drawn_with_its_probability(rectangles: DataConfig) -> None:
    half = DetectionDataset(rectangles, "train", SIZE, Augment(mosaic=0, scale=0, translate=0, mixup=0.5))
    counts = []
    for epoch in range(20):
        half.set_epoch(epoch)
        counts += [len(half[i].targets) for i in range(len(half))]
    assert set(counts) == {1, 2} and 40 <= counts.count(2) <= 80


def test_the_turns_of_an_image_differ(rectangles: DataConfig) -> None:
    dataset = DetectionDataset(rectangles, "train", SIZE, Augment())
    assert torch.equal(dataset[Draw(1)].image, dataset[1].image)
    assert not torch.equal(dataset[Draw(1, turn=1)].image, dataset[1].image)


def test_equal_images_are_augmented_differently(tmp_path: Path) -> None:
    image = rectangle(SIZE, SIZE, (8, 8, 40, 30))
    dataset = DetectionDataset(write_set(tmp_path, {"a": image, "b": image}, {}), "train", SIZE, Augment(mosaic=0))
    assert not torch.equal(dataset[0].image, dataset[1].image)


@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
def test_unreadable_images_are_left_out_and_named(rectangles: DataConfig, cache: Cache) -> None:
    folder = rectangles.path / "images" / "train"
    (folder / "aa_empty.png").touch()
    (folder / "image2.png").write_bytes((folder / "image2.png").read_bytes()[:80])
    dataset = DetectionDataset(rectangles, "train", SIZE, cache=cache)
    assert [file.stem for file in dataset.files] == ["image0", "image1", "image3", "image4", "image5"]
    assert len(dataset.problems) == 2
    assert dataset.problems[0] == (
        f"{folder / 'aa_empty.png'}: the image cannot be read (the file has 0 bytes); restore or remove it; "
        "the image was left out"
    )
    assert dataset.problems[1].startswith(f"{folder / 'image2.png'}: the image cannot be read (")
    sample = dataset[2]
    assert sample.targets[0, 0] == 3 and visible_box(sample.image, 3) is not None


def test_problems_are_logged_once(rectangles: DataConfig, caplog: pytest.LogCaptureFixture) -> None:
    (rectangles.path / "images" / "train" / "empty.png").touch()
    with caplog.at_level(logging.WARNING, logger="data"):
        dataset = DetectionDataset(rectangles, "train", SIZE)
    assert [r.getMessage() for r in caplog.records] == [f"split 'train': 1 problems, the first: {dataset.problems[0]}"]


def test_a_listed_image_that_is_missing_is_named(rectangles: DataConfig) -> None:
    (rectangles.path / "train.txt").write_text("./images/train/image0.png\nimages/train/absent.png\n")
    config = DataConfig(names=rectangles.names, train=(rectangles.path / "train.txt",), path=rectangles.path)
    dataset = DetectionDataset(config, "train", SIZE)
    assert len(dataset) == 1
    file = rectangles.path / "images" / "train" / "absent.png"
    assert dataset.problems == [
        f"{file}: the image cannot be read (No such file or directory); restore or remove it; looked for it at {file}, "
        "images/train/absent.png; the image was left out"
    ]


def test_a_split_without_usable_images_is_an_error(tmp_path: Path) -> None:
    config = write_set(tmp_path, {}, {})
    with pytest.raises(DataError, match=r"^split 'train': no image in .*images/train; known are .bmp, .jpeg, .jpg, "):
        DetectionDataset(config, "train", SIZE)
    (tmp_path / "images" / "train" / "a.jpg").touch()
    with pytest.raises(DataError, match=r"^split 'train': none of its 1 images can be used; the first: .*a\.jpg: "):
        DetectionDataset(config, "train", SIZE)


def test_an_image_that_changes_under_way_is_an_error(rectangles: DataConfig) -> None:
    dataset = DetectionDataset(rectangles, "train", SIZE, cache="none")
    (rectangles.path / "images" / "train" / "image0.png").write_bytes(dataset.files[1].read_bytes())
    with pytest.raises(DataError, match=r"image0\.png: the image changed since the data set was opened; start again$"):
        _ = dataset[0]


def test_a_cache_that_does_not_fit_is_not_made(
    rectangles: DataConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # The longer side becomes 64, the shorter one 64 * shorter / longer.
    sizes = [(40 + 4 * i, 64 - 3 * i) for i in range(6)]
    need = sum(3 * 64 * round(64 * min(size) / max(size)) for size in sizes)

    def cached(free: int | None, holders: int = 1) -> bool:
        monkeypatch.setattr(data.dataset, "available_bytes", lambda: free)
        return DetectionDataset(rectangles, "train", SIZE, holders=holders)._cache is not None

    assert cached(6 * need, holders=3) and cached(2 * need) and cached(None) and not caplog.records
    assert not cached(2 * need - 2) and not cached(6 * need - 2, holders=3)
    assert "split 'train': 0.0 GiB for its 6 images are more than half of the 0.0 GiB available" in caplog.text


def test_available_memory_is_known_here() -> None:
    available = data.dataset.available_bytes()
    assert available is None or 2**20 < available < 2**50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"image_size_px": 0}, "image size 0, expected"), ({"image_size_px": 32, "seed": -1}, "seed -1, expected")],
)
def test_wrong_arguments_are_named(rectangles: DataConfig, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=f"^{message}"):
        DetectionDataset(rectangles, "train", **arguments)  # type: ignore[arg-type]


def test_indices_out_of_range_end_an_iteration(rectangles: DataConfig) -> None:
    dataset = DetectionDataset(rectangles, "train", SIZE)
    assert [sample.image_id for sample in dataset] == list(range(6)) == list(range(len(dataset)))
    with pytest.raises(IndexError):
        _ = dataset[-1]


def test_ground_truth_by_hand(tmp_path: Path) -> None:
    image = rectangle(40, 80, (10, 10, 30, 30))
    lines = ["1 0.25 0.5 0.25 0.5", "0 0.9 0.5 0.4 0.25"]
    config = write_set(tmp_path, {"a": image, "b": image}, {"b": lines}, num_classes=2)
    truth = DetectionDataset(config, "train", 32).ground_truth()
    assert truth["images"] == [
        {"id": 0, "file_name": "a.png", "width": 80, "height": 40},
        {"id": 1, "file_name": "b.png", "width": 80, "height": 40},
    ]
    assert truth["categories"] == [{"id": 0, "name": "class0"}, {"id": 1, "name": "class1"}]
    first, second = truth["annotations"]
    assert first == {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0}
    # Clipped: 56 to 88 becomes 56 to 80.
    assert second["bbox"] == pytest.approx([56, 15, 24, 10], abs=1e-4)
    assert json.loads(json.dumps(truth)) == truth


@pytest.mark.skipif(not BCCD.is_dir(), reason="the reference data ../shared/data/bccd is not there")
def test_ground_truth_of_bccd_is_that_of_its_annotations() -> None:
    dataset = DetectionDataset(load_data_config(ROOT / "data" / "bccd.yaml", BCCD.parent), "val", 320, cache="none")
    truth = dataset.ground_truth()
    expected = json.loads((BCCD / "annotations" / "val.json").read_text())
    assert dataset.problems == []
    assert truth["images"] == expected["images"]
    assert [c["name"] for c in truth["categories"]] == ["RBC", "WBC", "Platelets"]
    assert len(truth["annotations"]) == len(expected["annotations"])

    def rows(content: dict[str, list[dict[str, object]]]) -> np.ndarray:
        found = [[a["image_id"], a["category_id"], *a["bbox"]] for a in content["annotations"]]  # type: ignore[misc]
        return np.array(sorted(found, key=lambda row: [round(value) for value in row]))

    np.testing.assert_allclose(rows(truth), rows(expected), atol=1)


@pytest.mark.skipif(not BCCD.is_dir(), reason="the reference data ../shared/data/bccd is not there")
@pytest.mark.parametrize(("split", "count"), [("train", 205), ("test", 72)])
def test_bccd_is_whole(split: str, count: int) -> None:
    dataset = DetectionDataset(load_data_config(ROOT / "data" / "bccd.yaml", BCCD.parent), split, 320, cache="none")
    assert len(dataset) == count and dataset.problems == []
