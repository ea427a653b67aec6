"""ONNX files: written from a network of any kind, and run by ONNX Runtime."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import onnxruntime
import onnxslim
import torch
from torch import Tensor, nn

import slim

from .errors import DeployError

INPUT = "images"
OUTPUT = "output0"
LARGEST_DIFFERENCE = 1e-4
"""Of the output's largest magnitude, between torch and an exported float32 network."""
LARGEST_ROUNDING = 10
"""Times torch's own distance from float64, where that is larger."""


class OnnxNetwork(nn.Module):
    """An ONNX file with one input and one output, as a module: float32 tensors in, float32 tensors out, on the CPU.

    ``metadata`` is what the file says of itself. ``num_cores``: threads of the network, 0 for all.
    """

    def __init__(self, path: str | Path, num_cores: int = 0) -> None:
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_cores
        if not Path(path).is_file():
            raise DeployError(f"{path}: no such file; expected an ONNX network, such as export.py writes")
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime's errors have no common class but this
            first = str(error).strip().splitlines()[0]
            raise DeployError(
                f"{path}: not an ONNX network that ONNX Runtime can run ({first}); export it anew"
            ) from error
        self.path = Path(path)
        self.metadata: dict[str, str] = dict(self.session.get_modelmeta().custom_metadata_map)

    def forward(self, images: Tensor) -> Tensor:
        entry = self.session.get_inputs()[0]
        fits = len(entry.shape) == images.ndim and all(
            not isinstance(size, int) or size == given for size, given in zip(entry.shape, images.shape, strict=True)
        )
        if not fits:
            raise DeployError(
                f"{self.path}: the input is {list(images.shape)}, expected {entry.shape}; export with that size, or with "
                "--dynamic"
            )
        (output,) = self.session.run(None, {entry.name: images.numpy()})
        return torch.from_numpy(output)


def export_onnx(
    model: nn.Module,
    path: str | Path,
    images: Tensor,
    *,
    stride_px: int = 1,
    dynamic: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> float:
    """Write a network of one input and one output; returns its largest difference from torch on ``images``.

    Gates are folded and batch norms fused. The file is checked by ``onnx.checker``, run, and appears only if the outputs
    differ by at most ``LARGEST_DIFFERENCE`` of torch's largest magnitude; DeployError otherwise.

    Args:
        model: a copy of it is exported, in evaluation mode, on the CPU
        path: the file; replaced whole or not at all
        images: [B, 3, H, W] float 0..1, on which torch and the file are compared; without ``dynamic`` also the size of
            the input
        stride_px: with ``dynamic``: height and width are multiples of it
        dynamic: the number, height and width of the images are free
        metadata: written into the file
    """
    folded = slim.fold_gates(copy.deepcopy(model).cpu(), (images,)).eval()
    proto = onnxslim.slim(_converted(folded, images, stride_px if dynamic else None))
    assert proto is not None
    onnx.helper.set_model_props(proto, dict(metadata or {}))
    differences: list[float] = []

    def write(temporary: Path) -> None:
        onnx.save(proto, temporary)
        onnx.checker.check_model(str(temporary), full_check=True)
        differences.append(_difference(folded, OnnxNetwork(temporary), images))

    slim.write_atomically(Path(path), write)
    return differences[0]


def _converted(model: nn.Module, images: Tensor, dynamic_stride_px: int | None) -> onnx.ModelProto:
    """As torch's exporter writes it, which optimises what it wrote."""
    shapes = None
    if dynamic_stride_px is not None:
        sides = {
            axis: dynamic_stride_px * torch.export.Dim(name, min=2) for axis, name in ((2, "rows"), (3, "columns"))
        }
        shapes = ({0: torch.export.Dim("batch", min=1), **sides},)
        # Sizes of 1, and sizes that are equal by chance, would be taken for constants.
        images = torch.zeros(2, images.shape[1], 6 * dynamic_stride_px, 8 * dynamic_stride_px)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (images,),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=shapes,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    return proto


def _difference(model: nn.Module, exported: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """The largest one; DeployError where it is too large.

    A network that magnifies float32's rounding is measured by how far torch itself is from float64.
    """
    with slim.evaluation_mode(model), torch.no_grad():
        wanted = model(images)
        difference, largest = float((exported(images) - wanted).abs().max()), float(wanted.abs().max())
        if difference <= LARGEST_DIFFERENCE * largest:
            return difference
        exact = copy.deepcopy(model).double()(images.double())
        rounding = float((wanted - exact).abs().max())
    if not difference <= LARGEST_ROUNDING * rounding:
        raise DeployError(
            f"the exported network differs from torch by {difference:.3g}, expected at most {LARGEST_DIFFERENCE:g} of "
            f"{largest:.3g}; nothing was written"
        )
    return difference
