"""Write a checkpoint, dense or pruned or published, as a file for other runtimes, proven equal to torch on real images."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import slim
from data import DataConfig, DetectionDataset
from deploy import (
    open_exported,
    size_text,
)
from slim import SlimError
from tracking import RunFolder

from .command import flag
from .datasets import DataFlags, so_many_images
from .network import Network, check_image_size, head_path, read_network
from .write_file import SUFFIX_OF, Nms, write_file

DEFAULT_DATA = "data/shapes.yaml"


@dataclass(frozen=True)
class ExportFlags(DataFlags):
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
    int8: bool = flag(False, "quantise to 8 bits, calibrated on training images of --data; onnx and openvino")
    calibration_images: int = flag(200, "with --int8: training images that choose the ranges of activations")
    keep_float: list[str] = flag([], "with --int8: modules that stay in float beside the head, as model.9.* model.0")  # noqa: RUF009
    max_drop: float | None = flag(
        None,
        "with --int8: AP on --data's val split that may be lost, 0 to 1; the noisiest blocks stay in float until it holds",
    )
    data: str = flag(DEFAULT_DATA, "data set on whose val images the file is compared with torch")

    def sides(self, network: Network) -> tuple[int, int]:
        """Height and width."""
        if len(self.img) not in (1, 2):
            raise SlimError(f"--img {' '.join(map(str, self.img))}: expected one side, or height and width")
        for side in self.img:
            check_image_size(network.model, side)
        return self.img[0], self.img[-1]

    def suppression(self) -> Nms | None:
        """Of --nms."""
        if not self.nms:
            return None
        if not (0 <= self.conf <= 1 and 0 <= self.iou <= 1 and self.max_det > 0):
            raise SlimError(
                f"--conf {self.conf:g}, --iou {self.iou:g}, --max-det {self.max_det}: expected 0 to 1, 0 to 1 and above 0"
            )
        return Nms(self.conf, self.iou, self.max_det)

    def check_int8(self, network: Network, config: DataConfig) -> None:
        """SlimError for what --int8 cannot do."""
        if not self.int8:
            if self.keep_float or self.max_drop is not None:
                raise SlimError("--keep-float and --max-drop are for --int8; add that, or leave them out")
        elif "torchscript" in self.include:
            raise SlimError("--int8: TorchScript files stay in float; --include onnx or openvino")
        elif self.data == DEFAULT_DATA and list(config.names) != network.names:
            raise SlimError("--int8: give --data, a data set of images like those that the network will see")


def export(flags: ExportFlags) -> list[Path]:
    """The files that were written; fills the run folder."""
    if flags.batch_size < 1:
        raise SlimError(f"--batch-size {flags.batch_size}: expected at least 1")
    network = read_network(flags.weights)
    sides = flags.sides(network)
    config = flags.open_data()
    flags.check_int8(network, config)
    dataset = DetectionDataset(config, "val", max(sides))
    images = so_many_images(dataset, flags.batch_size, sides)
    write = functools.partial(write_file, network, images=images, dynamic=flags.dynamic, uint8_input=flags.uint8_input)
    write_int8 = int8_writer(flags, network, config, write) if flags.int8 else None
    run = RunFolder.create(flags.project, flags.name)
    run.write_config(asdict(flags), "export.py")
    stem = Path(flags.out).with_suffix("") if flags.out else run.path / "weights" / Path(flags.weights).stem
    made = []
    for kind in dict.fromkeys(flags.include):
        out = stem.with_name(stem.name + ("-int8" if write_int8 else "") + SUFFIX_OF[kind])
        out.parent.mkdir(parents=True, exist_ok=True)
        difference, facts = write_int8(out) if write_int8 else (write(out, nms=flags.suppression()), {})
        made.append(described(kind, out, difference) | facts)
        slim.write_text_atomically(run.path / "export.json", json.dumps(made, indent=1))
    return [Path(row["file"]) for row in made]


def int8_writer(
    flags: ExportFlags, network: Network, config: DataConfig, write: Callable[..., float]
) -> Callable[[Path], tuple[float, dict[str, Any]]]:
    """Writes a file in INT8: the float file's difference from torch, and what export.json says of AP. Reads the images."""
    # Imported here since it runs detectors, which are written by this script.
    from .quantise import calibrate, noisiest_blocks, write_quantised

    sides = flags.sides(network)
    calibrated = calibrate(network, config, sides, flags.calibration_images, flags.seed, flags.weights, flags.data)
    keep_float = [head_path(network.model), *flags.keep_float]
    nms = flags.suppression()

    def write_float(path: Path, with_nms: bool) -> float:
        return write(path, nms=nms if with_nms else None)

    rank = functools.cache(lambda: noisiest_blocks(write_float, calibrated.images, keep_float))

    def write_int8(out: Path) -> tuple[float, dict[str, Any]]:
        difference, found = write_quantised(
            write_float,
            out,
            calibrated,
            keep_float,
            has_nms=nms is not None,
            max_drop=flags.max_drop,
            rank=rank,
        )
        if found.ap is None:
            print(f"{out}: AP not measured, since {calibrated.not_measured}")
        else:
            print(f"{out}: AP on val {found.ap_float:.4f} in float, {found.ap:.4f} in INT8")
        if found.kept:
            print(f"{out}: back in float are {', '.join(found.kept)}")
        return difference, {
            "ap_float": found.ap_float,
            "ap_int8": found.ap,
            "kept_float": [*keep_float, *found.kept],
            "calibration_images": len(calibrated.images),
        }

    return write_int8


def described(kind: str, out: Path, difference: float) -> dict[str, Any]:
    """What is to be known of a file, which is opened for it; prints it in a line."""
    network = open_exported(out)
    size = size_text(network.input_shape)
    quantised = network.precision == "int8"
    print(
        f"{out}: {network.bytes_on_disk / 1e6:.2f} MB, input {size}{' bytes' if network.takes_bytes else ''}, "
        f"{'before INT8 it ' if quantised else ''}differs from torch by at most {difference:.2g} of the largest output"
    )
    return {
        "format": kind,
        "file": str(out),
        "bytes": network.bytes_on_disk,
        "input": size,
        "max_difference": difference,
    }


def main(flags: ExportFlags) -> None:
    export(flags)
