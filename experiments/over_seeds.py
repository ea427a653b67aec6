"""The comparison of `experiments.slimming` with several seeds: mean and spread of every row.

python -m experiments.over_seeds --seeds 0 1 2 --comparison data=data/bccd.yaml weights=yolov5n.pt ...

Each seed is a whole comparison in a folder of its own (seed0, seed1, ...), with its own dense baseline. The same command
continues after an interruption: steps that are finished are not run again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import slim
from detection.command import run_script, with_pairs
from experiments.slimming import ROWS, SlimmingFlags, compare
from slim import SlimError
from tracking.settings import RunSettings


@dataclass(frozen=True)
class SeedsFlags:
    """Options of the repetition."""

    project: Annotated[str, "folder that holds a run folder for each seed"] = "runs/over_seeds"
    seeds: Annotated[tuple[int, ...], "seeds, one comparison each"] = (0, 1, 2)
    comparison: Annotated[
        tuple[str, ...], "flags of the comparison as name=value; of lists with commas, as in macs=0.3,0.2"
    ] = ()


def spread_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One step over seeds: mean and standard deviation of APs (0..1); costs are those of the first seed."""
    aps = {key: [row[key] for row in rows] for key in ("ap", "test_ap")}
    spreads = {key: None if None in values else mean_and_deviation(values) for key, values in aps.items()}
    return {"step": rows[0]["step"], **spreads, "macs": rows[0]["macs"], "params": rows[0]["params"]}


def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    """The sample's standard deviation is 0 for a single value."""
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def table(spreads: list[dict[str, Any]], seeds: Sequence[int]) -> str:
    """Markdown; the change is against the dense row."""
    lines = [
        f"| network | AP val, {len(seeds)} seeds | against dense | AP test | MACs | parameters |",
        "| --- " * 6 + "|",
    ]
    dense = spreads[0]
    for s in spreads:
        ap, test = ("" if s[key] is None else "{:.4f} ± {:.4f}".format(*s[key]) for key in ("ap", "test_ap"))
        costs = " | ".join(f"{s[key] / dense[key]:.0%}" for key in ("macs", "params"))
        lines.append(f"| {s['step']} | {ap} | {s['ap'][0] - dense['ap'][0]:+.4f} | {test} | {costs} |")
    return "\n".join(lines)


def repeat(flags: SeedsFlags) -> list[dict[str, Any]]:
    """A comparison a seed, then every row over the seeds."""
    if not flags.seeds:
        raise SlimError("--seeds: none given; name one or more whole numbers")
    common = replace(with_pairs(SlimmingFlags(), flags.comparison), resume=True)
    found = []
    for seed in flags.seeds:
        compare(replace(common, run=RunSettings(flags.project, f"seed{seed}"), seed=seed))
        rows = json.loads((Path(flags.project) / f"seed{seed}" / ROWS).read_text(encoding="utf-8"))
        found.append({row["step"]: row for row in rows})
    spreads = [spread_of([rows[step] for rows in found]) for step in found[0]]
    slim.write_text_atomically(Path(flags.project) / "report.md", table(spreads, flags.seeds) + "\n")
    content = json.dumps(spreads, indent=1)
    slim.write_text_atomically(Path(flags.project) / "spreads.json", content)
    return spreads


def main(flags: SeedsFlags) -> None:
    print(table(repeat(flags), flags.seeds))


def cli(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    return run_script(SeedsFlags, main, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(cli())
