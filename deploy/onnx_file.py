"""ONNX files: written from a network of any kind, and run by ONNX Runtime."""

from __future__ import annotations

import ast
import functools
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slim import SlimError

from .graph_wrappers import WRAPPED, FromBytes, unwrapped
from .network import INPUT, OUTPUT, EngineNetwork, existing, index_of_boxes, threads_of
from .profiling import WARMUP, LayerTime

if TYPE_CHECKING:
    import onnx
    import onnxruntime

NEWEST_OPSET = 23
"""The newest operator set that both ONNX Runtime and OpenVINO run as of today."""
INT8_TARGET = "int8_target"
"""The key of the metadata under which an INT8 file says which CPUs it is for; without it, those with VNNI."""


class OnnxNetwork(EngineNetwork):
    """An ONNX file under ONNX Runtime.

    Args:
        path: the file
        num_cores: threads of the network, 0 for all
        at_once: calls that may run side by side, on these threads together
    """

    engine = "onnxruntime"

    def __init__(self, path: str | Path, num_cores: int = 0, at_once: int = 1) -> None:
        path = existing(path, "an ONNX network")
        proto = read_onnx(path)
        is_quantised = any(node.op_type == "QuantizeLinear" for node in proto.graph.node)
        may_saturate = is_quantised and not any(
            (entry.key, entry.value) == (INT8_TARGET, "any") for entry in proto.metadata_props
        )
        # The callers' own threads compute, too: the runtime counts one of them.
        self.threads = max(1, threads_of(num_cores) - at_once + 1)
        self.exact_sums = may_saturate and int8_saturates()
        session = _session(path, self.threads, exact_sums=self.exact_sums)
        if len(session.get_inputs()) != 1:
            raise SlimError(f"{path}: it has {len(session.get_inputs())} inputs, expected one, as export.py writes")
        entry = session.get_inputs()[0]
        shapes = [_sizes(output.shape) for output in session.get_outputs()]
        boxes = index_of_boxes(path, shapes)
        super().__init__(
            path,
            session.get_modelmeta().custom_metadata_map,
            _sizes(entry.shape),
            takes_bytes=entry.type == "tensor(uint8)",
            precision="int8" if is_quantised else "float32",
            columns=shapes[boxes][-1] if shapes[boxes] else None,
        )
        self.session, self.entry, self.output = session, entry.name, session.get_outputs()[boxes].name
        if self.exact_sums:
            self.warning = (
                f"{path}: its weights have 8 bits, whose sums saturate in ONNX Runtime on this CPU, which has no VNNI; they are "
                "computed exactly here, which is slower; export with --int8-target any, or for OpenVINO"
            )

    def run(self, images: Tensor) -> Tensor:
        (output,) = self.session.run([self.output], {self.entry: images.numpy()})
        return torch.from_numpy(output)

    def layer_times(self, images: Tensor, runs: int) -> list[list[LayerTime]]:
        given = {self.entry: self.one_batch(images).numpy()}
        with TemporaryDirectory() as folder:
            prefix = str(Path(folder) / "profile")
            session = _session(self.path, self.threads, exact_sums=self.exact_sums, profile_prefix=prefix)
            for _ in range(WARMUP + runs):
                session.run(None, given)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        makers = {output: node for node in read_onnx(self.path).graph.node for output in node.output}
        found: list[list[LayerTime]] = [[]]
        for event in events:
            if event["name"] == "model_run":  # which comes when it is over
                found.append([])
            elif event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                found[-1].append(_layer_time(event, makers))
        return found[WARMUP : WARMUP + runs]


def _sizes(shape: Sequence[int | str | None]) -> tuple[int | None, ...]:
    """A shape as ONNX Runtime gives it; axes of any size have a name there."""
    return tuple(size if isinstance(size, int) else None for size in shape)


def _session(path: Path, threads: int, *, exact_sums: bool, profile_prefix: str = "") -> onnxruntime.InferenceSession:
    """``exact_sums``: by slower kernels that do not saturate, on a CPU where the others do."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Its threads would go on spinning after a run, on cores that the next stage or the engine measured next needs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.x64quantprecision", str(int(exact_sums)))
    if profile_prefix:
        options.enable_profiling, options.profile_file_prefix = True, profile_prefix
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's errors have no common class but this
        first = str(error).strip().splitlines()[0]
        raise SlimError(f"{path}: not an ONNX network that ONNX Runtime can run ({first}); export it anew") from error


@functools.cache
def int8_saturates() -> bool:
    """Whether ONNX Runtime's sums of uint8 times int8 saturate on this CPU, as a product that would says."""
    import numpy as np
    import onnx
    import onnxruntime

    weight = onnx.numpy_helper.from_array(np.full((2, 1), 127, np.int8), "weight")
    entry = onnx.helper.make_tensor_value_info("map", onnx.TensorProto.UINT8, [1, 2])
    result = onnx.helper.make_tensor_value_info("sum", onnx.TensorProto.INT32, [1, 1])
    node = onnx.helper.make_node("MatMulInteger", ["map", "weight"], ["sum"])
    graph = onnx.helper.make_graph([node], "product", [entry], [result], [weight])
    opsets = [onnx.helper.make_opsetid("", 17)]
    proto = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (total,) = session.run(None, {"map": np.full((1, 2), 255, np.uint8)})
    return int(total[0, 0]) != 2 * 255 * 127


def _layer_time(event: dict[str, Any], makers: Mapping[str, onnx.NodeProto]) -> LayerTime:
    """An event of ONNX Runtime's profile; it computed in the type of its result, QDQ's own operators in integers."""
    name, facts = event["name"].removesuffix("_kernel_time"), event["args"]
    # A convolution in a blocked layout bears the name of its output, even if that is its fused activation's.
    node = makers.get(name.removesuffix("_nchwc"))
    while node is not None and "Conv" in facts["op_name"] and "Conv" not in node.op_type:
        node = makers.get(node.input[0])
    kinds = [kind for entry in facts.get("output_type_shape", []) for kind in entry]
    kind = "int8" if facts["op_name"].startswith("QLinear") else kinds[0] if kinds else ""
    precision = {"float": "float32", "uint8": "int8"}.get(kind, kind)
    return LayerTime((node.name if node else name).split("/")[0], facts["op_name"], precision, event["dur"] / 1000)


def read_onnx(path: Path) -> onnx.ModelProto:
    """The graph of a file; SlimError where it is none, or one of operators that are not known here."""
    import onnx

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


def save_onnx(proto: onnx.ModelProto, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a graph with these metadata, and check the file."""
    import onnx

    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, dict(metadata))
    onnx.save(proto, path)
    onnx.checker.check_model(str(path), full_check=True)


def onnx_graph(
    model: nn.Module, images: Tensor, dynamic_stride_px: int | None, free_batch: bool, uint8_input: bool
) -> onnx.ModelProto:
    """The simplified graph of a network without gates; the arguments are ``export_network``'s."""
    import onnxslim

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
    """The graph as torch's exporter writes and optimises it."""
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


def in_opset(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """The graph in another operator set, by ONNX's own converter; SlimError where that does not know the way."""
    import onnx

    try:
        return onnx.version_converter.convert_version(proto, opset)
    except Exception as error:  # the converter's errors have no common class but this
        reason = str(error).strip().splitlines()[-1]
        raise SlimError(
            f"--opset {opset}: ONNX's converter cannot write this network so ({reason}); give 17 or more"
        ) from error


def store_halves(proto: onnx.ModelProto) -> None:
    """Store weights that are exact in 16 bits so, in place; runtimes widen them again as they load the file."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in proto.graph.initializer:
        values = numpy_helper.to_array(tensor)
        narrow = values.astype(np.float16) if values.dtype == np.float32 and values.ndim else None
        if narrow is not None and np.array_equal(narrow, values):
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(narrow, f"{name}.half"))
            casts.append(helper.make_node("Cast", [tensor.name], [name], name=f"{name}/Cast", to=TensorProto.FLOAT))
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def name_by_modules(proto: onnx.ModelProto) -> None:
    """Name each operator after its module and its own kind (``model.0.conv/Conv``), in place.

    So patterns of module paths find it, here and in what other runtimes make of the file.
    """
    weights = {tensor.name for tensor in proto.graph.initializer}
    taken: dict[str, int] = {}
    for node in proto.graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
        # The last scope is the operator's own. A convolution that took up its batch norm carries that one's name.
        path = ["", *ast.literal_eval(scopes)][-2]
        weight = next((name for name in node.input if name in weights and name.endswith(".weight")), None)
        path = unwrapped(weight.removesuffix(".weight") if weight else path)
        name = f"{path}/{node.op_type}" if path and path != WRAPPED else node.op_type
        taken[name] = taken.get(name, 0) + 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"
