"""Image weights and sizes by hand."""

from __future__ import annotations

import numpy as np
import pytest

from data import DataError, multi_scale_sizes
from data.dataset import weigh_images


def labels(*classes: int) -> np.ndarray:
    return np.array([[kind, 0.5, 0.5, 0.1, 0.1] for kind in classes], np.float32).reshape(-1, 5)


def test_weights_by_hand() -> None:
    """Class 0: 3 objects, class 1: none, class 2: 2 objects, so an object weighs 1/3, -, 1/2."""
    weights = weigh_images([labels(0, 0), labels(0, 2), labels(2)])
    np.testing.assert_allclose(weights, np.array([2 / 3, 1 / 3 + 1 / 2, 1 / 2]) / 2)


def test_rarer_classes_are_seen_more_often() -> None:
    rng = np.random.default_rng(0)
    sets = [labels(*rng.choice(4, size=5, p=[0.7, 0.2, 0.09, 0.01])) for _ in range(200)]
    weights = weigh_images(sets)
    counts = np.array([np.bincount(rows[:, 0].astype(int), minlength=4) for rows in sets])
    shares = (weights[:, None] * counts / counts.sum(axis=1, keepdims=True)).sum(axis=0)
    assert weights.sum() == pytest.approx(1)
    # Of one class a draw sees more the rarer it is, compared with drawing all alike.
    gain = shares / (counts.sum(axis=0) / counts.sum())
    assert (np.diff(gain) > 0).all() and gain[3] > 4


def test_images_without_objects_keep_their_share() -> None:
    weights = weigh_images([labels(0), labels(), labels(0, 1), labels()])
    np.testing.assert_allclose(weights, np.array([0.5, 1.0, 1.5, 1.0]) / 4)
    np.testing.assert_allclose(weigh_images([labels(), labels()]), [0.5, 0.5])


@pytest.mark.parametrize(
    ("size_px", "stride_px", "expected"),
    [
        (320, 32, (160, 192, 224, 256, 288, 320, 352, 384, 416, 448, 480)),
        (1280, 64, tuple(range(640, 1921, 64))),
        # 48 to 144: only what the stride divides
        (96, 32, (64, 96, 128)),
        (64, 64, (64,)),
    ],
)
def test_multi_scale_sizes(size_px: int, stride_px: int, expected: tuple[int, ...]) -> None:
    if len(expected) > 1:
        assert multi_scale_sizes(size_px, stride_px) == expected
        return
    with pytest.raises(
        DataError, match=r"^multi-scale: image size 64 leaves no multiple of the stride 64 to choose from"
    ):
        multi_scale_sizes(size_px, stride_px)
