"""Batches do not depend on how they are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from boxes import Letterbox
from data import Augment, Batch, DataConfig, DataError, DetectionDataset, Sample, build_loader, collate
from data.loading import EpochSampler
from tests.data.scenes import write_rectangles


@pytest.fixture
def rectangles(tmp_path: Path) -> DataConfig:
    return write_rectangles(tmp_path / "rectangles", count=7)


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        a.image_ids == b.image_ids
        and torch.equal(a.images, b.images)
        and torch.equal(a.targets, b.targets)
        and a.letterboxes == b.letterboxes
        for a, b in zip(one, other, strict=True)
    )


def test_collate_by_hand() -> None:
    box = Letterbox(1.0, 1.0, 0, 0, (4, 4))
    samples = [
        Sample(torch.full((3, 4, 4), i, dtype=torch.uint8), torch.full((count, 5), i + 0.5), 10 + i, letterbox, (4, 4))
        for i, (count, letterbox) in enumerate([(2, box), (0, None), (1, None)])
    ]
    batch = collate(samples)
    assert batch.images.dtype == torch.uint8 and batch.images[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert batch.targets.tolist() == [[0, *[0.5] * 5], [0, *[0.5] * 5], [2, *[2.5] * 5]]
    assert batch.image_ids == [10, 11, 12] and batch.letterboxes == [box, None, None]


def test_collate_without_any_target() -> None:
    batch = collate([Sample(torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(0, 5), 0, None, (4, 4))] * 2)
    assert batch.targets.shape == (0, 6) and batch.targets.dtype == torch.float32


@pytest.mark.parametrize("augment", [None, Augment()], ids=["plain", "augmented"])
def test_batches_depend_on_the_epoch_and_not_on_the_workers(rectangles: DataConfig, augment: Augment | None) -> None:
    """Persistent workers, which copied the data set when they began, follow set_epoch."""
    passes: dict[int, list[list[Batch]]] = {}
    for workers in (0, 2):
        dataset = DetectionDataset(rectangles, "train", 48, augment, seed=5)
        loader = build_loader(dataset, 3, shuffle=True, workers=workers, seed=5)
        passes[workers] = []
        for epoch in (0, 1, 0):
            dataset.set_epoch(epoch)
            passes[workers].append(list(loader))
    for alone, spread in zip(passes[0], passes[2], strict=True):
        assert same(alone, spread)
    first, second, again = passes[2]
    assert same(first, again)
    assert [b.image_ids for b in first] != [b.image_ids for b in second]
    by_index = [{i: image for b in p for i, image in zip(b.image_ids, b.images, strict=True)} for p in (first, second)]
    differs = [not torch.equal(by_index[0][i], by_index[1][i]) for i in range(7)]
    assert all(differs) if augment else not any(differs)


def test_loading_leaves_the_global_generator_alone(rectangles: DataConfig) -> None:
    loader = build_loader(DetectionDataset(rectangles, "train", 48, Augment()), 3, shuffle=True)
    before = torch.get_rng_state()
    list(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_each_image_once_and_in_order_without_shuffling(rectangles: DataConfig) -> None:
    dataset = DetectionDataset(rectangles, "train", 48)
    assert [b.image_ids for b in build_loader(dataset, 3, shuffle=False)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [b.image_ids for b in build_loader(dataset, 3, shuffle=False, drop_last=True)] == [[0, 1, 2], [3, 4, 5]]
    shuffled = [i for b in build_loader(dataset, 3, shuffle=True) for i in b.image_ids]
    assert shuffled != sorted(shuffled) == list(range(7))


def test_the_order_depends_on_the_seed(rectangles: DataConfig) -> None:
    dataset = DetectionDataset(rectangles, "train", 48)
    orders = {tuple(EpochSampler(dataset, True, seed)) for seed in range(5)}
    assert len(orders) == 5


def test_ranks_share_the_epoch_evenly(rectangles: DataConfig) -> None:
    """7 images for 2 ranks: the first of the order is taken twice."""
    dataset = DetectionDataset(rectangles, "train", 48)
    whole = list(EpochSampler(dataset, True, 3))
    shares = [list(EpochSampler(dataset, True, 3, rank, 2)) for rank in range(2)]
    assert [len(s) for s in shares] == [4, 4]
    assert shares[0] == whole[0::2] and shares[1] == [*whole[1::2], whole[0]]
    loaders = [build_loader(dataset, 2, shuffle=True, seed=3, rank=rank, num_ranks=2) for rank in range(2)]
    assert [[i for b in loader for i in b.image_ids] for loader in loaders] == shares


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch size 0 and 0 workers"),
        ({"workers": -1}, "batch size 1 and -1 workers"),
        ({"rank": 2, "num_ranks": 2}, "rank 2 of 2, seed 0"),
        ({"seed": -1}, "rank 0 of 1, seed -1"),
    ],
)
def test_wrong_arguments_are_named(rectangles: DataConfig, arguments: dict[str, int], message: str) -> None:
    dataset = DetectionDataset(rectangles, "train", 48)
    with pytest.raises(DataError, match=f"^{message}: expected "):
        build_loader(dataset, **{"batch_size": 1, "shuffle": False, **arguments})
