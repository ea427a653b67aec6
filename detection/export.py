"""Write a checkpoint, dense or pruned or published, as a file for other runtimes, proven equal to torch on real images."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

import slim
from data import DataConfig, DetectionDataset
from deploy import SUFFIXES, Int8Settings, open_exported, size_text
from slim import SlimError
from tracking import RunFolder

from .command import check_installed, flat
from .datasets import open_data, so_many_images
from .flags import SHAPES, ExportFlags
from .network import Network, check_image_size, head_path, read_network
from .published import find_weights
from .quantise import Int8Writer, calibration_images, measure_on
from .write_file import PACKAGES_OF, SUFFIX_OF, write_file

OPENVINO_FOLDER = "_openvino_model"
"""How the name of a folder for an OpenVINO network ends in YOLOv5."""


def export(flags: ExportFlags) -> list[Path]:
    """Write the files and the run folder; returns the files' paths."""
    kinds = list(dict.fromkeys(flags.include))
    outs = {kind: out_path(flags.out, kind, several=len(kinds) > 1) for kind in kinds} if flags.out else {}
    find_weights(flags.weights, flags.dataset.download)
    network = read_network(flags.weights)
    sides_px = sides_of(flags.img, network)
    config = open_data(flags.dataset)
    check_int8(flags, network, config)
    nms = flags.suppression if flags.nms else None
    images = so_many_images(DetectionDataset(config, "val", max(sides_px), cache="none"), flags.batch_size, sides_px)
    options: dict[str, Any] = {"images": images, "dynamic": flags.dynamic, "uint8_input": flags.uint8_input}
    options |= {"half": flags.half, "opset": flags.opset}
    int8 = int8_writer(flags, network, config, sides_px, options) if flags.int8.int8 else None
    for kind in kinds:
        check_installed(*PACKAGES_OF.get(kind, ()))
    run = RunFolder.create(flags.run.project, flags.run.name)
    run.write_config(flat(flags), "export.py")
    made = []
    for kind in kinds:
        name = f"{Path(flags.weights).stem}{'-int8' if int8 else ''}{SUFFIX_OF[kind]}"
        out = outs.get(kind, run.path / "weights" / name)
        facts: dict[str, Any] = {}
        if int8:
            difference, found = int8.write(out, nms)
            if found.changed:
                print(
                    f"{out}: AP not measured, since {int8.not_measured}; of {found.changed[1]} detections in float "
                    f"{found.changed[0]} were lost or gained in INT8, on {len(int8.images)} training images"
                )
            else:
                print(f"{out}: AP on val {found.ap_float:.4f} in float, {found.ap:.4f} in INT8")
            if found.kept:
                print(f"{out}: back in float are {', '.join(found.kept)}")
            kept = [*int8.keep_float, *found.kept]
            facts = {"ap_float": found.ap_float, "ap_int8": found.ap, "kept_float": kept}
            facts |= {"calibration_images": len(int8.images), "changed_detections": found.changed}
        else:
            difference = write_file(network, out, nms=nms, **options)
        made.append(described(kind, out, difference) | facts)
        if out.parent.name.endswith(OPENVINO_FOLDER):
            write_metadata_beside(out)
        slim.write_text_atomically(run.path / "export.json", json.dumps(made, indent=1))
    return [Path(row["file"]) for row in made]


def out_path(out: str, kind: str, *, several: bool) -> Path:
    """The file of a kind that --out names: itself, or one of ``several``, which differ in their suffixes.

    A name such as best_openvino_model is a folder, as YOLOv5's export makes it.
    """
    path, suffix = Path(out), SUFFIX_OF[kind]
    if kind == "openvino" and path.name.endswith(OPENVINO_FOLDER):
        return path / f"{path.name.removesuffix(OPENVINO_FOLDER)}.xml"
    if path.suffix not in SUFFIXES:
        return path.with_name(path.name + suffix)
    if path.suffix != suffix and not several:
        raise SlimError(f"--out {out}: --include {kind} writes {suffix} files; give that suffix, or leave it out")
    return path.with_suffix(suffix)


def write_metadata_beside(out: Path) -> None:
    """What others read of an OpenVINO folder: YOLOv5 the YAML of the graph's name, Ultralytics' later tools metadata.yaml."""
    known = open_exported(out).metadata
    content = {
        "stride": int(known["stride"]),
        "names": ast.literal_eval(known["names"]),
        "imgsz": json.loads(known["imgsz"]),
    }
    for file in (out.with_suffix(".yaml"), out.with_name("metadata.yaml")):
        slim.write_text_atomically(file, yaml.safe_dump({**content, "task": "detect"}, sort_keys=False))


def sides_of(img: Sequence[int], network: Network) -> tuple[int, int]:
    """Height and width of --img, as the network can take them."""
    if len(img) not in (1, 2):
        raise SlimError(f"--img {' '.join(map(str, img))}: expected one side, or height and width")
    for side in img:
        check_image_size(network.model, side)
    return img[0], img[-1]


def check_int8(flags: ExportFlags, network: Network, config: DataConfig) -> None:
    """Raise SlimError for what --int8 cannot do."""
    if not flags.int8.int8:
        if flags.int8 != Int8Settings():
            names = "--calibration-images, --keep-float, --int8-target and --max-drop"
            raise SlimError(f"{names} are for --int8; add that, or leave them out")
    elif "torchscript" in flags.include:
        raise SlimError("--int8: TorchScript files stay in float; --include onnx or openvino")
    elif flags.int8.int8_target != "any" and "onnx" not in flags.include:
        raise SlimError(
            f"--int8-target {flags.int8.int8_target}: OpenVINO's files are the same for all CPUs; leave it out"
        )
    elif flags.dataset.data == SHAPES and list(config.names) != network.names:
        raise SlimError("--int8: give --data, a data set of images like those that the network will see")


def int8_writer(
    flags: ExportFlags, network: Network, config: DataConfig, sides_px: tuple[int, int], options: dict[str, Any]
) -> Int8Writer:
    """What writes the network in INT8; reads the images."""
    images = calibration_images(config, sides_px, flags.int8.calibration_images, flags.seed)
    measure_ap, not_measured = measure_on(network, config, sides_px, flags.weights, str(flags.dataset.data))
    keep_float = [head_path(network.model), *flags.int8.keep_float]
    target, max_drop = flags.int8.int8_target, flags.int8.max_drop
    return Int8Writer(network, images, keep_float, target, max_drop, measure_ap, not_measured, options)


def described(kind: str, out: Path, difference: float) -> dict[str, Any]:
    """What is to be known of a file, which is opened for it; prints it in a line."""
    network = open_exported(out)
    size, quantised = size_text(network.input_shape), network.precision == "int8"
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
