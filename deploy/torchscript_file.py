"""TorchScript files: written from a network of any kind, and run by torch without its source."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slim import SlimError

from .graph_wrappers import FromBytes
from .network import EngineNetwork, as_bytes, digest_file, existing, index_of_boxes, read_list

INFO = "config.txt"
"""The extra file in which YOLOv5's exports say what they are: JSON."""


class TorchScriptNetwork(EngineNetwork):
    """A TorchScript file. Its threads are those of all of torch, see ``torch_threads``.

    Such a file is a program that may do anything as soon as it is opened. It is one of our exports if its SHA-256 is that in
    the file beside it; whoever can write there can write both, so that this shows damage and mix-ups, not malice.

    Args:
        path: the file
        trust: open it whatever its digest
    """

    engine = "torch"

    def __init__(self, path: str | Path, trust: bool = False) -> None:
        path = existing(path, "a TorchScript network")
        content = path.read_bytes()
        if not trust:
            _check_digest(path, content)
        extra = {INFO: ""}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                script = torch.jit.load(io.BytesIO(content), map_location="cpu", _extra_files=extra).eval()
            metadata = {key: _as_literal(value) for key, value in json.loads(extra[INFO] or "{}").items()}
        except (RuntimeError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise SlimError(f"{path}: not a TorchScript network ({first}); export it anew") from error
        super().__init__(
            path,
            metadata,
            tuple(read_list(metadata, "shape")) or (None,) * 4,
            takes_bytes=metadata.get("uint8_input") == "true",
            precision="float32",
        )
        self.script = script

    def run(self, images: Tensor) -> Tensor:
        output: Any = self.script(images)
        tensors = [one for one in ([output] if isinstance(output, Tensor) else output) if isinstance(one, Tensor)]
        return tensors[index_of_boxes(self.path, [tuple(one.shape) for one in tensors])]


def _as_literal(value: Any) -> str:
    """A value of the JSON as Python writes it, whose mappings have numbers as keys."""
    return str(
        {int(key) if key.isdecimal() else key: of for key, of in value.items()} if isinstance(value, dict) else value
    )


def _check_digest(path: Path, content: bytes) -> None:
    """Raise SlimError for a file that is not what an export left its digest of."""
    beside = digest_file(path)
    remedy = "export it anew, or give --trust if you trust whoever made it"
    try:
        known = beside.read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise SlimError(
            f"{path}: a TorchScript file is a program, which runs when it is opened, and there is no {beside.name} beside it, as "
            f"export.py leaves one; {remedy}"
        ) from None
    if known.split()[:1] != [hashlib.sha256(content).hexdigest()]:
        raise SlimError(f"{path}: its SHA-256 is not that in {beside.name}: it is damaged or another file; {remedy}")


def save_torchscript(
    model: nn.Module, path: Path, images: Tensor, uint8_input: bool, metadata: Mapping[str, str]
) -> None:
    """Trace and write a network, for images of the shape of ``images`` alone: tracing writes sizes down as numbers."""
    traced, example = (FromBytes(model).eval(), as_bytes(images)) if uint8_input else (model, images)
    # YOLOv5 reads the names as a mapping and the stride as a number.
    of_detector = {key: ast.literal_eval(metadata[key]) for key in ("names", "stride") if key in metadata}
    known = {**metadata, **of_detector, "shape": list(images.shape), "uint8_input": json.dumps(uint8_input)}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        script = torch.jit.freeze(torch.jit.trace(traced, (example,), check_trace=False))
        torch.jit.save(script, str(path), _extra_files={INFO: json.dumps(known)})
    digest_file(path).write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n", encoding="utf-8")
