"""Batches do not depend on how they are loaded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.ops import box_convert

from data import (
    Augment,
    Batch,
    DataConfig,
    DataError,
    DetectionDataset,
    Sample,
    build_loader,
    collate,
    multi_scale_sizes,
)
from data.dataset import Cache
from data.images import read_image, resize
from data.letterbox import Letterbox
from data.loading import EpochBatches
from tests.data.scenes import ROOT, label_line, rectangle, write_rectangles, write_set


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


def indices(batches: EpochBatches) -> list[int]:
    return [draw.index for batch in batches for draw in batch]


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
    orders = {tuple(indices(EpochBatches(dataset, 3, True, seed))) for seed in range(5)}
    assert len(orders) == 5


def test_ranks_share_the_epoch_evenly(rectangles: DataConfig) -> None:
    """7 images for 2 ranks: the first of the order is taken twice."""
    dataset = DetectionDataset(rectangles, "train", 48)
    whole = indices(EpochBatches(dataset, 2, True, 3))
    shares = [indices(EpochBatches(dataset, 2, True, 3, rank=rank, num_ranks=2)) for rank in range(2)]
    assert [len(s) for s in shares] == [4, 4]
    assert shares[0] == whole[0::2] and shares[1] == [*whole[1::2], whole[0]]
    loaders = [build_loader(dataset, 2, shuffle=True, seed=3, rank=rank, num_ranks=2) for rank in range(2)]
    assert [[i for b in loader for i in b.image_ids] for loader in loaders] == shares


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch size 0, seed 0"),
        ({"workers": -1}, "-1 workers"),
        ({"seed": -1}, "batch size 1, seed -1"),
    ],
)
def test_wrong_arguments_are_named(rectangles: DataConfig, arguments: dict[str, int], message: str) -> None:
    dataset = DetectionDataset(rectangles, "train", 48)
    with pytest.raises(DataError, match=f"^{message}: expected "):
        build_loader(dataset, **{"batch_size": 1, "shuffle": False, **arguments})


def augmented(config: DataConfig, image_weights: bool = False) -> DetectionDataset:
    return DetectionDataset(config, "train", 64, Augment(mixup=0.3), 5, mosaic_epochs=2, image_weights=image_weights)


@pytest.mark.parametrize("image_weights", [False, True])
def test_every_kind_of_batch_depends_on_the_epoch_alone(rectangles: DataConfig, image_weights: bool) -> None:
    """Sizes, weights, mixup and the end of mosaic: with workers that live on, without, and in a run that was resumed."""
    passes = []
    for workers in (2, 0):
        dataset = augmented(rectangles, image_weights)
        loader = build_loader(dataset, 2, shuffle=True, workers=workers, seed=5, sizes_px=multi_scale_sizes(64, 16))
        passes.append([])
        for epoch in range(4) if workers else (3, 1):
            dataset.set_epoch(epoch)
            passes[-1].append(list(loader))
    through, resumed = passes
    assert same(through[3], resumed[0]) and same(through[1], resumed[1])
    assert len({batch.images.shape[-1] for epoch in through for batch in epoch}) >= 4


def test_sizes_are_drawn_alike_for_all_ranks(rectangles: DataConfig) -> None:
    dataset = augmented(rectangles)
    sizes = (48, 64, 80, 96)
    epochs = []
    for epoch in range(40):
        dataset.set_epoch(epoch)
        ranks = [
            [{draw.canvas_hw for draw in batch} for batch in
             EpochBatches(dataset, 2, True, 3, rank=rank, num_ranks=2, sizes_px=sizes)]
            for rank in range(2)
        ]  # fmt: skip
        assert ranks[0] == ranks[1] and all(len(size) == 1 for size in ranks[0])
        epochs.append([next(iter(size)) for size in ranks[0]])
    drawn = [size for epoch in epochs for size in epoch]
    assert set(drawn) == {(size, size) for size in sizes}
    assert all(10 <= drawn.count((size, size)) <= 30 for size in sizes)
    assert len({tuple(epoch) for epoch in epochs}) > 10


def test_a_batch_holds_what_its_size_says(rectangles: DataConfig) -> None:
    dataset = augmented(rectangles)
    for batch in build_loader(dataset, 3, shuffle=True, seed=1, sizes_px=(32, 96)):
        assert batch.images.shape[-2:] in {(32, 32), (96, 96)}
        assert (batch.targets[:, 2:] >= 0).all() and (batch.targets[:, 2:] <= 1).all()


def test_batches_are_channels_last(rectangles: DataConfig) -> None:
    for dataset in (augmented(rectangles), DetectionDataset(rectangles, "train", 64)):
        for workers in (0, 1):
            images = next(iter(build_loader(dataset, 3, shuffle=False, workers=workers))).images
            assert images.is_contiguous(memory_format=torch.channels_last)


def test_rectangular_batches_by_hand(tmp_path: Path) -> None:
    """Longer sides at 64: heights 32, 64, 16, 64 and widths 64, 48, 64, 32. Wide first; half a stride of 16 at least."""
    shapes = {"a": (40, 80), "b": (80, 60), "c": (20, 80), "d": (80, 40)}
    images = {stem: rectangle(h, w, (2, 2, 18, 18), 1) for stem, (h, w) in shapes.items()}
    lines = {stem: [label_line(h, w, (2, 2, 18, 18), 1)] for stem, (h, w) in shapes.items()}
    dataset = DetectionDataset(write_set(tmp_path, images, lines), "train", 64)
    batches = list(build_loader(dataset, 2, shuffle=False, rect_stride_px=16))
    assert [batch.image_ids for batch in batches] == [[2, 0], [1, 3]]
    # 32 + 8 -> 48, 64 + 8 -> 80; 48 + 8 -> 64
    assert [tuple(batch.images.shape[2:]) for batch in batches] == [(48, 80), (80, 64)]
    assert batches[0].letterboxes == [Letterbox(0.8, 0.8, 8, 16, (20, 80)), Letterbox(0.8, 0.8, 8, 8, (40, 80))]
    for batch in batches:
        height, width = batch.images.shape[2:]
        for row in batch.targets:
            letterbox = batch.letterboxes[int(row[0])]
            assert letterbox is not None
            box = box_convert(row[2:], "cxcywh", "xyxy") * torch.tensor([width, height, width, height])
            torch.testing.assert_close(
                letterbox.to_original(box[None])[0], torch.tensor([2.0, 2, 18, 18]), atol=1e-3, rtol=0
            )


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_a_canvas_for_all_images(tmp_path: Path, cache: Cache) -> None:
    """On 32 x 64 at 64 the wide image keeps its size and the high one is halved: resized from its file, labels too."""
    shapes = {"a": (40, 80), "b": (80, 60)}
    images = {stem: rectangle(h, w, (2, 2, 18, 18), 1) for stem, (h, w) in shapes.items()}
    lines = {stem: [label_line(h, w, (2, 2, 18, 18), 1)] for stem, (h, w) in shapes.items()}
    dataset = DetectionDataset(write_set(tmp_path, images, lines), "train", 64, cache=cache)
    (batch,) = build_loader(dataset, 2, shuffle=False, canvas_hw=(32, 64))
    assert tuple(batch.images.shape) == (2, 3, 32, 64)
    assert batch.letterboxes == [Letterbox(0.8, 0.8, 0, 0, (40, 80)), Letterbox(0.4, 0.4, 20, 0, (80, 60))]
    assert torch.equal(batch.images[1, :, :, 20:44], resize(read_image(dataset.files[1]), (32, 24)))
    assert (batch.images[1, :, :, :20] == 114).all()
    for row, letterbox in zip(batch.targets, batch.letterboxes, strict=True):
        assert letterbox is not None
        box = box_convert(row[2:], "cxcywh", "xyxy") * torch.tensor([64, 32, 64, 32])
        torch.testing.assert_close(
            letterbox.to_original(box[None])[0], torch.tensor([2.0, 2, 18, 18]), atol=1e-3, rtol=0
        )


def test_rectangular_ranks_see_each_image(rectangles: DataConfig) -> None:
    dataset = DetectionDataset(rectangles, "train", 64)
    ranks = [indices(EpochBatches(dataset, 2, False, rank=rank, num_ranks=3, rect_stride_px=16)) for rank in range(3)]
    assert [len(rank) for rank in ranks] == [3, 3, 3]
    assert {i for rank in ranks for i in rank} == set(range(7))


def test_weighted_epochs_draw_rare_classes_more_often(tmp_path: Path) -> None:
    """Nine images of class 0 and one of class 1: weights 1/18 and 1/2."""
    box = (4, 4, 24, 24)
    kinds = {f"image{i}": int(i == 7) for i in range(10)}
    images = {stem: rectangle(32, 32, box, kind) for stem, kind in kinds.items()}
    lines = {stem: [label_line(32, 32, box, kind)] for stem, kind in kinds.items()}
    dataset = DetectionDataset(write_set(tmp_path, images, lines), "train", 32, Augment(), image_weights=True)
    drawn, mosaics = [], []
    for epoch in range(60):
        dataset.set_epoch(epoch)
        batches = list(EpochBatches(dataset, 4, True, 3))
        assert [len(batch) for batch in batches] == [4, 4, 2]
        drawn += [draw.index for batch in batches for draw in batch]
        shares = [indices(EpochBatches(dataset, 4, True, 3, rank=rank, num_ranks=2)) for rank in range(2)]
        together = [i for pair in zip(*shares, strict=True) for i in pair]
        assert together == drawn[-10:] and [len(share) for share in shares] == [5, 5]
        turns = [(draw.index, draw.turn) for batch in batches for draw in batch]
        assert len(set(turns)) == len(turns)
        mosaics += [int(kind) for kind in dataset[0].targets[:, 0]]
    assert 240 <= drawn.count(7) <= 360 and set(drawn) == set(range(10))
    # Three of a mosaic's four images are drawn by weight.
    assert 0.2 < np.mean(mosaics) < 0.6


@pytest.mark.parametrize(
    "arguments",
    [
        {"rank": 2, "num_ranks": 2},
        {"sizes_px": (32,)},
        {"canvas_hw": (0, 32)},
        {"canvas_hw": (32, 32), "rect_stride_px": 32},
        {"rect_stride_px": 0},
        {"rect_stride_px": 32, "shuffle": True},
    ],
)
def test_what_our_own_callers_never_ask_for(rectangles: DataConfig, arguments: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        build_loader(DetectionDataset(rectangles, "train", 48), **{"batch_size": 1, "shuffle": False, **arguments})


PATIENT = """
import os, signal, sys
from pathlib import Path
from data import Augment, DataConfig, DetectionDataset, build_loader

root = Path(sys.argv[1])
config = DataConfig(names=tuple("abcd"), train=(root / "images" / "train",), path=root)
loader = build_loader(DetectionDataset(config, "train", 48, Augment()), 2, shuffle=True, workers=2)
for _ in loader:
    pass
asked = []
signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
print("ready", flush=True)
while not asked:
    pass
print(sum(len(list(loader)) for _ in range(3)))
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    for _ in loader:
        os.killpg(0, signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.skipif(os.name != "posix", reason="process groups")
def test_ctrl_c_reaches_the_main_process_alone(rectangles: DataConfig) -> None:
    """As a terminal does, the signal goes to the whole group: a main process that wants to finish can go on loading."""
    process = subprocess.Popen(
        [sys.executable, "-c", PATIENT, str(rectangles.path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    # Three epochs of four batches, then an interrupt that ends the program.
    assert (process.returncode, out.split(), err) == (0, ["12", "interrupted"], "")
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_workers_are_out_of_reach_of_signals_to_the_whole_process_group(rectangles: DataConfig) -> None:
    """Ctrl-C in a terminal and torchrun's SIGTERM go to a group, and a worker that dies takes its run along."""
    loader = build_loader(DetectionDataset(rectangles, "train", 48), 3, shuffle=False, workers=1)
    batches = iter(loader)
    next(batches)
    (worker,) = loader._iterator._workers
    assert os.getpgid(worker.pid) == worker.pid != os.getpgid(0)
    assert len(list(batches)) == 2
