"""The gates of a network as a few figures for metrics.json, and their part of a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from slim import CLOSED, SlimError

from . import charts, wording
from .blocks import Block, Chart, Section, Table, Text
from .contents import Contents, number

_BINS = 60


def summarise_gates(gates: Mapping[str, Tensor], threshold: float = CLOSED) -> dict[str, Any]:
    """Plain figures of the gate vectors by group: a histogram of |gate| over all, and each group's channels, closed ones,
    mean and largest. SlimError without gates."""
    if not gates:
        raise SlimError("no gates to summarise: the model has none (were they folded already?)")
    sizes = {name: gate.detach().flatten().abs().float().cpu() for name, gate in gates.items()}
    joined = torch.cat(list(sizes.values()))
    top = max(1.0, float(joined.max()))
    counts = torch.histc(joined, _BINS, 0.0, top)
    return {
        "threshold": threshold,
        "edges": [round(top * k / _BINS, 6) for k in range(_BINS + 1)],
        "counts": [int(count) for count in counts],
        "groups": {
            name: {
                "channels": len(size),
                "closed": int((size < threshold).sum()),
                "mean": float(size.mean()),
                "largest": float(size.max()),
            }
            for name, size in sizes.items()
        },
    }


def gates_section(contents: Contents) -> Section | None:
    """Histogram, share of closed gates, and a row for each group."""
    summary = contents.metrics.get("gates")
    if summary is None:
        return None
    groups, threshold = summary["groups"], float(summary["threshold"])
    total, closed = (sum(int(group[key]) for group in groups.values()) for key in ("channels", "closed"))
    rows = []
    for name, group in groups.items():
        of_group = wording.share(group["closed"], group["channels"])
        rows.append(
            (
                str(name),
                str(group["channels"]),
                str(group["closed"]),
                wording.gauge(of_group, number(group, "closed"), full=group["channels"]),
                f"{number(group, 'mean'):.3f}",
                f"{number(group, 'largest'):.3f}",
            )
        )
    columns = ("group", ">channels", ">closed", "share closed", ">mean", ">largest")
    blocks: tuple[Block, ...] = (
        Text(f"{closed} of {total} gates are closed ({wording.share(closed, total)}): below {threshold:g} in size."),
        Chart("Histogram of gate sizes", charts.histogram(summary["edges"], summary["counts"], threshold)),
        Table(columns, tuple(rows)),
    )
    return Section("Gates", blocks)
