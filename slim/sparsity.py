"""Sparse training: which channels the L1 step shrinks, and how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from slim.errors import SlimError
from slim.gate import CLOSED, gate_vectors
from slim.graph import ChannelGraph
from slim.solver import make_plan

Penalty = Literal["proximal", "loss", "polarisation"]
POLARISATION = 1.2
"""Weight of the L1 norm beside the distances to the mean, the paper's t."""


class L1Step:
    """What every way to choose the factors that shrink has in common; see ``SmallestHalfL1`` and ``BudgetL1``.

    In training, in this order: backward, ``add_gradient()``, ``optimizer.step()``, ``step(lr)``. With the proximal penalty
    ``add_gradient`` does nothing and may be left out.

    Args:
        model: a model with gates, see ``slim.add_gates``; vectors that require no gradient are left alone
        strength: how far a factor moves in one step, per unit of learning rate; see ``slim.strength_for``
        penalty: "proximal" takes L1's proximal step after the optimiser's, which reaches exactly 0 (Parikh and Boyd, "Proximal
            Algorithms", 2014, section 6.5.2); "loss" adds L1's gradient to that of the loss, as network slimming does (Liu et
            al., ICCV 2017), where momentum multiplies it; "polarisation" adds that of Zhuang et al., "Neuron-level Structured
            Pruning using Polarization Regularizer", NeurIPS 2020, over all factors, whatever is selected
        rank_every: so many steps keep one ranking
        vectors: the factors by name, in place of the model's gates; they may be negative (weights of batch norms)

    Raises:
        SlimError: for values out of range, and when the model has no gate that is trained.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float,
        penalty: Penalty = "proximal",
        rank_every: int = 1,
        vectors: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        if not strength >= 0.0:
            raise SlimError(f"strength is {strength}; expected a number of at least 0")
        if penalty not in get_args(Penalty):
            raise SlimError(f"penalty is {penalty!r}; expected one of {', '.join(get_args(Penalty))}")
        gates = gate_vectors(model) if vectors is None else dict(vectors)
        if not gates:
            raise SlimError("the model has no gates to shrink; call slim.add_gates(model, graph) first")
        self.vectors = {name: vector for name, vector in gates.items() if vector.requires_grad}
        if not self.vectors:
            raise SlimError(f"all {len(gates)} gate vectors of the model are frozen; leave one its requires_grad")
        self.strength, self.penalty, self.rank_every = strength, penalty, rank_every
        self._are_gates = vectors is None
        self._sizes = [vector.numel() for vector in self.vectors.values()]
        self._steps = 0
        self._chosen: Tensor | None = None

    def select(self) -> Tensor:
        """Rank now: which factors to shrink, bool [all factors], in the order of ``joined``."""
        raise NotImplementedError

    def selected(self) -> Tensor:
        """Which factors the next step shrinks: bool [all factors], in the order of ``joined``."""
        kept = self._chosen is not None and self._steps % self.rank_every
        return self._chosen if kept and self._chosen is not None else self.select()

    def joined(self) -> Tensor:
        """All factors one after another, detached, [all factors]."""
        return torch.cat([vector.detach() for vector in self.vectors.values()])

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add the penalty's gradient to that of the loss, in place, where the penalty is part of the loss."""
        if self.penalty == "proximal" or self.strength == 0:
            return
        factors = self.joined()
        if self.penalty == "polarisation":
            apart = (factors - factors.mean()).sign()
            gradient = POLARISATION * factors.sign() - (apart - apart.mean())
        else:
            gradient = factors.sign() * self.selected()
        for vector, part in zip(self.vectors.values(), (gradient * self.strength).split(self._sizes), strict=True):
            vector.grad = part.clone() if vector.grad is None else vector.grad.add_(part)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Take one L1 step with learning rate ``lr``, in place; keeps gates at or above 0. A rate of 0 does that alone."""
        if self.strength > 0 and lr > 0:
            chosen = self._chosen = self.selected()
            self._steps += 1
            if self.penalty == "proximal":
                factors, most = self.joined(), chosen * (lr * self.strength)
                shrunk = factors - factors.clamp(-most, most)  # what reaches 0 is +0, whatever its sign was
                torch._foreach_copy_(list(self.vectors.values()), list(shrunk.split(self._sizes)))
        if self._are_gates:
            torch._foreach_clamp_min_(list(self.vectors.values()), 0.0)

    def sum_of_selected(self) -> float:
        """Sum of the magnitudes of the factors that the next step would shrink."""
        return float(self.joined()[self.selected()].abs().sum())

    def closed_share(self) -> float:
        """Share of these factors that are closed, 0..1."""
        factors = self.joined()
        return int((factors.abs() < CLOSED).sum()) / factors.numel()

    def strength_over_gradient(self) -> float | None:
        """Strength over the mean magnitude of the loss's gradient at the factors that are shrunk; above 1 they close.

        Read it between a backward pass and the next ``zero_grad``. None where there is no gradient, or where the penalty's
        is part of it.
        """
        gradients = [vector.grad for vector in self.vectors.values() if vector.grad is not None]
        if len(gradients) < len(self.vectors) or self.penalty != "proximal":
            return None
        opposed = float(torch.cat(gradients)[self.selected()].abs().mean())
        return self.strength / opposed if opposed > 0 else None

    def gates(self) -> dict[str, Tensor]:
        """The vectors by name, detached (for histograms)."""
        return {name: vector.detach() for name, vector in self.vectors.items()}

    def state(self) -> dict[str, Any]:
        """What ``restore`` needs to continue exactly."""
        return {"strength": self.strength, "steps": self._steps, "chosen": self._chosen}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state``, in place."""
        self.strength, self._steps, chosen = state["strength"], state.get("steps", 0), state.get("chosen")
        self._chosen = None if chosen is None else chosen.to(self.joined().device)  # states are read on the CPU


class SmallestHalfL1(L1Step):
    """The L1 step on the smallest part of every gate vector.

    Take it once, right after ``optimizer.step()``: in each vector the ``fraction`` of entries that is smallest by
    magnitude (the ranking is fresh at each step; of equal entries the ones of lower index) becomes
    ``max(0, gate - lr * strength)``; the others become ``max(0, gate)``. Unlike a term in the loss it reaches exactly 0
    and owes nothing to batch size, loss scale, momentum or AMP.

    Args:
        fraction: share of each vector that is shrunk, 0..1
        scope: rank within each "vector", or over "all" of them together

    Other arguments and errors are those of ``L1Step``.

    Examples:
        >>> import slim, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
        >>> gates = slim.add_gates(model, slim.trace(model, torch.zeros(1, 3, 8, 8)))
        >>> sparsity = slim.SmallestHalfL1(model, strength=2.0)
        >>> sparsity.step(lr=0.25)  # after each optimizer.step()
        >>> gates["0"].tolist()
        [0.5, 0.5, 1.0, 1.0]
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float,
        fraction: float = 0.5,
        scope: Literal["vector", "all"] = "vector",
        penalty: Penalty = "proximal",
        rank_every: int = 1,
        vectors: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        if not 0.0 <= fraction <= 1.0:
            raise SlimError(f"fraction is {fraction}; expected 0 to 1, the part of each gate vector that is shrunk")
        super().__init__(model, strength=strength, penalty=penalty, rank_every=rank_every, vectors=vectors)
        self.fraction = fraction
        # All vectors are ranked at once, as rows of a table that is as wide as the longest of them.
        rows = self._sizes if scope == "vector" else [sum(self._sizes)]
        self._shape = len(rows), max(rows)
        self._slots = torch.cat([row * self._shape[1] + torch.arange(size) for row, size in enumerate(rows)])
        self._counts = torch.tensor([[int(size * fraction)] for size in rows])

    @torch.no_grad()
    def select(self) -> Tensor:
        factors = self.joined()
        slots, counts = self._slots.to(factors.device), self._counts.to(factors.device)
        table = factors.new_full(self._shape, float("inf"))
        table.view(-1)[slots] = factors.abs()
        order = torch.sort(table, dim=1, stable=True).indices
        is_low = torch.arange(table.shape[1], device=factors.device) < counts
        return torch.zeros_like(table, dtype=torch.bool).scatter_(1, order, is_low).view(-1)[slots]


MEMORY = 0.97
"""Weight of the past in the running mean of a channel's importance, a step."""
CLOSING = 0.6
"""Share of the sparse steps in which the budget falls to its target; in the rest the last gates close and the weights settle."""


class BudgetL1(L1Step):
    """The L1 step on the least important channels of the whole model, as many as must go to meet a budget of MACs.

    At each step all channels are ranked anew and a plan is made from that, see ``slim.make_plan``: what it would remove is what
    shrinks. So the gates say how many channels each layer keeps, and not only which. The budget falls from the whole model
    to its target, fast at first, over the first part of the steps; then the choice stays, and once its gates are closed a cut
    to that target removes nothing else.

    The importance is the squared change of the loss, to first order, when a gate closes, (gate * gradient)^2, as a running mean
    over steps (Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019), over the MACs that the channel
    costs: the greedy answer to the knapsack of Shen et al. (NeurIPS 2022). Gates alone, as all start at 1, know nothing of a
    layer's worth.

    Call ``step`` after every step of the optimiser, also before the sparse ones (with a rate of 0): it reads the gradients.

    Args:
        graph: what ``slim.trace`` finds in the model
        macs: share of the MACs to keep, above 0 and at most 1
        steps: how many steps with a rate above 0 there will be
        rank: by "gradient", or by the gates' "magnitude" alone
        cost_aware: over the MACs that a channel costs
        options: of ``slim.make_plan``: round_to, min_channels, min_keep and the like

    Other arguments and errors are those of ``L1Step`` and ``slim.make_plan``.

    Examples:
        >>> import slim, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
        >>> graph = slim.trace(model, torch.zeros(1, 3, 8, 8))
        >>> gates = slim.add_gates(model, graph)
        >>> sparsity = slim.BudgetL1(model, graph, macs=0.5, strength=1.0, steps=1, options={"round_to": 1, "min_channels": 1})
        >>> for vector, worth in ((gates["0"], [3.0, 4.0, 5.0, 6.0]), (gates["2"], [1.0, 0.0, 0.0, 2.0])):
        ...     vector.grad = torch.tensor(worth)
        >>> sparsity.step(lr=0.25)  # the first layer costs more: two of its channels go, and one that is worth nothing
        >>> gates["0"].tolist(), gates["2"].tolist()
        ([0.75, 0.75, 1.0, 1.0], [1.0, 1.0, 0.75, 1.0])
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        *,
        macs: float,
        strength: float,
        steps: int,
        rank: Literal["gradient", "magnitude"] = "gradient",
        cost_aware: bool = True,
        options: Mapping[str, Any] | None = None,
        penalty: Penalty = "proximal",
        rank_every: int = 1,
    ) -> None:
        super().__init__(model, strength=strength, penalty=penalty, rank_every=rank_every)
        if not 0 < macs <= 1:
            raise SlimError(f"macs is {macs}; expected the share to keep, above 0 and at most 1")
        self.graph, self.macs, self.total_steps, self.rank = graph, macs, max(1, steps), rank
        self.options = {"cost_aware": cost_aware, **(options or {})}
        self.importance: dict[str, Tensor] = {}
        self._observed = False
        self._groups = {name: name.partition("@")[0] for name in self.vectors}
        self.plan_at(macs)  # a target out of reach is told before the training

    @torch.no_grad()
    def observe(self) -> None:
        """Take the gradients of this step into the running mean of importance, in place."""
        found = {name: vector for name, vector in self.vectors.items() if vector.grad is not None}
        if not found:
            return
        # One copy to the CPU, on which plans are made.
        joined = torch.cat([v.detach() * v.grad for v in found.values() if v.grad is not None]).double().cpu()
        products: dict[str, Tensor] = {}
        for name, product in zip(found, joined.split([v.numel() for v in found.values()]), strict=True):
            group = self._groups[name]
            products[group] = products[group] + product if group in products else product
        for group, product in products.items():
            known, squared = self.importance.get(group), product.square()
            self.importance[group] = squared if known is None else known.lerp_(squared, 1 - MEMORY)

    def scores(self) -> dict[str, Tensor]:
        """The importance of each group's channels, [size]."""
        if self.rank == "gradient":
            return {g: self.importance.get(g, torch.ones(self.graph.by_name[g].size)) for g in self._groups.values()}
        found: dict[str, Tensor] = {}
        for name, vector in self.vectors.items():
            group, magnitude = self._groups[name], vector.detach().abs().double().cpu()
            found[group] = torch.maximum(found[group], magnitude) if group in found else magnitude
        return found

    def budget(self) -> float:
        """The share of the MACs that a choice made now aims at: that of the last step for which it stands."""
        left = max(0.0, 1 - (self._steps + self.rank_every) / (CLOSING * self.total_steps))
        return 1 - (1 - self.macs) * (1 - left**2)

    def plan_at(self, macs: float) -> dict[str, tuple[int, ...]]:
        """The channels that go, by group, when so much is kept now."""
        plan = make_plan(self.graph, self.scores(), macs=macs, **self.options)
        return {group.name: group.removed for group in plan.groups}

    def select(self) -> Tensor:
        if self._chosen is not None and self._steps >= CLOSING * self.total_steps:
            return self._chosen  # made for the target itself
        removed = self.plan_at(self.budget())
        parts = []
        for name, vector in self.vectors.items():
            part = torch.zeros(vector.numel(), dtype=torch.bool, device=vector.device)
            part[list(removed[self._groups[name]])] = True
            parts.append(part)
        return torch.cat(parts)

    @torch.no_grad()
    def add_gradient(self) -> None:
        if self.penalty != "proximal":
            self.observe()  # the loss's gradients, before the penalty's is among them
            self._observed = True
        super().add_gradient()

    @torch.no_grad()
    def step(self, lr: float) -> None:
        if not self._observed:
            self.observe()
        self._observed = False
        super().step(lr)

    def state(self) -> dict[str, Any]:
        return super().state() | {"importance": dict(self.importance)}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.importance = dict(state["importance"])


def strength_for(total_lr: float, travel: float = 2.0) -> float:
    """The strength with which an unopposed gate moves by ``travel`` in all.

    Args:
        total_lr: sum of the learning rates over the sparse steps
        travel: how far; a gate starts at 1 and the data resists, so that 2 closes about the smallest half; with
            ``BudgetL1``, whose choice grows over the steps, 4 to 7 close what it chooses last as well

    Raises:
        SlimError: when ``total_lr`` is not above 0.

    Examples:
        >>> import slim
        >>> slim.strength_for(total_lr=0.5, travel=2.0)
        4.0
    """
    if not total_lr > 0:
        raise SlimError(
            f"the learning rates of the sparse steps sum to {total_lr}; expected more than 0 (train longer)"
        )
    return travel / total_lr
