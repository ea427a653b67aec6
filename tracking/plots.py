"""Pictures of a run, drawn with matplotlib's objects (no global state, no display)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from slim import CLOSED, SlimError, write_atomically

from .run_folder import RunFolder

_INCHES_PER_BAR = 0.18


def plot_results(run: RunFolder, path: str | Path | None = None) -> Path:
    """Losses, APs, learning rate and share of closed gates against the epoch, from results.csv."""
    rows = run.read_rows()
    if not rows:
        raise SlimError(f"{run.results_file}: no finished epoch, nothing to plot")
    panels: dict[str, list[str]] = {}
    for column in rows[0]:
        if column not in ("epoch", "seconds"):
            prefix = column.split("/")[0]
            panels.setdefault("l1" if column == "loss/l1" else prefix, []).append(column)

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (title, columns) in zip(axes, panels.items(), strict=True):
            for column in columns:
                points = [(int(row["epoch"]), float(row[column])) for row in rows if row.get(column)]
                if points:
                    axis.plot(*zip(*points, strict=True), marker=".", label=column)
            axis.set(title=title, xlabel="epoch")
            if axis.lines:
                axis.legend()

    return _draw(run.path / "results.png" if path is None else path, (4 * len(panels), 3.5), draw)


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

    return _draw(path, (13, max(3.5, _INCHES_PER_BAR * len(names))), draw)


def plot_gates(gates: Mapping[str, Tensor], path: str | Path, threshold: float = CLOSED) -> Path:
    """Histogram of |gate| over all groups, with the threshold below which a gate counts as closed."""
    if not gates:
        raise SlimError("no gates to plot: the model has none (were they folded already?)")
    values = torch.cat([gate.detach().flatten().abs().float().cpu() for gate in gates.values()])
    closed = int((values < threshold).sum())

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        axis.hist(values.tolist(), bins=60)
        axis.axvline(threshold, color="tab:red", linestyle="--", label=f"closed below {threshold:g}")
        axis.set(title=f"{closed} of {len(values)} gates closed", xlabel="|gate|", ylabel="channels", yscale="log")
        axis.legend()

    return _draw(path, (7, 4), draw)


def plot_widths(before: Mapping[str, int], after: Mapping[str, int], path: str | Path) -> Path:
    """Channels per layer before and after a cut, one bar a layer; layers missing from `after` are drawn at 0."""
    layers = list(before)

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        axis.barh(range(len(layers)), [before[layer] for layer in layers], color="lightgrey", label="before")
        axis.barh(range(len(layers)), [after.get(layer, 0) for layer in layers], color="tab:blue", label="after")
        axis.set_yticks(range(len(layers)), layers, fontsize=7)
        axis.invert_yaxis()
        axis.set(title="width of each layer", xlabel="channels")
        axis.legend()

    return _draw(path, (8, max(3.0, _INCHES_PER_BAR * len(layers))), draw)


def plot_trade_off(
    points: Mapping[str, tuple[float, float]], path: str | Path, xlabel: str, ylabel: str = "AP"
) -> Path:
    """One labelled point for each name: (cost, quality). More than a few get a legend, since labels would overlap."""
    is_crowded = len(points) > 6

    def draw(figure: Figure) -> None:
        axis: Axes = figure.subplots()
        for number, (name, (x, y)) in enumerate(points.items()):
            axis.plot([x], [y], marker="osD^v"[number // 10 % 5], linestyle="", label=name)
            if not is_crowded:
                axis.annotate(name, (x, y), textcoords="offset points", xytext=(4, 4))
        if is_crowded:
            axis.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize="small")
        axis.set(xlabel=xlabel, ylabel=ylabel)

    return _draw(path, (9, 5) if is_crowded else (6, 4), draw)


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


def save_png(image: Tensor, path: str | Path) -> Path:
    """uint8 [3, H, W] -> a PNG file."""
    path = Path(path)
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    write_atomically(path, lambda temporary: picture.save(temporary, format="png"))
    return path


def read_png(path: str | Path) -> Tensor:
    """A picture's file -> uint8 [3, H, W], transparent parts on white."""
    with Image.open(path) as image:
        on_white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    found: Tensor = pil_to_tensor(on_white.convert("RGB"))
    return found


def _draw(path: str | Path, inches: tuple[float, float], draw: Callable[[Figure], None]) -> Path:
    path = Path(path)
    with matplotlib.rc_context({"text.parse_math": False}):  # names of classes and layers are no formulae
        figure = Figure(figsize=inches, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    return path
