"""ONNX files quantised for ONNX Runtime: every convolution, activation and sum computes on integers.

ONNX Runtime computes an operator on integers only if its inputs and its output are quantised, so the map between a
convolution and its activation is quantised too. What that costs in accuracy is won back by narrower ranges: the mean over
images of the smallest and largest value, and for a SiLU only as far down as it differs from 0.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from .network import INPUT, whole_or_nothing
from .onnx_file import read_onnx, save_onnx
from .quantiser import Quantiser

if TYPE_CHECKING:
    import onnx

Array = NDArray[np.float32]
ON_INTEGERS = ("Conv", "Sigmoid", "Mul", "Add", "Concat", "MaxPool", "Resize", "Relu", "LeakyRelu", "Clip", "HardSwish")
"""The kinds of operators that are quantised."""
STEPS = 255


@dataclass(frozen=True)
class Statistics:
    """Of each tensor the mean over images of its smallest and its largest value, of maps also each channel's mean."""

    lowest: dict[str, float]
    highest: dict[str, float]
    channel_means: dict[str, Array]


class OnnxQuantiser(Quantiser):
    """``.onnx`` files, by ONNX Runtime's quantiser: QDQ, weights per channel and symmetric, activations asymmetric."""

    suffix = ".onnx"

    def __init__(self, source: str | Path, images: Sequence[Tensor]) -> None:
        super().__init__(source, images)
        self._statistics = cache(self._measured)

    def write(self, path: Path, kept: frozenset[str], *, rough: bool = False) -> None:
        from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType, TensorsData

        proto, statistics = self._graph(), self._statistics(rough)
        ranges = {
            name: (np.float32(low).reshape(1), np.float32(high).reshape(1))
            for name, (low, high) in activation_ranges(proto, statistics).items()
        }
        correct_biases(proto, statistics.channel_means, kept)
        quantiser = QDQQuantizer(
            proto,
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=TensorsData(CalibrationMethod.MinMax, ranges),
            nodes_to_quantize=[],
            nodes_to_exclude=sorted(kept),
            op_types_to_quantize=list(ON_INTEGERS),
            extra_options={},
        )
        quantiser.quantize_model()
        quantiser.model.topological_sort()
        made = quantiser.model.model
        _take_bytes_as_they_are(made)
        with whole_or_nothing(path) as temporary:
            save_onnx(made, temporary, self.metadata)

    def _graph(self) -> onnx.ModelProto:
        import onnx

        return onnx.shape_inference.infer_shapes(read_onnx(self.source))

    def _measured(self, rough: bool) -> Statistics:
        import onnxruntime

        observed, maps = _observed(self._graph())
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(observed.SerializeToString(), options, ["CPUExecutionProvider"])
        names = [
            output.name for output in session.get_outputs() if output.name.endswith(("/lowest", "/highest", "/means"))
        ]
        found: dict[str, list[Array]] = defaultdict(list)
        for batch in tqdm(self.batches(rough), "calibration", disable=rough or None, leave=False):
            for name, value in zip(names, session.run(names, {INPUT: batch.numpy()}), strict=True):
                found[name].append(value)
        means = {name: np.concatenate(values).mean(0) for name, values in found.items()}
        lowest, highest = (
            {name[: -len(end)]: float(value) for name, value in means.items() if name.endswith(end)}
            for end in ("/lowest", "/highest")
        )
        return Statistics(lowest, highest, {name: means[f"{name}/means"].ravel() for name in maps})


def _observed(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """A copy that also gives each tensor's range and means by image, as ``<tensor>/lowest`` ...; the inputs of convolutions."""
    import onnx

    observed = copy.deepcopy(proto)
    graph = observed.graph
    constants = {tensor.name for tensor in graph.initializer}
    used = [node for node in proto.graph.node if node.op_type in ON_INTEGERS]
    tensors = dict.fromkeys(name for node in used for name in (*node.input, *node.output) if name)
    rank_of = {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in (*graph.value_info, *graph.input, *graph.output)
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }
    maps = list(dict.fromkeys(node.input[0] for node in used if node.op_type == "Conv"))

    def observe(kind: str, tensor: str, end: str, axes: range) -> None:
        known = onnx.numpy_helper.from_array(np.array(axes, np.int64), f"{tensor}/{end}/axes")
        graph.initializer.append(known)
        keep = end == "means"
        graph.node.append(onnx.helper.make_node(kind, [tensor, known.name], [f"{tensor}/{end}"], keepdims=int(keep)))
        graph.output.append(onnx.helper.make_tensor_value_info(f"{tensor}/{end}", onnx.TensorProto.FLOAT, None))

    for tensor in tensors:
        if tensor not in constants and rank_of.get(tensor, 0) > 1:
            observe("ReduceMin", tensor, "lowest", range(1, rank_of[tensor]))
            observe("ReduceMax", tensor, "highest", range(1, rank_of[tensor]))
    for tensor in maps:
        observe("ReduceMean", tensor, "means", range(2, rank_of[tensor]))
    return observed, maps


def activation_ranges(proto: onnx.ModelProto, statistics: Statistics) -> dict[str, tuple[float, float]]:
    """The range in which each tensor is quantised."""
    ranges = {name: (low, statistics.highest[name]) for name, low in statistics.lowest.items()}
    readers = defaultdict(list)
    for node in proto.graph.node:
        for name in node.input:
            readers[name].append(node)
    for name, nodes in readers.items():
        if name not in ranges:
            continue
        kinds = sorted(node.op_type for node in nodes)
        low, high = ranges[name]
        if kinds == ["Mul", "Sigmoid"]:
            out_low, out_high = ranges[next(node.output[0] for node in nodes if node.op_type == "Mul")]
            ranges[name] = max(low, silu_floor((out_high - out_low) / STEPS)), high
        elif kinds == ["HardSwish"]:
            ranges[name] = max(low, -3.0), high
        elif nodes[0].op_type == "Conv" and name in _scaled_images(proto):
            ranges[name] = 0.0, 1.0
    return ranges


def silu_floor(step: float) -> float:
    """Below it SiLU differs from 0 by less than half of ``step``; at most -4, well below SiLU's minimum near -1.28."""
    floor = -4.0
    while -floor / (1 + math.exp(-floor)) > step / 2:
        floor -= 0.25
    return floor


def correct_biases(proto: onnx.ModelProto, means: Mapping[str, Array], kept: frozenset[str]) -> None:
    """Add to the biases of convolutions what rounding their weights takes from the mean output, in place.

    After Nagel et al. 2019 (arXiv:1906.04721), section 4.2, with means from real images: sum of (weight - rounded weight) *
    mean input. Borders are counted as if they were not there.
    """
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type != "Conv" or node.name in kept or len(node.input) < 3:
            continue
        weight, bias = (constants.get(name) for name in node.input[1:3])
        if weight is None or bias is None:
            continue
        exact = numpy_helper.to_array(weight)
        scale = np.abs(exact).reshape(len(exact), -1).max(1).reshape(-1, *[1] * (exact.ndim - 1)) / 127
        scale[scale == 0] = 1
        lost = exact - np.round(exact / scale) * scale
        mean = means[node.input[0]]
        groups = len(mean) // exact.shape[1]
        by_group = lost.reshape(groups, -1, *exact.shape[1:]).sum(tuple(range(3, lost.ndim + 1)))
        shift = (by_group * mean.reshape(groups, 1, -1)).sum(-1).ravel()
        known = numpy_helper.to_array(bias) + shift
        bias.CopyFrom(numpy_helper.from_array(known.astype(np.float32), bias.name))


def _scaled_images(proto: onnx.ModelProto) -> set[str]:
    """The tensors that hold images as float 0..1: the input, or what bytes become."""
    import onnx

    bytes_in = proto.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    found = {INPUT}
    for node in proto.graph.node:
        if bytes_in and node.op_type in ("Cast", "Div", "Mul") and node.input[0] in found:
            found.add(node.output[0])
    return found


def _take_bytes_as_they_are(proto: onnx.ModelProto) -> None:
    """Bytes that are scaled to 0..1 and quantised to bytes again are left alone, in place."""
    images = _scaled_images(proto) - {INPUT}
    nodes = proto.graph.node
    quantised = [node for node in nodes if node.op_type == "QuantizeLinear" and node.input[0] in images]
    for quantise in quantised:
        for node in nodes:
            for place, name in enumerate(node.input):
                if name == quantise.output[0]:
                    node.input[place] = INPUT
        nodes.remove(quantise)
    while idle := [node for node in nodes if node.output[0] in images and not _is_read(proto, node.output[0])]:
        for node in idle:
            nodes.remove(node)


def _is_read(proto: onnx.ModelProto, tensor: str) -> bool:
    return any(tensor in node.input for node in proto.graph.node) or any(o.name == tensor for o in proto.graph.output)
