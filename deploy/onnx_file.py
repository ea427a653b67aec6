"""ONNX files: written from a network of any kind, and run by ONNX Runtime."""

from __future__ import annotations

import ast
import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import onnxruntime
import onnxslim
import torch
from torch import Tensor, nn

import slim
from slim import SlimError

from .graph_ends import WRAPPED, FromBytes, unwrapped
from .network import INPUT, OUTPUT, ExportedNetwork, existing, threads_of
from .proof import prove_equal

NEWEST_OPSET = 23
"""Of the operators that ONNX Runtime and OpenVINO run as of today."""
Proof = Callable[[Any, nn.Module, Tensor], float]


class OnnxNetwork(ExportedNetwork):
    """An ONNX file under ONNX Runtime. ``num_cores``: threads of the network, 0 for all; ``profile``: see profile.py.

    ``at_once`` calls may run side by side, on these threads together.
    """

    engine = "onnxruntime"

    def __init__(self, path: str | Path, num_cores: int = 0, profile: bool = False, at_once: int = 1) -> None:
        path = existing(path, "an ONNX network")
        proto = read_onnx(path)
        options = onnxruntime.SessionOptions()
        # The callers' own threads compute, too: the runtime counts one of them.
        options.intra_op_num_threads = max(1, threads_of(num_cores) - at_once + 1)
        options.log_severity_level = 3
        profiles_to = TemporaryDirectory() if profile else None
        if profiles_to is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(profiles_to.name) / "profile")
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime's errors have no common class but this
            first = str(error).strip().splitlines()[0]
            raise SlimError(
                f"{path}: not an ONNX network that ONNX Runtime can run ({first}); export it anew"
            ) from error
        if len(session.get_inputs()) != 1 or len(session.get_outputs()) != 1:
            raise SlimError(
                f"{path}: it has {len(session.get_inputs())} inputs and {len(session.get_outputs())} outputs, "
                "expected one of each, as export.py writes"
            )
        entry = session.get_inputs()[0]
        quantised = any(node.op_type == "QuantizeLinear" for node in proto.graph.node)
        super().__init__(
            path,
            session.get_modelmeta().custom_metadata_map,
            tuple(size if isinstance(size, int) else None for size in entry.shape),
            takes_bytes=entry.type == "tensor(uint8)",
            precision="int8" if quantised else "float32",
        )
        self.session, self.entry, self.profiles_to = session, entry.name, profiles_to

    def run(self, images: Tensor) -> Tensor:
        (output,) = self.session.run(None, {self.entry: images.numpy()})
        return torch.from_numpy(output)


def read_onnx(path: Path) -> onnx.ModelProto:
    """The graph of a file; SlimError where it is none, or one of operators that are not known here."""
    try:
        proto = onnx.load(path)
        opset = max((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    except Exception as error:  # protobuf's errors have no common class but this
        raise SlimError(f"{path}: not an ONNX network ({' '.join(str(error).split())}); export it anew") from error
    if not opset or not proto.graph.node:
        raise SlimError(f"{path}: not an ONNX network (it has no operators); export it anew")
    if opset > NEWEST_OPSET:
        raise SlimError(
            f"{path}: its operators are those of ONNX opset {opset}, expected at most {NEWEST_OPSET}; export it anew with "
            "export.py, or with a lower opset"
        )
    return proto


def export_onnx(
    model: nn.Module,
    path: str | Path,
    images: Tensor,
    *,
    stride_px: int = 1,
    dynamic: bool = False,
    free_batch: bool = True,
    uint8_input: bool = False,
    metadata: Mapping[str, str] | None = None,
    prove: Proof = prove_equal,
) -> float:
    """Write a network of one input and one output; returns its largest relative difference from torch on ``images``.

    Gates are folded and batch norms fused; operators are named after their modules (``model.0.conv/Conv``). The file is
    checked by ``onnx.checker``, run, and appears only if its outputs are torch's (``prove_equal``); SlimError otherwise.

    Args:
        model: a copy of it is exported, in evaluation mode, on the CPU
        path: the file; replaced whole or not at all
        images: [B, 3, H, W] float 0..1, on which torch and the file are compared; without ``dynamic`` also the size of
            the input
        stride_px: with ``dynamic``: height and width are multiples of it
        dynamic: height and width of the images are free, and with ``free_batch`` their number
        uint8_input: the file takes bytes 0..255 and scales them itself
        metadata: written into the file
        prove: the difference between two networks on images, or an error
    """
    folded = slim.fold_gates(copy.deepcopy(model).cpu(), (images,)).eval()
    proto = onnx_proto(folded, images, stride_px if dynamic else None, free_batch, uint8_input)
    onnx.helper.set_model_props(proto, dict(metadata or {}))
    differences: list[float] = []

    def write(temporary: Path) -> None:
        onnx.save(proto, temporary)
        onnx.checker.check_model(str(temporary), full_check=True)
        differences.append(prove(folded, OnnxNetwork(temporary), images))

    slim.write_atomically(Path(path), write)
    return differences[0]


def onnx_proto(
    model: nn.Module, images: Tensor, dynamic_stride_px: int | None, free_batch: bool, uint8_input: bool
) -> onnx.ModelProto:
    """The simplified graph of a network without gates."""
    shapes: tuple[Any, ...] | None = None
    if dynamic_stride_px is not None:
        sides = {
            axis: dynamic_stride_px * torch.export.Dim(name, min=2) for axis, name in ((2, "rows"), (3, "columns"))
        }
        shapes = ({0: torch.export.Dim("batch", min=1), **sides} if free_batch else sides,)
        # Sizes of 1, and sizes that are equal by chance, would be taken for constants.
        count = 2 if free_batch else len(images)
        images = torch.zeros(count, images.shape[1], 6 * dynamic_stride_px, 8 * dynamic_stride_px)
    if uint8_input:
        model, images = FromBytes(model).eval(), images.to(torch.uint8)
    converted = _converted(model, images, shapes)
    name_by_modules(converted)
    proto: onnx.ModelProto | None = onnxslim.slim(converted)
    assert proto is not None
    return proto


def _converted(model: nn.Module, images: Tensor, shapes: tuple[Any, ...] | None) -> onnx.ModelProto:
    """As torch's exporter writes it, which optimises what it wrote."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                model,
                (images,),
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=shapes,
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise SlimError(f"torch cannot write this network as ONNX ({reason}); nothing was written") from error
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    return proto


def name_by_modules(proto: onnx.ModelProto) -> None:
    """Name each operator after the module that it comes from and its own kind, in place.

    So patterns of module paths find it, here and in what other runtimes make of the file.
    """
    weights = {tensor.name for tensor in proto.graph.initializer}
    taken: dict[str, int] = {}
    for node in proto.graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
        # The last scope is the operator's own. A convolution that took up its batch norm carries that one's name.
        path = ["", *ast.literal_eval(scopes)][-2]
        weight = next((name for name in node.input if name in weights and name.endswith(".weight")), None)
        path = weight.removesuffix(".weight") if weight else path
        path = unwrapped(path)
        name = f"{path}/{node.op_type}" if path and path != WRAPPED else node.op_type
        taken[name] = taken.get(name, 0) + 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"
