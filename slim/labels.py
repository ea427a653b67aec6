"""Label tensors: beside every tensor of a forward pass, which channel each of its elements belongs to.

A label tensor has as many axes as the tensor that it describes; an axis along which the label is constant has size 1
(so an activation [1, C, H, W] carries labels [1, C, 1, 1]). Label 0 means "no channel". ``None`` stands for all 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def collapse(labels: Tensor) -> Tensor | None:
    """Shrink every axis along which the labels do not change to size 1; None when nothing is labelled."""
    for axis in range(labels.ndim):
        if labels.shape[axis] <= 1:
            continue
        first = labels.narrow(axis, 0, 1)
        # Axes that came from expand() have stride 0: constant by construction, no need to compare.
        if labels.stride(axis) == 0 or bool((labels == first).all()):
            labels = first
    return labels.clone() if bool(labels.any()) else None


def spread(labels: Tensor | None, tensor: Tensor) -> Tensor:
    """Labels in the full shape of the tensor that they describe (a view where possible)."""
    if labels is None:
        return torch.zeros((1,) * tensor.ndim, dtype=torch.int64).expand(tensor.shape)
    return labels.expand(tensor.shape)


def varying_axes(labels: Tensor) -> list[int]:
    """Axes along which the labels change."""
    return [axis for axis, size in enumerate(labels.shape) if size > 1]


def along(labels: Tensor | None, axis: int, tensor: Tensor) -> Tensor | None:
    """The label of each index of one axis, [size]; None when labels vary along any other axis."""
    if labels is None:
        return torch.zeros(tensor.shape[axis], dtype=torch.int64)
    axis = axis % tensor.ndim
    if any(other != axis for other in varying_axes(labels)):
        return None
    return labels.reshape(-1).expand(tensor.shape[axis])


def split_axes(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[int, list[int]]]:
    """For a view from one shape to another: the input axes that it splits, each with the output axes (size > 1) they become.

    A run of input axes that merges and splits at once is reported for each of its axes.
    """
    result: list[tuple[int, list[int]]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        ins, outs = [i], [j]
        size_in, size_out = before[i], after[j]
        i, j = i + 1, j + 1
        while size_in != size_out:
            if size_in < size_out and i < len(before):
                size_in *= before[i]
                ins.append(i)
                i += 1
            elif j < len(after):
                size_out *= after[j]
                outs.append(j)
                j += 1
            else:
                return result
        wide = [k for k in outs if after[k] > 1]
        if len(wide) > 1:
            result.extend((axis, wide) for axis in ins if before[axis] > 1)
    return result


class UnionFind:
    """Disjoint sets of labels; label 0 is reserved."""

    def __init__(self) -> None:
        self.parent = [0]

    def fresh(self, count: int) -> Tensor:
        """``count`` new labels, [count]."""
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return torch.arange(start, start + count, dtype=torch.int64)

    def find(self, label: int) -> int:
        """The representative of a label's set: its smallest member."""
        parent = self.parent
        root = label
        while parent[root] != root:
            root = parent[root]
        while parent[label] != root:
            parent[label], label = root, parent[label]
        return root

    def roots(self) -> Tensor:
        """The representative of every label, [labels]."""
        roots = torch.tensor(self.parent)
        while True:
            further = roots[roots]
            if torch.equal(further, roots):
                return roots
            roots = further

    def unite(self, first: Tensor, second: Tensor) -> None:
        """Unite element by element where both labels are not 0; the shapes broadcast."""
        first, second = torch.broadcast_tensors(first, second)
        pairs = torch.stack([first.reshape(-1), second.reshape(-1)])
        pairs = pairs[:, (pairs[0] != pairs[1]) & (pairs != 0).all(0)]
        if pairs.numel() == 0:
            return
        for a, b in torch.unique(pairs, dim=1).t().tolist():
            root_a, root_b = self.find(a), self.find(b)
            if root_a != root_b:
                self.parent[max(root_a, root_b)] = min(root_a, root_b)
