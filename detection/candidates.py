"""The slimming loop's candidates: what it aims at, which of them it accepts, their record, and what a finished loop leaves."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import slim
from data import DetectionDataset
from models import YOLO
from slim import SlimError, write_text_atomically
from tracking import RunFolder, plot_channels, plot_widths, read_png, write_report
from tracking.journal import Journal
from tracking.stages import Stages

from .evaluator import draw_side_by_side
from .flags import IterateFlags, share_of_drop
from .latency import TOLERANCE, Measurer
from .network import Network, example_image
from .timing import Timing, time_models, timing_warning

LEAST_AP = 0.01
"""A network with less finds next to nothing, whatever it began as."""


@dataclass(frozen=True)
class Candidate:
    """A network that the loop has made and evaluated; a row of pareto.csv.

    Round 0 is the dense network; attempt 0 is the network after the final fine-tuning. `keep_macs` and `macs` are a share
    of the dense network's and a count; `ms` are milliseconds an image, by the ratio to the dense network in whose turns it
    was measured. `folder` is relative to the loop's.
    """

    round: int
    attempt: int
    keep_macs: float
    macs: int
    params: int
    ap: float
    ap50: float
    worst_class: str
    worst_class_ap: float
    ms: float
    accepted: bool
    reason: str
    folder: str


def round_target(current_macs: float, final_macs: float, rounds_left: int) -> float:
    """The MACs that the next of `rounds_left` rounds aims at: equal ratios down to `final_macs`."""
    return float(current_macs * (final_macs / current_macs) ** (1 / rounds_left))


def smaller_cut(current_macs: float, failed_macs: float) -> float:
    """What to try after a cut to `failed_macs` was rejected: half as far, as ratios go."""
    return float((current_macs * failed_macs) ** 0.5)


def worst_of(per_class: Mapping[str, float]) -> tuple[str, float]:
    """The class with the lowest AP, and that AP."""
    name = min(per_class, key=lambda name: per_class[name])
    return name, per_class[name]


def allowed_drop(max_drop: float | str, ap: float) -> float:
    """How far below a dense network's AP a candidate's may be: `--max-drop` itself, or as "5%" a share of that AP."""
    share = share_of_drop(max_drop)
    return float(max_drop) if share is None else share * ap


def check_max_drop(max_drop: float | str, ap: float, weights: str) -> None:
    """Raise SlimError where networks that find next to nothing would be accepted, or the dense one is such a network."""
    if not ap >= LEAST_AP:
        raise SlimError(
            f"{weights}: AP {ap:.4f} on the val split, expected at least {LEAST_AP:g}: nothing to slim; train it on this data "
            "set first"
        )
    if not ap - allowed_drop(max_drop, ap) >= LEAST_AP:
        raise SlimError(
            f"--max-drop {max_drop}: the dense network's AP is {ap:.4f}, so networks that find next to nothing would be "
            f"accepted; expected at most {ap - LEAST_AP:.4f}, or a share of that AP such as 5%"
        )


def check_drop(
    ap: float, per_class: Mapping[str, float], baseline: Mapping[str, Any], max_drop: float | str
) -> tuple[bool, str]:
    """Whether AP and the worst class's AP stay within `max_drop` of the dense network's, and why or why not.

    No AP below `LEAST_AP` is accepted, however large the drop.
    """
    drops = {
        "AP": (baseline["ap"], ap),
        "the worst class's AP": (worst_of(baseline["per_class"])[1], worst_of(per_class)[1]),
    }
    said = []
    for what, (before, now) in drops.items():
        if not before - now <= allowed_drop(max_drop, before):
            said.append(f"{what} {now:.4f} is {before - now:.4f} below the dense network's {before:.4f}")
    if said:
        return False, f"{' and '.join(said)}, more than {max_drop}"
    if not ap >= LEAST_AP:
        return False, f"AP {ap:.4f} is next to nothing (less than {LEAST_AP:g})"
    return True, f"within {max_drop} of the dense network"


def make_candidate(
    found: Mapping[str, Any], dense: Mapping[str, Any], round: int, attempt: int, ms: float, folder: str
) -> Candidate:
    """A candidate from what its evaluation found; the dense network itself has no verdict in `found`."""
    worst, worst_ap = worst_of(found["per_class"])
    return Candidate(
        round=round,
        attempt=attempt,
        keep_macs=found["macs"] / dense["macs"],
        macs=found["macs"],
        params=found["params"],
        ap=found["ap"],
        ap50=found["ap50"],
        worst_class=worst,
        worst_class_ap=worst_ap,
        ms=ms,
        accepted=found.get("accepted", True),
        reason=found.get("reason", "the dense network"),
        folder=folder,
    )


def candidate_table(candidates: Sequence[Candidate]) -> str:
    """Markdown."""
    lines = ["| network | AP | M MACs | M parameters | ms | accepted |", "| --- " * 6 + "|"]
    for c in candidates:
        tried = f"round {c.round}, attempt {c.attempt}" if c.attempt else "fine-tuned, folded"
        figures = f"{c.ap:.4f} | {c.macs / 1e6:.1f} | {c.params / 1e6:.3f} | {c.ms:.1f}"
        lines.append(f"| {tried if c.round else 'dense'} | {figures} | {'yes' if c.accepted else 'no'} |")
    return "\n".join(lines)


def write_pareto(candidates: Sequence[Candidate], path: Path) -> None:
    """pareto.csv: a row a candidate, in the order in which they were made."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, [field.name for field in dataclasses.fields(Candidate)], lineterminator="\n")
    table.writeheader()
    table.writerows(dataclasses.asdict(candidate) for candidate in candidates)
    write_text_atomically(path, text.getvalue())


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
            found = self.measurer.time_dense()
            return {"dense_ms": found.median_ms, **self.measurer.setting(), **_warned([found])}

        return self.journal.phase("latency", act)

    def times(self, model: YOLO) -> dict[str, Any]:
        """`ms` of an image, measured in turn with the dense network, gates folded: in torch, or as the latency is asked for.

        With `timing_warning` where that says little.
        """
        if self.measurer:
            dense_ms = self.dense_latency()["dense_ms"]
            compared = self.measurer.against_dense(model)
            ms = {"dense": dense_ms, "candidate": compared.ratio * dense_ms}
            return {"ms": ms, **_warned([compared.first, compared.second])}
        networks = {"dense": slim.fold_gates(self.dense.model.cpu()), "candidate": slim.fold_gates(model.cpu())}
        found = time_models(networks, example_image(self.flags.img), repeats=15, warmup=3)
        return {"ms": {name: timing.median_ms for name, timing in found.items()}, **_warned(found.values())}

    def metrics(self, baseline: Mapping[str, Any], dense_ms: float, ms: float) -> dict[str, Any]:
        """What metrics.json says of the latency of the slim network; nothing where MACs are the target."""
        if self.measurer is None:
            return {}
        return {**self.dense_latency(), "target_ms": self.final(baseline) * dense_ms, "latency_ms": ms}


def _warned(timings: Iterable[Timing]) -> dict[str, str]:
    """A phase's `timing_warning`, which is printed; nothing where the measurements are good."""
    warning = timing_warning(timing.warning for timing in timings)
    if warning:
        print(warning)
    return {"timing_warning": warning} if warning else {}


def save_networks(run: RunFolder, networks: Sequence[Path], plans: Sequence[slim.Plan]) -> Path:
    """Copy the phases' files of the slim network, its checkpoint first, and write the rounds' plans as one plan.

    Returns the checkpoint's place in the run.
    """
    for made in networks:
        slim.write_atomically(run.path / "weights" / made.name, functools.partial(shutil.copyfile, made))
    write_text_atomically(run.path / "plan.json", functools.reduce(slim.compose, plans).to_json())
    return run.path / "weights" / networks[0].name


def write_reports(
    run: RunFolder, metrics: Mapping[str, Any], networks: Mapping[str, nn.Module], val_set: DetectionDataset, step: int
) -> None:
    """Pictures, metrics and reports, the phases' too: those were written before the phases had their names.

    `metrics` are metrics.json's, with those of the dense network as "baseline"; `networks` are drawn side by side on
    images of `val_set`, in TensorBoard at `step`, the number of rounds.
    """
    run.log_picture("detections", draw_side_by_side(networks, val_set, run.path / "side_by_side.png"), step)
    widths = plot_widths(metrics["baseline"]["channels"], metrics["channels"], run.path / "widths.png")
    run.log_picture("widths", read_png(widths), step)
    run.write_metrics(metrics)
    run.close()
    for training in sorted(run.path.glob("*/results.csv")):
        write_report(RunFolder(training.parent))
    write_report(run)


def write_tensorboard(
    run: RunFolder, journal: Journal, candidates: Sequence[Candidate], baseline: Mapping[str, Any], stages: Stages
) -> None:
    """TensorBoard's series against the round so far, written anew: a loop that continued shows no step twice."""
    for old in run.path.glob("events.out.*"):
        old.unlink()
    run.drop_rows_from(0)
    run.log_stages(stages)
    for c in candidates:
        if c.round and not (c.attempt and c.accepted):
            continue
        found = journal.result(f"round{c.round}-try{c.attempt}-evaluation") if c.round else baseline
        assert found is not None
        run.log_channels(found["channels"], c.round)
        scalars = {"metrics/ap": c.ap, "metrics/ap50": c.ap50, "cost/macs": c.macs, "cost/params": c.params}
        run.log_scalars(scalars, c.round)
    history = run.read_channels()
    drawn = plot_channels(history, baseline["channels"], run.path / "channels.png", "round")
    run.log_picture("channels", read_png(drawn), max(history))
    run.close()
