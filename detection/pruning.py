"""Cut a checkpoint to a share of its MACs, parameters, channels or milliseconds, prove the cut, and save the narrow network.

With --unstructured single weights are set to zero instead, for comparison.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import slim
from data import DataConfig, DetectionDataset
from engine import Evaluation, recalibrate
from slim import SlimError
from tracking import RunFolder, plot_widths, read_png, save_png, side_by_side, write_report

from .command import choose_device, flag
from .datasets import real_images, training_images
from .evaluator import Evaluator, draw_networks
from .latency import ROUNDINGS, Cutter, LatencyFlags, LatencySearch, Measurer
from .losses import training_loss
from .network import Network, check_classes, check_image_size, example_image, read_network, save_network
from .unstructured import share_of_zeros, zero_smallest

TOLERANCE = 1e-4
EXACT_TOLERANCE = 1e-6  # decoded boxes are float32 whatever the network computes in
PROOF_IMAGES = 4
ROUND_TO = 8
TARGETS = ("macs", "params", "channels", "threshold")


@dataclass(frozen=True)
class PruneFlags(LatencyFlags):
    """A cut."""

    project: str = flag("runs/prune", "folder that holds the run folders")
    weights: str = flag("", "checkpoint to cut (ours or a published YOLOv5 .pt)")
    img: int = flag(320, "image size in pixels at which MACs are counted and the proof is made")
    macs: float | None = flag(None, "MACs to keep: a share above 0 to 1, or a count")
    params: float | None = flag(None, "parameters to keep: a share above 0 to 1, or a count")
    channels: float | None = flag(None, "prunable channels to keep: a share above 0 to 1, or a count")
    threshold: float | None = flag(None, "instead: cut every channel whose score is below this (gates: 0.01 is closed)")
    criterion: str = flag("gate", "what ranks the channels: gate, bn, l1, l2, fpgm, taylor (needs --data) or random")
    reduction: Literal["mean", "max", "sum"] | None = flag(None, "over a group's layers; else the criterion's own")
    normalise: Literal["mean", "max", "none"] | None = flag(None, "within each layer; else the criterion's own")
    taylor_batches: int = flag(8, "training batches whose gradients --criterion taylor averages")
    scope: Literal["global", "local", "isomorphic"] = flag(
        "global", "rank all channels together, keep the same share of each group, or of each class of like groups"
    )
    cost_aware: bool = flag(False, "rank by score per MAC (or parameter) saved")
    round_to: int | None = flag(
        None,
        "kept widths are multiples of this many channels; else 8, for a latency 8 or 16, whichever measures faster",
    )
    min_channels: int = flag(8, "every group keeps at least this many channels")
    min_keep: float = flag(0.0, "every group keeps at least this share of its channels, 0 to 1")
    overrides: list[str] = flag([], "PATTERN=WIDTH, layers of a set width: a share (0.5) or a count (32)")  # noqa: RUF009
    ignore: list[str] = flag([], "patterns of layers that stay whole, such as 'model.24.*'")  # noqa: RUF009
    data: str | None = flag(None, "data set: prove on its val images and evaluate masked and pruned")
    recalibrate: int = flag(
        0, "training batches on which batch-norm statistics are re-estimated after the cut; 0 keeps them"
    )
    batch_size: int = flag(16, "images at once in the evaluation")
    unstructured: float | None = flag(
        None,
        "instead of cutting channels: share of the convolutions' weights set to zero, the smallest, above 0, below 1",
    )
    unstructured_scope: Literal["layer", "global"] = flag(
        "layer", "with --unstructured: this share of each convolution's weights, or of all together"
    )
    out: str | None = flag(None, "file for the narrow network; else weights/pruned.pt in the run folder")

    def check(self) -> None:
        """SlimError for a target that cannot be meant."""
        self.check_latency()
        if self.recalibrate and self.data is None:
            raise SlimError("--recalibrate needs --data: statistics are re-estimated on its training images")
        given = [f"--{name}" for name in TARGETS if getattr(self, name) is not None]
        given += ["--latency-ms"] if self.latency_ms is not None else []
        given += ["--latency-share"] if self.latency_share is not None else []
        if self.by_latency and len(given) > 1:
            raise SlimError(f"{' and '.join(given)}: give exactly one target")
        if self.unstructured is None:
            return
        if not 0 < self.unstructured < 1:
            raise SlimError(f"--unstructured {self.unstructured:g}: expected above 0 and below 1, the share to zero")
        if others := [*given, *(["--recalibrate"] if self.recalibrate else [])]:
            raise SlimError(
                f"--unstructured and {', '.join(others)}: zeroed weights leave every width as it is; cut channels in a run of "
                "its own"
            )


@dataclass(frozen=True)
class PruneResult:
    """What a cut leaves; the APs are None without a data set."""

    run: RunFolder
    out: Path
    plan: slim.Plan
    masked_ap: float | None
    pruned_ap: float | None
    max_difference: float
    latency: dict[str, Any] | None = None


@dataclass(frozen=True)
class Choice:
    """A plan for the network that was traced, and with a latency as the target what was measured."""

    graph: slim.ChannelGraph
    plan: slim.Plan
    latency: dict[str, Any] | None


@dataclass(frozen=True)
class Material:
    """What is cut, and on what the cut is judged."""

    network: Network
    device: torch.device
    images: torch.Tensor
    config: DataConfig | None
    evaluator: Evaluator | None


@dataclass(frozen=True)
class Cut:
    """A narrow network, proven; the evaluations are None without a data set."""

    model: nn.Module
    max_difference: float
    masked: Evaluation | None
    pruned: Evaluation | None


def prune(flags: PruneFlags, pruning_round: int = 1) -> PruneResult:
    """Plan, mask, cut, prove, save; nothing is saved unless pruned = masked, but the record of a search for a latency."""
    flags.check()
    material = open_material(flags)
    run, search = None, None
    if flags.by_latency:
        run = open_run(flags)
        search = LatencySearch(flags, Measurer(flags, material.network, material.images), run.path / "latency.json")
    choice = choose_plan(flags, material, search)
    print(choice.plan)
    done = cut(flags, material, choice.plan)
    run = run or open_run(flags)
    slim.write_text_atomically(run.path / "plan.json", choice.plan.to_json())
    out = Path(flags.out) if flags.out else run.path / "weights" / "pruned.pt"
    save_network(out, done.model, material.network.build)
    if material.evaluator:
        networks = {"before the cut": material.network.model, "after it": done.model}
        picture = side_by_side(draw_networks(networks, material.evaluator.dataset))
        save_png(picture, run.path / "side_by_side.png")
        run.log_picture("detections", picture, pruning_round)
    record(run, choice, material.network.model, done, flags.criterion, pruning_round)
    print(f"saved {out}")
    masked_ap, pruned_ap = (None if found is None else found.ap for found in (done.masked, done.pruned))
    return PruneResult(run, out, choice.plan, masked_ap, pruned_ap, done.max_difference, choice.latency)


def open_run(flags: PruneFlags) -> RunFolder:
    """The run's folder with its configuration."""
    run = RunFolder.create(flags.project, flags.name)
    rounding = flags.round_to if flags.by_latency else flags.round_to or ROUND_TO
    run.write_config({**asdict(flags), "round_to": rounding}, "prune.py")
    return run


def open_material(flags: PruneFlags) -> Material:
    """The network of --weights and the images to prove its cut on: real ones with --data, else noise."""
    network = read_network(flags.weights)
    check_image_size(network.model, flags.img)
    device = choose_device(flags.device)
    if flags.data is None:
        images = torch.rand(2, 3, flags.img, flags.img, generator=torch.Generator().manual_seed(flags.seed))
        return Material(network, device, images, None, None)
    config = flags.open_data()
    check_classes(network, config, flags.weights, flags.data)
    dataset = DetectionDataset(config, "val", flags.img)
    evaluator = Evaluator(dataset, batch_size=flags.batch_size, workers=0, device=device)
    return Material(network, device, real_images(dataset, PROOF_IMAGES), config, evaluator)


def choose_plan(
    flags: PruneFlags, material: Material, search: LatencySearch | None = None, latency: float = 1.0
) -> Choice:
    """Trace, score, plan; by ``search`` where the target is a latency. ``latency`` is the network's before the cut, as a
    share of the latency of the dense network of the search."""
    model = material.network.model
    graph = slim.trace(model, example_image(flags.img))
    scores = judge(flags, model, graph, material)
    bounds: dict[str, Any] = {
        "min_channels": flags.min_channels,
        "min_keep": flags.min_keep,
        "scope": flags.scope,
        "overrides": dict(width_override(text) for text in flags.overrides),
        "ignore": flags.ignore,
    }
    if search is None:
        targets = {name: getattr(flags, name) for name in TARGETS}
        bounds |= {**targets, "round_to": flags.round_to or ROUND_TO, "cost_aware": flags.cost_aware}
        return Choice(graph, slim.make_plan(graph, scores, **bounds), None)

    def plan_at(macs: int | None, round_to: int) -> slim.Plan:
        if macs is None:
            return slim.make_plan(graph, scores, threshold=float("inf"), round_to=round_to, **bounds)
        return slim.make_plan(graph, scores, macs=macs, round_to=round_to, cost_aware=flags.cost_aware, **bounds)

    roundings = ROUNDINGS if flags.round_to is None else (flags.round_to,)
    floors = [f"--min-channels {flags.min_channels}", f"--round-to {' or '.join(map(str, roundings))}"]
    floors += [f"--{name.replace('_', '-')}" for name in ("min_keep", "overrides", "ignore") if getattr(flags, name)]
    plan, found = search.choose(Cutter(model, plan_at, roundings, " and ".join(floors), latency))
    return Choice(graph, plan, found)


def cut(flags: PruneFlags, material: Material, plan: slim.Plan) -> Cut:
    """The narrow network of a plan: masked first, then proven, then (--recalibrate) its statistics re-estimated."""
    model, evaluator = material.network.model, material.evaluator
    masked = slim.mask(model, plan)
    masked_evaluation = evaluator(masked) if evaluator else None
    if masked_evaluation:
        print(f"masked AP {masked_evaluation.ap:.4f}")
    pruned = slim.apply_plan(model, plan)
    difference = prove(masked.cpu(), pruned, material.images)
    print(f"pruned = masked to {difference:.1e} of the largest output on {len(material.images)} images")
    if flags.recalibrate:
        assert material.config is not None
        batch_size, seed = flags.batch_size, flags.seed
        batches = training_images(material.config, flags.img, batch_size, flags.recalibrate, seed)
        recalibrate(pruned, batches, material.device)
    pruned_evaluation = evaluator(pruned) if evaluator else None
    if pruned_evaluation:
        print(f"pruned AP {pruned_evaluation.ap:.4f}")
    return Cut(pruned.cpu(), difference, masked_evaluation, pruned_evaluation)


def judge(flags: PruneFlags, model: nn.Module, graph: slim.ChannelGraph, material: Material) -> dict[str, torch.Tensor]:
    """Scores by the criterion; ``taylor`` runs batches of the training split through YOLOv5's loss."""
    batches, loss = None, None
    if flags.criterion == "taylor":
        if material.config is None or flags.taylor_batches < 1:
            raise SlimError(
                "--criterion taylor needs --data, whose training images it averages, and --taylor-batches >= 1"
            )
        batches, loss = training_loss(
            model.to(material.device), material.config, flags.img, flags.batch_size, flags.seed
        )
        batches = itertools.islice(batches, flags.taylor_batches)
    scores = slim.score(
        model,
        graph,
        flags.criterion,
        seed=flags.seed,
        reduction=flags.reduction,
        normalise=flags.normalise,
        batches=batches,
        loss=loss,
    )
    model.cpu()
    return scores


def width_override(text: str) -> tuple[str, float]:
    """'model.0*=0.5' or 'model.0*=32' as a pattern and a share or a count."""
    pattern, _, width = text.rpartition("=")
    try:
        return pattern, int(width) if width.strip().isdigit() else float(width)
    except ValueError as error:
        raise SlimError(
            f"--overrides {text}: expected PATTERN=WIDTH, such as 'model.0*=0.5' or 'model.0*=32'"
        ) from error


NOT_EVALUATED: dict[str, Any] = {"ap": None, "ap50": None, "ap75": None, "per_class": {}, "images": 0, "seconds": 0.0}


def prove(
    masked: nn.Module,
    pruned: nn.Module,
    images: torch.Tensor,
    remade: Callable[[nn.Module], nn.Module] | None = None,
) -> float:
    """The largest difference between masked and pruned, relative; SlimError when it is no proof.

    A network that has hardly been trained may magnify float32's rounding beyond the tolerance; float64 tells that from a
    wrong cut, which differs as much in any precision. ``remade`` makes pruned of masked anew, where that rounds weights.
    """
    difference = slim.max_difference(masked, pruned, images)
    if not difference <= TOLERANCE:
        first = copy.deepcopy(masked).double()
        second = copy.deepcopy(pruned).double() if remade is None else remade(first)
        exact = slim.max_difference(first, second, images.double())
        if not exact <= EXACT_TOLERANCE:
            raise SlimError(
                f"the cut is wrong: pruned and masked differ by {difference:.1e} of the largest output, expected at most "
                f"{TOLERANCE:g} (in float64 {exact:.1e}); nothing was saved; please report the model description"
            )
        print(f"in float32 rounding alone makes {difference:.1e}; in float64 they differ by {exact:.1e}")
    return difference


def output_widths(model: nn.Module) -> dict[str, int]:
    """{path: output channels} of every convolution and linear layer."""
    return {path: widths[1] for path, widths in slim.widths_of(model).items()}


def record(run: RunFolder, choice: Choice, model: nn.Module, done: Cut, criterion: str, pruning_round: int) -> None:
    """metrics.json, TensorBoard and the width plot of a cut."""
    graph = choice.graph
    before, after = output_widths(model), output_widths(done.model)
    cost = slim.cost(done.model, example_like(graph))
    run.write_metrics(
        {
            **(done.pruned.metrics() if done.pruned else NOT_EVALUATED),
            "criterion": criterion,
            "max_difference": done.max_difference,
            "masked_ap": done.masked.ap if done.masked else None,
            "masked_ap50": done.masked.ap50 if done.masked else None,
            "pruned_ap": done.pruned.ap if done.pruned else None,
            "params": cost.params,
            "macs": cost.macs,
            "before": {"params": graph.params, "macs": graph.macs, "channels": before},
            "after": {"params": cost.params, "macs": cost.macs, "channels": after},
            **(choice.latency or {}),
        },
        after_cut=True,
    )
    run.log_picture("widths", read_png(plot_widths(before, after, run.path / "widths.png")), pruning_round)
    for number, widths, costs in ((pruning_round - 1, before, graph), (pruning_round, after, cost)):
        run.log_channels(widths, number)
        run.log_scalars({"cost/macs": float(costs.macs), "cost/params": float(costs.params)}, number)
    if done.pruned:
        run.log_scalars({"metrics/ap": done.pruned.ap, "metrics/ap50": done.pruned.ap50}, pruning_round)
    run.close()
    write_report(run)


def example_like(graph: slim.ChannelGraph) -> torch.Tensor:
    """An input of the shape that the graph was traced with."""
    assert graph.example is not None
    return torch.zeros(graph.example[0][0])


def zero_weights(flags: PruneFlags) -> RunFolder:
    """--unstructured: the smallest weights at zero, widths as they were."""
    flags.check()
    assert flags.unstructured is not None
    material = open_material(flags)
    folded = slim.fold_gates(material.network.model, material.images)
    already = share_of_zeros(folded)
    if already > flags.unstructured:
        raise SlimError(
            f"--unstructured {flags.unstructured:g}: {already:.1%} of the convolutions' weights are zero already (gates are "
            "folded first, closed ones leave zeros); give a larger share, or a network that was not trained sparsely"
        )
    before = material.evaluator(folded) if material.evaluator else None
    zeroed, layers = zero_smallest(folded.cpu(), flags.unstructured, flags.unstructured_scope)
    after = material.evaluator(zeroed) if material.evaluator else None
    run = open_run(flags)
    out = Path(flags.out) if flags.out else run.path / "weights" / "pruned.pt"
    save_network(out, zeroed.cpu(), material.network.build)
    cost = slim.cost(zeroed, example_image(flags.img))
    zeros, size = (sum(counts[i] for counts in layers.values()) for i in (0, 1))
    found = {
        "zeros": zeros,
        "conv_weights": size,
        "zeros_share": zeros / size,
        "zeros_by_layer": {path: {"zeros": counts[0], "weights": counts[1]} for path, counts in layers.items()},
        "dense_ap": before.ap if before else None,
    }
    figures = after.metrics() if after else NOT_EVALUATED
    run.write_metrics({**figures, "params": cost.params, "macs": cost.macs, **found})
    run.close()
    write_report(run)
    print(f"{zeros:,} of {size:,} weights of {len(layers)} convolutions are zero: {zeros / size:.1%}")
    if before and after:
        print(f"AP {after.ap:.4f}, {before.ap:.4f} before")
    print("every width, so MACs and run time, as before: a zero is multiplied like any other number")
    print(f"saved {out}")
    return run


def main(flags: PruneFlags) -> None:
    if flags.unstructured is not None:
        zero_weights(flags)
    else:
        prune(flags)
