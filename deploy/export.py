"""A network of any kind as a file for another runtime, accepted only if it computes what torch does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import slim
from slim import SlimError

from .network import whole_or_nothing
from .onnx_file import onnx_graph, save_onnx
from .open_file import SUFFIXES, open_exported
from .openvino_file import from_onnx, save_openvino
from .proof import prove_equal
from .torchscript_file import save_torchscript


def export_network(
    model: nn.Module,
    path: str | Path,
    images: Tensor,
    *,
    dynamic_stride_px: int | None = None,
    free_batch: bool = True,
    uint8_input: bool = False,
    metadata: Mapping[str, str] | None = None,
    prove: Callable[[Any, nn.Module, Tensor], float] = prove_equal,
) -> float:
    """Write a network of one input and one output; returns its largest relative difference from torch on ``images``.

    Gates are folded and batch norms fused; operators are named after their modules (``model.0.conv/Conv``). The file is
    run, and appears only if its outputs are torch's (``prove_equal``); SlimError otherwise.

    Args:
        model: a copy of it is exported, in evaluation mode, on the CPU
        path: the file, replaced whole or not at all; its suffix says which kind: ``.onnx``, ``.xml`` (OpenVINO, float32
            weights in a ``.bin`` beside it) or ``.torchscript``
        images: [B, 3, H, W] float 0..1, on which torch and the file are compared; without ``dynamic_stride_px`` the file
            takes images of this shape alone
        dynamic_stride_px: height and width of the images are free, in multiples of this; not for TorchScript
        free_batch: with ``dynamic_stride_px``: the number of images is free, too
        uint8_input: the file takes bytes 0..255 and scales them itself
        metadata: written into the file
        prove: the difference between two networks on images, or an error

    Example:
        >>> import deploy, tempfile, torch
        >>> network, images = torch.nn.Conv2d(3, 8, 3), torch.rand(1, 3, 32, 32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     difference = deploy.export_network(network, f"{folder}/net.onnx", images)
        ...     deploy.open_exported(f"{folder}/net.onnx")(images).shape
        torch.Size([1, 8, 30, 30])
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise SlimError(f"{path}: not a kind of file that can be written; expected one of {', '.join(SUFFIXES)}")
    if path.suffix == ".torchscript" and dynamic_stride_px is not None:
        raise SlimError("--dynamic: TorchScript files take one size; leave it out, or --include onnx or openvino")
    folded = slim.fold_gates(copy.deepcopy(model).cpu(), (images,)).eval()
    with whole_or_nothing(path) as temporary:
        if path.suffix == ".torchscript":
            save_torchscript(folded, temporary, images, uint8_input, metadata or {})
        else:
            graph = onnx_graph(folded, images, dynamic_stride_px, free_batch, uint8_input)
            if path.suffix == ".onnx":
                save_onnx(graph, temporary, metadata or {})
            else:
                save_openvino(from_onnx(graph), temporary, metadata or {})
        return prove(folded, open_exported(temporary, precision="float32"), images)
