"""What a model costs: MACs of its convolutions and linear layers, and its parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from slim.gate import Gate
from slim.graph import LayerCost
from slim.propagate import Propagation, transparent_gates


@dataclass(frozen=True)
class Cost:
    """``macs`` for one image, ``params`` without gates (they fold away), a row per call of a layer."""

    macs: int
    params: int
    layers: tuple[LayerCost, ...]

    def __str__(self) -> str:
        width = max([5, *(len(row.path) for row in self.layers)])
        lines = [f"{'layer':<{width}}  {'weight':<20}  {'positions':>9}  {'M MACs':>9}"]
        lines += [f"{r.path:<{width}}  {r.shape!s:<20}  {r.positions:>9}  {r.macs / 1e6:>9.3f}" for r in self.layers]
        return "\n".join([*lines, f"{self.macs / 1e6:.1f} M MACs, {self.params / 1e6:.3f} M parameters"])


def cost(model: nn.Module, example_inputs: Any) -> Cost:
    """MACs for the example inputs divided by their batch size, parameters, and a row per layer call.

    Element-wise work (activations, norms, pooling) is not counted.
    """
    counter = Propagation(model, muted=True)
    with transparent_gates(model):
        counter.run(example_inputs)
    gates = {id(p) for m in model.modules() if isinstance(m, Gate) for p in m.parameters()}
    params = sum(p.numel() for p in model.parameters() if id(p) not in gates)
    return Cost(sum(row.macs for row in counter.layers), params, tuple(counter.layers))
