"""The L1 step of a sparse training, from its flags: which gates it shrinks, how strongly and from when."""

from __future__ import annotations

from torch import nn

import slim
from engine import OptimConfig, Sparsity, SparsitySettings, learning_rate_sum

from .flags import ROUND_TO, SparseFlags, TrainFlags
from .network import example_image
from .width_bounds import width_bounds

TRAVEL, BUDGET_TRAVEL = 2.0, 7.0
"""How far an unopposed gate moves under ``--strength auto``, without and with a budget."""
LARGEST_MOVE = 0.1
"""How far a gate moves in one L1 step at most: closed in fewer than ten, it takes the network with it."""
FEWEST_STEPS = 60
"""Sparse steps with fewer of which the weights cannot follow the closing gates."""


def make_sparsity(flags: TrainFlags, model: nn.Module, steps: int) -> Sparsity | None:
    """The L1 step of sparse training of so many steps an epoch; without one, trained gates are only kept at or above 0."""
    if not isinstance(flags, SparseFlags):
        trained = [vector for vector in slim.gate_vectors(model).values() if vector.requires_grad]
        return Sparsity(slim.SmallestHalfL1(model, strength=0.0), None) if trained else None
    settings, training, start = flags.sparsity, flags.training, flags.sparsity.sparse_from
    sparse_steps, graph = steps * (training.epochs - start), slim.trace(model, example_image(flags.img))
    strength = auto_strength(settings, training.optim, steps, training.epochs)
    l1 = make_l1(flags, model, graph, strength, sparse_steps, steps)
    if settings.penalty == "polarisation":
        what = "all gates, by polarisation"
    elif settings.has_budget:
        what = f"the channels beyond {settings.keep_macs:.0%} of the MACs"
    else:
        fraction = 0.5 if settings.fraction is None else settings.fraction
        what = f"the smallest {fraction:.0%} of {'all gates' if settings.select == 'all' else 'each gate vector'}"
    print(f"L1 step: strength {l1.strength:.4g} on {what}, from epoch {start}")
    if l1.strength and settings.strength == "auto" and sparse_steps < FEWEST_STEPS:
        print(
            f"warning: gates close within {sparse_steps} steps, too few for the weights to follow; expected at least "
            f"{FEWEST_STEPS}: give --epochs {start + -(-FEWEST_STEPS // steps)} or more, or a smaller --travel"
        )
    return Sparsity(l1, from_epoch=start, graph=graph)


def auto_strength(settings: SparsitySettings, optim: OptimConfig, steps: int, epochs: int) -> float:
    """The strength that is given, or for ``auto`` the one of the travel, as far as no step moves a gate too far."""
    if settings.strength != "auto":
        return settings.strength
    travel = settings.travel or (BUDGET_TRAVEL if settings.has_budget else TRAVEL)
    strength = slim.strength_for(learning_rate_sum(optim, steps, epochs, settings.sparse_from), travel)
    if settings.penalty != "proximal":  # SGD's momentum takes each gradient 1 / (1 - momentum) times as far
        return strength * (1 - optim.momentum if optim.optimizer == "sgd" else 1)
    return min(strength, LARGEST_MOVE / optim.lr)


def make_l1(
    flags: SparseFlags,
    model: nn.Module,
    graph: slim.ChannelGraph,
    strength: float,
    sparse_steps: int,
    epoch_steps: int,
) -> slim.L1Step:
    """What shrinks the gates, or the norms' weights, of a model with gates."""
    settings = flags.sparsity
    held = {"step": 1, "epoch": epoch_steps, "once": sparse_steps}[settings.rank_every]
    if settings.has_budget:
        return slim.BudgetL1(
            model,
            graph,
            macs=settings.keep_macs,
            strength=strength,
            steps=sparse_steps,
            rank="magnitude" if settings.rank == "magnitude" else "gradient",
            cost_aware=settings.rank == "gradient-per-mac",
            options={"round_to": flags.widths.round_to or ROUND_TO, **width_bounds(flags.widths)},
            penalty=settings.penalty,
            rank_every=held,
        )
    return slim.SmallestHalfL1(
        model,
        strength=strength,
        fraction=0.5 if settings.fraction is None else settings.fraction,
        scope="all" if settings.select == "all" else "vector",
        penalty=settings.penalty,
        rank_every=held,
        vectors=norm_weights(model, graph) if settings.where == "norm-weight" else None,
    )


def norm_weights(model: nn.Module, graph: slim.ChannelGraph) -> dict[str, nn.Parameter]:
    """The weights of the batch norms that scale channels which can be pruned, by name."""
    layers = {m.layer for group in graph.groups if group.prunable for m in group.members if m.role == "scale"}
    norms = {path: model.get_submodule(path) for path in sorted(layers)}
    return {path: norm.weight for path, norm in norms.items() if isinstance(norm, nn.BatchNorm2d)}
