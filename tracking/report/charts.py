"""Charts as SVG elements in the colour of the text around them; the same input gives the same bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

_INK = "#010203"  # replaced by the surrounding text's colour
BLUE, ORANGE, GREY = "#3b82f6", "#ea7317", "#8b95a5"
_COLOURS = (BLUE, ORANGE, "#16a37a", "#c2418f", "#8b6fd8", "#b08900", "#5b7a99", "#d4513d")
_MOST_POINTS = 600
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names of layers and classes are no formulae
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _INK,
    "grid.alpha": 0.12,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
}


@dataclass(frozen=True)
class Point:
    """A network in a chart of cost against quality; ``kind`` is dense, accepted or rejected."""

    label: str
    cost: float
    ap: float
    kind: str


def curves(panels: dict[str, dict[str, list[tuple[float, float]]]]) -> str:
    """A panel for each title: its named lines of (epoch, value)."""
    height = 2.7 * ((len(panels) + 1) // 2)

    def draw(figure: Figure) -> None:
        axes = figure.subplots((len(panels) + 1) // 2, 2, squeeze=False).flatten()
        for axis, (title, lines) in zip(axes, panels.items(), strict=False):
            axis.set_prop_cycle(color=_COLOURS)
            for name, points in lines.items():
                thinned = points[:: len(points) // _MOST_POINTS + 1]
                marker = "o" if len(thinned) <= 40 else ""
                axis.plot(*zip(*thinned, strict=True), marker=marker, label=name)
            axis.set_title(title)
            axis.set_xlabel("epoch")
            axis.xaxis.get_major_locator().set_params(integer=True)
            if len(lines) > 1:
                axis.legend()
        for axis in axes[len(panels) :]:
            axis.set_axis_off()

    return _svg("curves", (10.4, height), draw)


def histogram(edges: Sequence[float], counts: Sequence[float], threshold: float) -> str:
    """Numbers of gates by size, with the threshold below which one is closed."""

    def draw(figure: Figure) -> None:
        axis: Axes = figure.subplots()
        axis.stairs(counts, edges, fill=True, color=BLUE, alpha=0.85)
        axis.axvline(threshold, color=ORANGE, linestyle="--", label=f"closed below {threshold:g}")
        axis.set(xlabel="|gate|", ylabel="channels (logarithmic)", yscale="log")
        axis.set_ylim(bottom=0.7)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.legend(loc="upper center")

    return _svg("gates", (10.4, 3.2), draw)


def trade_off(panels: dict[str, list[Point]]) -> str:
    """AP against each cost (its axis label is the key): dense baseline, accepted and rejected candidates."""
    marks = {
        "dense": {"marker": "D", "color": _INK, "s": 60},
        "accepted": {"marker": "o", "color": BLUE, "s": 55},
        "rejected": {"marker": "x", "color": ORANGE, "s": 50},
    }

    def draw(figure: Figure) -> None:
        for axis, (label, points) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
        ):
            path = [(p.cost, p.ap) for p in points if p.kind != "rejected"]
            if len(path) > 1:
                axis.plot(*zip(*path, strict=True), color=GREY, linewidth=1, zorder=1)
            for kind, mark in marks.items():
                chosen = [p for p in points if p.kind == kind]
                if chosen:
                    axis.scatter([p.cost for p in chosen], [p.ap for p in chosen], label=kind, zorder=2, **mark)
            for p in points:
                axis.annotate(p.label, (p.cost, p.ap), textcoords="offset points", xytext=(7, 5), fontsize=9)
            axis.set(xlabel=label, ylabel="AP")
            axis.margins(0.12, 0.15)
            axis.legend()

    return _svg("trade-off", (10.4, 4.0), draw)


def _svg(name: str, inches: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    """An <svg> element whose identifiers begin with ``name``, unlike those of the page's other charts."""
    text = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=inches, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return re.sub(r"<[^>]*>", lambda tag: _own_ids(tag.group(), name), svg).replace(_INK, "currentColor").strip()


def _own_ids(tag: str, name: str) -> str:
    tag = re.sub(r'\bid="', f'id="{name}-', tag)
    return tag.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
