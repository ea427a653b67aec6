"""Pictures of what a detector finds and mistakes: curves of the classes, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from .plots import BESIDE, save_figure

_MOST_NAMED, _MOST_NUMBERED = 20, 40
"""Classes up to which lines have colours and names, and cells their numbers."""


def plot_class_curves(
    x: tuple[str, Sequence[float]],
    y: tuple[str, Mapping[str, Sequence[float]]],
    path: str | Path,
    *,
    areas: bool = False,
    mark: float | None = None,
) -> Path:
    """A thin line for each class and a thick one for their mean.

    Args:
        x: the axis's label and the values that all classes share
        y: the axis's label, and values from 0 to 1 by class
        path: of the picture
        areas: name the mean of each line, as the AP under a curve of precision, instead of its largest value
        mark: a place on x to point out
    """
    (xlabel, places), (ylabel, lines) = x, y
    mean = np.mean(list(lines.values()), axis=0)
    is_named = len(lines) <= _MOST_NAMED

    def label(name: str, values: NDArray[np.float64]) -> str:
        return f"{name} {values.mean() if areas else values.max():.3f}"

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        for name, values in lines.items():
            style: dict[str, Any] = {"label": label(name, np.asarray(values))} if is_named else {"color": "lightgrey"}
            axis.plot(places, values, linewidth=1, **style)
        axis.plot(places, mean, linewidth=3, color="black", label=label("all classes", mean))
        if mark is not None:
            axis.axvline(mark, color="grey", linestyle=":", label=f"{xlabel} {mark:g}")
        axis.set(xlabel=xlabel, ylabel=ylabel, xlim=(0, 1), ylim=(0, 1.02))
        axis.legend(**BESIDE)

    return save_figure(path, (8.5, 5), draw)


def plot_confusions(counts: NDArray[np.int64], names: Sequence[str], path: str | Path, title: str) -> Path:
    """Objects by what they are taken for: the share of each row as a colour, and where there is room it and the count.

    ``counts`` [classes + 1, classes + 1]: rows are the objects' classes, columns those of the detections, and last in both
    is the background.
    """
    ticks = [*names, "background"]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    inches = 0.3 * len(ticks) if len(ticks) > _MOST_NAMED else 0.65 * len(ticks)

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        image = axis.imshow(np.ma.masked_equal(shares, 0), cmap="Blues", vmin=0, vmax=1)
        for row, column in zip(*np.nonzero(counts if len(ticks) <= _MOST_NUMBERED else counts * 0), strict=True):
            count, share = counts[row, column], shares[row, column]
            text = str(count) if len(ticks) > _MOST_NAMED else f"{count}\n{share:.0%}"
            ink = "white" if share > 0.6 else "black"
            axis.text(column, row, text, ha="center", va="center", fontsize=7, color=ink)
        axis.set_xticks(range(len(ticks)), ticks, rotation=90)
        axis.set_yticks(range(len(ticks)), ticks)
        axis.set(xlabel="detected as", ylabel="object", title=title)
        figure.colorbar(image, ax=axis, label="share of the row", aspect=40)

    return save_figure(path, (max(6.0, 3.5 + inches), max(5.0, 2.2 + inches)), draw)
