"""Pictures of a run, drawn with matplotlib's objects (no global state, no display)."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from slim import CLOSED, SlimError, write_atomically

from .run_folder import number

_INCHES_PER_BAR = 0.18
_GATE_BINS = 60
_PANELS = {
    "loss/l1": "L1 of the gates that shrink",
    "lr": "learning rate",
    "metrics": "AP",
    "gates/pull_over_gradient": "L1 step over gradient: gates close above 1",
    "gates/closed_share": "share of closed gates",
}
_NOT_PLOTTED = ("epoch", "seconds", "gates/strength")
BESIDE: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5), "fontsize": "small"}
_ABOVE: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "fontsize": "small", "frameon": False}
"""Legends beside and above their axes, where they lie over nothing."""
_MARKS: dict[str, dict[str, Any]] = {
    "dense": {"marker": "D", "color": "black"},
    "accepted": {"marker": "o", "color": "tab:blue"},
    "rejected": {"marker": "x", "color": "tab:orange"},
}


def plot_results(rows: Sequence[Mapping[str, str]], path: str | Path) -> Path:
    """Losses, APs, learning rate, the L1 step against the gradient and the share of closed gates against the epoch.

    `rows` are those of results.csv.
    """
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for column in dict.fromkeys(key for row in rows for key in row if key not in _NOT_PLOTTED):
        points = [(float(row["epoch"]), y) for row in rows if (y := number(row, column)) is not None]
        prefix = column.split("/")[0]
        if points:
            panels.setdefault(_PANELS.get(column, _PANELS.get(prefix, prefix)), {})[column] = points
    if not panels:
        raise SlimError(f"{path}: no finished epoch, nothing to plot")
    epochs = [float(row["epoch"]) for row in rows]
    margin = max(0.5, 0.03 * (max(epochs) - min(epochs)))

    def draw(figure: Figure) -> None:
        grid = figure.add_gridspec((len(panels) + 1) // 2, 2)
        for place, (title, lines) in enumerate(panels.items()):
            is_alone = place + 1 == len(panels) and place % 2 == 0
            axis = figure.add_subplot(grid[place // 2, slice(None) if is_alone else place % 2])
            for column, points in lines.items():
                label = column.removeprefix("loss/").removeprefix("metrics/")
                axis.plot(*zip(*points, strict=True), marker="." if len(points) <= 40 else "", label=label)
            axis.set_title(title, loc="left")
            axis.set(xlabel="epoch", xlim=(min(epochs) - margin, max(epochs) + margin))
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            if "gates/pull_over_gradient" in lines:
                axis.set_yscale("log")
                axis.axhline(1, color="grey", linestyle=":")
            if len(lines) > 1:
                axis.legend(**_ABOVE, ncols=len(lines))

    return save_figure(path, (11, 2.8 * ((len(panels) + 1) // 2)), draw)


def plot_labels(ground_truth: Mapping[str, Any], names: Sequence[str], path: str | Path) -> Path:
    """Instances per class, boxes per image and box sizes of a COCO dict (pixels of the original images), without crowds."""
    annotations = [annotation for annotation in ground_truth["annotations"] if not annotation.get("iscrowd")]
    images = ground_truth["images"]
    per_class = Counter(annotation["category_id"] for annotation in annotations)
    per_image = Counter(annotation["image_id"] for annotation in annotations)
    counts = [per_class[category["id"]] for category in ground_truth["categories"]]

    def draw(figure: Figure) -> None:
        classes, boxes, sizes = figure.subplots(1, 3)
        classes.barh(range(len(names)), counts)
        classes.set_yticks(range(len(names)), names)
        classes.invert_yaxis()
        classes.set(title="instances per class", xlabel="boxes")
        boxes.hist([per_image[image["id"]] for image in images], bins=30)
        boxes.set(title="boxes per image", xlabel="boxes", ylabel="images")
        sizes.scatter([a["bbox"][2] for a in annotations], [a["bbox"][3] for a in annotations], s=4, alpha=0.4)
        sizes.set(title="box sizes", xlabel="width, px", ylabel="height, px")

    return save_figure(path, (13, max(3.5, _INCHES_PER_BAR * len(names))), draw)


def summarise_gates(gates: Mapping[str, Tensor], threshold: float = CLOSED) -> dict[str, Any]:
    """Plain figures of the gate vectors by group: a histogram of |gate| over all, and each group's channels, closed ones,
    mean and largest. SlimError without gates."""
    if not gates:
        raise SlimError("no gates to summarise: the model has none (were they folded already?)")
    sizes = {name: gate.detach().flatten().abs().float().cpu() for name, gate in gates.items()}
    joined = torch.cat(list(sizes.values()))
    top = max(1.0, float(joined.max()))
    return {
        "threshold": threshold,
        "edges": [round(top * k / _GATE_BINS, 6) for k in range(_GATE_BINS + 1)],
        "counts": [int(count) for count in torch.histc(joined, _GATE_BINS, 0.0, top)],
        "groups": {
            name: {
                "channels": len(size),
                "closed": int((size < threshold).sum()),
                "mean": float(size.mean()),
                "largest": float(size.max()),
            }
            for name, size in sizes.items()
        },
    }


def plot_gates(summary: Mapping[str, Any], path: str | Path) -> Path:
    """The histogram of `summarise_gates`, with the threshold below which a gate counts as closed."""

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        axis.stairs(summary["counts"], summary["edges"], fill=True)
        axis.axvline(
            summary["threshold"], color="tab:red", linestyle="--", label=f"closed below {summary['threshold']:g}"
        )
        axis.set(xlabel="|gate|", ylabel="channels", yscale="log")
        axis.set_ylim(bottom=0.7)
        axis.legend(**_ABOVE)

    return save_figure(path, (8, 3.5), draw)


def plot_widths(before: Mapping[str, int], after: Mapping[str, int], path: str | Path) -> Path:
    """Channels per layer before and after a cut, one bar a layer; layers missing from `after` are drawn at 0."""
    layers = list(before)

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        axis.barh(range(len(layers)), [before[layer] for layer in layers], color="lightgrey", label="before")
        axis.barh(range(len(layers)), [after.get(layer, 0) for layer in layers], color="tab:blue", label="after")
        axis.set_yticks(range(len(layers)), layers, fontsize=7)
        axis.set(xlabel="channels", ylim=(len(layers) - 0.4, -0.6))
        axis.set_title("width of each layer", loc="left")
        axis.legend(**_ABOVE, ncols=2)

    return save_figure(path, (8, max(3.0, _INCHES_PER_BAR * len(layers))), draw)


def plot_channels(
    history: Mapping[int, Mapping[str, int]], widths: Mapping[str, int], path: str | Path, unit: str
) -> Path:
    """The share of each layer's channels that is open, a row a layer and a column an epoch or a round (``unit``).

    ``history``: counts by step and layer; ``widths``: what the layers have when all are open. Few columns show the counts.
    """
    steps, layers = list(history), list(dict.fromkeys(layer for counts in history.values() for layer in counts))
    shares = [[history[step].get(layer, 0) / widths[layer] for step in steps] for layer in layers]
    has_numbers = len(steps) <= 12

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        image = axis.imshow(shares, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        for row, layer in enumerate(layers if has_numbers else ()):
            for column, step in enumerate(steps):
                ink = "black" if shares[row][column] > 0.6 else "white"
                text = str(history[step].get(layer, 0))
                axis.text(column, row, text, ha="center", va="center", fontsize=6, color=ink)
        axis.set_yticks(range(len(layers)), layers, fontsize=7)
        every = max(1, len(steps) // 10)
        axis.set_xticks(range(0, len(steps), every), [str(step) for step in steps[::every]])
        axis.set(title="open channels of each layer", xlabel=unit)
        figure.colorbar(image, ax=axis, label="share of the layer's channels", aspect=40, format=PercentFormatter(1.0))

    return save_figure(path, (8, max(3.0, 1.2 + _INCHES_PER_BAR * len(layers))), draw)


def plot_trade_off(
    panels: Mapping[str, Mapping[str, tuple[float, float]]], path: str | Path, kinds: Mapping[str, str] | None = None
) -> Path:
    """AP against each cost, whose label is the key: {name: (cost, AP)} of the networks.

    ``kinds`` marks names as "dense", "accepted" or "rejected". More than a few points get a legend, since labels would
    overlap.
    """
    is_crowded = max(map(len, panels.values())) > 6

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (xlabel, points) in zip(axes, panels.items(), strict=True):
            for k, (name, (cost, ap)) in enumerate(points.items()):
                mark = _MARKS.get((kinds or {}).get(name, ""), {"marker": "osD^v"[k // 10 % 5]})
                axis.plot([cost], [ap], linestyle="", label=name, **mark)
                if not is_crowded:  # neighbours are often close: their names in turn above and below
                    axis.annotate(name, (cost, ap), textcoords="offset points", xytext=(4, -12 if k % 2 else 4))
            axis.set(xlabel=xlabel, ylabel="AP")
            axis.margins(0.15)
        if is_crowded:
            axes[-1].legend(**BESIDE)

    return save_figure(path, (5.5 * len(panels) + (2.5 if is_crowded else 0), 4.2), draw)


def plot_runtimes(points: Sequence[tuple[str, str, float, float]], path: str | Path) -> Path:
    """AP against milliseconds: ``points`` are (network, runtime, milliseconds, AP), a colour a network, a marker a runtime."""
    networks, runtimes = (list(dict.fromkeys(point[k] for point in points)) for k in (0, 1))
    palette = matplotlib.colormaps["tab10" if len(networks) <= 10 else "tab20"]
    colours = {name: palette(k) for k, name in enumerate(networks)}
    markers = dict(zip(runtimes, itertools.cycle("o^sDvP*X<>"), strict=False))

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        for name in runtimes:
            line = sorted(point[2:] for point in points if point[1] == name)
            axis.plot(*zip(*line, strict=True), color="lightgrey", linewidth=1, zorder=0)
        for network, runtime, milliseconds, ap in points:
            axis.plot([milliseconds], [ap], linestyle="", marker=markers[runtime], color=colours[network], alpha=0.8)
        for name in networks:
            axis.plot([], [], linestyle="", marker="s", color=colours[name], markersize=9, label=name)
        for name in runtimes:
            axis.plot([], [], linestyle="", marker=markers[name], color="grey", fillstyle="none", label=name)
        axis.set(xlabel="milliseconds an image", ylabel="AP")
        axis.margins(0.15)
        axis.legend(**BESIDE)

    return save_figure(path, (8.5, max(4.2, 0.5 + 0.22 * (len(networks) + len(runtimes)))), draw)


def side_by_side(columns: Mapping[str, Sequence[Tensor]]) -> Tensor:
    """Titled columns of pictures (uint8 [3, H, W], all of one size), a row for each place -> uint8 [3, H', W']."""
    gap, bar = 6, 22
    parts = []
    for title, pictures in columns.items():
        width = pictures[0].shape[2]
        head = Image.new("RGB", (width, bar), "white")
        ImageDraw.Draw(head).text((4, 3), title, fill="black", font=ImageFont.load_default(14))
        white = torch.full((3, gap, width), 255, dtype=torch.uint8)
        parts.append(torch.cat([pil_to_tensor(head), *(t for picture in pictures for t in (picture, white))], 1))
        parts.append(torch.full((3, parts[-1].shape[1], gap), 255, dtype=torch.uint8))
    return torch.cat(parts[:-1], 2)[:, :-gap]


def drawn_by(*code: Callable[..., Any]) -> str:
    """For a picture's file: the functions and classes that drew it, as module:name, and a digest of their source.

    Of a function inside another one the outer is named. So a picture says whether the code is still that which drew it.
    """
    started = getattr(sys.modules["__main__"], "__spec__", None)  # of python -m
    modules = [started.name if one.__module__ == "__main__" and started else one.__module__ for one in code]
    names = [f"{module}:{one.__qualname__.partition('.')[0]}" for module, one in zip(modules, code, strict=True)]
    return " ".join([*names, digest_of_code(names)])


def digest_of_code(names: Sequence[str]) -> str:
    """Of the source of functions and classes that are given as module:name."""
    parts = (name.partition(":") for name in names)
    sources = [inspect.getsource(getattr(importlib.import_module(module), name)) for module, _, name in parts]
    return hashlib.sha256("".join(sources).encode()).hexdigest()[:16]


def save_png(image: Tensor, path: str | Path, software: str = "") -> Path:
    """uint8 [3, H, W] -> a PNG file, which says what drew it (``drawn_by``)."""
    path, info = Path(path), PngInfo()
    if software:
        info.add_text("Software", software)
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    write_atomically(path, lambda temporary: picture.save(temporary, format="png", pnginfo=info))
    return path


def read_png(path: str | Path) -> Tensor:
    """A picture's file -> uint8 [3, H, W], transparent parts on white."""
    with Image.open(path) as image:
        on_white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    found: Tensor = pil_to_tensor(on_white.convert("RGB"))
    return found


def save_figure(path: str | Path, inches: tuple[float, float], draw: Callable[[Figure], None]) -> Path:
    """A PNG file of so many inches of what ``draw`` puts on a figure; it says what drew it (``drawn_by``)."""
    path, metadata = Path(path), {"Software": drawn_by(draw, save_figure)}
    with matplotlib.rc_context({"text.parse_math": False}):  # names of classes and layers are no formulae
        figure = Figure(figsize=inches, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        for scale in (scale for axis in figure.axes for scale in (axis.xaxis, axis.yaxis)):
            if scale.get_scale() == "log":
                scale.set_major_formatter("{x:g}")  # matplotlib's own is a formula
                scale.set_minor_formatter(NullFormatter())
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120, metadata=metadata))
    return path
