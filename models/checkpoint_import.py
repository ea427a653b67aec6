"""Published YOLOv5 checkpoints: the structure, weights and class names in a pickle of module objects, read as data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import ModelError
from .restricted_pickle import Stub, read_checkpoint

# Derived from anchors and strides; early releases saved it.
_DERIVED = ("anchor_grid",)
_MAX_DEPTH = 32


@dataclass(frozen=True)
class Imported:
    """``description`` is fit for ``build_model``; ``state_dict`` is FP32 (counters int64); ``names`` by class index."""

    description: dict[str, Any]
    state_dict: dict[str, Tensor] = field(repr=False)
    names: list[str] | None


def import_checkpoint(path: str | Path) -> Imported:
    """Read a published YOLOv5 ``.pt`` (a zip with a pickled module tree) without running any code of the file.

    Takes the moving average (``ema``) where there is one, else ``model``. Where a release's activations are not in its
    YAML, they are read off the module tree. Raises ModelError for any other kind of file, for a damaged one, and for
    one whose pickle asks for something that no YOLOv5 checkpoint holds.
    """
    path = Path(path)
    content = read_checkpoint(path)
    model = _find_model(content, path)
    description = _plain(model.state.get("yaml"))
    if not isinstance(description, dict) or "backbone" not in description:
        raise ModelError(f"{path}: {model.qualified_name} carries no YAML; expected a YOLOv5 detection checkpoint")
    state_dict: dict[str, Tensor] = {}
    for name, tensor in _tensors(model, "", path):
        if tensor.nbytes > tensor.untyped_storage().nbytes():  # a stride of 0 could ask for any amount of memory
            raise ModelError(f"{path}: is damaged (more elements in {name} than are stored); download the file again")
        state_dict[name] = (tensor.float() if tensor.is_floating_point() else tensor).detach().contiguous()
    if not state_dict:
        raise ModelError(f"{path}: {model.qualified_name} holds no tensors; expected a YOLOv5 detection checkpoint")
    for key, activation in _activations(model).items():
        description.setdefault(key, activation)
    return Imported(description, state_dict, _names(model))


def _find_model(content: Any, path: Path) -> Stub:
    remedy = "expected a published YOLOv5 checkpoint with 'model' or 'ema'"
    if isinstance(content, Stub):
        return content
    if not isinstance(content, dict):
        raise ModelError(f"{path}: holds a {type(content).__name__}, {remedy}")
    if content and all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"{path}: holds a plain state dict without the model's structure, {remedy}")
    for key in ("ema", "model"):
        model = content.get(key)
        if isinstance(model, tuple | list) and model:
            model = model[0]
        if isinstance(model, Stub):
            return model
        if isinstance(model, dict) and any(isinstance(value, Tensor) for value in model.values()):
            raise ModelError(f"{path}: {key!r} is a plain state dict without the model's structure, {remedy}")
    raise ModelError(f"{path}: has the keys {sorted(map(str, content))[:8]}, {remedy}")


def _children(module: Stub) -> dict[str, Any]:
    children = module.state.get("_modules")
    return children if isinstance(children, dict) else {}


def _tensors(module: Stub, prefix: str, path: Path, depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by the names that ``state_dict`` would give them."""
    if depth > _MAX_DEPTH:
        raise ModelError(f"{path}: modules are nested deeper than {_MAX_DEPTH} at {prefix[:80]}; the file is damaged")
    for kind in ("_parameters", "_buffers"):
        held = module.state.get(kind)
        for name, value in held.items() if isinstance(held, dict) else ():
            if isinstance(value, Tensor) and name not in _DERIVED:
                yield f"{prefix}{name}", value
    for name, child in _children(module).items():
        if isinstance(child, Stub):
            yield from _tensors(child, f"{prefix}{name}.", path, depth + 1)


def _activations(model: Stub) -> dict[str, str]:
    """Keys of the description for activations other than SiLU, from the first blocks that have one."""
    found: dict[str, str] = {}
    stack = [model]
    while stack:
        module = stack.pop()
        act = _children(module).get("act")
        block = module.qualified_name.rpartition(".")[2]
        key = {"Conv": "activation", "BottleneckCSP": "csp_activation"}.get(block)
        if key and key not in found and isinstance(act, Stub) and not act.qualified_name.endswith(".Identity"):
            found[key] = _activation_name(act)
        stack.extend(child for child in reversed(_children(module).values()) if isinstance(child, Stub))
    if found.get("csp_activation") == found.get("activation", "SiLU"):
        found.pop("csp_activation", None)
    if found.get("activation") == "SiLU":
        found.pop("activation")
    return found


def _activation_name(act: Stub) -> str:
    name = act.qualified_name.rpartition(".")[2]
    slope = act.state.get("negative_slope")
    return f"nn.LeakyReLU({slope})" if name == "LeakyReLU" and isinstance(slope, float) else name


def _names(model: Stub) -> list[str] | None:
    names = model.state.get("names")
    if isinstance(names, dict) and set(names) == set(range(len(names))):
        names = [names[i] for i in range(len(names))]
    return [str(name) for name in names] if isinstance(names, list | tuple) else None


def _plain(value: Any, depth: int = 0) -> Any:
    """Dicts, lists and scalars as they are (tuples as lists); anything else, or nested too deep, becomes None."""
    if depth > _MAX_DEPTH:
        return None
    if isinstance(value, dict):
        return {key: _plain(item, depth + 1) for key, item in value.items() if isinstance(key, str)}
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    return value if isinstance(value, str | int | float | bool) else None
