"""Plans by measured latency: candidates are cut, exported and run in turns with the dense network on this machine."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import slim
from deploy import (
    SUFFIX_FOR,
    EngineNetwork,
    LatencySettings,
    MeasuredCut,
    open_exported,
    search_latency,
    threads_of,
    torch_threads,
)
from models import YOLO
from slim import SlimError
from tracking.journal import read_json

from .detector import TorchNetwork
from .network import Network, head_path
from .quantise import QUANTISERS
from .timing import Comparison, InterleavedTimer, Timing, compare, timing_warning
from .write_file import write_file

TOLERANCE = 0.05
"""How far above the target a network may be when it is measured again."""
ATTEMPTS = 4
"""Networks that are measured again before the machine is held for too noisy."""
ROUNDS = 20
"""How often the dense network is measured on its own, before there is a candidate."""
ROUNDINGS = (8, 16)
Run = Callable[[], object]


class Measurer:
    """Measures networks under the engine of a latency, one image at a time, against the dense one.

    ``images`` [B, 3, H, W], float 0..1: the first is what is run, the others calibrate INT8.
    """

    def __init__(self, settings: LatencySettings, dense: Network, images: Tensor) -> None:
        self.settings, self.dense, self.images = settings, dense, images
        self.precision: str = "int8" if settings.latency_int8 else settings.latency_precision

    def setting(self) -> dict[str, Any]:
        """Under what the latencies hold."""
        return {
            "engine": self.settings.engine,
            "precision": self.precision,
            "num_cores": threads_of(self.settings.num_cores),
            "image_px": list(self.images.shape[2:]),
        }

    def time_dense(self) -> Timing:
        """Measure the dense network alone."""
        with self._threads():
            timer = InterleavedTimer({"dense": self.dense_run}, threads=self.settings.num_cores)
            timer.run([False] + [True] * ROUNDS)
        return timer.timings()["dense"]

    def against_dense(self, model: YOLO) -> Comparison:
        """Measure a network of the dense one's kind, which is left on the CPU; the dense network comes first."""
        with self._threads():
            return compare(self.dense_run, self.runnable(model), threads=self.settings.num_cores)

    @functools.cached_property
    def dense_run(self) -> Run:
        """One run of the dense network."""
        return self.runnable(self.dense.model)

    def runnable(self, model: YOLO) -> Run:
        """One run of a network as the engine runs it after ``export.py``; torch runs it from its checkpoint."""
        settings, image = self.settings, self.images[:1]
        built = Network(model.cpu(), self.dense.build)
        network: EngineNetwork
        if settings.engine == "torch":
            network = TorchNetwork(built, precision=settings.latency_precision)
        else:
            suffix = SUFFIX_FOR[settings.engine]
            with TemporaryDirectory() as folder:
                out = Path(folder) / f"network{suffix}"
                write_file(built, out, image)
                if settings.latency_int8:
                    quantiser = QUANTISERS[suffix](out, list(self.images))
                    out = Path(folder) / f"int8{suffix}"
                    quantiser.write(out, quantiser.operators.within([head_path(model)]), rough=True)
                network = open_exported(
                    out, settings.engine, num_cores=settings.num_cores, precision=settings.latency_precision
                )
        self.precision = network.precision
        return torch.no_grad()(functools.partial(network, image))

    def _threads(self) -> contextlib.AbstractContextManager[None]:
        """Torch's threads, where it is torch that runs, for the time of a measurement."""
        return torch_threads(threads_of(self.settings.num_cores) if self.settings.engine == "torch" else 0)


@dataclass(frozen=True)
class CandidateFactory:
    """What candidates are cut from.

    Args:
        model: the uncut network
        plan_at: the plan that keeps at most so many MACs (None: what the floors hold) in multiples of so many channels
        roundings: the multiples to try
        floors: the flags that bound the widths, as the user may change them
        latency: of the uncut network, as a share of the dense network's (1 for that itself)
    """

    model: YOLO
    plan_at: Callable[[int | None, int], slim.Plan]
    roundings: tuple[int, ...]
    floors: str
    latency: float = 1.0


class LatencySearch:
    """A search among measured candidates, all of whose measurements are in ``record``, which a later process takes up.

    Where nothing but the dense network was measured there is no record; a function is asked for its place before it is written.
    """

    factory: CandidateFactory

    def __init__(self, settings: LatencySettings, measurer: Measurer, record: Path | Callable[[], Path]) -> None:
        self.settings, self.measurer, self.record = settings, measurer, record
        self.plans: dict[str, slim.Plan] = {}
        self.known: dict[str, Any] = {"dense": None, "measurements": []}
        if isinstance(record, Path) and record.is_file():
            self.known = read_json(record)

    def choose(self, factory: CandidateFactory) -> tuple[slim.Plan, dict[str, Any]]:
        """The plan with the most MACs that meets the target when it is measured twice, and what metrics.json says of it.

        SlimError, which the record repeats, where the dense network meets the target already, where no plan does, and
        where the machine does not say the same thing twice.
        """
        self.factory = factory
        try:
            with tqdm(desc="latency", unit=" measurements", disable=None) as self.bar:
                plan = self._search()
        except SlimError as error:
            self._finish(str(error))
            raise
        self._finish(f"met: {self.known['chosen']['latency_ms']:.2f} ms")
        warning = self.warning()
        return plan, {
            **self.known["setting"],
            **self.known["chosen"],
            **({"timing_warning": warning} if warning else {}),
        }

    def warning(self) -> str:
        """What makes the measurements say little, in a line; "" for nothing."""
        rows = self.known["measurements"]
        found = [self.known["dense"], *(row[which] for row in rows for which in ("dense", "candidate"))]
        return timing_warning(timing.get("warning", "") for timing in found)

    def _search(self) -> slim.Plan:
        if self.known["dense"] is None:
            self.known["dense"] = self.measurer.time_dense().summary()
            self.known["setting"] = self.measurer.setting()
        uncut, floors = self.factory.latency, [self.factory.plan_at(None, n) for n in self.factory.roundings]
        least = {n: plan.macs[1] / plan.macs[0] for n, plan in zip(self.factory.roundings, floors, strict=True)}
        for _ in range(ATTEMPTS):
            if self.target >= uncut:
                raise SlimError(
                    f"{self.target_text}: the uncut network takes {uncut * self.dense_ms:.2f} ms, which meets it; nothing was cut"
                )
            found = search_latency(self.measured_at, self.target, least, whole=uncut)
            if found is None:
                raise SlimError(self._unreachable())
            plan, rows = self.plans[found.widths], self._rows_of(found.widths)
            if len(rows) == 1 or not self._is_met(rows[-1]):
                rows.append(self._measure(plan, found.round_to))
            again = rows[-1]
            if self._is_met(again):
                again["accepted"] = True
                self.known["chosen"] = {
                    "dense_ms": self.dense_ms,
                    "target_ms": self.target * self.dense_ms,
                    "latency_ms": again["ratio"] * self.dense_ms,
                    "latency_share": again["ratio"],
                    "round_to": found.round_to,
                }
                return plan
        raise SlimError(
            f"{self.target_text}: networks that met it took longer when they were measured again ({ATTEMPTS} of them; "
            f"{self.record} lists all); stop what else this machine does, or allow more time"
        )

    def _rows_of(self, widths: str) -> list[dict[str, Any]]:
        return [row for row in self.known["measurements"] if row["widths"] == widths]

    def _is_met(self, row: Mapping[str, Any]) -> bool:
        """Whether a second measurement confirms a plan: about as fast as asked for, and faster than the uncut network."""
        return bool(row["ratio"] <= self.target * (1 + TOLERANCE) and row["ratio"] < self.factory.latency)

    @property
    def target_text(self) -> str:
        """The target as it stands on the command line."""
        ms, share = self.settings.latency_ms, self.settings.latency_share
        return f"--latency-share {share:g}" if ms is None else f"--latency-ms {ms:g}"

    @property
    def target(self) -> float:
        """The target as a share of the dense network's milliseconds."""
        if self.settings.latency_share is not None:
            return self.settings.latency_share
        assert self.settings.latency_ms is not None
        return self.settings.latency_ms / self.dense_ms

    @property
    def dense_ms(self) -> float:
        """The median of what all measurements say: the milliseconds for which ratios stand."""
        known = [self.known["dense"], *(row["dense"] for row in self.known["measurements"])]
        return float(statistics.median(row["median_ms"] for row in known))

    def measured_at(self, share: float, round_to: int) -> MeasuredCut:
        """The candidate at a share of the MACs, measured where it is not known."""
        smallest = self.factory.plan_at(None, round_to)
        macs = round(share * smallest.macs[0])
        plan = smallest if macs <= smallest.macs[1] else self.factory.plan_at(macs, round_to)
        widths = widths_digest(plan)
        self.plans[widths] = plan
        rows = self._rows_of(widths) or [self._measure(plan, round_to)]
        ratio = statistics.median(row["ratio"] for row in rows)
        return MeasuredCut(round_to, plan.macs[1] / plan.macs[0], ratio, widths)

    def _measure(self, plan: slim.Plan, round_to: int) -> dict[str, Any]:
        """Cut, export and time a plan; the row is in the record when this returns."""
        found = self.measurer.against_dense(slim.apply_plan(self.factory.model, plan))
        row = {
            "round_to": round_to,
            "keep_macs": plan.macs[1] / plan.macs[0],
            "macs": plan.macs[1],
            "params": plan.params[1],
            "widths": widths_digest(plan),
            "ratio": found.ratio,
            "error": found.error,
            "dense": found.first.summary(),
            "candidate": found.second.summary(),
            "accepted": False,
        }
        self.known["measurements"].append(row)
        self._write()
        ms, target_ms = found.ratio * self.dense_ms, self.target * self.dense_ms
        self.bar.set_postfix_str(f"{row['keep_macs']:.0%} of the MACs: {ms:.2f} ms, target {target_ms:.2f} ms")
        self.bar.update()
        return row

    def _finish(self, reason: str) -> None:
        self.known["reason"] = reason
        if self.known["measurements"]:
            self._write()
            print(self.table())
            if warning := self.warning():
                print(warning)

    def _write(self) -> None:
        if not isinstance(self.record, Path):
            self.record = self.record()
        slim.write_text_atomically(self.record, json.dumps(self.known, indent=1))

    def _unreachable(self) -> str:
        """Why not: the fastest, and what of it no cut takes away, by the line through (share of the MACs, latency)."""
        rows = self.known["measurements"]
        fastest = min(rows, key=lambda row: row["ratio"])
        ms = fastest["ratio"] * self.dense_ms
        text = (
            f"{self.target_text}: cannot be met; the fastest network that {self.factory.floors} allow keeps "
            f"{fastest['keep_macs']:.1%} of the MACs and takes {ms:.2f} ms (dense: {self.dense_ms:.2f}, target: "
            f"{self.target * self.dense_ms:.2f})"
        )
        shares, ratios = [1.0, *(row["keep_macs"] for row in rows)], [self.factory.latency, *(r["ratio"] for r in rows)]
        fixed = statistics.linear_regression(shares, ratios).intercept if len(set(shares)) > 1 else 0.0
        if fixed > 0:
            text += f", of which about {min(fixed * self.dense_ms, ms):.2f} ms stay whatever is cut"
        return f"{text}; lower the floors or --img, or try another --engine, --num-cores or --latency-int8"

    def table(self) -> str:
        """All measurements in their order, as Markdown."""
        setting = self.known["setting"]
        lines = [
            f"latency of one image, {setting['engine']}, {setting['precision']}, {setting['num_cores']} CPU threads: dense "
            f"{self.dense_ms:.2f} ms, target {self.target * self.dense_ms:.2f} ms",
            "| rounded to | share of MACs | of dense | ms | error | |\n| --- | --- | --- | --- | --- | --- |",
        ]
        seen: set[str] = set()
        for row in self.known["measurements"]:
            note = "accepted" if row["accepted"] else "again" if row["widths"] in seen else ""
            seen.add(row["widths"])
            lines.append(
                f"| {row['round_to']} | {row['keep_macs']:.3f} | {row['ratio']:.3f} | {row['ratio'] * self.dense_ms:.2f} | "
                f"{row['error'] * self.dense_ms:.2f} | {note} |"
            )
        return "\n".join(lines)


def widths_digest(plan: slim.Plan) -> str:
    """The same for plans that keep as many channels of each group: they are as fast."""
    widths = [[group.name, len(group.keep)] for group in plan.groups]
    return hashlib.sha256(json.dumps(widths).encode()).hexdigest()[:12]
