"""An exported network in INT8 for timing alone: its scales come from a few images, so its outputs mean nothing."""

from __future__ import annotations

import contextlib
import io
import logging
from pathlib import Path

import onnx
import openvino
from torch import Tensor

from .errors import DeployError


def quantise_for_timing(source: Path, out: Path, images: Tensor, keep_float: str) -> None:
    """Write the ``.xml`` or ``.onnx`` of ``source`` in INT8; operators whose names match ``keep_float`` stay as they are."""
    if source.suffix not in (".xml", ".onnx"):
        raise DeployError(f"{source}: only .xml and .onnx networks run in INT8; choose another --engine than torch")
    import nncf  # takes seconds, and few need it

    logging.getLogger("nncf").setLevel(logging.ERROR)
    calibration = nncf.Dataset([image[None].numpy() for image in images])
    network = openvino.Core().read_model(source) if source.suffix == ".xml" else onnx.load(source)
    if source.suffix == ".onnx":
        entry = network.graph.input[0].name
        calibration = nncf.Dataset([{entry: image[None].numpy()} for image in images])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # its own bars
        quantised = nncf.quantize(
            network,
            calibration,
            subset_size=len(images),
            ignored_scope=nncf.IgnoredScope(patterns=[keep_float], validate=False),
        )
    if source.suffix == ".xml":
        openvino.save_model(quantised, out, compress_to_fp16=False)
    else:
        onnx.save(quantised, out)
