"""A network of any kind as a file for another runtime, accepted only if it is proven to compute what torch does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

import slim
from slim import SlimError

from .graph_wrappers import WithNms
from .network import whole_or_nothing
from .onnx_file import in_opset, onnx_graph, save_onnx, store_halves
from .open_file import SUFFIXES, open_exported
from .openvino_file import from_onnx, save_openvino
from .torchscript_file import save_torchscript

LARGEST_DIFFERENCE = 1e-4
"""The accepted difference between torch and an exported float32 network, relative to the output's largest magnitude."""
LARGEST_ROUNDING = 10
"""The accepted difference where that is larger: so many times torch's own distance from float64."""


def prove_equal(model: nn.Module, exported: nn.Module, images: Tensor) -> float:
    """The largest difference, relative to the largest output (``slim.max_difference``); SlimError where it is too large.

    A network that magnifies float32's rounding is measured by how far torch itself is from float64.
    """
    difference = slim.max_difference(model, exported, images)
    if difference <= LARGEST_DIFFERENCE:
        return difference
    exact = copy.deepcopy(model).double()
    with slim.evaluation_mode(model), slim.evaluation_mode(exact), torch.no_grad():
        wanted, precise = model(images), exact(images.double())
    rounding = float((wanted - precise).abs().max() / precise.abs().max())
    if not difference <= LARGEST_ROUNDING * rounding:
        raise SlimError(
            f"the exported network differs from torch by {difference:.3g} of the largest output, expected at most "
            f"{LARGEST_DIFFERENCE:g}; nothing was written"
        )
    return difference


def export_network(
    model: nn.Module,
    path: str | Path,
    images: Tensor,
    *,
    dynamic_stride_px: int | None = None,
    free_batch: bool = True,
    uint8_input: bool = False,
    half_weights: bool = False,
    opset: int | None = None,
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
        half_weights: weights that are exact in 16 bits are stored so; runtimes compute in float32 as before. Not for TorchScript
        opset: the operator set of an ONNX file; None for that of torch's exporter
        metadata: written into the file
        prove: the difference between two networks on images, or an error

    Examples:
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
                graph = graph if opset is None else in_opset(graph, opset)
                if half_weights:
                    store_halves(graph)
                save_onnx(graph, temporary, metadata or {})
            else:
                save_openvino(from_onnx(graph), temporary, metadata or {}, half_weights=half_weights)
        return prove(folded, open_exported(temporary, precision="float32"), images)


def prove_same_detections(model: WithNms, exported: nn.Module, images: Tensor) -> float:
    """Do what ``prove_equal`` does for detectors that end in a suppression; the difference is that of boxes and scores.

    Where scores are equal, or an overlap is at its limit, but for rounding, more than one outcome is right. So what is
    checked is what defines the outcome: each detection is a candidate of torch's, no two of a class overlap too much, and
    each candidate that is missing overlaps too much with a detection of its class that is no less confident.
    """
    with slim.evaluation_mode(model), torch.no_grad():
        candidates = [model.candidates(predictions) for predictions in model.network(images)]
        worst = max(_suppression_error(model, *pair) for pair in zip(candidates, exported(images), strict=True))
    if not worst <= LARGEST_DIFFERENCE:
        raise SlimError(
            f"the exported network's detections differ from torch's by {worst:.3g} of the largest coordinate, expected at "
            f"most {LARGEST_DIFFERENCE:g}; nothing was written"
        )
    return worst


def _suppression_error(model: WithNms, candidates: Tensor, detections: Tensor) -> float:
    """The largest difference of one image's rows (box, score, class); infinite where they are no suppression of candidates."""
    candidates, found = candidates[candidates[:, 4] > 0], detections[detections[:, 4] > 0]
    is_full = len(found) == model.max_detections
    least = max(model.conf, float(found[-1, 4]) if is_full else 0.0) + LARGEST_DIFFERENCE
    surely = candidates[candidates[:, 4] > least]
    if not len(found):
        return float("inf") if len(surely) else 0.0
    if not len(candidates):
        return float("inf")
    scale = candidates[:, :4].abs().max()
    size = torch.tensor([*[float(scale)] * 4, 1.0, LARGEST_DIFFERENCE / 2])  # no class is another one
    worst = float((torch.cdist(found / size, candidates / size, float("inf"))).min(1).values.max())
    same_class = found[:, 5, None] == found[:, 5]
    overlaps = box_iou(found[:, :4], found[:, :4]).triu(1) * same_class
    removed = box_iou(surely[:, :4], found[:, :4]) > model.iou - LARGEST_DIFFERENCE
    removed &= (surely[:, 5, None] == found[:, 5]) & (found[:, 4] > surely[:, 4, None] - LARGEST_DIFFERENCE)
    if bool((overlaps > model.iou + LARGEST_DIFFERENCE).any()) or not bool(removed.any(1).all()):
        return float("inf")
    return worst
