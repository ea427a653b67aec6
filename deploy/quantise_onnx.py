"""ONNX files quantised for ONNX Runtime: every convolution, activation and sum computes on integers.

ONNX Runtime computes an operator on integers only if its inputs and its output are quantised, so the map between a
convolution and its activation is quantised too. What that costs in accuracy is won back by narrower ranges: the mean over
images of the smallest and largest value, and for a SiLU only as far down as it differs from 0.

On x86 CPUs without VNNI it sums pairs of products of uint8 and int8 in 16 bits, which saturate (vpmaddubsw): 2 * 255 * 127
becomes 32767. Which weights make a pair is the kernel's affair, so for any CPU no two of a channel may be too large together.
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
from .onnx_file import INT8_TARGET, read_onnx, save_onnx
from .quantiser import Quantiser
from .settings import Int8Target

if TYPE_CHECKING:
    import onnx

Array = NDArray[np.float32]
ON_INTEGERS = ("Conv", "Sigmoid", "Mul", "Add", "Concat", "MaxPool", "Resize", "Relu", "LeakyRelu", "Clip", "HardSwish")
"""The kinds of operators that are quantised."""
STEPS = 255
PAIR = 128
"""The largest sum of two weights that no pair of bytes takes out of 16 bits: 255 * 128 = 32640."""


@dataclass(frozen=True)
class Statistics:
    """Of each tensor the mean over images of its smallest and its largest value, of maps also each channel's mean."""

    lowest: dict[str, float]
    highest: dict[str, float]
    channel_means: dict[str, Array]


class OnnxQuantiser(Quantiser):
    """``.onnx`` files, by ONNX Runtime's quantiser: QDQ, weights per channel and symmetric, activations asymmetric."""

    suffix = ".onnx"

    def __init__(self, source: str | Path, images: Sequence[Tensor], target: Int8Target = "any") -> None:
        super().__init__(source, images, target)
        self._statistics = cache(self._measured)

    def write(self, path: Path, kept: frozenset[str], *, rough: bool = False) -> None:
        from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType, TensorsData

        proto, statistics = self._graph(), self._statistics(rough)
        ranges = {
            name: (np.float32(low).reshape(1), np.float32(high).reshape(1))
            for name, (low, high) in activation_ranges(proto, statistics).items()
        }
        scales = round_convolutions(proto, statistics.channel_means, kept, self.target)
        known = {"axis": 0, "quant_type": QuantType.QInt8, "zero_point": np.int8(0)}
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
            extra_options={"TensorQuantOverrides": {w: [{**known, "scale": s} for s in scales[w]] for w in scales}},
        )
        quantiser.quantize_model()
        quantiser.model.topological_sort()
        made = quantiser.model.model
        _take_bytes_as_they_are(made)
        with whole_or_nothing(path) as temporary:
            save_onnx(made, temporary, {**self.metadata, INT8_TARGET: self.target})

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


def round_convolutions(
    proto: onnx.ModelProto, means: Mapping[str, Array], kept: frozenset[str], target: Int8Target
) -> dict[str, Array]:
    """Round the weights of convolutions, in place, and give each weight's scales, one for each output channel.

    To the biases is added what that takes from the mean output, after Nagel et al. 2019 (arXiv:1906.04721), section 4.2, with
    means from real images: sum of (weight - rounded weight) * mean input. Borders are counted as if they were not there.
    """
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    exact_of: dict[str, Array] = {}
    scales: dict[str, Array] = {}
    for node in proto.graph.node:
        if node.op_type != "Conv" or node.name in kept or node.input[1] not in constants:
            continue
        weight = constants[node.input[1]]
        exact = exact_of.setdefault(weight.name, numpy_helper.to_array(weight))
        integers, scales[weight.name] = round_weights(exact, target)
        rounded = integers * scales[weight.name].reshape(-1, *[1] * (exact.ndim - 1))
        weight.CopyFrom(numpy_helper.from_array(rounded, weight.name))
        bias = constants.get(node.input[2]) if len(node.input) > 2 else None
        if bias is None:
            continue
        lost, mean = exact - rounded, means[node.input[0]]
        groups = len(mean) // exact.shape[1]
        by_group = lost.reshape(groups, -1, *exact.shape[1:]).sum(tuple(range(3, lost.ndim + 1)))
        shift = (by_group * mean.reshape(groups, 1, -1)).sum(-1).ravel()
        known = numpy_helper.to_array(bias) + shift
        bias.CopyFrom(numpy_helper.from_array(known.astype(np.float32), bias.name))
    return scales


def round_weights(weights: Array, target: Int8Target) -> tuple[Array, Array]:
    """Integers [C, ...] and each output channel's scale [C], which makes weights of them.

    For ``vnni`` a channel's largest weight becomes 127. For ``any`` no two of a sign add up to more than 128, whatever
    their order; of the scales that make 64 to 127 of the largest weight that of the least squared error is taken, though
    it may clip some.
    """
    flat = weights.reshape(len(weights), -1)
    largest = np.abs(flat).max(1, keepdims=True)
    largest[largest == 0] = 1
    seconds = [np.sort(np.pad(sign * flat, ((0, 0), (1, 0))), 1)[:, -2:-1].clip(0) for sign in (1, -1)]
    integers, scale, least = np.zeros_like(flat), largest, np.full_like(largest, np.inf)
    for steps in range(64, 128) if target == "any" else (127,):
        tried = largest / steps
        up, down = (np.clip(PAIR - np.round(second / tried), 64, 127) for second in seconds)
        limits = (-down, up) if target == "any" else (-127, 127)
        rounded = np.clip(np.round(flat / tried), *limits)
        error = np.square(flat - rounded * tried).sum(1, keepdims=True)
        better = error < least
        integers, scale, least = (
            np.where(better, new, old) for new, old in ((rounded, integers), (tried, scale), (error, least))
        )
    return integers.reshape(weights.shape), scale.ravel()


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
