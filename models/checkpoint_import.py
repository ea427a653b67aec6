"""Published YOLOv5 checkpoints, pickles of module objects, as a model description and a state dict.

Nothing that a file asks for is run. torch's own unpickler for weights alone does the reading. Classes that YOLOv5 checkpoints
are known to name are given to it as records, which only remember what they were given; no name of the file is ever imported,
and any other ends the reading.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from slim import SlimError
from slim.archive import Record, read_archive

from .errors import ModelError

# Derived from anchors and strides; early releases saved it.
_DERIVED = ("anchor_grid",)
_MAX_DEPTH = 32
_RECORDED = re.compile(
    # Classes of networks; by convention a class starts with a capital, a function does not.
    r"(models|utils|yolov5|torch\.nn\.modules|torch\.nn\.parallel)(\.\w+)*\.[A-Z]\w*|ultralytics(\.\w+)+"
    # A method that a module holds as its forward: of fused and of segmentation networks. Transformers hold functions.
    r"|builtins\.getattr|torch\.nn\.functional\.\w+|torch\._C\._nn\.\w+"
    # What else their trainings left in the file. Functions too become records: their result is one of the call.
    r"|builtins\.(object|dict|list|frozenset)|argparse\.Namespace|collections\.defaultdict"
    r"|datetime\.(date|datetime|timedelta)|pathlib(\._local)?\.(Path|(Pure)?PosixPath|(Pure)?WindowsPath)"
    r"|numpy\._?core\.multiarray\.(_reconstruct|scalar)|numpy\.(dtype|ndarray)|torch\.dtype"
)
_OTHER_TASKS = {"Segment": "segmentation", "Classif": "classification", "Pose": "pose", "OBB": "oriented-box"}


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
    return imported_from(read_checkpoint(path), path)


def imported_from(content: Any, path: Path) -> Imported:
    """``import_checkpoint`` of what ``read_checkpoint`` gave."""
    model = _find_model(content, path)
    description = _plain(model.state.get("yaml"))
    _check_is_detector(model, description, path)
    if not isinstance(description, dict) or "backbone" not in description:
        raise ModelError(f"{path}: {model.qualified_name} carries no YAML; expected a YOLOv5 detection checkpoint")
    state_dict: dict[str, Tensor] = {}
    for name, tensor in _tensors(model, "", path):
        state_dict[name] = (tensor.float() if tensor.is_floating_point() else tensor).detach().contiguous()
    if not state_dict:
        raise ModelError(f"{path}: {model.qualified_name} holds no tensors; expected a YOLOv5 detection checkpoint")
    for key, activation in _activations(model).items():
        description.setdefault(key, activation)
    return Imported(description, state_dict, _names(model, path))


def _find_model(content: Any, path: Path) -> Record:
    remedy = "expected a published YOLOv5 checkpoint with 'model' or 'ema'"
    if isinstance(content, Record):
        return content
    if not isinstance(content, dict):
        raise ModelError(f"{path}: holds a {type(content).__name__}, {remedy}")
    if content and all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"{path}: holds a plain state dict without the model's structure, {remedy}")
    for key in ("ema", "model"):
        model = content.get(key)
        if isinstance(model, tuple | list) and model:
            model = model[0]
        if isinstance(model, Record):
            return model
        if isinstance(model, dict) and any(isinstance(value, Tensor) for value in model.values()):
            raise ModelError(f"{path}: {key!r} is a plain state dict without the model's structure, {remedy}")
    raise ModelError(f"{path}: has the keys {sorted(map(str, content))[:8]}, {remedy}")


def _children(module: Record) -> dict[str, Any]:
    children = module.state.get("_modules")
    return children if isinstance(children, dict) else {}


def _tensors(module: Record, prefix: str, path: Path, depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by the names that ``state_dict`` would give them."""
    if depth > _MAX_DEPTH:
        raise ModelError(f"{path}: modules are nested deeper than {_MAX_DEPTH} at {prefix[:80]}; the file is damaged")
    for kind in ("_parameters", "_buffers"):
        held = module.state.get(kind)
        for name, value in held.items() if isinstance(held, dict) else ():
            if isinstance(value, Tensor) and name not in _DERIVED:
                yield f"{prefix}{name}", value
    for name, child in _children(module).items():
        if isinstance(child, Record):
            yield from _tensors(child, f"{prefix}{name}.", path, depth + 1)


def _activations(model: Record) -> dict[str, str]:
    """Keys of the description for activations other than SiLU, from the first blocks that have one."""
    found: dict[str, str] = {}
    stack = [model]
    while stack:
        module = stack.pop()
        act = _children(module).get("act")
        block = module.qualified_name.rpartition(".")[2]
        key = {"Conv": "activation", "BottleneckCSP": "csp_activation"}.get(block)
        if key and key not in found and isinstance(act, Record) and not act.qualified_name.endswith(".Identity"):
            found[key] = _activation_name(act)
        stack.extend(child for child in reversed(_children(module).values()) if isinstance(child, Record))
    if found.get("csp_activation") == found.get("activation", "SiLU"):
        found.pop("csp_activation", None)
    if found.get("activation") == "SiLU":
        found.pop("activation")
    return found


def _activation_name(act: Record) -> str:
    name = act.qualified_name.rpartition(".")[2]
    slope = act.state.get("negative_slope")
    return f"nn.LeakyReLU({slope})" if name == "LeakyReLU" and isinstance(slope, float) else name


def _names(model: Record, path: Path) -> list[str] | None:
    names = model.state.get("names")
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise ModelError(f"{path}: its names have the keys {list(names)[:8]}, expected 0 to {len(names) - 1}")
        names = [names[i] for i in range(len(names))]
    return [str(name) for name in names] if isinstance(names, list | tuple) else None


def _check_is_detector(model: Record, description: Any, path: Path) -> None:
    """Raise ModelError that says what a network is that YOLOv5 or its publisher made for something else."""
    head = description.get("head") if isinstance(description, dict) else None
    last = head[-1][2] if isinstance(head, list) and head and isinstance(head[-1], list) and len(head[-1]) > 2 else ""
    name = model.qualified_name
    task = next((task for key, task in _OTHER_TASKS.items() if key in name.rpartition(".")[2] or key in str(last)), "")
    if name.startswith("ultralytics."):
        kind = f"a{'n' if task[:1] == 'o' else ''} {task}" if task else "a"
        raise ModelError(f"{path}: {kind} network of Ultralytics YOLOv8 or later ({name}); expected a YOLOv5 detector")
    if task:
        raise ModelError(f"{path}: a {task} network ({name}); expected a detector")


def _plain(value: Any, depth: int = 0) -> Any:
    """Dicts, lists and scalars as they are (tuples as lists); anything else, or nested too deep, becomes None."""
    if depth > _MAX_DEPTH:
        return None
    if isinstance(value, dict):
        return {key: _plain(item, depth + 1) for key, item in value.items() if isinstance(key, str)}
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    return value if isinstance(value, str | int | float | bool) else None


def read_checkpoint(path: Path) -> Any:
    """The object pickled in a torch zip file, tensors as they are, with a ``Record`` for objects.

    Raises ModelError for a file that is missing, damaged, of another kind, or that asks for anything unknown.
    """

    def check_names(asked: Sequence[str]) -> None:
        for name in asked:
            if not _RECORDED.fullmatch(name):
                raise ModelError(
                    f"{path}: asks for {name}, which no YOLOv5 checkpoint holds: it is of another kind of network, or hostile; "
                    "nothing of the file was run"
                )

    try:
        return read_archive(path, check_names)
    except ModelError:
        raise
    except SlimError as error:
        raise ModelError(str(error)) from error
