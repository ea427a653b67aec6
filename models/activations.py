"""Activations by name, from an explicit table."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

from models.errors import ModelError

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

_CALL = re.compile(r"\s*(?:torch\.)?(?:nn\.)?(?P<name>\w+)\s*(?:\((?P<args>[^()]*)\))?\s*")


def make_activation(name: str) -> nn.Module:
    """A new activation module from a name such as ``silu``, ``nn.ReLU()`` or ``nn.LeakyReLU(0.1)``.

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
