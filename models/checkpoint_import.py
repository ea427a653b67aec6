"""Published YOLOv5 checkpoints, pickles of module objects, as a model description and a state dict.

Nothing that a file asks for is run. torch's own unpickler for weights alone does the reading. Classes that YOLOv5 checkpoints
are known to name are given to it as stubs, which only remember what they were given; no name of the file is ever imported,
and any other ends the reading.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from .errors import ModelError

# Derived from anchors and strides; early releases saved it.
_DERIVED = ("anchor_grid",)
_MAX_DEPTH = 32
_STUBBED = re.compile(
    # Classes of networks; by convention a class starts with a capital, a function does not.
    r"(models|utils|ultralytics|torch\.nn\.modules|torch\.nn\.parallel)(\.\w+)*\.[A-Z]\w*"
    # What else their trainings left in the file. Functions too become stubs: their result is a record of the call.
    r"|builtins\.(object|dict|list|frozenset)|argparse\.Namespace|collections\.defaultdict"
    r"|datetime\.(date|datetime|timedelta)|pathlib(\._local)?\.(Path|(Pure)?PosixPath|(Pure)?WindowsPath)"
    r"|numpy\._?core\.multiarray\.(_reconstruct|scalar)|numpy\.(dtype|ndarray)|torch\.dtype"
)


class Stub:
    """An object of a class that is not loaded: what it was called with and the state it was given, as data."""

    __slots__ = ("args", "state")
    qualified_name = ""
    args: tuple[Any, ...]
    state: dict[Any, Any]

    def __new__(cls, *args: Any) -> Stub:
        stub = object.__new__(cls)
        stub.args, stub.state = args, {}
        return stub

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.state.update(part)


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


def read_checkpoint(path: Path) -> Any:
    """The object pickled in a torch zip file, tensors as they are, with ``Stub`` for objects.

    Raises ModelError for a file that is missing, damaged, of another kind, or that asks for anything unknown.
    """
    _check_archive(path)
    try:
        asked = sorted(get_unsafe_globals_in_checkpoint(str(path)))
        refused = [name for name in asked if not _STUBBED.fullmatch(name)]
        if refused:
            raise ModelError(
                f"{path}: asks for {refused[0]}, which is not part of a YOLOv5 checkpoint; nothing of the file was run, do "
                "not load it with other tools"
            )
        stubs = [type(name.rpartition(".")[2], (Stub,), {"__slots__": (), "qualified_name": name}) for name in asked]
        with safe_globals(list(zip(stubs, asked, strict=True))), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except ModelError:
        raise
    except Exception as error:  # a damaged file can fail in any way, from IndexError to MemoryError
        cause = error.__cause__ if isinstance(error.__cause__, pickle.UnpicklingError) else error
        reason = (str(cause) or type(cause).__name__).splitlines()[0][:200]
        raise ModelError(f"{path}: is damaged ({reason}); download the file again") from None


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); give the path of a checkpoint") from None
    except zipfile.BadZipFile:
        raise ModelError(
            f"{path}: not a zip file, expected a checkpoint saved by torch 1.6 or later; it may be truncated or of another kind: "
            "download it again, or load and save it with the tool that made it"
        ) from None
    if not any(record.filename.endswith("/data.pkl") for record in records):
        raise ModelError(f"{path}: a zip file without data.pkl, expected a checkpoint saved by torch")
    for record in records:
        # torch stores records as they are; refusing compressed ones bounds memory by the file's size.
        if record.compress_type != zipfile.ZIP_STORED:
            raise ModelError(f"{path}: record {record.filename} is compressed, which torch never does")
