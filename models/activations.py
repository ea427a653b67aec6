"""Activations by name, from an explicit table."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from .errors import ModelError
from .yolo import YOLO

ACTIVATIONS: dict[str, Callable[..., nn.Module]] = {
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "hardswish": nn.Hardswish,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leakyrelu": nn.LeakyReLU,
    "mish": nn.Mish,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "identity": nn.Identity,
}

DEFAULT_ACTIVATION = "silu"

_CALL = re.compile(r"\s*(?:torch\.)?(?:nn\.)?(?P<name>\w+)\s*(?:\((?P<args>[^()]*)\))?\s*")


def make_activation(name: str) -> nn.Module:
    """Make a new activation module from a name such as ``silu``, ``nn.ReLU()`` or ``nn.LeakyReLU(0.1)``.

    Arguments are plain numbers, by position or by keyword; ``inplace`` is accepted and ignored.
    Raises ModelError for a name outside the table and for arguments that are not numbers.
    """
    match = _CALL.fullmatch(name) if isinstance(name, str) else None
    factory = ACTIVATIONS.get(match["name"].lower().replace("_", "")) if match else None
    if match is None or factory is None:
        raise ModelError(f"activation {name!r} is not known; use one of: {', '.join(ACTIVATIONS)}")
    args: list[float] = []
    kwargs: dict[str, float] = {}
    for text in filter(None, (part.strip() for part in (match["args"] or "").split(","))):
        key, _, value = text.rpartition("=")
        key = key.strip()
        if key == "inplace":
            continue
        try:
            number = float(value)
        except ValueError:
            raise ModelError(f"activation {name!r}: argument {text!r} is not a number") from None
        if key:
            kwargs[key] = number
        else:
            args.append(number)
    try:
        return factory(*args, **kwargs)
    except TypeError:
        raise ModelError(f"activation {name!r}: {match['name']} does not take these arguments") from None


def has_activation(model: YOLO, name: str) -> bool:
    """Tell whether the blocks of a YOLO have the activation ``name`` already."""
    own = model.description.get("activation") or DEFAULT_ACTIVATION
    return type(make_activation(own)) is type(make_activation(name))


def activation_name(model: YOLO) -> str:
    """Return the kind of activation in the blocks of a YOLO, such as SiLU."""
    return type(make_activation(model.description.get("activation") or DEFAULT_ACTIVATION)).__name__


def swap_activations(model: YOLO, name: str) -> int:
    """Give every block of a YOLO the activation ``name`` where it has the model's own now; in place, how many changed.

    Weights stay, so a trained model has to be trained on. ``model.description`` says it from then on. Activations of
    another kind (a block without one, a ``csp_activation`` of its own) stay.
    """
    if has_activation(model, name):
        return 0
    description: dict[str, Any] = model.description
    old = type(make_activation(description.get("activation") or DEFAULT_ACTIVATION))
    count = 0
    for module in model.modules():
        act = getattr(module, "act", None)
        if type(act) is old and isinstance(act, nn.Module):
            if list(act.children()):
                raise ModelError(
                    f"activation {name!r}: a gate follows the activation that it would replace; fold it first"
                )
            module.act = make_activation(name)
            count += 1
    changed = {"activation": name}
    if description.get("csp_activation") and type(make_activation(description["csp_activation"])) is old:
        changed["csp_activation"] = name
    model.description = {**description, **changed}
    return count
