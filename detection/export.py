"""Write a checkpoint, dense or pruned or published, as a file for other runtimes, proven equal to torch on real images."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import slim
from data import DataConfig, DetectionDataset
from deploy import (
    open_exported,
    size_text,
)
from slim import SlimError
from tracking import RunFolder

from .command import flat
from .datasets import open_data, so_many_images
from .flags import SHAPES, ExportFlags
from .network import Network, check_image_size, head_path, read_network
from .write_file import SUFFIX_OF, write_file


def sides_of(img: Sequence[int], network: Network) -> tuple[int, int]:
    """Height and width of --img, as the network can take them."""
    if len(img) not in (1, 2):
        raise SlimError(f"--img {' '.join(map(str, img))}: expected one side, or height and width")
    for side in img:
        check_image_size(network.model, side)
    return img[0], img[-1]


def check_int8(flags: ExportFlags, network: Network, config: DataConfig) -> None:
    """SlimError for what --int8 cannot do."""
    if not flags.int8.int8:
        if flags.int8.keep_float or flags.int8.max_drop is not None:
            raise SlimError("--keep-float and --max-drop are for --int8; add that, or leave them out")
    elif "torchscript" in flags.include:
        raise SlimError("--int8: TorchScript files stay in float; --include onnx or openvino")
    elif flags.dataset.data == SHAPES and list(config.names) != network.names:
        raise SlimError("--int8: give --data, a data set of images like those that the network will see")


def export(flags: ExportFlags) -> list[Path]:
    """The files that were written; fills the run folder."""
    network = read_network(flags.weights)
    sides = sides_of(flags.img, network)
    config = open_data(flags.dataset)
    check_int8(flags, network, config)
    nms = flags.suppression if flags.nms else None
    dataset = DetectionDataset(config, "val", max(sides))
    images = so_many_images(dataset, flags.batch_size, sides)
    write = functools.partial(write_file, network, images=images, dynamic=flags.dynamic, uint8_input=flags.uint8_input)
    write_int8 = int8_writer(flags, network, config, sides, write) if flags.int8.int8 else None
    run = RunFolder.create(flags.run.project, flags.run.name)
    run.write_config(flat(flags), "export.py")
    stem = Path(flags.out).with_suffix("") if flags.out else run.path / "weights" / Path(flags.weights).stem
    made = []
    for kind in dict.fromkeys(flags.include):
        out = stem.with_name(stem.name + ("-int8" if write_int8 else "") + SUFFIX_OF[kind])
        out.parent.mkdir(parents=True, exist_ok=True)
        difference, facts = write_int8(out) if write_int8 else (write(out, nms=nms), {})
        made.append(described(kind, out, difference) | facts)
        slim.write_text_atomically(run.path / "export.json", json.dumps(made, indent=1))
    return [Path(row["file"]) for row in made]


def int8_writer(
    flags: ExportFlags, network: Network, config: DataConfig, sides: tuple[int, int], write: Callable[..., float]
) -> Callable[[Path], tuple[float, dict[str, Any]]]:
    """Writes a file in INT8: the float file's difference from torch, and what export.json says of AP. Reads the images."""
    # Imported here since it runs detectors, which are written by this script.
    from .quantise import calibrate, noisiest_blocks, write_quantised

    calibrated = calibrate(
        network, config, sides, flags.int8.calibration_images, flags.seed, flags.weights, str(flags.dataset.data)
    )
    keep_float = [head_path(network.model), *flags.int8.keep_float]
    nms = flags.suppression if flags.nms else None

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
            max_drop=flags.int8.max_drop,
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
