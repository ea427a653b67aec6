"""Cuts: planned, masked, made, proven and saved; and single weights set to zero, for comparison."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import slim
from data import DetectionDataset
from engine import Evaluation, recalibrate
from models import YOLO
from slim import SlimError
from tracking import RunFolder, plot_widths, read_png, write_report

from .command import flat
from .datasets import open_data, real_images, training_batches
from .evaluator import Evaluator, draw_side_by_side
from .flags import ROUND_TO, PruneFlags, ScoreSettings
from .latency import ROUNDINGS, CandidateFactory, LatencySearch, Measurer
from .losses import training_loss
from .network import (
    Network,
    channel_stages,
    check_classes,
    check_image_size,
    choose_device,
    example_image,
    read_network,
    save_network,
)
from .published import find_weights
from .unstructured import share_of_zeros, zero_smallest
from .width_bounds import width_bounds

PROOF_IMAGES = 4


@dataclass(frozen=True)
class PlannedCut:
    """A plan for the network that was traced, and with a latency as the target what was measured."""

    graph: slim.ChannelGraph
    plan: slim.Plan
    latency: dict[str, Any] | None


@dataclass(frozen=True)
class PruneInputs:
    """The network to cut, and on what its cut is proven and evaluated."""

    network: Network
    device: torch.device
    images: torch.Tensor
    evaluator: Evaluator | None = None
    training_batches: Callable[..., Iterator[Any]] | None = None

    def recalibrate(self, model: nn.Module, batches: int) -> None:
        """Re-estimate a network's batch-norm statistics on so many training batches, in place; 0 keeps them."""
        if batches:
            assert self.training_batches is not None
            images = (batch.images.float() / 255 for batch in itertools.islice(self.training_batches(), batches))
            recalibrate(model, images, self.device)


@dataclass(frozen=True)
class Cut:
    """A narrow network, proven; the evaluations are None without a data set."""

    model: nn.Module
    max_difference: float
    masked: Evaluation | None
    pruned: Evaluation | None


def prune(flags: PruneFlags, pruning_round: int = 1) -> Path:
    """Plan, mask, cut, prove, save; returns the narrow network's file.

    Nothing is saved unless pruned = masked, but the record of a search for a latency.
    """
    find_weights(flags.weights, flags.dataset.download)
    if not (flags.target.given or flags.latency.given):
        raise SlimError(
            "--macs: no target given; --macs 0.4 keeps 40 % of the MACs (others: --params, --channels, --threshold, "
            "--latency-ms, --latency-share)"
        )
    inputs = open_prune_inputs(flags)
    run, search = RunFolder.create(flags.run.project, flags.run.name), None
    if flags.latency.given:
        measurer = Measurer(flags.latency, inputs.network, inputs.images)
        search = LatencySearch(flags.latency, measurer, lambda: begin(run, flags) / "latency.json")
    planned = choose_plan(flags, inputs, search)
    print(planned.plan)
    done = cut(inputs, planned.plan, flags.recalibrate)
    slim.write_text_atomically(begin(run, flags) / "plan.json", planned.plan.to_json())
    out = Path(flags.out) if flags.out else run.path / "weights" / "pruned.pt"
    save_network(out, done.model, inputs.network.build)
    if inputs.evaluator:
        networks = {"before the cut": inputs.network.model, "after it": done.model}
        picture = draw_side_by_side(networks, inputs.evaluator.dataset, run.path / "side_by_side.png")
        run.log_picture("detections", picture, pruning_round)
    record(run, planned, inputs.network.model, done, flags.score.criterion, pruning_round)
    print(f"saved {out}")
    return out


def begin(run: RunFolder, flags: PruneFlags) -> Path:
    """Write config.yaml, the first content of the run's folder; returns the folder."""
    rounding = flags.widths.round_to or (None if flags.latency.given else ROUND_TO)
    run.write_config({**flat(flags), "round_to": rounding}, "prune.py")
    return run.path


def open_prune_inputs(flags: PruneFlags, val_set: DetectionDataset | None = None) -> PruneInputs:
    """The network of --weights and the images to prove its cut on: real ones with --data, else noise.

    ``val_set`` is the val split at ``flags.img`` pixels where it is open already.
    """
    network, img, seed = read_network(flags.weights), flags.img, flags.seed
    check_image_size(network.model, img)
    device = choose_device(flags.device)
    if flags.dataset.data is None:
        images = torch.rand(2, 3, img, img, generator=torch.Generator().manual_seed(seed))
        return PruneInputs(network, device, images)
    config, loading = open_data(flags.dataset), flags.loading
    check_classes(network, config, flags.weights, flags.dataset.data)
    dataset = val_set or DetectionDataset(config, "val", img, cache=loading.cache)
    evaluator = Evaluator(dataset, batch_size=loading.batch_size, workers=loading.workers, device=device)
    batches = functools.partial(training_batches, config, img, loading.batch_size, seed=seed, augment=network.augment)
    return PruneInputs(network, device, real_images(dataset, PROOF_IMAGES), evaluator, batches)


def choose_plan(
    flags: PruneFlags, inputs: PruneInputs, search: LatencySearch | None = None, latency: float = 1.0
) -> PlannedCut:
    """Trace, score, plan; by ``search`` where the target is a latency. ``latency`` is the network's before the cut, as a
    share of the latency of the dense network of the search."""
    model, widths = inputs.network.model, flags.widths
    graph = slim.trace(model, example_image(flags.img))
    scores = scores_of(flags.score, model, graph, inputs, flags.seed)
    bounds = width_bounds(widths)
    if search is None:
        bounds |= {"round_to": widths.round_to or ROUND_TO, "cost_aware": flags.score.cost_aware}
        return PlannedCut(graph, slim.make_plan(graph, scores, **vars(flags.target), **bounds), None)

    def plan_at(macs: int | None, round_to: int) -> slim.Plan:
        if macs is None:
            return slim.make_plan(graph, scores, threshold=float("inf"), round_to=round_to, **bounds)
        return slim.make_plan(graph, scores, macs=macs, round_to=round_to, cost_aware=flags.score.cost_aware, **bounds)

    roundings = ROUNDINGS if widths.round_to is None else (widths.round_to,)
    floors = [f"--min-channels {widths.min_channels}", f"--round-to {' or '.join(map(str, roundings))}"]
    floors += [f"--{name.replace('_', '-')}" for name in ("min_keep", "overrides", "ignore") if getattr(widths, name)]
    plan, found = search.choose(CandidateFactory(model, plan_at, roundings, " and ".join(floors), latency))
    return PlannedCut(graph, plan, found)


def cut(inputs: PruneInputs, plan: slim.Plan, recalibration_batches: int = 0) -> Cut:
    """The narrow network of a plan: masked first, then proven, then its batch-norm statistics re-estimated."""
    model, evaluator = inputs.network.model, inputs.evaluator
    masked = slim.mask(model, plan)
    masked_evaluation = evaluator(masked) if evaluator else None
    if masked_evaluation:
        print(f"masked AP {masked_evaluation.ap:.4f}")
    pruned = slim.apply_plan(model, plan)
    difference = proven("pruned = masked", masked.cpu(), pruned, inputs.images)
    inputs.recalibrate(pruned, recalibration_batches)
    pruned_evaluation = evaluator(pruned) if evaluator else None
    if pruned_evaluation:
        print(f"pruned AP {pruned_evaluation.ap:.4f}")
    return Cut(pruned.cpu(), difference, masked_evaluation, pruned_evaluation)


def scores_of(
    settings: ScoreSettings, model: nn.Module, graph: slim.ChannelGraph, inputs: PruneInputs, seed: int
) -> dict[str, torch.Tensor]:
    """Scores by the criterion; ``taylor`` runs batches of the training split through YOLOv5's loss."""
    batches, loss = None, None
    if settings.criterion == "taylor":
        if inputs.training_batches is None or settings.taylor_batches < 1:
            raise SlimError(
                "--criterion taylor needs --data, whose training images it averages, and --taylor-batches >= 1"
            )
        batches = itertools.islice(inputs.training_batches(labelled=True), settings.taylor_batches)
        loss = training_loss(inputs.network.model.to(inputs.device), inputs.images.shape[-1], inputs.network.gains)
    scores = slim.score(
        model,
        graph,
        settings.criterion,
        seed=seed,
        reduction=settings.reduction,
        normalise=settings.normalise,
        batches=batches,
        loss=loss,
    )
    model.cpu()
    return scores


NOT_EVALUATED: dict[str, Any] = {"ap": None, "ap50": None, "ap75": None, "per_class": {}, "images": 0, "seconds": 0.0}


def proven(
    what: str,
    first: nn.Module,
    second: nn.Module,
    images: torch.Tensor,
    remade: Callable[[nn.Module], nn.Module] | None = None,
) -> float:
    """The largest difference of two networks by ``slim.prove``, told on the screen; SlimError where it is no proof."""
    try:
        proof = slim.prove(first, second, images, remade=remade)
    except SlimError as error:
        raise SlimError(
            f"{what} does not hold: {error}; nothing was saved; please report the model description"
        ) from error
    print(f"{what}: {proof}, on {len(images)} images")
    return proof.difference


def output_widths(model: nn.Module) -> dict[str, int]:
    """{path: output channels} of every convolution and linear layer."""
    return {path: widths[1] for path, widths in slim.layer_widths(model).items()}


def record(run: RunFolder, planned: PlannedCut, model: YOLO, done: Cut, criterion: str, pruning_round: int) -> None:
    """metrics.json, TensorBoard and the width plot of a cut."""
    graph = planned.graph
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
            **(planned.latency or {}),
        },
        after_cut=True,
    )
    run.log_picture("widths", read_png(plot_widths(before, after, run.path / "widths.png")), pruning_round)
    run.log_stages(channel_stages(model, graph.layers, example_like(graph).shape[-1]))
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


def zero_weights(flags: PruneFlags) -> None:
    """--unstructured: the smallest weights at zero, widths as they were."""
    assert flags.unstructured is not None
    find_weights(flags.weights, flags.dataset.download)
    inputs = open_prune_inputs(flags)
    folded = slim.fold_gates(inputs.network.model, inputs.images)
    already = share_of_zeros(folded)
    if already > flags.unstructured:
        raise SlimError(
            f"--unstructured {flags.unstructured:g}: {already:.1%} of the convolutions' weights are zero already (gates are "
            "folded first, closed ones leave zeros); give a larger share, or a network that was not trained sparsely"
        )
    before = inputs.evaluator(folded) if inputs.evaluator else None
    zeroed, layers = zero_smallest(folded.cpu(), flags.unstructured, flags.unstructured_scope)
    after = inputs.evaluator(zeroed) if inputs.evaluator else None
    run = RunFolder.create(flags.run.project, flags.run.name)
    begin(run, flags)
    out = Path(flags.out) if flags.out else run.path / "weights" / "pruned.pt"
    save_network(out, zeroed.cpu(), inputs.network.build)
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
