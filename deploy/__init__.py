"""Export of trained networks, each proven equal to torch before it is accepted, and the runtimes that run the files."""

from .accuracy import Quantised, quantise
from .errors import DeployError
from .graph_ends import Decoded, FromBytes, WithNms
from .latency_search import Trial, search_latency
from .network import ExportedNetwork, Precision, as_bytes, parts_of, size_text, threads_of, torch_threads
from .onnx_file import OnnxNetwork, export_onnx
from .open_file import ENGINES, SUFFIX_FOR, SUFFIXES, open_exported
from .openvino_file import OpenVinoNetwork, export_openvino
from .profile import LayerTime, profile, profile_text
from .proof import prove_equal, prove_same_detections
from .quantise import OpenVinoQuantiser, Quantiser
from .quantise_onnx import OnnxQuantiser
from .torchscript_file import TorchScriptNetwork, export_torchscript

__all__ = [
    "ENGINES",
    "SUFFIXES",
    "SUFFIX_FOR",
    "Decoded",
    "DeployError",
    "ExportedNetwork",
    "FromBytes",
    "LayerTime",
    "OnnxNetwork",
    "OnnxQuantiser",
    "OpenVinoNetwork",
    "OpenVinoQuantiser",
    "Precision",
    "Quantised",
    "Quantiser",
    "TorchScriptNetwork",
    "Trial",
    "WithNms",
    "as_bytes",
    "export_onnx",
    "export_openvino",
    "export_torchscript",
    "open_exported",
    "parts_of",
    "profile",
    "profile_text",
    "prove_equal",
    "prove_same_detections",
    "quantise",
    "search_latency",
    "size_text",
    "threads_of",
    "torch_threads",
]
