"""The slimming loop: rounds of sparse training and cutting, final fine-tuning, gates folded."""

from __future__ import annotations

import functools
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import detection
import slim
from engine import EngineError, RunFolder
from engine.command import RunFlags, choose_device, flag, run_script
from finetune import FinetuneFlags
from prune import PruneFlags, output_widths, prune
from train_sparse import SparseFlags, train


@dataclass(frozen=True)
class IterateFlags(RunFlags):
    """The loop."""

    project: str = flag("runs/iterate", "folder that holds the run folders")
    weights: str = flag("", "trained checkpoint to slim; its AP is the baseline")
    data: str = flag("data/bccd.yaml", "data set description (a YOLOv5 data.yaml)")
    data_root: str | None = flag(None, "folder of data sets; else $SLIM_DATA_ROOT, else ./datasets")
    img: int = flag(320, "image size in pixels, a multiple of the largest stride")
    rounds: int = flag(3, "how many times to train sparsely and cut")
    macs: float = flag(0.4, "share of the MACs of --weights to keep in the end, above 0 to 1")
    sparse_epochs: int = flag(10, "epochs of sparse training a round")
    finetune_epochs: int = flag(20, "epochs of fine-tuning after the last cut")
    max_drop: float = flag(0.02, "AP that the slim network may lose against the baseline; more is reported")
    batch_size: int = flag(16, "images a step")
    workers: int = flag(2, "loader processes")
    lr: float = flag(0.01, "learning rate after the warm-up, of every training")
    strength: float | Literal["auto"] = flag("auto", "pull a unit of learning rate; auto closes the pulled gates")
    fraction: float = flag(0.5, "part of each gate vector that is pulled: its smallest entries")
    pull_from: int = flag(1, "first epoch of each round with the pull")
    tie: Literal["group", "layer"] = flag("group", "one gate vector a group, or one an activation")
    round_to: int = flag(8, "kept widths are multiples of this many channels")
    min_channels: int = flag(8, "every group keeps at least this many channels")


def shared(flags: IterateFlags, kind: type[Any]) -> dict[str, Any]:
    """The flags that a step of the loop has in common with the loop."""
    wanted = {field.name for field in fields(kind)} - {"project", "name", "weights", "macs"}
    return {name: value for name, value in asdict(flags).items() if name in wanted}


def iterate(flags: IterateFlags) -> Path:
    """Run the loop; returns the file of the slim network."""
    if flags.rounds < 1:
        raise EngineError(f"--rounds {flags.rounds}: expected at least 1")
    if not 0 < flags.macs <= 1:
        raise EngineError(f"--macs {flags.macs}: expected above 0 to 1, the share to keep")
    network = detection.read_network(flags.weights)
    config = detection.open_data(flags.data, flags.data_root)
    detection.check_image_size(network.model, flags.img)
    detection.check_classes(network, config, flags.weights, flags.data)
    evaluator = detection.Evaluator(
        detection.DetectionDataset(config, "val", flags.img),
        batch_size=flags.batch_size,
        workers=0,
        device=choose_device(flags.device),
    )
    run = RunFolder.create(flags.project, flags.name)
    run.write_config(asdict(flags))
    baseline = evaluator(network.model).ap
    dense = slim.cost(network.model.cpu(), detection.example_image(flags.img))
    rows = [("dense", baseline, dense.macs, dense.params)]
    run.log_channels(output_widths(network.model), 0)
    weights, plans = flags.weights, list[slim.Plan]()
    for number in range(1, flags.rounds + 1):
        print(f"round {number} of {flags.rounds}")
        sparse = train(
            SparseFlags(
                **shared(flags, SparseFlags),
                project=str(run.path),
                name=f"sparse{number}",
                weights=weights,
                epochs=flags.sparse_epochs,
            )
        )
        # Equal ratios: the rounds' targets are a geometric series from 1 down to --macs.
        target = dense.macs * flags.macs ** (number / flags.rounds)
        result = prune(
            PruneFlags(
                **shared(flags, PruneFlags),
                project=str(run.path),
                name=f"cut{number}",
                weights=str(sparse.run.last),
                macs=round(target),
            ),
            number,
        )
        weights = str(result.out)
        plans.append(result.plan)
        rows.append((f"round {number}, sparse", sparse.evaluation.ap, *sparse_cost(result.plan, 0)))
        rows.append((f"round {number}, cut", result.pruned_ap or 0.0, *sparse_cost(result.plan, 1)))
        cut = detection.read_network(weights)
        run.log_channels(output_widths(cut.model), number)
        run.log_scalars({"metrics/ap": result.pruned_ap, "cost/macs": float(result.plan.macs[1])}, number)
    slim.write_text_atomically(run.path / "plan.json", functools.reduce(slim.Plan.then, plans).to_json())
    final = train(
        FinetuneFlags(
            **shared(flags, FinetuneFlags),
            project=str(run.path),
            name="finetune",
            weights=weights,
            epochs=flags.finetune_epochs,
        ),
        keep_gates=False,
    )
    rows.append(("fine-tuned", final.evaluation.ap, *sparse_cost(result.plan, 1)))
    return conclude(flags, run, final.run, evaluator, rows)


def sparse_cost(plan: slim.Plan, after: int) -> tuple[int, int]:
    """MACs and parameters before (0) or after (1) a cut."""
    return plan.macs[after], plan.params[after]


def conclude(
    flags: IterateFlags,
    run: RunFolder,
    last: RunFolder,
    evaluator: detection.Evaluator,
    rows: list[tuple[str, float, int, int]],
) -> Path:
    """The slim network's file, metrics and table."""
    slim_network = detection.read_network(last.last)
    out = run.path / "weights" / "slim.pt"
    detection.save_network(out, slim_network.model, slim_network.build)
    evaluation = evaluator(slim_network.model)
    baseline, macs, params = rows[0][1:]
    cost = slim.cost(slim_network.model.cpu(), detection.example_image(flags.img))
    run.write_metrics({**evaluation.metrics(), "params": cost.params, "macs": cost.macs, "baseline_ap": baseline})
    run.close()
    lines = ["| step | AP | M MACs | M parameters |", "| --- | --- | --- | --- |"]
    lines += [f"| {name} | {ap:.4f} | {m / 1e6:.1f} | {p / 1e6:.3f} |" for name, ap, m, p in rows]
    slim.write_text_atomically(run.path / "report.md", "\n".join(["# Slimming run", "", *lines, ""]))
    print("\n".join(lines))
    drop = baseline - evaluation.ap
    verdict = "within" if drop <= flags.max_drop else "MORE than"
    print(
        f"{out}: {cost.macs / macs:.1%} of the MACs, {cost.params / params:.1%} of the parameters; AP drop {drop:.4f}, "
        f"{verdict} --max-drop {flags.max_drop:g}"
    )
    return out


def main(flags: IterateFlags) -> None:
    iterate(flags)


def cli(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    return run_script(IterateFlags, main, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(cli())
