"""Finds a model's channel groups: a propagation of channel labels with the rules, groups from its labels, a dry run of a cut."""

from __future__ import annotations

from typing import Any

from torch import nn

from slim.dry_run import freeze_what_breaks
from slim.graph import ChannelGraph
from slim.groups import find_groups


def trace(model: nn.Module, example_inputs: Any, *, allow_inexact: bool = False, dry_run: bool = True) -> ChannelGraph:
    """Find the channel groups of a model.

    The model runs once in evaluation mode without gradients and is left exactly as it was; gates that it already has are
    looked through.

    Args:
        model: any model in Python code; of one in ``DistributedDataParallel`` the module within it
        example_inputs: a tensor, a tuple of positional or a dictionary of keyword arguments; a small batch of one is enough
        allow_inexact: cut channels, too, that layer norms, softmax or means over channels mix. Their statistics change when
            one goes, so that pruned = masked holds no more; the report names these groups
        dry_run: cut a copy of the model and run it, to find groups that code with constant channel counts cannot spare;
            they are frozen

    Raises:
        SlimError: when the model does not run on the inputs.

    Examples:
        >>> import slim, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
        >>> graph = slim.trace(model, torch.zeros(1, 3, 8, 8))
        >>> [(group.name, group.size, group.prunable, group.frozen_reason) for group in graph.groups]
        [('0', 4, True, None), ('2', 2, False, 'a model output')]
    """
    graph, owners, run = find_groups(model, example_inputs, allow_inexact=allow_inexact)
    return freeze_what_breaks(graph, owners, run, example_inputs) if dry_run else graph
