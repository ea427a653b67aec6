"""What the slimming loop decides: how far each round cuts, what is accepted, and the record of all candidates."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slim import write_text_atomically

DENSE_ROUND = 0


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


def check_drop(
    ap: float, per_class: Mapping[str, float], baseline: Mapping[str, Any], max_drop: float
) -> tuple[bool, str]:
    """Whether AP and the worst class's AP stay within `max_drop` of the dense network's, and why or why not."""
    drops = {
        "AP": (baseline["ap"], ap),
        "the worst class's AP": (worst_of(baseline["per_class"])[1], worst_of(per_class)[1]),
    }
    said = []
    for what, (before, now) in drops.items():
        if not before - now <= max_drop:
            said.append(f"{what} {now:.4f} is {before - now:.4f} below the dense network's {before:.4f}")
    if said:
        return False, f"{' and '.join(said)}, more than {max_drop:g}"
    return True, f"within {max_drop:g} of the dense network"


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
