"""Detections as files: YOLO's text, one a picture, and one JSON list as COCO's results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from slim import write_text_atomically


class DetectionFiles:
    """``labels/NAME.txt`` (of videos ``NAME_FRAME.txt``, from 1) and ``detections.json`` in a folder, each where asked for.

    A line of text is class, centre x, centre y, width, height, normalised to 0..1, and with ``scores`` the score; pictures
    without a detection have an empty file. The JSON appears when it is closed: of each detection image_id (counts pictures
    over all sources, from 0), file, frame (of videos, from 0), category_id and name of the class, bbox (x, y, width, height
    in pixels of the picture) and score.
    """

    def __init__(self, folder: Path, names: Sequence[str], *, text: bool, scores: bool, as_json: bool) -> None:
        self.folder, self.names, self.text, self.scores, self.as_json = folder, names, text, scores, as_json
        self.pictures = self.detections = 0
        self.labels = folder / "labels"
        self.lines: list[str] = []

    def __enter__(self) -> DetectionFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.as_json:
            write_text_atomically(self.folder / "detections.json", "[\n" + ",\n".join(self.lines) + "\n]\n")

    def add(
        self, file: str, name: str, frame: int | None, rows: Sequence[Sequence[float]], size_hw: tuple[int, int]
    ) -> None:
        """Write a picture's detections (x1, y1, x2, y2 in pixels, score, class); ``name`` is that of its text file."""
        if self.text:
            self._write_text(name if frame is None else f"{name}_{frame + 1}", rows, size_hw)
        for x1, y1, x2, y2, score, kind in rows if self.as_json else ():
            place = {"image_id": self.pictures, "file": file, **({} if frame is None else {"frame": frame})}
            what = {"category_id": int(kind), "name": self.names[int(kind)]}
            bbox = [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)]
            row = {**place, **what, "bbox": bbox, "score": round(score, 6)}
            self.lines.append(json.dumps(row, ensure_ascii=False))
        self.detections += len(rows)
        self.pictures += 1

    def _write_text(self, name: str, rows: Sequence[Sequence[float]], size_hw: tuple[int, int]) -> None:
        height, width = size_hw
        lines = []
        for x1, y1, x2, y2, score, kind in rows:
            shape = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
            values = [*shape, score] if self.scores else shape
            lines.append(f"{int(kind)} " + " ".join(f"{value:.6f}" for value in values) + "\n")
        self.labels.mkdir(exist_ok=True)
        # Not flushed to the disk each: a video has thousands, and the disk would be slower than the network.
        (self.labels / f"{name}.txt").write_text("".join(lines), encoding="utf-8")
