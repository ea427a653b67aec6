"""Where an engine spends its time: its own measurement of every operator that it ran."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity

from slim import SlimError

from .graph_ends import unwrapped
from .onnx_file import OnnxNetwork, read_onnx
from .openvino_file import OpenVinoNetwork
from .torchscript_file import TorchScriptNetwork

SCOPE = "module:"
"""Before a module's path in the name of what the profiler of torch records."""
WARMUP = 3
"""Runs before those that are recorded."""


@dataclass(frozen=True)
class LayerTime:
    """An operator as the engine ran it: milliseconds of one run, the median of several.

    ``name`` is the path of the module that it comes from, where the file or the model says that, else the engine's name;
    ``kind`` the engine's word for the operation; ``precision`` what it computed in, empty where the engine does not say.
    """

    name: str
    kind: str
    precision: str
    milliseconds: float


@dataclass(frozen=True)
class KindTime:
    """All operators of a kind and precision together; ``share`` is of the whole network, 0 to 1."""

    kind: str
    precision: str
    count: int
    milliseconds: float
    share: float


def profile(network: nn.Module, images: Tensor, runs: int = 20) -> list[LayerTime]:
    """The operators of a network in the order in which they ran, measured by its engine over ``runs`` runs on ``images``.

    Exported files must have been opened with ``profile=True``, which slows them; an ``OnnxNetwork`` is profiled once.
    Any other module is profiled by torch, operator by operator.
    """
    if runs < 1:
        raise SlimError(f"profile: {runs} runs, expected at least 1")
    with torch.no_grad():
        if isinstance(network, OpenVinoNetwork):
            return _of_openvino(network, images, runs)
        if isinstance(network, OnnxNetwork):
            return _of_onnx(network, images, runs)
        return _of_torch(network, images, runs)


def by_kind(layers: Sequence[LayerTime]) -> list[KindTime]:
    """The slowest kind first."""
    total = sum(layer.milliseconds for layer in layers)
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for layer in layers:
        found[layer.kind, layer.precision].append(layer.milliseconds)
    kinds = [
        KindTime(kind, precision, len(times), sum(times), sum(times) / total if total else 0.0)
        for (kind, precision), times in found.items()
    ]
    return sorted(kinds, key=lambda row: -row.milliseconds)


def profile_text(layers: Sequence[LayerTime], slowest: int = 10) -> str:
    """Two Markdown tables: time by kind of operator, and the slowest operators."""
    total = sum(layer.milliseconds for layer in layers)
    kinds = [
        f"| {row.kind} | {row.precision} | {row.count} | {row.milliseconds:.3f} | {row.share:.1%} |"
        for row in by_kind(layers)
    ]
    top = [
        f"| {row.name} | {row.kind} | {row.precision} | {row.milliseconds:.3f} | {row.milliseconds / total:.1%} |"
        for row in sorted(layers, key=lambda row: -row.milliseconds)[:slowest]
    ]
    return "\n".join(
        [
            "| kind | precision | operators | ms | share |\n| --- | --- | --- | --- | --- |",
            *kinds,
            f"| all | | {len(layers)} | {total:.3f} | 100.0% |",
            "\n| slowest operators | kind | precision | ms | share |\n| --- | --- | --- | --- | --- |",
            *top,
        ]
    )


Row = tuple[str, str, str]
"""Name, kind and precision of an operator."""


def _medians(rows: Iterable[tuple[Row, float]]) -> list[LayerTime]:
    """Of each operator over all runs, in the order of the first one."""
    times_ms: dict[Row, list[float]] = defaultdict(list)
    for row, milliseconds in rows:
        times_ms[row].append(milliseconds)
    return [LayerTime(*row, statistics.median(times)) for row, times in times_ms.items()]


def _numbered(names: Iterable[str]) -> Iterator[str]:
    """Names that occur again get a number, so that each operator is one row."""
    seen: dict[str, int] = defaultdict(int)
    for name in names:
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name} ({seen[name]})"


def _module_of(operator: str) -> str:
    """``onnx_file.name_by_modules`` writes the module before the operator; some engines add words of their own."""
    return operator.split("/")[0]


def _of_openvino(network: OpenVinoNetwork, images: Tensor, runs: int) -> list[LayerTime]:
    precisions = {"i8": "int8", "u8": "int8", "bf16": "bfloat16", "f16": "float16", "f32": "float32"}
    for _ in range(WARMUP):
        network(images)
    rows: list[tuple[Row, float]] = []
    for _ in range(runs):
        network(images)
        with network.request() as request:
            ran = [info for info in request.get_profiling_info() if info.status == info.Status.EXECUTED]
        if not ran:
            raise SlimError(f"{network.path}: OpenVINO measured nothing; open it with profile=True")
        for name, info in zip(_numbered(_module_of(info.node_name) for info in ran), ran, strict=True):
            precision = precisions.get(info.exec_type.rsplit("_", 1)[-1].lower(), "")
            rows.append(((name, info.node_type, precision), info.real_time.total_seconds() * 1000))
    return _medians(rows)


def _of_onnx(network: OnnxNetwork, images: Tensor, runs: int) -> list[LayerTime]:
    if network.profiles_to is None:
        raise SlimError(f"{network.path}: ONNX Runtime measures nothing; open it with profile=True")
    for _ in range(WARMUP + runs):
        network(images)
    events = json.loads(Path(network.session.end_profiling()).read_text(encoding="utf-8"))
    network.profiles_to.cleanup()
    network.profiles_to = None
    makers = {output: node for node in read_onnx(network.path).graph.node for output in node.output}
    times: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            own = event["name"].removesuffix("_kernel_time")
            times[own, event["args"]["op_name"], _onnx_precision(event["args"])].append(event["dur"] / 1000)
    names = _numbered(_module_of(_onnx_name(own, kind, makers)) for own, kind, _ in times)
    return [
        LayerTime(name, kind, precision, statistics.median(values[-runs:]))
        for name, ((_, kind, precision), values) in zip(names, times.items(), strict=True)
    ]


def _onnx_name(own: str, kind: str, makers: Mapping[str, Any]) -> str:
    """A convolution in a blocked layout bears the name of its output, even if that is its fused activation's."""
    node = makers.get(own.removesuffix("_nchwc"))
    while node is not None and "Conv" in kind and "Conv" not in node.op_type:
        node = makers.get(node.input[0])
    return own if node is None else str(node.name)


def _onnx_precision(facts: dict[str, Any]) -> str:
    """Of an operator that ONNX Runtime ran: by the type of its result, and of QDQ's own by their name."""
    names = {"float": "float32", "uint8": "int8", "int8": "int8", "float16": "float16", "bfloat16": "bfloat16"}
    kinds = [kind for entry in facts.get("output_type_shape", []) for kind in entry]
    return "int8" if facts["op_name"].startswith("QLinear") else names.get(kinds[0], kinds[0]) if kinds else ""


def _of_torch(network: nn.Module, images: Tensor, runs: int) -> list[LayerTime]:
    parameter = next(network.parameters(), None)
    precision = "float32" if parameter is None else str(parameter.dtype).removeprefix("torch.")
    for _ in range(WARMUP):
        network(images)
    rows: list[tuple[Row, float]] = []
    with _quiet(), _scopes(network), torch.profiler.profile(activities=[ProfilerActivity.CPU]) as recorded:
        for number in range(runs):
            with record_function(f"{SCOPE}run {number}"):
                network(images)
    events: Any = recorded.events()
    by_run: dict[str, list[Any]] = defaultdict(list)
    for event in sorted(events, key=lambda event: event.time_range.start):
        parent = event.cpu_parent
        # An operator that torch itself was asked for, not one that another calls.
        if event.name.startswith(("aten::", "torchvision::")) and parent is not None and not _is_operator(parent):
            by_run[_root(event).name].append(event)
    for operators in by_run.values():
        for name, event in zip(_numbered(map(_scope_of, operators)), operators, strict=True):
            rows.append(((name, event.name.split("::")[1], precision), event.cpu_time_total / 1000))
    return _medians(rows)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on the process's standard error: torch's profiler tells there of every start, and of a GPU that is absent."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def _scopes(network: nn.Module) -> Iterator[None]:
    """While it holds, every module of an eager network opens a scope of its path in what torch records."""
    if isinstance(network, TorchScriptNetwork):
        yield
        return
    handles = []
    opened: list[Any] = []

    def enter(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object) -> None:
            opened.append(record_function(SCOPE + path))
            opened[-1].__enter__()

        return hook

    def leave(module: nn.Module, inputs: object, outputs: object) -> None:
        opened.pop().__exit__(None, None, None)

    try:
        for path, module in network.named_modules():
            if path:
                handles.append(module.register_forward_pre_hook(enter(path)))
                handles.append(module.register_forward_hook(leave))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_operator(event: Any) -> bool:
    return "::" in event.name


def _root(event: Any) -> Any:
    while event.cpu_parent is not None:
        event = event.cpu_parent
    return event


def _scope_of(event: Any) -> str:
    """The innermost module that an operator ran in; the operator itself where there is none, as in TorchScript."""
    parent = event.cpu_parent
    own: str = event.name.split("::")[1]
    path = unwrapped(parent.name.removeprefix(SCOPE))
    return own if path.startswith("run ") or not parent.name.startswith(SCOPE) else path
