"""A detector as a file for another runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import slim
from deploy import Decoded, WithNms, export_network, prove_same_detections
from models import YOLO, NmsSettings, activation_name, fuse_norms

from .network import Network

PACKAGES_OF = {"onnx": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}
"""What writes the files of a kind; TorchScript needs torch alone."""
SUFFIX_OF: dict[str, str] = {"onnx": ".onnx", "openvino": ".xml", "torchscript": ".torchscript"}


def metadata_of(network: Network, sides_px: tuple[int, int] | None = None) -> dict[str, str]:
    """What a deployed detector says of itself, as YOLOv5's exports (names as a Python literal, the largest stride) and more.

    ``macs`` are those of an image of ``sides_px`` (height, width), which stand in ``imgsz``; else of a small one.
    """
    model = network.model
    sides_px = sides_px or (2 * max(model.stride_px),) * 2
    cost = slim.cost(model, torch.zeros(1, 3, *sides_px))
    return {
        "names": repr(dict(enumerate(network.names))),
        "stride": str(max(model.stride_px)),
        "strides": json.dumps(list(model.stride_px)),
        "anchors_px": json.dumps(model.anchors_px.tolist()),
        "imgsz": json.dumps(list(sides_px)),
        "activation": activation_name(model),
        "macs": str(cost.macs),
        "params": str(cost.params),
    }


def write_file(
    network: Network,
    out: Path,
    images: Tensor,
    *,
    dynamic: bool = False,
    uint8_input: bool = False,
    nms: NmsSettings | None = None,
    half: bool = False,
    opset: int | None = None,
) -> float:
    """Write a detector as a file of the kind that ``out``'s suffix names; its relative difference from torch on ``images``.

    ``images`` [B, 3, H, W] are real ones, 0..1 in steps of 1/255; without ``dynamic`` the file takes their shape alone.
    The output is [B, N, 5 + classes] as in YOLOv5's exports, with ``nms`` [B, D, 6] of box, score and class. With ``half`` the
    file is proven equal to the network with its weights rounded to 16 bits, whose difference is returned.
    """
    model = with_half_weights(network.model) if half else network.model
    detector: nn.Module = Decoded(model)
    proof: dict[str, Any] = {}
    if nms:
        detector = WithNms(detector, nms.conf, nms.iou, nms.max_det)
        proof["prove"] = prove_same_detections
    difference = export_network(
        detector,
        out,
        images,
        dynamic_stride_px=max(network.model.stride_px) if dynamic else None,
        free_batch=nms is None,
        uint8_input=uint8_input,
        half_weights=half,
        opset=opset,
        metadata={
            **metadata_of(network, (images.shape[2], images.shape[3])),
            "batch": str(len(images)),
            "dynamic": json.dumps(dynamic),
            "nms": json.dumps(nms and {"conf": nms.conf, "iou": nms.iou, "max_detections": nms.max_det}),
        },
        **proof,
    )
    return slim.max_difference(Decoded(network.model), Decoded(model), images) if half else difference


def with_half_weights(model: YOLO) -> YOLO:
    """A copy without gates and batch norms, whose weights are rounded to 16 bits."""
    narrow = fuse_norms(slim.fold_gates(model).cpu().eval())
    with torch.no_grad():
        for parameter in narrow.parameters():
            parameter.copy_(parameter.half())
    return narrow
