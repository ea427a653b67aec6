"""Where gates go: behind activations, and behind the layer itself where its channels reach a reader past no activation of
their own (a ResNet block runs one ReLU module three times, and its last norm is summed before it)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from slim.graph import Site
from slim.labels import varying_axes

if TYPE_CHECKING:
    from slim.trace import ChannelPropagation

ACTIVATIONS = (
    nn.SiLU,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Mish,
    nn.GELU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.Softplus,
)
"""Activations that a gate may follow. Bounded ones (sigmoid, ...) make factors of other channels, not maps."""

SCALABLE = (nn.modules.batchnorm._BatchNorm, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Layers into whose weight and bias a gate behind them folds."""


NO_MAPS = {
    "sigmoid",
    "hardsigmoid",
    "softplus",
    "log_sigmoid_forward",
    "exp",
    "cos",
    "_softmax",
    "_log_softmax",
    "rsub",
}
"""Operators whose result is not 0 where what they are given is: a gate before them would close nothing."""


@dataclass
class Flow:
    """What happened to which tensor, in order: enough to see from which layers' outputs a reader is reached.

    An event is (kind, what, tensors in, tensors out), tensors by identity: an operator's name, or a module's path.
    """

    events: list[tuple[str, str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)

    def operator(self, name: str, reads: bool, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        offset = name in ("add", "sub") and len(inputs) == 1
        kind = "read" if reads else "end" if name in NO_MAPS or offset else "move"
        self.events.append((kind, name, tuple(map(id, inputs)), tuple(map(id, outputs))))

    def module(self, kind: str, path: str, output: Tensor) -> None:
        self.outputs.setdefault(path, []).append(output)
        if kind != "move":
            self.events.append((kind, path, (), (id(output),)))


def find_sites(run: ChannelPropagation, home: Tensor) -> list[Site]:
    """Sites straight behind layers' activations that run once per forward and whose every channel belongs to a group; then
    those behind layers that reach a reader past none of these. ``home`` [labels, 2]: group and channel of each label, -1
    for none."""
    activations = [path for kind, path, _, _ in run.flow.events if kind == "activation"]
    sites = [site for path in dict.fromkeys(activations) if (site := site_at(run, home, path))]
    layers = ungated(run.flow, {site.path for site in sites})
    return sites + [site for path in layers if (site := site_at(run, home, path))]


def site_at(run: ChannelPropagation, home: Tensor, path: str) -> Site | None:
    outputs = run.flow.outputs[path]
    labels = run.get(outputs[0])
    if len(outputs) != 1 or labels is None or len(varying_axes(labels)) != 1:
        return None
    axis = varying_axes(labels)[0]
    channels = home[labels.flatten()]
    if len(channels) != outputs[0].shape[axis] or not bool((channels >= 0).all()):
        return None
    return Site(path, axis, tuple((group, channel) for group, channel in channels.tolist()))


def ungated(flow: Flow, gated: set[str]) -> list[str]:
    """The layers whose outputs reach some reader past no gated activation: of a convolution and its norm, the norm."""
    reaching: dict[int, frozenset[str]] = {}
    found: dict[str, None] = {}
    nothing: frozenset[str] = frozenset()
    for kind, what, inputs, outputs in flow.events:
        met = nothing.union(*(reaching.get(key, nothing) for key in inputs))
        if kind in ("read", "end"):
            found.update(dict.fromkeys(sorted(met)) if kind == "read" else {})
            met = nothing
        elif kind == "layer":
            met = frozenset([what])
        elif kind == "activation" and what in gated:
            met = nothing
        elif kind == "activation":
            # The module's operators ran before; what they passed on stands.
            continue
        for key in outputs:
            reaching[key] = met
    return list(found)
