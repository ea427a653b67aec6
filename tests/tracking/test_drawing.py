"""Boxes land where they are, in RGB as in the planes of a video."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from tracking import Painter, drawing
from tracking.drawing import PALETTE, _values

NAMES = ["cat", "dog"]


def planes(height: int, width: int, space: str) -> tuple[np.ndarray, ...]:
    half = 1 if space == "rgb" else 2
    sizes = [(height, width)] + 2 * [(-(-height // half), -(-width // half))]
    return tuple(np.zeros(size, np.uint8) for size in sizes)


def test_an_outline_to_the_pixel() -> None:
    drawn = planes(40, 60, "rgb")
    Painter(NAMES, "rgb", line_px=2, labels=False, scores=False).draw(drawn, [(10, 5, 30, 25, 0.9, 1)])
    expected = np.zeros((40, 60), bool)
    expected[5:26, 10:31] = True
    expected[7:24, 12:29] = False
    for plane, value in zip(drawn, bytes.fromhex(PALETTE[1][1:]), strict=True):
        assert np.array_equal(plane, np.where(expected, value, 0))


def test_chroma_of_half_the_resolution() -> None:
    luma, blue, red = planes(40, 60, "yuv")
    Painter(NAMES, "yuv", line_px=2, labels=False, scores=False).draw((luma, blue, red), [(10, 6, 30, 26, 0.9, 0)])
    colour = _values((0xD6, 0x27, 0x28), "yuv")
    assert (luma[6:8, 10:31] == colour[0]).all() and not luma[8:24, 12:28].any()
    assert (blue[3, 5:16] == colour[1]).all() and (red[3:14, 5] == colour[2]).all() and not blue[4:12, 6:14].any()


@pytest.mark.parametrize("space", ["rgb", "yuv"])
@pytest.mark.parametrize("box", [(-5, -5, 200, 200), (58, 38, 59.9, 39.9), (0, 0, 0, 0), (3, 0, 9, 4)])
def test_what_leaves_the_picture_is_cut(space: str, box: tuple[float, ...]) -> None:
    drawn = planes(40, 60, space)
    Painter(NAMES, space).draw(drawn, [(*box, 0.5, 7 % 2)])  # type: ignore[arg-type]
    assert drawn[0].any()


def test_labels_say_class_and_score_above_the_box() -> None:
    def inked(**style: bool) -> int:
        drawn = planes(100, 200, "rgb")
        Painter(NAMES, "rgb", **style).draw(drawn, [(20, 60, 120, 90, 0.75, 1)])
        return int((drawn[2][:60] > 0).sum())

    assert inked() > inked(labels=False) > inked(labels=False, scores=False) == 0
    assert inked() > inked(scores=False) > 0


def test_the_best_is_on_top_and_labels_are_drawn_once() -> None:
    painter = Painter(NAMES, "rgb", labels=False, scores=False)
    drawn = planes(40, 60, "rgb")
    painter.draw(drawn, [(10, 10, 30, 30, 0.9, 1), (10, 10, 30, 30, 0.4, 0)])
    assert drawn[0][10, 10] == int(PALETTE[1][1:3], 16)
    labelled = Painter(NAMES, "rgb")
    for _ in range(5):
        labelled.draw(planes(100, 200, "rgb"), [(20, 60, 120, 90, 0.75, 1)])
    assert labelled._strip.cache_info().misses == 1


def test_luma_and_chroma_of_known_colours() -> None:
    assert _values((255, 255, 255), "yuv") == (235, 128, 128)
    assert _values((0, 0, 0), "yuv") == (16, 128, 128)
    assert _values((255, 0, 0), "yuv") == (81, 90, 240)


@pytest.mark.parametrize("pair", ["éè", "ßö", "ğş", "ЖД", "αβ"])
def test_letters_beyond_ascii_can_be_told_apart(pair: str) -> None:
    first, second = (np.full((3, 64, 64), 255, np.uint8) for _ in pair)
    for letter, planes in zip(pair, (first, second), strict=True):
        Painter([letter], "rgb", scores=False).draw(tuple(planes), [[2, 30, 60, 60, 1.0, 0]])
    assert not np.array_equal(first, second)


def test_letters_that_no_font_has_are_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(drawing, "_SYSTEM_FONTS", ())
    drawing._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for name in ("\ue000", "\ue001"):
            Painter([name], "rgb").draw(tuple(np.zeros((3, 64, 64), np.uint8)), [[2, 30, 60, 60, 1.0, 0]])
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == len(caplog.records) == 1
