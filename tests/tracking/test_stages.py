"""A network's stages, and the charts that TensorBoard makes of them."""

from __future__ import annotations

from typing import Any

from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from slim.graph import LayerCost
from tracking.stages import channel_charts, stages_of


def calls(**positions: int) -> list[LayerCost]:
    """Layers in the order in which they run, by path (``__`` for a dot), with the positions of their outputs."""
    return [LayerCost(path.replace("__", "."), "weight", (4, 4, 3, 3), count) for path, count in positions.items()]


FIRST = {"model__0__conv": 1024, "model__1__conv": 256, "model__2__m__0": 256, "model__2__gate": 1, "model__3": 64}
UP = {"model__4__cv1": 256, "model__4__cv2": 256, "model__5": 64}


def part_of(path: str) -> str | None:
    number = int(path.split(".")[1])
    return None if number == 5 else "neck" if number > 3 else "backbone"


def test_a_stage_is_a_part_at_one_resolution() -> None:
    """Of an image of 64 x 64; what works on one position goes with the layers before it."""
    assert stages_of(calls(**FIRST, **UP), 64 * 64, part_of) == {
        "backbone": {
            "stride 2: model.0": ["model.0.conv"],
            "stride 4: model.1, model.2": ["model.1.conv", "model.2.m.0", "model.2.gate"],
            "stride 8: model.3": ["model.3"],
        },
        "neck": {"stride 4: model.4": ["model.4.cv1", "model.4.cv2"]},
    }


def test_any_network_has_stages() -> None:
    blocks = {f"layer{k}__conv": 256 for k in range(6)}
    assert stages_of([*calls(stem=1024, **blocks), *calls(stem=1024)], 64 * 64) == {
        "network": {
            "stride 2: stem": ["stem"],
            "stride 4: layer0 ... layer5": [f"layer{k}.conv" for k in range(6)],
        }
    }


def test_a_chart_a_stage_of_which_no_line_is_smoothed() -> None:
    (value,) = channel_charts({"neck": {"stride 4: a, b": ["a.conv", "b"]}}).value
    assert (value.tag, value.metadata.plugin_data.plugin_name) == ("custom_scalars__config__", "custom_scalars")
    (category,) = Layout.FromString(value.tensor.string_val[0]).category
    (chart,) = category.chart
    assert (category.title, chart.title) == ("channels, neck", "stride 4: a, b")
    assert not chart.HasField("multiline")

    def tags(series: Any) -> tuple[str, str, str]:
        return series.value, series.lower, series.upper

    assert [tags(series) for series in chart.margin.series] == [3 * ("channels/a.conv",), 3 * ("channels/b",)]
