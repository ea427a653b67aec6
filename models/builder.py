"""Building a YOLO from a YOLOv5 model description."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from . import blocks
from .activations import DEFAULT_ACTIVATION, make_activation
from .description import LayerSpec, check_description, layer_specs
from .detect import Detect
from .errors import ModelError
from .yolo import YOLO

# Blocks whose first argument is a width, scaled by width_multiple, and whose constructor starts (in, out, ...).
WIDE_BLOCKS: dict[str, Callable[..., nn.Module]] = {
    block.__name__: block
    for block in (
        *(
            blocks.Conv,
            blocks.DWConv,
            blocks.Bottleneck,
            blocks.BottleneckCSP,
            blocks.C3,
            blocks.SPP,
            blocks.SPPF,
            blocks.Focus,
        ),
        *(blocks.GhostConv, blocks.GhostBottleneck, blocks.C3Ghost, nn.Conv2d, nn.ConvTranspose2d),
    )
}
# Blocks that repeat inside themselves: (in, out, repeats, ...).
REPEATING_BLOCKS = frozenset({"BottleneckCSP", "C3", "C3Ghost"})
# Blocks that keep the width and take their arguments as they are.
PLAIN_BLOCKS: dict[str, Callable[..., nn.Module]] = {
    block.__name__: block for block in (nn.Upsample, nn.MaxPool2d, nn.AvgPool2d, nn.ZeroPad2d, nn.Identity)
}
KNOWN_BLOCKS = (*WIDE_BLOCKS, *PLAIN_BLOCKS, "BatchNorm2d", "Concat", "Detect")

_WORDS: dict[str, Any] = {"None": None, "True": True, "False": False}
_DRY_SIDE_PX = 256
MAX_REPEATS = 100
"""Of a block in a layer; YOLOv5x has 12."""
MAX_PARAMS = 1_000_000_000
"""Of a network, 4 GB; YOLOv5x6 has 140 million."""


def build_model(description: Mapping[str, Any], num_classes: int | None = None) -> YOLO:
    """Build a freshly initialised YOLO, in training mode, from the description of a YOLOv5 model.

    Args:
        description: a model YAML as a dict. Besides YOLOv5's keys, ``activation`` names the activation of all blocks (default
            SiLU) and ``csp_activation`` the one after BottleneckCSP's batch norm (default: the same).
        num_classes: replaces ``nc``.

    Raises:
        ModelError: unknown blocks, missing keys, wrong types, or layers that do not fit together.

    >>> from models import build_model, load_description
    >>> model = build_model(load_description("models/yolov5n.yaml"), num_classes=3)
    >>> [tuple(level.shape) for level in model(torch.zeros(1, 3, 64, 64))]
    [(1, 3, 8, 8, 8), (1, 3, 4, 4, 8), (1, 3, 2, 2, 8)]
    """
    checked = check_description(description, num_classes)
    settings = {"width_multiple": 1.0, "depth_multiple": 1.0, "channel_multiple": 8, **checked}
    settings["activation"] = checked.get("activation") or DEFAULT_ACTIVATION
    settings["csp_activation"] = checked.get("csp_activation") or settings["activation"]
    for key in ("activation", "csp_activation"):
        make_activation(settings[key])
    specs = layer_specs(checked)
    if not specs or _short_name(specs[-1]) != "Detect":
        raise ModelError("model description: the last layer of head must be Detect")
    layers: list[nn.Module] = []
    widths: dict[int, int] = {-1: checked.get("ch", 3)}
    params = 0
    for spec in specs:
        inputs = [widths[source] for source in spec.sources]
        with torch.device("meta"):  # what a line of YAML asks for may be more than the memory
            shapes, widths[spec.index] = _build_layer(spec, inputs, settings)
        params += sum(parameter.numel() for parameter in shapes.parameters())
        if params > MAX_PARAMS:
            raise ModelError(f"{spec}: with it the network has {params:,} parameters, expected at most {MAX_PARAMS:,}")
        layers.append(_build_layer(spec, inputs, settings)[0])
    model = YOLO(checked, layers, [spec.sources for spec in specs], [spec.takes_list for spec in specs])
    model.detect.calibrate(_measure_strides(model, specs, widths[-1]))
    return model


def reinitialise(model: YOLO) -> None:
    """Draw all weights anew as ``build_model`` does for a network of these widths, in place; the anchors stay.

    From one random state a network as wide as its description gets the very weights that ``build_model`` gives it. ModelError
    for a model with parameters that no module of its own draws, such as gates.
    """
    drawn = [module for module in model.modules() if callable(getattr(module, "reset_parameters", None))]
    known = {id(parameter) for module in drawn for parameter in module.parameters(recurse=False)}
    strange = next((name for name, parameter in model.named_parameters() if id(parameter) not in known), None)
    if strange is not None:
        raise ModelError(f"{strange}: belongs to no layer that the builder initialises; fold gates first")
    for module in drawn:
        module.reset_parameters()  # type: ignore[operator]
    model.detect.add_prior()


def _short_name(spec: LayerSpec) -> str:
    return spec.block.removeprefix("torch.").removeprefix("nn.")


def _build_layer(spec: LayerSpec, in_channels: list[int], settings: Mapping[str, Any]) -> tuple[nn.Module, int]:
    """The layer and the width of its output."""
    name = _short_name(spec)
    if name not in KNOWN_BLOCKS:
        raise ModelError(f"layer {spec.index}: block {spec.block!r} is not known; known are {', '.join(KNOWN_BLOCKS)}")
    if spec.takes_list != (name in ("Concat", "Detect")):
        expected = "one index" if spec.takes_list else "a list"
        raise ModelError(f"{spec}: takes {expected} in 'from', found {list(spec.sources)}")
    args = [_resolve(arg, settings) for arg in spec.args]
    try:
        if name == "Detect":
            return _build_detect(args, in_channels), 0
        if name == "Concat":
            return blocks.Concat(*args), sum(in_channels)
        if name == "BatchNorm2d":
            return blocks.batch_norm(in_channels[0]), in_channels[0]
        repeats = max(round(spec.repeats * settings["depth_multiple"]), 1) if spec.repeats > 1 else 1
        if repeats > MAX_REPEATS:
            raise ValueError(f"{repeats:,} repeats, by its depth_multiple, expected at most {MAX_REPEATS}")
        if name in PLAIN_BLOCKS:
            return _chain([PLAIN_BLOCKS[name](*args) for _ in range(repeats)]), in_channels[0]
        return _build_wide(name, repeats, args, in_channels[0], settings)
    except (TypeError, ValueError, RuntimeError, IndexError, ArithmeticError) as error:
        raise ModelError(f"{spec}: arguments {list(spec.args)} do not fit: {error}") from None


def _build_wide(
    name: str, repeats: int, args: list[Any], in_channels: int, settings: Mapping[str, Any]
) -> tuple[nn.Module, int]:
    width = args[0]
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise ValueError(f"the width is {width!r}, expected a whole number from 1")
    multiple = settings["channel_multiple"]
    out_channels = max(math.ceil(width * settings["width_multiple"] / multiple) * multiple, multiple)
    rest = args[1:]
    options: dict[str, str] = {}
    if name not in ("Conv2d", "ConvTranspose2d"):
        options["activation"] = settings["activation"]
    if name == "BottleneckCSP":
        options["csp_activation"] = settings["csp_activation"]
    block = WIDE_BLOCKS[name]
    if name in REPEATING_BLOCKS:
        return block(in_channels, out_channels, repeats, *rest, **options), out_channels
    inputs = [in_channels] + [out_channels] * (repeats - 1)
    return _chain([block(width, out_channels, *rest, **options) for width in inputs]), out_channels


def _chain(layers: list[nn.Module]) -> nn.Module:
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


def _build_detect(args: Sequence[Any], in_channels: list[int]) -> Detect:
    if len(args) != 2:
        raise ValueError("expected [nc, anchors]")
    num_classes, anchors = args
    if isinstance(anchors, int):
        # Only a count is given: placeholders, to be replaced by a checkpoint's anchors or by clustering.
        anchors = [list(range(1, 2 * anchors + 1))] * len(in_channels)
    if len(anchors) != len(in_channels):
        raise ValueError(f"{len(anchors)} levels of anchors for {len(in_channels)} inputs")
    return Detect(num_classes, anchors, in_channels)


def _resolve(arg: Any, settings: Mapping[str, Any]) -> Any:
    """YOLOv5's YAML writes some values as words; everything else is taken as it stands."""
    if arg in ("nc", "anchors"):
        return settings[arg]
    return _WORDS.get(arg, arg) if isinstance(arg, str) else arg


def _measure_strides(model: YOLO, specs: Sequence[LayerSpec], channels: int) -> tuple[int, ...]:
    """Strides of the head's inputs, from one pass over shapes alone (meta tensors: no arithmetic, no memory)."""
    outputs: dict[int, Any] = {-1: torch.empty(1, channels, _DRY_SIDE_PX, _DRY_SIDE_PX, device="meta")}
    for spec, layer in zip(specs, model.model, strict=True):
        held = (*layer.named_parameters(), *layer.named_buffers())
        state = {name: tensor.to("meta") for name, tensor in held}
        inputs = [outputs[source] for source in spec.sources]
        try:
            with torch.no_grad():
                outputs[spec.index] = functional_call(layer, state, (inputs if spec.takes_list else inputs[0],))
        except (RuntimeError, ValueError, TypeError) as error:
            shapes = [tuple(x.shape) for x in inputs]
            reason = str(error).splitlines()[0]
            raise ModelError(f"{spec}: does not fit inputs of the shapes {shapes}: {reason}") from None
    strides = []
    for level in outputs[len(specs) - 1]:
        height = level.shape[2]
        if _DRY_SIDE_PX % height or level.shape[2] != level.shape[3]:
            size = tuple(level.shape[2:4])
            raise ModelError(f"{specs[-1]}: a {_DRY_SIDE_PX} px image gives a map of {size}; no stride fits")
        strides.append(_DRY_SIDE_PX // height)
    return tuple(strides)
