"""A detector as a file for another runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import slim
from deploy import (
    Decoded,
    WithNms,
    export_onnx,
    export_openvino,
    export_torchscript,
    prove_same_detections,
)
from models import NmsSettings, activation_name
from slim import SlimError

from .network import Network

SUFFIX_OF: dict[str, str] = {"onnx": ".onnx", "openvino": ".xml", "torchscript": ".torchscript"}


def write_file(
    network: Network,
    out: Path,
    images: Tensor,
    *,
    dynamic: bool = False,
    uint8_input: bool = False,
    nms: NmsSettings | None = None,
) -> float:
    """A detector as a file of the kind that ``out``'s suffix names; its relative difference from torch on ``images``.

    ``images`` [B, 3, H, W] are real ones, 0..1 in steps of 1/255; without ``dynamic`` the file takes their shape alone.
    The output is [B, N, 5 + classes] as in YOLOv5's exports, with ``nms`` [B, D, 6] of box, score and class. The metadata
    are those of YOLOv5's exports (names as a Python literal, the largest stride) and more.
    """
    model = network.model
    cost = slim.cost(model, images[:1])
    metadata = {
        "names": repr(dict(enumerate(network.names))),
        "stride": str(max(model.stride_px)),
        "strides": json.dumps(list(model.stride_px)),
        "anchors_px": json.dumps(model.anchors_px.tolist()),
        "imgsz": json.dumps(list(images.shape[2:])),
        "batch": str(len(images)),
        "dynamic": json.dumps(dynamic),
        "nms": json.dumps(nms and {"conf": nms.conf, "iou": nms.iou, "max_detections": nms.max_det}),
        "activation": activation_name(model),
        "macs": str(cost.macs),
        "params": str(cost.params),
    }
    detector: nn.Module = Decoded(model)
    common: dict[str, Any] = {"uint8_input": uint8_input, "metadata": metadata}
    if nms:
        detector = WithNms(detector, nms.conf, nms.iou, nms.max_det)
        common["prove"] = prove_same_detections
    if out.suffix == ".torchscript":
        if dynamic:
            raise SlimError("--dynamic: TorchScript files take one size; leave it out, or --include onnx or openvino")
        return export_torchscript(detector, out, images, **common)
    write = export_onnx if out.suffix == ".onnx" else export_openvino
    return write(
        detector, out, images, stride_px=max(model.stride_px), dynamic=dynamic, free_batch=nms is None, **common
    )
