"""What the slimming loop aims at, MACs or milliseconds, and how the run time of its networks is measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import slim
from models import YOLO
from slim import SlimError
from tracking.journal import Journal

from .flags import IterateFlags
from .latency import TOLERANCE, Measurer
from .network import Network, example_image
from .timing import milliseconds_per_image


class LoopTarget:
    """The size of networks in MACs, or with a `measurer` their latency as a share of the dense network's."""

    def __init__(self, flags: IterateFlags, dense: Network, measurer: Measurer | None, journal: Journal) -> None:
        self.flags, self.dense, self.measurer, self.journal = flags, dense, measurer, journal
        self.unit = "latency" if measurer else "MACs"

    def size(self, macs: int, latency_share: float) -> float:
        """The size of a network of so many MACs and such a share of the dense network's latency."""
        return latency_share if self.measurer else macs

    def final(self, baseline: Mapping[str, Any]) -> float:
        """The size that the last round aims at."""
        wanted = self.flags.latency
        if self.measurer is None:
            assert self.flags.macs is not None
            return float(baseline["macs"] * self.flags.macs)
        dense_ms = self.dense_latency()["dense_ms"]
        if wanted.latency_share is not None:
            return wanted.latency_share
        assert wanted.latency_ms is not None
        if wanted.latency_ms >= dense_ms:
            raise SlimError(
                f"--latency-ms {wanted.latency_ms:g}: the dense network takes {dense_ms:.2f} ms, which meets it; nothing to cut"
            )
        return float(wanted.latency_ms / dense_ms)

    def is_met(self, latency_share: float, baseline: Mapping[str, Any]) -> bool:
        """Whether a latency is low enough already: widths may fall below what their round aimed at."""
        return self.measurer is not None and latency_share <= self.final(baseline) * (1 + TOLERANCE)

    def dense_latency(self) -> dict[str, Any]:
        """What the dense network takes, and under what."""

        def act(work: Path) -> dict[str, Any]:
            assert self.measurer is not None
            return {"dense_ms": self.measurer.time_dense().median_ms, **self.measurer.setting()}

        return self.journal.phase("latency", act)

    def milliseconds(self, model: YOLO) -> dict[str, float]:
        """One image, measured in turn with the dense network, gates folded: in torch, or as the latency is asked for."""
        if self.measurer:
            dense_ms = self.dense_latency()["dense_ms"]
            return {"dense": dense_ms, "candidate": self.measurer.against_dense(model).ratio * dense_ms}
        networks = {"dense": slim.fold_gates(self.dense.model.cpu()), "candidate": slim.fold_gates(model.cpu())}
        return milliseconds_per_image(networks, example_image(self.flags.img), repeats=15, warmup=3)

    def metrics(self, baseline: Mapping[str, Any], dense_ms: float, ms: float) -> dict[str, Any]:
        """What metrics.json says of the latency of the slim network; nothing where MACs are the target."""
        if self.measurer is None:
            return {}
        return {**self.dense_latency(), "target_ms": self.final(baseline) * dense_ms, "latency_ms": ms}
