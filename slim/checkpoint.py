"""Slim checkpoints: a dictionary of tensors and plain values from which a pruned model is built again.

The structure travels inside: ``build`` (what the builder needs to make the dense network), the width of every layer, the
gates' layout. Loads with ``torch.load(weights_only=True)``; no pickled modules.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slim.atomic import write_atomically
from slim.cost import cost
from slim.errors import SlimError
from slim.fold import example_of
from slim.gate import Gate
from slim.insert import gate_layout, restore_gates
from slim.surgery import replace_tensor
from slim.widths import norm_widths, refresh_widths, set_norm_widths

FORMAT = "slim-checkpoint"
FORMAT_VERSION = 3
OLDEST_READABLE = {"without gates": 1, "with gates": 3}
"""1 had no widths of norms; before 3 gates took the place of the activations that they followed."""


def widths_of(model: nn.Module) -> dict[str, list[int]]:
    """{path: [input channels, output channels]} of every convolution and linear layer."""
    widths = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            widths[path] = [module.in_channels, module.out_channels]
        elif isinstance(module, nn.Linear):
            widths[path] = [module.in_features, module.out_features]
    return widths


def pack(model: nn.Module, build: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint's dictionary: weights in FP32 on the CPU, widths, gates and what they cost."""
    example = getattr(model, "slim_example", None)
    state = {
        k: (v.float() if v.is_floating_point() else v).detach().cpu().contiguous()
        for k, v in model.state_dict().items()
    }
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "build": dict(build),
        "widths": widths_of(model),
        "norms": norm_widths(model),
        "gates": gate_layout(model),
        "example": None if example is None else [[list(shape), kind] for shape, kind in example],
        "params": count_params(model),
        "macs": None if example is None else cost(model, example_of(model)).macs,
        "state_dict": state,
    }


def count_params(model: nn.Module) -> int:
    """Learnable parameters, gates not counted."""
    gates = {id(p) for m in model.modules() if isinstance(m, Gate) for p in m.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in gates)


def save(
    model: nn.Module, path: str | os.PathLike[str], build: Mapping[str, Any], extra: Mapping[str, Any] | None = None
) -> None:
    """Write a checkpoint atomically: a temporary file in the same folder, flushed, then renamed.

    ``build`` is what ``load``'s builder will get; ``extra`` adds further entries (tensors and plain values).
    """
    packed = pack(model, build)
    taken = set(extra or {}) & set(packed)
    if taken:
        raise SlimError(f"extra uses reserved entries: {', '.join(sorted(taken))}")
    content = {**packed, **(extra or {})}
    write_atomically(Path(path), lambda temporary: torch.save(content, temporary))


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint's dictionary; SlimError when the file is missing, damaged or of another kind."""
    if not Path(path).is_file():
        raise SlimError(f"{path}: no such file; expected a checkpoint written by slim.save")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, OSError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SlimError(f"{path}: not a readable checkpoint ({first}); expected a file written by slim.save") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise SlimError(f"{path}: a checkpoint of another kind; expected one written by slim.save")
    oldest = OLDEST_READABLE["with gates" if content["gates"] else "without gates"]
    if not oldest <= content["format_version"] <= FORMAT_VERSION:
        raise SlimError(
            f"{path}: checkpoint format {content['format_version']}; this slim reads {oldest} to {FORMAT_VERSION} for a network "
            f"{'with' if content['gates'] else 'without'} gates; write it again with the slim that it belongs to"
        )
    return content


def load(path: str | os.PathLike[str], builder: Callable[[dict[str, Any]], nn.Module]) -> nn.Module:
    """Build the dense network with ``builder(build)``, narrow it to the checkpoint's widths, put its gates and weights in."""
    return restore(read(path), builder, str(path))


def restore(
    content: Mapping[str, Any], builder: Callable[[dict[str, Any]], nn.Module], origin: str = "checkpoint"
) -> nn.Module:
    """``load`` for a dictionary that is already read."""
    model = builder(content["build"])
    example = content["example"]
    restore_gates(model, content["gates"], None if example is None else tuple((tuple(s), kind) for s, kind in example))
    state: dict[str, Tensor] = content["state_dict"]
    own = model.state_dict()
    missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if missing or unexpected:
        raise SlimError(
            f"{origin}: does not fit the network that was built: missing {missing[:3]}, unexpected {unexpected[:3]} "
            f"({len(missing)} and {len(unexpected)} in all); was it saved with another builder?"
        )
    for name, tensor in state.items():
        if own[name].shape != tensor.shape:
            replace_tensor(model, name, torch.empty_like(tensor, dtype=own[name].dtype))
    refresh_widths(model)
    set_norm_widths(model, content.get("norms", {}))
    model.load_state_dict(state)
    verify(model, content, origin)
    return model


def verify(model: nn.Module, content: Mapping[str, Any], origin: str) -> None:
    """The network that was built must be the one that was saved: widths, parameters, MACs."""
    found = {"widths": widths_of(model), "params": count_params(model)}
    if content["macs"] is not None:
        found["macs"] = cost(model, example_of(model)).macs
    for key, value in found.items():
        if value != content[key]:
            detail = "" if key == "widths" else f" ({value}, recorded {content[key]})"
            raise SlimError(f"{origin}: {key} of the rebuilt network differ from those recorded{detail}")
