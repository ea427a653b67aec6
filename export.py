"""Write a checkpoint, dense or pruned or published, as a file for other runtimes, proven equal to torch on real images."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

import detection
import slim
from deploy import export_onnx
from engine import EngineError, RunFolder
from engine.command import flag, run_script


@dataclass(frozen=True)
class ExportFlags(detection.DataFlags):
    """An export."""

    project: str = flag("runs/export", "folder that holds the run folders")
    weights: str = flag("", "checkpoint (ours or a published YOLOv5 .pt)")
    include: list[Literal["onnx"]] = flag(["onnx"], "formats to write")  # noqa: RUF009
    img: int = flag(320, "image size in pixels, a multiple of the largest stride")
    batch_size: int = flag(1, "images at once, where --dynamic does not leave that free")
    dynamic: bool = flag(False, "number, height and width of the images are free, in multiples of the largest stride")
    out: str | None = flag(None, "file to write; else weights/NAME.onnx in the run folder, by the name of --weights")
    data: str = flag("data/shapes.yaml", "data set on whose val images the file is compared with torch")


class Decoded(nn.Module):
    """A detector that gives its decoded boxes alone, [B, N, 5 + classes], as YOLOv5's own exports do."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> Tensor:
        decoded: Tensor = self.detector(images)[0]
        return decoded


def write_onnx(network: detection.Network, out: Path, images: Tensor, dynamic: bool = False) -> float:
    """A detector as an ONNX file; its largest difference from torch on ``images`` [B, 3, H, W], whose size it takes.

    The metadata are those of YOLOv5's exports (names as a Python literal, the largest stride) and more.
    """
    model = network.model
    metadata = {
        "names": repr(dict(enumerate(network.names))),
        "stride": str(max(model.stride_px)),
        "strides": json.dumps(list(model.stride_px)),
        "anchors_px": json.dumps(model.anchors_px.tolist()),
        "imgsz": json.dumps(list(images.shape[2:])),
        "batch": str(len(images)),
        "dynamic": json.dumps(dynamic),
    }
    return export_onnx(Decoded(model), out, images, stride_px=max(model.stride_px), dynamic=dynamic, metadata=metadata)


def export(flags: ExportFlags) -> Path:
    """The file that was written; fills the run folder."""
    if flags.batch_size < 1:
        raise EngineError(f"--batch-size {flags.batch_size}: expected at least 1")
    network = detection.read_network(flags.weights)
    detection.check_image_size(network.model, flags.img)
    found = detection.real_images(detection.DetectionDataset(flags.open_data(), "val", flags.img), flags.batch_size)
    images = found[torch.arange(flags.batch_size) % len(found)]
    run = RunFolder.create(flags.project, flags.name)
    run.write_config(asdict(flags), "export.py")
    out = Path(flags.out) if flags.out else run.path / "weights" / f"{Path(flags.weights).stem}.onnx"
    difference = write_onnx(network, out, images, flags.dynamic)
    stride = max(network.model.stride_px)
    size = f"any number of images, sides multiples of {stride}" if flags.dynamic else " x ".join(map(str, images.shape))
    made = {
        "format": "onnx",
        "file": str(out),
        "bytes": out.stat().st_size,
        "input": size,
        "max_difference": difference,
    }
    slim.write_text_atomically(run.path / "export.json", json.dumps([made], indent=1))
    print(f"{out}: {made['bytes'] / 1e6:.2f} MB, input {size}, differs from torch by at most {difference:.2g}")
    return out


def main(flags: ExportFlags) -> None:
    export(flags)


def cli(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    return run_script(ExportFlags, main, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(cli())
