"""Plans by measured latency: candidates are cut, exported and run in turns with the dense network on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import slim
from deploy import SUFFIX_FOR, LatencySettings, Trial, open_exported, search_latency, threads_of, torch_threads
from slim import SlimError
from tracking.journal import read_json

from .comparison import Comparison, compare, summary
from .detector import Eager
from .network import Network, head_path
from .quantise import QUANTISERS
from .timing import Timing, Turns
from .write_file import write_file

TOLERANCE = 0.05
"""How far above the target a network may be when it is measured again."""
ATTEMPTS = 4
"""Networks that are measured again before the machine is held for too noisy."""
ROUNDS = 20
"""In which the dense network is measured on its own, before there is a candidate."""
ROUNDINGS = (8, 16)
Run = Callable[[], object]


class Measurer:
    """Networks under the engine of a latency, one image at a time, against the dense one."""

    def __init__(self, settings: LatencySettings, dense: Network, images: Tensor) -> None:
        """``images`` [B, 3, H, W], float 0..1: the first is what is run, the others calibrate INT8."""
        self.settings, self.dense, self.images = settings, dense, images
        self.precision = "int8" if settings.latency_int8 else settings.latency_precision
        self._dense_run: Run | None = None

    def setting(self) -> dict[str, Any]:
        """Under what the latencies hold."""
        return {
            "engine": self.settings.engine,
            "precision": self.precision,
            "num_cores": threads_of(self.settings.num_cores),
            "image_px": list(self.images.shape[2:]),
        }

    def alone(self) -> Timing:
        """The dense network."""
        with self.threads():
            turns = Turns({"dense": self.dense_run()})
            for number in range(ROUNDS + 1):
                turns.round(counts=number > 0)
        return turns.timings()["dense"]

    def against_dense(self, model: nn.Module) -> Comparison:
        """A network of the dense one's kind, which is left on the CPU; the dense network comes first."""
        with self.threads():
            return compare(self.dense_run(), self.runnable(model))

    def dense_run(self) -> Run:
        self._dense_run = self._dense_run or self.runnable(self.dense.model)
        return self._dense_run

    def runnable(self, model: nn.Module) -> Run:
        """One run of the network as the engine runs it after ``export.py``; torch runs it from its checkpoint."""
        settings, image = self.settings, self.images[:1]
        if settings.engine == "torch":
            network: nn.Module = Eager.of(model, settings.latency_precision)
            self.precision = network.precision
        else:
            suffix = SUFFIX_FOR[settings.engine]
            with TemporaryDirectory() as folder:
                out = Path(folder) / f"network{suffix}"
                write_file(Network(model.cpu(), self.dense.build), out, image)
                if settings.latency_int8:
                    written, out = out, Path(folder) / f"int8{suffix}"
                    quantiser = QUANTISERS[suffix](written, list(self.images))
                    kept = quantiser.operators.within([head_path(model)])
                    quantiser.write(out, kept, rough=True)
                exported = open_exported(
                    out, settings.engine, num_cores=settings.num_cores, precision=settings.latency_precision
                )
            self.precision, network = exported.precision, exported

        def run() -> object:
            with torch.no_grad():
                return network(image)

        return run

    def threads(self) -> contextlib.AbstractContextManager[None]:
        """Torch's threads, where it is torch that runs, for the time of a measurement."""
        return torch_threads(threads_of(self.settings.num_cores) if self.settings.engine == "torch" else 0)


PlanAt = Callable[[int | None, int], slim.Plan]
"""The plan that keeps at most so many MACs (None: what the floors hold) in multiples of so many channels."""


@dataclass(frozen=True)
class Cutter:
    """What candidates are cut from. ``latency``: of the uncut network, as a share of the dense network's (1 for that itself).

    ``floors`` are the flags that bound the widths, as the user may change them.
    """

    model: nn.Module
    plan_at: PlanAt
    roundings: tuple[int, ...]
    floors: str
    latency: float = 1.0


class LatencySearch:
    """Candidates and their measurements, all of them in ``record``, which a later process takes up."""

    cutter: Cutter

    def __init__(self, settings: LatencySettings, measurer: Measurer, record: Path) -> None:
        self.settings, self.measurer, self.record = settings, measurer, record
        self.plans: dict[str, slim.Plan] = {}
        self.known: dict[str, Any] = {"dense": None, "measurements": []}
        if record.is_file():
            self.known = read_json(record)

    def choose(self, cutter: Cutter) -> tuple[slim.Plan, dict[str, Any]]:
        """The plan with the most MACs that meets the target when it is measured twice, and what metrics.json says of it.

        SlimError, which the record repeats, where the dense network meets the target already, where no plan does, and
        where the machine does not say the same thing twice.
        """
        self.cutter = cutter
        try:
            with tqdm(desc="latency", unit=" measurements", disable=None) as self.bar:
                plan = self.searched()
        except SlimError as error:
            self.known["reason"] = str(error)
            self.write()
            print(self.table())
            raise
        self.known["reason"] = f"met: {self.known['chosen']['latency_ms']:.2f} ms"
        self.write()
        print(self.table())
        return plan, {**self.known["setting"], **self.known["chosen"]}

    def searched(self) -> slim.Plan:
        if self.known["dense"] is None:
            self.known["dense"] = summary(self.measurer.alone())
            self.known["setting"] = self.measurer.setting()
        least = self.least()
        for _ in range(ATTEMPTS):
            target = self.target()
            if target >= self.cutter.latency:
                raise SlimError(
                    f"{self.asked}: the uncut network takes {self.cutter.latency * self.dense_ms:.2f} ms, which meets it; "
                    "nothing was cut"
                )
            found = search_latency(self.trial, target, least, whole=self.cutter.latency)
            if found is None:
                raise SlimError(self.unreachable())
            plan = self.plans[found.widths]
            rows = self.rows_of(found.widths)
            if len(rows) == 1 or not self.is_met(rows[-1]):
                rows.append(self.measure(plan, found.round_to))
            target, again = self.target(), rows[-1]
            if self.is_met(again):
                again["accepted"] = True
                self.known["chosen"] = {
                    "dense_ms": self.dense_ms,
                    "target_ms": target * self.dense_ms,
                    "latency_ms": again["ratio"] * self.dense_ms,
                    "latency_share": again["ratio"],
                    "round_to": found.round_to,
                }
                return plan
        raise SlimError(
            f"{self.asked}: networks that met it took longer when they were measured again ({ATTEMPTS} of them; {self.record} "
            "lists all); stop what else this machine does, or allow more time"
        )

    def rows_of(self, widths: str) -> list[dict[str, Any]]:
        """The measurements of a plan."""
        return [row for row in self.known["measurements"] if row["widths"] == widths]

    def is_met(self, row: Mapping[str, Any]) -> bool:
        """Whether a second measurement confirms a plan: about as fast as asked for, and faster than the uncut network."""
        ratio: float = row["ratio"]
        return ratio <= self.target() * (1 + TOLERANCE) and ratio < self.cutter.latency

    @property
    def asked(self) -> str:
        settings = self.settings
        if settings.latency_ms is not None:
            return f"--latency-ms {settings.latency_ms:g}"
        return f"--latency-share {settings.latency_share:g}"

    @property
    def dense_ms(self) -> float:
        """The median of what all measurements say: the milliseconds for which ratios stand."""
        known = [self.known["dense"], *(row["dense"] for row in self.known["measurements"])]
        return statistics.median(row["median_ms"] for row in known)

    def target(self) -> float:
        """As a share of the dense network's milliseconds."""
        settings = self.settings
        return settings.latency_share if settings.latency_share is not None else settings.latency_ms / self.dense_ms

    def least(self) -> dict[int, float]:
        """The smallest share of the MACs for each rounding."""
        shares = {}
        for round_to in self.cutter.roundings:
            plan = self.cutter.plan_at(None, round_to)
            shares[round_to] = plan.macs[1] / plan.macs[0]
        return shares

    def trial(self, share: float, round_to: int) -> Trial:
        """The candidate at a share of the MACs, measured where it is not known."""
        smallest = self.cutter.plan_at(None, round_to)
        macs = round(share * smallest.macs[0])
        plan = smallest if macs <= smallest.macs[1] else self.cutter.plan_at(macs, round_to)
        widths = widths_digest(plan)
        self.plans[widths] = plan
        rows = self.rows_of(widths) or [self.measure(plan, round_to)]
        ratio = statistics.median(row["ratio"] for row in rows)
        return Trial(round_to, plan.macs[1] / plan.macs[0], ratio, widths)

    def measure(self, plan: slim.Plan, round_to: int) -> dict[str, Any]:
        """Cut, export and time a plan; the row is in the record when this returns."""
        found = self.measurer.against_dense(slim.apply_plan(self.cutter.model, plan))
        row = {
            "round_to": round_to,
            "keep_macs": plan.macs[1] / plan.macs[0],
            "macs": plan.macs[1],
            "params": plan.params[1],
            "widths": widths_digest(plan),
            "ratio": found.ratio,
            "error": found.error,
            "dense": summary(found.first),
            "candidate": summary(found.second),
            "accepted": False,
        }
        self.known["measurements"].append(row)
        self.write()
        ms, target_ms = found.ratio * self.dense_ms, self.target() * self.dense_ms
        self.bar.set_postfix_str(f"{row['keep_macs']:.0%} of the MACs: {ms:.2f} ms, target {target_ms:.2f} ms")
        self.bar.update()
        return row

    def unreachable(self) -> str:
        """Why not: the fastest, and what of it no cut takes away."""
        rows = self.known["measurements"]
        fastest = min(rows, key=lambda row: row["ratio"])
        share, ms = fastest["keep_macs"], fastest["ratio"] * self.dense_ms
        text = (
            f"{self.asked}: cannot be met; the fastest network that {self.cutter.floors} allow keeps {share:.1%} of the MACs "
            f"and takes {ms:.2f} ms (dense: {self.dense_ms:.2f}, target: {self.target() * self.dense_ms:.2f})"
        )
        fixed = fixed_share([(1.0, self.cutter.latency), *((row["keep_macs"], row["ratio"]) for row in rows)])
        if fixed > 0:
            text += f", of which about {min(fixed * self.dense_ms, ms):.2f} ms stay whatever is cut"
        return f"{text}; lower the floors or --img, or try another --engine, --num-cores or --latency-int8"

    def write(self) -> None:
        slim.write_text_atomically(self.record, json.dumps(self.known, indent=1))

    def table(self) -> str:
        """All measurements in their order."""
        if not self.known["measurements"]:
            return ""
        setting = self.known["setting"]
        lines = [
            f"latency of one image, {setting['engine']}, {setting['precision']}, {setting['num_cores']} CPU threads: dense "
            f"{self.dense_ms:.2f} ms, target {self.target() * self.dense_ms:.2f} ms",
            "| rounded to | share of MACs | of dense | ms | error | |\n| --- | --- | --- | --- | --- | --- |",
        ]
        seen: set[str] = set()
        for row in self.known["measurements"]:
            note = "accepted" if row["accepted"] else "again" if row["widths"] in seen else ""
            seen.add(row["widths"])
            ms = row["ratio"] * self.dense_ms
            lines.append(
                f"| {row['round_to']} | {row['keep_macs']:.3f} | {row['ratio']:.3f} | {ms:.2f} | "
                f"{row['error'] * self.dense_ms:.2f} | {note} |"
            )
        return "\n".join(lines)


def widths_digest(plan: slim.Plan) -> str:
    """The same for plans that keep as many channels of each group: they are as fast."""
    widths = [[group.name, len(group.keep)] for group in plan.groups]
    return hashlib.sha256(json.dumps(widths).encode()).hexdigest()[:12]


def fixed_share(points: list[tuple[float, float]]) -> float:
    """What the least-squares line through (share of MACs, latency) leaves at no MACs."""
    mean_x, mean_y = (statistics.mean(point[axis] for point in points) for axis in (0, 1))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    if not spread:
        return 0.0
    return mean_y - mean_x * sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
