"""Which runtime runs which file."""

from __future__ import annotations

from pathlib import Path

from slim import SlimError

from .network import EngineNetwork
from .onnx_file import OnnxNetwork
from .openvino_file import OpenVinoNetwork
from .settings import Engine, RuntimePrecision
from .torchscript_file import TorchScriptNetwork

SUFFIXES: dict[str, tuple[Engine, ...]] = {
    ".onnx": ("onnxruntime", "openvino"),
    ".xml": ("openvino",),
    ".torchscript": ("torch",),
}
"""The engines that run a kind of file, the one first that does so unless another is asked for."""
SUFFIX_FOR: dict[Engine, str] = {engines[0]: suffix for suffix, engines in SUFFIXES.items()}
"""The kind of file that is written for an engine."""


def network_file(path: str | Path) -> Path:
    """The file that opens a network: of a folder such as ``yolov5s_openvino_model`` the ``.xml`` in it."""
    path = Path(path)
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.xml"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise SlimError(f"{path}: a folder, expected a file, or an OpenVINO folder with one .xml; found {names}")
    return found[0]


def open_exported(
    path: str | Path,
    engine: Engine | None = None,
    *,
    num_cores: int = 0,
    precision: RuntimePrecision = "auto",
    at_once: int = 1,
    trust: bool = False,
) -> EngineNetwork:
    """Open an exported file (or OpenVINO folder) under an engine.

    SlimError where that does not run such files, or not in ``precision``.

    ``num_cores``: threads, 0 for all; ``at_once``: calls that run side by side on them, from as many threads;
    ``trust``: run a TorchScript file without the digest that our export leaves beside it.
    """
    path = network_file(path)
    suffix = path.suffix
    if suffix not in SUFFIXES:
        raise SlimError(f"{path}: not an exported network; expected one of {', '.join(SUFFIXES)}")
    chosen = engine or SUFFIXES[suffix][0]
    if chosen not in SUFFIXES[suffix]:
        raise SlimError(f"{path}: --engine {chosen} does not run {suffix} files; use {' or '.join(SUFFIXES[suffix])}")
    if chosen == "openvino":
        return OpenVinoNetwork(path, num_cores, precision, at_once)
    if precision == "bfloat16":
        raise SlimError(f"--precision bfloat16: {chosen} computes exported networks in float32; use --engine openvino")
    return OnnxNetwork(path, num_cores, at_once) if chosen == "onnxruntime" else TorchScriptNetwork(path, trust)
