"""Write a checkpoint, dense or pruned or published, as a file for other runtimes, proven equal to torch on real images."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import detection
import slim
from deploy import (
    Decoded,
    WithNms,
    export_onnx,
    export_openvino,
    export_torchscript,
    open_exported,
    prove_same_detections,
    size_text,
)
from engine import EngineError, RunFolder
from engine.command import flag, run_script
from models import activation_name


@dataclass(frozen=True)
class ExportFlags(detection.DataFlags):
    """An export."""

    project: str = flag("runs/export", "folder that holds the run folders")
    weights: str = flag("", "checkpoint (ours or a published YOLOv5 .pt)")
    include: list[Literal["onnx", "openvino", "torchscript"]] = flag(["onnx"], "formats to write")  # noqa: RUF009
    img: list[int] = flag([320], "image size in pixels, multiples of the largest stride: one side or height and width")  # noqa: RUF009
    batch_size: int = flag(1, "images at once, where --dynamic does not leave that free")
    dynamic: bool = flag(False, "number, height and width of the images are free, in multiples of the largest stride")
    uint8_input: bool = flag(False, "the file takes bytes 0 to 255 and scales them itself, instead of float 0 to 1")
    nms: bool = flag(False, "the file gives final detections [batch, --max-det, 6]: box, score, class")
    conf: float = flag(0.25, "with --nms: lowest score of a detection, 0 to 1")
    iou: float = flag(0.45, "with --nms: IoU above which a box removes a less confident one, 0 to 1")
    max_det: int = flag(300, "with --nms: detections of an image")
    out: str | None = flag(None, "file to write, its suffix by the format; else weights/ in the run folder")
    data: str = flag("data/shapes.yaml", "data set on whose val images the file is compared with torch")

    def sides(self, network: detection.Network) -> tuple[int, int]:
        """Height and width."""
        if len(self.img) not in (1, 2):
            raise EngineError(f"--img {' '.join(map(str, self.img))}: expected one side, or height and width")
        for side in self.img:
            detection.check_image_size(network.model, side)
        return self.img[0], self.img[-1]

    def suppression(self) -> Nms | None:
        """Of --nms."""
        if not self.nms:
            return None
        if not (0 <= self.conf <= 1 and 0 <= self.iou <= 1 and self.max_det > 0):
            raise EngineError(
                f"--conf {self.conf:g}, --iou {self.iou:g}, --max-det {self.max_det}: expected 0 to 1, 0 to 1 and above 0"
            )
        return Nms(self.conf, self.iou, self.max_det)


@dataclass(frozen=True)
class Nms:
    """A suppression inside of a file."""

    conf: float
    iou: float
    max_detections: int


SUFFIX_OF: dict[str, str] = {"onnx": ".onnx", "openvino": ".xml", "torchscript": ".torchscript"}


def write_file(
    network: detection.Network,
    out: Path,
    images: Tensor,
    *,
    dynamic: bool = False,
    uint8_input: bool = False,
    nms: Nms | None = None,
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
        "nms": json.dumps(asdict(nms) if nms else None),
        "activation": activation_name(model),
        "macs": str(cost.macs),
        "params": str(cost.params),
    }
    detector: nn.Module = Decoded(model)
    common: dict[str, Any] = {"uint8_input": uint8_input, "metadata": metadata}
    if nms:
        detector = WithNms(detector, nms.conf, nms.iou, nms.max_detections)
        common["prove"] = prove_same_detections
    if out.suffix == ".torchscript":
        if dynamic:
            raise EngineError("--dynamic: TorchScript files take one size; leave it out, or --include onnx or openvino")
        return export_torchscript(detector, out, images, **common)
    write = export_onnx if out.suffix == ".onnx" else export_openvino
    return write(
        detector, out, images, stride_px=max(model.stride_px), dynamic=dynamic, free_batch=nms is None, **common
    )


def export(flags: ExportFlags) -> list[Path]:
    """The files that were written; fills the run folder."""
    if flags.batch_size < 1:
        raise EngineError(f"--batch-size {flags.batch_size}: expected at least 1")
    network = detection.read_network(flags.weights)
    sides = flags.sides(network)
    dataset = detection.DetectionDataset(flags.open_data(), "val", max(sides))
    found = cropped(detection.real_images(dataset, flags.batch_size), sides)
    images = found[torch.arange(flags.batch_size) % len(found)]
    run = RunFolder.create(flags.project, flags.name)
    run.write_config(asdict(flags), "export.py")
    stem = Path(flags.out).with_suffix("") if flags.out else run.path / "weights" / Path(flags.weights).stem
    made = []
    for kind in dict.fromkeys(flags.include):
        out = stem.with_name(stem.name + SUFFIX_OF[kind])
        out.parent.mkdir(parents=True, exist_ok=True)
        difference = write_file(
            network, out, images, dynamic=flags.dynamic, uint8_input=flags.uint8_input, nms=flags.suppression()
        )
        made.append(described(kind, out, difference))
        slim.write_text_atomically(run.path / "export.json", json.dumps(made, indent=1))
    return [Path(row["file"]) for row in made]


def described(kind: str, out: Path, difference: float) -> dict[str, Any]:
    """What is to be known of a file, which is opened for it; prints it in a line."""
    network = open_exported(out)
    size = size_text(network.input_shape)
    print(
        f"{out}: {network.bytes_on_disk / 1e6:.2f} MB, input {size}{' bytes' if network.takes_bytes else ''}, differs from "
        f"torch by at most {difference:.2g} of the largest output"
    )
    return {
        "format": kind,
        "file": str(out),
        "bytes": network.bytes_on_disk,
        "input": size,
        "max_difference": difference,
    }


def cropped(images: Tensor, sides: tuple[int, int]) -> Tensor:
    """The middle of square images, [B, 3, *sides]."""
    top, left = ((images.shape[axis] - side) // 2 for axis, side in zip((2, 3), sides, strict=True))
    return images[:, :, top : top + sides[0], left : left + sides[1]]


def main(flags: ExportFlags) -> None:
    export(flags)


def cli(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    return run_script(ExportFlags, main, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(cli())
