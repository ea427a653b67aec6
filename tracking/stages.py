"""Stages of a network, the layers that a reader looks at together, and TensorBoard's charts of their channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from slim.graph import LayerCost

Stages = Mapping[str, Mapping[str, Sequence[str]]]
"""{part of the network, such as backbone: {title of a stage: its layers in the order in which they run}}."""


def stages_of(layers: Sequence[LayerCost], image_px: int, part_of: Callable[[str], str | None] | None = None) -> Stages:
    """The layers of each part that work at one resolution.

    ``layers``: in the order in which they run; ``image_px``: pixels of the image, height times width; ``part_of``: a layer's
    part by its path, None for layers to leave out. Layers of one position (of squeeze-and-excitation, of a classifier) go
    with those before them.
    """
    found: dict[str, dict[int, list[str]]] = {}
    positions = image_px
    for call in layers:
        positions = call.positions if call.positions > 1 else positions
        part = "network" if part_of is None else part_of(call.path)
        if part is not None:
            stage = found.setdefault(part, {}).setdefault(round(math.sqrt(image_px / positions)), [])
            stage += [] if call.path in stage else [call.path]
    levels = zip(*(call.path.split(".") for call in layers), strict=False)
    depth = next((level for level, names in enumerate(levels) if len(set(names)) > 1), 0) + 1
    return {
        part: {f"stride {stride}: {_blocks(paths, depth)}": paths for stride, paths in stages.items()}
        for part, stages in found.items()
    }


def _blocks(paths: Iterable[str], depth: int) -> str:
    """The blocks that layers belong to: the part of their paths in which the network's layers first differ."""
    blocks = list(dict.fromkeys(".".join(path.split(".")[:depth]) for path in paths))
    return ", ".join(blocks) if len(blocks) <= 4 else f"{blocks[0]} ... {blocks[-1]}"


def channel_charts(stages: Stages) -> Any:
    """The summary that lays out TensorBoard's custom scalars: a category for each part, a chart for each stage.

    Charts with margins, here of no width, show values as they are; charts of several lines would be smoothed, and a count
    that falls from 16 to 8 read 11.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.plugins.custom_scalar.layout_pb2 import Category, Chart, Layout, MarginChartContent

    def chart(title: str, layers: Sequence[str]) -> Any:
        tags = [f"channels/{layer}" for layer in layers]
        series = [MarginChartContent.Series(value=tag, lower=tag, upper=tag) for tag in tags]
        return Chart(title=title, margin=MarginChartContent(series=series))

    categories = [
        Category(title=f"channels, {part}", chart=[chart(title, layers) for title, layers in found.items()])
        for part, found in stages.items()
    ]
    content = TensorProto(dtype="DT_STRING", string_val=[Layout(category=categories).SerializeToString()])
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="custom_scalars"))
    return Summary(value=[Summary.Value(tag="custom_scalars__config__", tensor=content, metadata=metadata)])
