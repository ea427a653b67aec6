"""YOLOv5 model YAML: reading it and checking its form."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .errors import ModelError

_MAX_ANCHORS = 1000
_MAX_ALIASES = 16
_MAX_LAYERS = 1000


@dataclass(frozen=True)
class LayerSpec:
    """One line of ``backbone`` or ``head``; ``sources`` are absolute layer indices, -1 is the image."""

    index: int
    sources: tuple[int, ...]
    takes_list: bool
    repeats: int
    block: str
    args: tuple[Any, ...]

    def __str__(self) -> str:
        return f"layer {self.index} ({self.block})"


def load_description(path: str | Path) -> dict[str, Any]:
    """Read a YOLOv5 model YAML to a plain dict; ModelError when the file is missing, damaged or not a description.

    ``models/NAME`` and ``NAME`` that are missing are those of this folder: an installed command runs anywhere.
    """
    path, own = Path(path), Path(__file__).with_name(Path(path).name)
    if not path.exists() and path.parent in (Path(), Path("models")) and own.is_file():
        path = own
    try:
        text = path.read_text(encoding="utf-8")
        aliases = sum(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)) if "*" in text else 0
        if aliases > _MAX_ALIASES:
            raise ModelError(
                f"{path}: {aliases} aliases, which can expand without end; write out all but {_MAX_ALIASES}"
            )
        content = yaml.safe_load(text)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); give the path of a model YAML") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where is not None else ""
        raise ModelError(f"{path}{line}: not valid YAML; repair or replace the file") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: holds {_kind(content)}, expected a mapping with nc, anchors, backbone and head")
    try:
        check_description(content)
        layer_specs(content)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    return content


def check_description(description: Mapping[str, Any], num_classes: int | None = None) -> dict[str, Any]:
    """A deep copy with every top-level value checked and ``nc`` set; defaults are not filled in. Raises ModelError."""
    if not isinstance(description, Mapping):
        raise ModelError(f"model description: expected a mapping, found {_kind(description)}")
    checked = copy.deepcopy(dict(description))
    if num_classes is not None:
        checked["nc"] = num_classes
    for key in ("nc", "anchors", "backbone", "head"):
        if key not in checked:
            raise ModelError(f"model description: key {key!r} is missing; it has {sorted(map(str, checked))}")
    for key, lowest in (("nc", 1), ("ch", 1), ("channel_multiple", 1)):
        value = checked.get(key, lowest)
        if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
            raise ModelError(f"model description: {key} is {value!r}, expected a whole number from {lowest}")
    for key in ("depth_multiple", "width_multiple"):
        value = checked.get(key, 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ModelError(f"model description: {key} is {value!r}, expected a number above 0")
    for key in ("activation", "csp_activation"):
        if not isinstance(checked.get(key, ""), str | None):
            raise ModelError(f"model description: {key} is {checked[key]!r}, expected a name such as nn.ReLU()")
    for key in ("backbone", "head"):
        if not isinstance(checked[key], list) or not checked[key]:
            raise ModelError(f"model description: {key} is {_kind(checked[key])}, expected a list of layers")
    _check_anchors(checked["anchors"])
    return checked


def _check_anchors(anchors: Any) -> None:
    if isinstance(anchors, int) and not isinstance(anchors, bool) and 0 < anchors <= _MAX_ANCHORS:
        return
    remedy = f"expected one list of width, height pairs in pixels per level, all of one length, or a count up to {_MAX_ANCHORS}"
    if not isinstance(anchors, list) or not anchors:
        raise ModelError(f"model description: anchors is {anchors!r}; {remedy}")
    for level in anchors:
        right = isinstance(level, list) and len(level) == len(anchors[0]) and level and len(level) % 2 == 0
        if not right or not all(isinstance(v, int | float) and v > 0 for v in level):
            raise ModelError(f"model description: anchors has the level {level!r}; {remedy}")


def layer_specs(description: Mapping[str, Any]) -> list[LayerSpec]:
    """The lines of ``backbone`` and ``head`` in order. Raises ModelError naming the line that is malformed."""
    specs: list[LayerSpec] = []
    if len(description["backbone"]) + len(description["head"]) > _MAX_LAYERS:
        raise ModelError(f"model description: more than {_MAX_LAYERS} layers; it is damaged or of another kind")
    for index, line in enumerate([*description["backbone"], *description["head"]]):
        if not isinstance(line, list) or len(line) != 4:
            raise ModelError(f"layer {index}: found {line!r}, expected [from, repeats, block, [arguments]]")
        origin, repeats, block, args = line
        if not isinstance(block, str):
            raise ModelError(f"layer {index}: block is {block!r}, expected a name")
        if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
            raise ModelError(f"layer {index} ({block}): repeats is {repeats!r}, expected a whole number from 1")
        if not isinstance(args, list):
            raise ModelError(f"layer {index} ({block}): arguments are {args!r}, expected a list")
        takes_list = isinstance(origin, list)
        origins = origin if takes_list else [origin]
        if not origins or not all(isinstance(o, int) and not isinstance(o, bool) for o in origins):
            raise ModelError(f"layer {index} ({block}): from is {origin!r}, expected an index or a list of indices")
        sources = tuple(index + o if o < 0 else o for o in origins)
        if any(not -1 <= source < index for source in sources):
            raise ModelError(f"layer {index} ({block}): from is {origin!r}, but only {index} layers come before")
        specs.append(LayerSpec(index, sources, takes_list, repeats, block, tuple(args)))
    return specs


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
