"""Non-maximum suppression on hand-made predictions."""

import pytest
import torch

import models

# cx, cy, w, h, objectness, two classes. The first two overlap by IoU 0.82, the third lies apart.
ROWS = torch.tensor(
    [
        [50.0, 50, 20, 20, 0.9, 0.8, 0.5],
        [51, 51, 20, 20, 1.0, 0.3, 0.9],
        [90, 20, 10, 10, 0.5, 0.9, 0.1],
    ]
)


def suppress(*args, **options):
    return models.non_max_suppression(torch.stack(args) if args else ROWS[None], **options)


def test_best_class_alone():
    (found,) = suppress()
    expected = [[41, 41, 61, 61, 0.9, 1], [40, 40, 60, 60, 0.72, 0], [85, 15, 95, 25, 0.45, 0]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_multi_label_counts_every_class():
    (found,) = suppress(multi_label=True, iou=0.5)
    # In each class the better of the two overlapping boxes suppresses the other.
    torch.testing.assert_close(found[:, 4:], torch.tensor([[0.9, 1], [0.72, 0], [0.45, 0]]))
    (loose,) = suppress(multi_label=True, iou=0.9, conf=0.01)
    torch.testing.assert_close(loose[:, 4], torch.tensor([0.9, 0.72, 0.45, 0.45, 0.3, 0.05]))


def test_class_agnostic():
    (found,) = suppress(class_agnostic=True)
    assert found[:, 5].tolist() == [1, 0]
    torch.testing.assert_close(found[:, 4], torch.tensor([0.9, 0.45]))


def test_some_classes():
    assert suppress(classes=[1])[0][:, 5].tolist() == [1]
    assert suppress(classes=[])[0].shape == (0, 6)


def test_score_must_exceed_the_threshold():
    assert len(suppress(conf=0.72)[0]) == 1
    assert len(suppress(conf=0.46)[0]) == 2
    assert suppress(conf=0.95)[0].shape == (0, 6)


def test_at_most_so_many():
    assert suppress(max_detections=1)[0][:, 4].tolist() == pytest.approx([0.9])


def test_images_are_separate_and_may_be_empty():
    empty = torch.zeros_like(ROWS)
    found = suppress(empty, ROWS, empty)
    assert [len(image) for image in found] == [0, 3, 0]
    assert [len(image) for image in models.non_max_suppression(torch.zeros(2, 0, 7))] == [0, 0]


def test_best_candidates_survive_the_cap():
    """40,000 boxes that do not overlap, scores in random order: the 300 best are found."""
    n = 40000
    scores = torch.linspace(0.3, 0.9, n)[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    predictions = torch.zeros(n, 6)
    predictions[:, 0] = torch.arange(n) * 2
    predictions[:, 2:4] = 1
    predictions[:, 4], predictions[:, 5] = scores, 1
    (found,) = models.non_max_suppression(predictions[None], class_agnostic=True)
    torch.testing.assert_close(found[:, 4], scores.sort(descending=True).values[:300])


def test_candidates_are_capped(monkeypatch):
    monkeypatch.setattr("models.postprocess._MAX_CANDIDATES", 2)
    assert suppress()[0][:, 4].tolist() == pytest.approx([0.9, 0.72])


@pytest.mark.parametrize(("options", "message"), [({"conf": 1.5}, "conf is 1.5"), ({"iou": -1}, "iou is -1")])
def test_thresholds_outside(options, message):
    with pytest.raises(models.ModelError, match=message):
        suppress(**options)


def test_wrong_shape():
    with pytest.raises(models.ModelError, match=r"shape \(3, 7\)"):
        models.non_max_suppression(ROWS)
