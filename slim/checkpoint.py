"""Slim checkpoints: a dictionary of tensors and plain values from which a pruned model is built again.

The structure travels inside: ``build`` (what the builder needs to make the dense network), the width of every layer, the
gates' layout. Loads with ``torch.load(weights_only=True)``; no pickled modules.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from slim.archive import read_archive
from slim.atomic import write_atomically
from slim.errors import SlimError
from slim.fold import example_inputs_of
from slim.forward import like
from slim.gate import count_params, gate_layout, restore_gates
from slim.propagate import cost
from slim.surgery import swap_tensors
from slim.widths import counts_of, layer_widths, norm_widths, note_buffers, refresh_widths, set_counts, set_norm_widths
from slim.wrapped import Model, without_ddp

FORMAT = "slim-checkpoint"
FORMAT_VERSION = 3
OLDEST_READABLE = {"without gates": 1, "with gates": 3}
"""1 had no widths of norms; before 3 gates took the place of the activations that they followed."""
_ENTRIES: dict[str, type | tuple[type, ...]] = {
    **{"format_version": int, "build": dict, "widths": dict, "gates": list, "params": int, "state_dict": dict},
    **{"macs": (int, type(None)), "example": (list, type(None))},
}


def pack(model: nn.Module, build: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint's dictionary: weights in FP32 on the CPU, widths, gates and what they cost.

    Nothing runs and what is FP32 on the CPU already is not copied: MACs follow from the widths and from the output
    positions of each layer, which were seen when the gates were placed.
    """
    model = without_ddp(model)
    example = getattr(model, "slim_example", None)
    state = {name: _kept(value) for name, value in model.state_dict().items()}
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "build": dict(build),
        "widths": layer_widths(model),
        "norms": norm_widths(model),
        "counts": counts_of(model),
        "buffers": {name: _kept(t) for name, t in model.named_buffers() if name in getattr(model, "slim_buffers", ())},
        "gates": gate_layout(model),
        "example": None if example is None else [[list(shape), kind] for shape, kind in example],
        "params": count_params(model),
        "macs": None if example is None else macs_from_widths(model),
        "state_dict": state,
    }


def _kept(value: Any) -> Any:
    """As it is saved: a tensor in FP32 on the CPU; what a module gives as its extra state stays what it is."""
    if not isinstance(value, Tensor):
        return value
    return (value.float() if value.is_floating_point() else value).detach().cpu().contiguous()


def macs_from_widths(model: nn.Module) -> int:
    """MACs of one image at the size with which the gates were placed, from the shapes that the weights have now."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    layers = model.slim_layers
    return sum(prod(shapes.get(layer.weight, layer.shape)) * layer.positions for layer in layers)  # type: ignore[union-attr]


def save(
    model: nn.Module, path: str | os.PathLike[str], build: Mapping[str, Any], extra: Mapping[str, Any] | None = None
) -> None:
    """Write a checkpoint atomically: a temporary file in the same folder, flushed, then renamed.

    Args:
        model: a dense, gated or pruned model
        path: the file; folders are made
        build: what ``load``'s builder needs to make the dense network: plain values
        extra: further entries of the file: tensors and plain values

    Raises:
        SlimError: when the file cannot be written, and where ``extra`` uses names of the format's own entries.

    Examples:
        >>> import slim, tempfile, torch
        >>> from pathlib import Path
        >>> from torch import nn
        >>> def build_network(build):
        ...     return nn.Sequential(nn.Conv2d(3, build["width"], 3), nn.ReLU(), nn.Conv2d(build["width"], 2, 1))
        >>> model, x = build_network({"width": 4}), torch.rand(1, 3, 8, 8)
        >>> graph = slim.trace(model, x)
        >>> plan = slim.make_plan(graph, slim.score(model, graph, "l1"), macs=0.5, round_to=1, min_channels=1)
        >>> pruned = slim.apply_plan(model, plan)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     slim.save(pruned, Path(folder) / "pruned.pt", build={"width": 4})
        ...     loaded = slim.load(Path(folder) / "pruned.pt", build_network)
        >>> slim.max_difference(pruned, loaded, x)
        0.0
    """
    packed = pack(model, build)
    taken = set(extra or {}) & set(packed)
    if taken:
        raise SlimError(f"extra uses reserved entries: {', '.join(sorted(taken))}")
    content = {**packed, **(extra or {})}
    write_atomically(Path(path), lambda temporary: torch.save(content, temporary))


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint's dictionary; SlimError when the file is missing, damaged or of another kind."""
    return checked(read_archive(Path(path)), str(path))


def is_ours(content: Any) -> TypeGuard[dict[str, Any]]:
    """Whether what a file holds is meant for ``checked``."""
    return isinstance(content, dict) and content.get("format") == FORMAT


def checked(content: Any, origin: str) -> dict[str, Any]:
    """What a file holds, if it is a checkpoint with all of its entries that can be read here; else SlimError."""
    if not is_ours(content):
        raise SlimError(f"{origin}: a checkpoint of another kind; expected one written by slim.save")
    for key, kinds in _ENTRIES.items():
        if key not in content or not isinstance(content[key], kinds):
            found = type(content[key]).__name__ if key in content else "nothing"
            raise SlimError(
                f"{origin}: its entry {key} is {found}, which slim.save never writes; it is damaged: copy it again"
            )
    version, oldest = content["format_version"], OLDEST_READABLE["with gates" if content["gates"] else "without gates"]
    if not oldest <= version <= FORMAT_VERSION:
        raise SlimError(
            f"{origin}: checkpoint format {version}; this slim reads {oldest} to {FORMAT_VERSION} for a network "
            f"{'with' if content['gates'] else 'without'} gates; write it again with the slim that it belongs to"
        )
    return content


def load(path: str | os.PathLike[str], builder: Callable[[dict[str, Any]], Model]) -> Model:
    """Build the network of a checkpoint and put its gates and weights in.

    The dense network comes from ``builder(build)`` and is narrowed to the checkpoint's widths; its parameters and MACs must
    be those recorded.

    Args:
        path: a file written by ``slim.save``; no code in it is run
        builder: from the ``build`` that was saved to the dense network

    Raises:
        SlimError: when the file is missing, damaged or of another kind, or does not fit the network that was built.

    Examples:
        >>> import slim
        >>> slim.load("nowhere.pt", lambda build: None)
        Traceback (most recent call last):
            ...
        slim.errors.SlimError: nowhere.pt: no such file; give the path of a checkpoint
    """
    return restore(read(path), builder, str(path))


def restore(
    content: Mapping[str, Any], builder: Callable[[dict[str, Any]], Model], origin: str = "checkpoint"
) -> Model:
    """``load`` for a dictionary that is already read."""
    try:
        model = builder(content["build"])
        _put_in(model, content, origin)
        verify(model, content, origin)
    except SlimError as error:
        text = str(error)
        raise error if text.startswith(f"{origin}: ") else SlimError(f"{origin}: {text}") from error
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError, MemoryError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SlimError(
            f"{origin}: no network can be built of its entries ({type(error).__name__}: {first}); it is damaged, or was saved "
            "with another builder"
        ) from error
    return model


def _put_in(model: nn.Module, content: Mapping[str, Any], origin: str) -> None:
    """Gates, widths and weights, in place."""
    restore_gates(model, content["gates"])
    state: dict[str, Tensor] = content["state_dict"]
    own = model.state_dict(keep_vars=True)
    missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if missing or unexpected:
        raise SlimError(
            f"{origin}: does not fit the network that was built: missing {missing[:3]}, unexpected {unexpected[:3]} "
            f"({len(missing)} and {len(unexpected)} in all); was it saved with another builder?"
        )
    buffers, kept = dict(model.named_buffers()), content.get("buffers", {})
    resized = {
        own[name]: torch.empty_like(t, dtype=own[name].dtype)
        for name, t in state.items()
        if isinstance(t, Tensor) and own[name].shape != t.shape
    }
    resized |= {buffers[name]: t.to(buffers[name].dtype) for name, t in kept.items()}
    swap_tensors(model, {id(old): like(old, tensor) for old, tensor in resized.items()})
    note_buffers(model, kept)
    set_norm_widths(model, content.get("norms", {}))
    refresh_widths(model)
    set_counts(model, content.get("counts", {}))
    model.load_state_dict(state)


def verify(model: nn.Module, content: Mapping[str, Any], origin: str) -> None:
    """The network that was built must be the one that was saved: widths, parameters, MACs."""
    found = {"widths": layer_widths(model), "params": count_params(model)}
    if content["example"] is not None:
        model.slim_example = tuple((tuple(shape), kind) for shape, kind in content["example"])  # type: ignore[assignment]
        measured = cost(model, example_inputs_of(model))
        model.slim_layers = measured.layers  # type: ignore[assignment]
        found["macs"] = measured.macs
    for key, value in found.items():
        if value != content[key]:
            detail = "" if key == "widths" else f" ({value}, recorded {content[key]})"
            raise SlimError(f"{origin}: {key} of the rebuilt network differ from those recorded{detail}")
