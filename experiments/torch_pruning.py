"""torch-pruning's group norm as a baseline: cut a checkpoint to a share of its MACs, for finetune.py and val.py.

python -m experiments.torch_pruning --weights last.pt --data data/bccd.yaml --img 320 --macs 0.3 --out pruned.pt

Channels are ranked by the group L2 norm of Fang et al., "DepGraph: Towards Any Structural Pruning" (CVPR 2023), the library's
GroupMagnitudeImportance with its own defaults, on the weights as they are: the importance alone, without the sparse
training of that paper (GroupNormPruner.regularize). The share of channels to remove, which is what the library takes, is
found by bisection: MACs (slim.cost) are at most and nearest to --macs. Batch-norm statistics are not re-estimated.

Gates are folded first and the convolutions that Detect ends in keep their outputs. In one thing the library is helped:
where its rounding leaves a layer without channels it would keep that layer whole; here --round-to channels stay.

Cost: a minute for YOLOv5n on a CPU. Needs torch-pruning >= 1.6 (extra `bench`).
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import nn

import slim
from data.settings import DataSettings, LoaderSettings
from detection.command import check_installed, flat, run_script
from detection.flags import ROUND_TO, PruneFlags, ScriptFlags
from detection.network import example_image, read_network, save_network
from detection.pruning import NOT_EVALUATED, open_prune_inputs, output_widths
from models import YOLO
from slim import SlimError
from tracking import RunFolder, plot_widths, write_report
from tracking.settings import RunSettings

BISECTIONS = 14
"""Halvings of the ratio: to less than one channel in ten thousand."""


@dataclass(frozen=True)
class TorchPruningFlags(ScriptFlags):
    """Options of the cut."""

    run: RunSettings = RunSettings(project="runs/torch_pruning")
    seed: Annotated[int, "seed of the noise that the cut network is tried on without --data"] = 0
    weights: Annotated[str, "checkpoint to cut (ours or a published YOLOv5 .pt)"] = ""
    img: Annotated[int, "image size in pixels at which MACs are counted"] = 320
    macs: Annotated[float, "share of the MACs to keep at most", "above 0 to below 1"] = 0.5
    scope: Annotated[Literal["global", "local"], "rank all channels together, or keep the same share of each group"] = (
        "global"
    )
    round_to: Annotated[int, "kept widths are multiples of this many channels, and no less", "at least 1"] = ROUND_TO
    out: Annotated[str | None, "file for the narrow network; else weights/pruned.pt in the run folder"] = None
    dataset: DataSettings = DataSettings(data=None)
    loading: LoaderSettings = LoaderSettings(workers=0)


@dataclass(frozen=True)
class Found:
    """A cut network, its MACs, and the share of channels that torch-pruning was told to remove for it."""

    model: YOLO
    macs: int
    ratio: float


def cut_by_ratio(model: YOLO, img: int, ratio: float, scope: str, round_to: int) -> YOLO:
    """A copy of ``model`` without this share, 0..1, of its channels."""
    import torch_pruning as tp

    pruned = copy.deepcopy(model).eval()
    pruner = tp.pruner.BasePruner(
        pruned,
        (example_image(img),),
        importance=tp.importance.GroupMagnitudeImportance(),
        global_pruning=scope == "global",
        pruning_ratio=ratio,
        round_to=round_to,
        ignored_layers=list(pruned.detect.m),
        output_transform=lambda outputs: outputs[1],  # raw maps; decoding them adds nothing but constants of the grid
    )
    pruner._round_to = removed_when_rounded
    pruner.step()
    return pruned


def removed_when_rounded(removed: int, channels: int, round_to: int) -> int:
    """How many of so many channels go instead of ``removed``: a multiple of ``round_to`` stays, at least one time it."""
    kept = (channels - removed) // round_to * round_to
    return max(0, channels - max(kept, round_to))


def cut_to_macs(model: YOLO, img: int, macs: float, scope: str, round_to: int) -> Found:
    """The cut network of the most MACs that are at most the share ``macs``; SlimError when even the narrowest has more."""
    dense = slim.cost(model, example_image(img)).macs

    def at(ratio: float) -> Found:
        pruned = cut_by_ratio(model, img, ratio, scope, round_to)
        return Found(pruned, slim.cost(pruned, example_image(img)).macs, ratio)

    low, best = 0.0, at(1.0)
    if best.macs > macs * dense:
        raise SlimError(
            f"--macs {macs:g}: with --round-to {round_to} at least {best.macs / dense:.4f} of the MACs stay; give more, or a "
            "smaller --round-to"
        )
    for _ in range(BISECTIONS):
        tried = at((low + best.ratio) / 2)
        if tried.macs > macs * dense:
            low = tried.ratio
        else:
            best = tried
    return best


def reload_difference(out: Path, model: nn.Module, images: torch.Tensor) -> float:
    """The largest difference between a network and what its checkpoint gives back, relative; SlimError unless it is 0."""
    loaded = read_network(out).model
    difference = slim.max_difference(model, loaded, images)
    if difference or slim.layer_widths(loaded) != slim.layer_widths(model):
        raise SlimError(
            f"{out}: reads back as another network, {difference:.1e} of the largest output; please report it"
        )
    return difference


def main(flags: TorchPruningFlags) -> None:
    """Cut, save, read back, evaluate."""
    check_installed("torch_pruning")
    inputs = open_prune_inputs(
        PruneFlags(
            device=flags.device,
            seed=flags.seed,
            weights=flags.weights,
            img=flags.img,
            dataset=flags.dataset,
            loading=flags.loading,
        )
    )
    model = slim.fold_gates(inputs.network.model)
    found = cut_to_macs(model, flags.img, flags.macs, flags.scope, flags.round_to)
    run = RunFolder.create(flags.run.project, flags.run.name)
    run.write_config(flat(flags), "experiments.torch_pruning")
    out = Path(flags.out) if flags.out else run.path / "weights" / "pruned.pt"
    save_network(out, found.model, inputs.network.build)
    difference = reload_difference(out, found.model, inputs.images)
    evaluation = inputs.evaluator(found.model) if inputs.evaluator else None
    before, after = slim.cost(model, example_image(flags.img)), slim.cost(found.model.cpu(), example_image(flags.img))
    widths = {"before": output_widths(model), "after": output_widths(found.model)}
    run.write_metrics(
        {
            **(evaluation.metrics() if evaluation else NOT_EVALUATED),
            "criterion": "group_norm",
            "pruning_ratio": found.ratio,
            "reload_difference": difference,
            "pruned_ap": evaluation.ap if evaluation else None,
            "params": after.params,
            "macs": after.macs,
            "before": {"params": before.params, "macs": before.macs, "channels": widths["before"]},
            "after": {"params": after.params, "macs": after.macs, "channels": widths["after"]},
        }
    )
    plot_widths(widths["before"], widths["after"], run.path / "widths.png")
    run.close()
    write_report(run)
    print(
        f"{flags.scope} ratio {found.ratio:.4f}: {after.macs / before.macs:.2%} of the MACs, {after.params:,} parameters"
    )
    if evaluation:
        print(f"pruned AP {evaluation.ap:.4f}")
    print(f"saved {out}")


def cli(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    return run_script(TorchPruningFlags, main, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(cli())
