"""Gates: learnable per-channel factors placed after activations, or before them, behind the norm.

At either place gate 0 means that the map *is* 0, so removing the channel changes nothing; a batch norm's weight is
followed by a bias and a non-linearity and promises no such thing.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slim.errors import SlimError
from slim.graph import ChannelGraph, GateSite
from slim.wrapped import without_ddp

logger = logging.getLogger(__name__)

CLOSED = 0.01
"""A gate below this magnitude is closed."""
NAME = "slim_gate"
"""The name of a gate among the children of the module that it follows."""


class Gate(nn.Module):
    """Multiplies each channel of one activation by its factor.

    Args:
        groups: names of the channel groups to which the activation's channels belong
        vectors: the factors of each of these groups, FP32; gates of one group share a vector when they are tied
        index: for each channel its position in the vectors' concatenation, int64 [channels]; None when they are in order
        axis: the channel axis of the activation
    """

    index: Tensor | None

    def __init__(
        self, groups: Sequence[str], vectors: Sequence[nn.Parameter], index: Tensor | None = None, axis: int = 1
    ) -> None:
        super().__init__()
        self.groups = tuple(groups)
        self.vectors = nn.ParameterList(vectors)
        self.register_buffer("index", index, persistent=False)
        self.axis = axis
        self.transparent = False

    def factors(self) -> Tensor:
        """The factor of each channel of the activation, [channels]."""
        joined = self.vectors[0] if len(self.vectors) == 1 else torch.cat(list(self.vectors))
        return joined if self.index is None else joined[self.index]

    def forward(self, x: Tensor) -> Tensor:
        if self.transparent:
            return x
        shape = [1] * x.ndim
        shape[self.axis] = -1
        return x * self.factors().to(x.dtype).view(shape)

    def after(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """The forward hook by which a gate follows a module. (A bound method, so that deep copies follow their own gate.)"""
        scaled: Tensor = self(output)
        return scaled

    def extra_repr(self) -> str:
        return f"groups={list(self.groups)}, channels={self.factors().numel()}"


def attach_gate(module: nn.Module, gate: Gate) -> None:
    """Scale what a module gives from now on; in place. No other module or parameter changes its name."""
    module.add_module(NAME, gate)
    module.register_forward_hook(gate.after)


def detach_gate(module: nn.Module) -> None:
    """Undo ``attach_gate``, in place."""
    gate = module._modules.pop(NAME)
    for key, hook in list(module._forward_hooks.items()):
        if getattr(hook, "__self__", None) is gate:
            del module._forward_hooks[key]


def gated_path(gate_path: str) -> str:
    """Path of the module that the gate at a path follows."""
    return gate_path.removesuffix(f".{NAME}")


def gates_in(model: nn.Module) -> list[tuple[str, Gate]]:
    """(path, gate) of every gate in a model."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, Gate)]


def vectors_in(model: nn.Module) -> list[tuple[str, int, str, nn.Parameter]]:
    """(path of the gate, number of the vector there, its group's name, vector) of every vector of every gate in a model."""
    return [
        (path, number, group, vector)
        for path, gate in gates_in(model)
        for number, (group, vector) in enumerate(zip(gate.groups, gate.vectors, strict=True))
    ]


def gate_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all gates of a model, each once, in the order of its modules."""
    return list({id(p): p for _, gate in gates_in(model) for p in gate.parameters()}.values())


def count_params(model: nn.Module) -> int:
    """Number of learnable parameters, gates not counted since they fold away."""
    return sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in gate_parameters(model))


def gate_vectors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every distinct gate vector of a model by name.

    The name is the group's when the gates of a group are tied, otherwise ``group@path of the module before the gate``.
    """
    found: dict[str, dict[int, tuple[str, nn.Parameter]]] = {}
    for path, _, group, vector in vectors_in(model):
        found.setdefault(group, {}).setdefault(id(vector), (gated_path(path), vector))
    return {
        group if len(vectors) == 1 else f"{group}@{path}": vector
        for group, vectors in found.items()
        for path, vector in vectors.values()
    }


def closed_share(model: nn.Module) -> float:
    """Share of gates that are closed, 0..1; 0 for a model without gates."""
    vectors = [v.detach() for v in gate_parameters(model)]
    total = sum(v.numel() for v in vectors)
    return sum(int((v.abs() < CLOSED).sum()) for v in vectors) / total if total else 0.0


def open_channels(graph: ChannelGraph, vectors: Mapping[str, Tensor]) -> dict[str, int]:
    """How many output channels of each layer have an open gate, in the order in which the layers run.

    Args:
        graph: what ``slim.trace`` finds in the model
        vectors: the model's gate vectors by name, see ``slim.gate_vectors``, or weights of norms by the norm's path. A channel
            with several is open while one of them is; one without any always is.

    Examples:
        >>> import slim, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
        >>> graph = slim.trace(model, torch.zeros(1, 3, 8, 8))
        >>> slim.add_gates(model, graph)["0"].data[:3] = 0.0
        >>> slim.open_channels(graph, slim.gate_vectors(model))
        {'0': 1, '2': 2}
    """
    is_open: dict[str, Tensor] = {}
    for name, vector in vectors.items():
        found = vector.detach().abs().cpu() >= CLOSED
        if (gated := graph.by_name.get(name.partition("@")[0])) is not None:
            places = [(gated, torch.arange(gated.size))]
        else:
            places = [(g, m.index_tensor) for g in graph.groups for m in g.members if m.param == f"{name}.weight"]
        for group, index in places:
            now = found[index].view(group.size, -1).any(1)
            is_open[group.name] = is_open[group.name] | now if group.name in is_open else now
    counts = {call.path: 0 for call in graph.layers}
    for group in graph.groups:
        channels = int(is_open[group.name].sum()) if group.name in is_open else group.size
        for member in group.members:
            if member.produces and member.layer in counts:
                counts[member.layer] += channels * (len(member.index) // group.size)
    return counts


@contextlib.contextmanager
def closed_gates_at_zero(model: nn.Module) -> Iterator[bool]:
    """Set closed gates to exactly 0 for the duration, as a cut leaves them; in place. Gives whether that changes any."""
    vectors = gate_parameters(model)
    before = [vector.detach().clone() for vector in vectors]
    with torch.no_grad():
        for vector in vectors:
            vector[vector.abs() < CLOSED] = 0.0
    try:
        yield any(not torch.equal(vector, old) for vector, old in zip(vectors, before, strict=True))
    finally:
        with torch.no_grad():
            for vector, old in zip(vectors, before, strict=True):
                vector.copy_(old)


def add_gates(
    model: nn.Module,
    graph: ChannelGraph,
    *,
    tie: Literal["group", "layer"] = "group",
    where: Literal["activation", "norm"] = "activation",
) -> dict[str, nn.Parameter]:
    """Put a gate, all factors 1, behind every activation whose channels can be pruned; in place and idempotent.

    Where channels reach a weight past no activation module of their own (one that runs several times in a forward pass,
    a function, a sum), the gate sits behind the norm or layer that makes them.

    Args:
        model: the model that was traced
        graph: what ``slim.trace`` found in it
        tie: "group" gives all gates of one group one shared vector, "layer" each gate its own
        where: "norm" puts the gates before the activations instead, behind the norm or, without one, behind the layer; not
            where the activation makes something of 0, such as a softplus. They scale what the activation bends, so they
            fold back into norm or layer where its slope is not constant

    Returns:
        The gate vectors, FP32 [channels of the group], by group name (``group@module`` where a group has several).

    Raises:
        SlimError: for another ``tie`` or ``where``, and when no channels that can be pruned pass a place for a gate.

    Examples:
        >>> import slim, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
        >>> graph = slim.trace(model, torch.zeros(1, 3, 8, 8))
        >>> {name: gate.tolist() for name, gate in slim.add_gates(model, graph).items()}
        {'0': [1.0, 1.0, 1.0, 1.0]}
    """
    model = without_ddp(model)
    if any("_orig_mod" in module._modules or module._compiled_call_impl is not None for module in model.modules()):
        raise SlimError("the model is compiled, and its code would not see the gates; place them first, then compile")
    if tie not in ("group", "layer"):
        raise SlimError(f"tie is {tie!r}; expected 'group' or 'layer'")
    if where not in ("activation", "norm"):
        raise SlimError(f"where is {where!r}; expected 'activation' or 'norm'")
    if gates_in(model):
        return gate_vectors(model)
    shared: dict[str, nn.Parameter] = {}
    device = next((p.device for p in model.parameters()), None)
    for site in graph.gate_sites if where == "activation" else graph.norm_sites:
        numbers = list(dict.fromkeys(group for group, _ in site.channels))
        groups = [graph.groups[n] for n in numbers]
        frozen = next((g for g in groups if not g.prunable), None)
        if frozen is not None:
            logger.debug("no gate at %s: group %s is frozen (%s)", site.path, frozen.name, frozen.frozen_reason)
            continue
        vectors = []
        for group in groups:
            key = group.name if tie == "group" else f"{group.name}@{site.path}"
            shared.setdefault(key, nn.Parameter(torch.ones(group.size, dtype=torch.float32, device=device)))
            vectors.append(shared[key])
        gate = Gate([g.name for g in groups], vectors, gate_index(site, numbers, [g.size for g in groups]), site.axis)
        attach_gate(model.get_submodule(site.path), gate.to(device))
    if not shared:
        place = "an activation or a layer" if where == "activation" else "a layer before an activation"
        raise SlimError(
            f"no gate could be placed: the graph has no channels that can be pruned behind {place}; see graph.report()"
        )
    model.slim_example, model.slim_layers = graph.example, graph.layers  # type: ignore[assignment]
    return gate_vectors(model)


def gate_index(site: GateSite, numbers: Sequence[int], sizes: Sequence[int]) -> Tensor | None:
    """For each channel of the site its position in the concatenation of the groups' vectors; None when in order."""
    start = {n: sum(sizes[:i]) for i, n in enumerate(numbers)}
    index = [start[group] + channel for group, channel in site.channels]
    return None if index == list(range(sum(sizes))) else torch.tensor(index)


def gate_layout(model: nn.Module) -> list[dict[str, Any]]:
    """Where each gate sits and which vectors feed it: plain data, enough to put them back on a fresh model."""
    names = {id(vector): name for name, vector in gate_vectors(model).items()}
    return [
        {
            "path": gated_path(path),
            "axis": gate.axis,
            "groups": list(gate.groups),
            "vectors": [names[id(v)] for v in gate.vectors],
            "sizes": [v.numel() for v in gate.vectors],
            "index": None if gate.index is None else gate.index.tolist(),
        }
        for path, gate in gates_in(model)
    ]


def restore_gates(model: nn.Module, layout: Sequence[Mapping[str, Any]]) -> None:
    """Put gates back by their layout, factors 1, in place."""
    shared: dict[str, nn.Parameter] = {}
    for item in layout:
        vectors = [
            shared.setdefault(name, nn.Parameter(torch.ones(size)))
            for name, size in zip(item["vectors"], item["sizes"], strict=True)
        ]
        index = None if item["index"] is None else torch.tensor(item["index"])
        try:
            module = model.get_submodule(item["path"])
        except AttributeError as error:
            raise SlimError(f"a gate belongs at {item['path']}, but the built model has no such module") from error
        attach_gate(module, Gate(item["groups"], vectors, index, item["axis"]))
