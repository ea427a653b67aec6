"""Where an engine spends its time: the milliseconds of every operator or layer, named after the network's modules."""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from slim import SlimError

from .graph_wrappers import unwrapped

WARMUP = 3
"""Runs before those that are recorded."""


@dataclass(frozen=True)
class LayerTime:
    """The milliseconds of an operator as an engine ran it, or of a torch module without its children.

    ``name`` is the path of its module where the engine says that; ``kind`` the engine's word for the operation;
    ``precision`` what it computed in, empty where the engine does not say.
    """

    name: str
    kind: str
    precision: str
    milliseconds: float


def profile(network: nn.Module, images: Tensor, runs: int = 20) -> list[LayerTime]:
    """Measure a network layer by layer, each the median of ``runs`` runs on ``images`` [B, 3, H, W], in their order.

    An exported network is measured by its engine, which is opened a second time for it; torch modules by their calls.
    """
    if runs < 1:
        raise SlimError(f"profile: {runs} runs, expected at least 1")
    with torch.no_grad():
        measure = getattr(network, "layer_times", None)
        found = (measure(images, runs) if measure else None) or _module_times(network, images, runs)
    times_ms: dict[LayerTime, list[float]] = defaultdict(list)
    for run in found:
        seen: Counter[tuple[str, str]] = Counter()
        for layer in run:
            seen[layer.name, layer.kind] += 1
            number = seen[layer.name, layer.kind]
            name = f"{layer.name} ({number})" if number > 1 else layer.name
            times_ms[replace(layer, name=name, milliseconds=0.0)].append(layer.milliseconds)
    return [replace(layer, milliseconds=statistics.median(times)) for layer, times in times_ms.items()]


def profile_text(layers: Sequence[LayerTime], slowest: int = 10) -> str:
    """Two Markdown tables: time by kind of operator, and the slowest operators."""
    total = sum(layer.milliseconds for layer in layers) or 1.0
    kinds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for layer in layers:
        kinds[layer.kind, layer.precision].append(layer.milliseconds)
    lines = ["| kind | precision | operators | ms | share |\n| --- | --- | --- | --- | --- |"]
    for (kind, precision), times in sorted(kinds.items(), key=lambda row: -sum(row[1])):
        lines.append(f"| {kind} | {precision} | {len(times)} | {sum(times):.3f} | {sum(times) / total:.1%} |")
    lines.append(f"| all | | {len(layers)} | {total:.3f} | 100.0% |")
    lines.append("\n| slowest operators | kind | precision | ms | share |\n| --- | --- | --- | --- | --- |")
    for layer in sorted(layers, key=lambda layer: -layer.milliseconds)[:slowest]:
        ms = layer.milliseconds
        lines.append(f"| {layer.name} | {layer.kind} | {layer.precision} | {ms:.3f} | {ms / total:.1%} |")
    return "\n".join(lines)


def _module_times(network: nn.Module, images: Tensor, runs: int) -> list[list[LayerTime]]:
    """The modules in the order in which they ended, each without the time of its children."""
    parameter = next(network.parameters(), None)
    precision = "float32" if parameter is None else str(parameter.dtype).removeprefix("torch.")
    # A script's modules take no hooks: its time is its caller's.
    paths = {
        module: unwrapped(path)
        for path, module in network.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
    }
    opened: list[list[float]] = []  # of each module that runs: when it began, and its children's seconds
    layers: list[LayerTime] = []

    def enter(module: nn.Module, inputs: object) -> None:
        opened.append([time.perf_counter(), 0.0])

    def leave(module: nn.Module, inputs: object, output: object) -> None:
        began, inside = opened.pop()
        seconds = time.perf_counter() - began
        if opened:
            opened[-1][1] += seconds
        layers.append(LayerTime(paths[module], type(module).__name__, precision, 1000 * (seconds - inside)))

    handles = [module.register_forward_pre_hook(enter) for module in paths]
    handles += [module.register_forward_hook(leave) for module in paths]
    try:
        found = []
        for _ in range(WARMUP + runs):
            layers = []
            network(images)
            found.append(layers)
    finally:
        for handle in handles:
            handle.remove()
    return found[WARMUP:]
