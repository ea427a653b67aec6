"""Gates: learnable per-channel factors placed after activations.

After the activation, gate 0 means that the map *is* 0, so removing the channel changes nothing; a batch norm's weight is
followed by a bias and a non-linearity and promises no such thing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slim.errors import SlimError

CLOSED = 0.01
"""A gate below this is closed."""


class Gate(nn.Module):
    """Multiplies each channel of one activation by its factor.

    The factors of the activation's channels come from one vector per group (FP32 parameters, shared between the gates of
    one group when tied); ``index`` [channels] picks them from the vectors' concatenation, None when in order.
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


NAME = "slim_gate"
"""The name of a gate among the children of the module that it follows."""


def attach_gate(module: nn.Module, gate: Gate) -> None:
    """Scale what a module gives from now on; in place. No other module or parameter changes its name."""
    module.add_module(NAME, gate)
    module.register_forward_hook(gate.after)


def detach_gate(module: nn.Module) -> None:
    """The inverse of ``attach_gate``, in place."""
    gate = module._modules.pop(NAME)
    for key, hook in list(module._forward_hooks.items()):
        if getattr(hook, "__self__", None) is gate:
            del module._forward_hooks[key]


def site_of(gate_path: str) -> str:
    """Path of the module that the gate at a path follows."""
    return gate_path.removesuffix(f".{NAME}")


def gates_in(model: nn.Module) -> Iterator[tuple[str, Gate]]:
    """(path, gate) of every gate in a model."""
    for path, module in model.named_modules():
        if isinstance(module, Gate):
            yield path, module


def gate_vectors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every distinct gate vector of a model by name.

    The name is the group's when the gates of a group are tied, otherwise ``group@activation path``.
    """
    found: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for path, gate in gates_in(model):
        for group, vector in zip(gate.groups, gate.vectors, strict=True):
            known = found.setdefault(group, [])
            if all(vector is not other for _, other in known):
                known.append((site_of(path), vector))
    names: dict[str, nn.Parameter] = {}
    for group, vectors in found.items():
        for path, vector in vectors:
            names[group if len(vectors) == 1 else f"{group}@{path}"] = vector
    return names


def closed_share(model: nn.Module) -> float:
    """Share of gates that are closed, 0..1; 0 for a model without gates."""
    vectors = [v.detach() for v in gate_vectors(model).values()]
    total = sum(v.numel() for v in vectors)
    return sum(int((v.abs() < CLOSED).sum()) for v in vectors) / total if total else 0.0


@contextlib.contextmanager
def closed_gates_at_zero(model: nn.Module) -> Iterator[bool]:
    """Inside, closed gates are exactly 0, as a cut of them leaves them; in place. Gives whether that changes any."""
    vectors = list(gate_vectors(model).values())
    kept = [vector.detach().clone() for vector in vectors]
    changed = False
    with torch.no_grad():
        for vector, before in zip(vectors, kept, strict=True):
            vector[before.abs() < CLOSED] = 0.0
            changed |= not torch.equal(vector, before)
    try:
        yield changed
    finally:
        with torch.no_grad():
            for vector, before in zip(vectors, kept, strict=True):
                vector.copy_(before)


class SmallestHalfL1:
    """The L1 pull on the smallest part of every gate vector, as a proximal step.

    Take it once, right after ``optimizer.step()``: in each vector the ``fraction`` of entries that is smallest by
    magnitude (the ranking is fresh at each step; of equal entries the ones of lower index) becomes
    ``max(0, gate - lr * strength)``; the others become ``max(0, gate)``. Unlike a term in the loss it reaches exactly 0
    and owes nothing to batch size, loss scale, momentum or AMP. (Proximal operator of the L1 norm: Parikh and Boyd,
    "Proximal Algorithms", 2014, section 6.5.2.)

    Vectors that require no gradient are frozen: they are left alone and count in no share.

    ``strength`` and ``limit`` may be changed between steps; with a limit only so many gates are pulled, of those the
    smallest over all vectors.
    """

    limit: int | None = None

    def __init__(self, model: nn.Module, *, strength: float, fraction: float = 0.5) -> None:
        if not 0.0 <= fraction <= 1.0:
            raise SlimError(f"fraction is {fraction}; expected 0 to 1, the part of each gate vector that is pulled")
        if not strength >= 0.0:
            raise SlimError(f"strength is {strength}; expected a number of at least 0")
        gates = gate_vectors(model)
        if not gates:
            raise SlimError("the model has no gates to pull; call slim.add_gates(model, graph) first")
        self.vectors = {name: vector for name, vector in gates.items() if vector.requires_grad}
        if not self.vectors:
            raise SlimError(f"all {len(gates)} gate vectors of the model are frozen; leave one its requires_grad")
        self.strength = strength
        self.fraction = fraction
        self._sizes = [vector.numel() for vector in self.vectors.values()]
        # All vectors are ranked at once, as rows of a table that is as wide as the longest of them.
        width = max(self._sizes)
        self._slots = torch.cat([row * width + torch.arange(size) for row, size in enumerate(self._sizes)])
        self._pulled = torch.tensor([[int(size * fraction)] for size in self._sizes])

    @torch.no_grad()
    def pulled(self) -> Tensor:
        """Which gates the next step pulls: bool [all gates], in the order of ``joined``."""
        gates = self.joined()
        slots, pulled = self._slots.to(gates.device), self._pulled.to(gates.device)
        table = gates.new_full((len(self._sizes), max(self._sizes)), float("inf"))
        table.view(-1)[slots] = gates.abs()
        order = torch.sort(table, dim=1, stable=True).indices
        is_low = torch.arange(table.shape[1], device=gates.device) < pulled
        chosen = torch.zeros_like(table, dtype=torch.bool).scatter_(1, order, is_low).view(-1)[slots]
        if self.limit is None:
            return chosen
        ranked = gates.abs().masked_fill_(~chosen, float("inf")).sort(stable=True).indices
        chosen[ranked[self.limit :]] = False
        return chosen

    def joined(self) -> Tensor:
        """All gates one after another, detached, [all gates]."""
        return torch.cat([vector.detach() for vector in self.vectors.values()])

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Pull once with learning rate ``lr``, in place."""
        if self.strength > 0:
            gates = self.joined().sub_(self.pulled() * (lr * self.strength))
            torch._foreach_copy_(list(self.vectors.values()), list(gates.split(self._sizes)))
        self.project()

    @torch.no_grad()
    def project(self) -> None:
        """Only keep the gates at or above 0, in place."""
        torch._foreach_clamp_min_(list(self.vectors.values()), 0.0)

    def penalty(self) -> float:
        """Sum of the magnitudes of the entries that the next step would pull."""
        return float(self.joined()[self.pulled()].abs().sum())

    def closed_share(self) -> float:
        """Share of all gates that are closed, 0..1."""
        gates = self.joined()
        return int((gates.abs() < CLOSED).sum()) / gates.numel()

    def against_gradient(self) -> float | None:
        """The pull over the mean magnitude of the loss's gradient at the pulled gates; above 1 they close.

        Read it between a backward pass and the next ``zero_grad``. None where there is no gradient.
        """
        gradients = [vector.grad for vector in self.vectors.values()]
        if any(gradient is None for gradient in gradients):
            return None
        opposed = float(torch.cat([g for g in gradients if g is not None])[self.pulled()].abs().mean())
        return self.strength / opposed if opposed > 0 else None

    def gates(self) -> dict[str, Tensor]:
        """The gate vectors by name, detached (for histograms)."""
        return {name: vector.detach() for name, vector in self.vectors.items()}

    def state(self) -> dict[str, float]:
        """What ``restore`` needs to continue exactly."""
        return {"strength": self.strength}

    def restore(self, state: Mapping[str, float]) -> None:
        """Continue from a ``state``, in place."""
        self.strength = state["strength"]


def strength_for(total_lr: float, travel: float = 2.0) -> float:
    """The strength with which an unopposed gate travels ``travel`` (a gate starts at 1; the data resists).

    ``total_lr`` is the sum of the learning rates over the steps that pull.
    """
    if not total_lr > 0:
        raise SlimError(
            f"the learning rates of the sparse steps sum to {total_lr}; expected more than 0 (train longer)"
        )
    return travel / total_lr
