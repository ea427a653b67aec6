"""Export of trained networks, each proven equal to torch before it is accepted."""

from .errors import DeployError
from .onnx_file import OnnxNetwork, export_onnx

__all__ = ["DeployError", "OnnxNetwork", "export_onnx"]
