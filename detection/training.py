"""Training of a YOLOv5: sparsely with gates under the L1 step, or plainly."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

import slim
from data import DataConfig, DetectionDataset, Sample, build_loader, multi_scale_sizes
from deploy.qat import plain_state, with_quantisers
from engine import (
    Evaluation,
    FitResult,
    LossFunction,
    World,
    fit,
    read_training_state,
    seed_generators,
)
from models import YOLO
from slim import SlimError
from tracking import (
    RunFolder,
    plot_channels,
    plot_labels,
    read_png,
    summarise_gates,
    write_report,
)

from .command import BARE, OF_THE_COMMAND_LINE_ALONE, flat, read, with_values
from .datasets import open_data, real_images
from .evaluation_pictures import add_picture, measure_detections
from .evaluator import Evaluator, draw_networks, draw_truth
from .flags import FinetuneFlags, SparseFlags, TrainFlags
from .losses import add_teacher, fit_anchors, make_loss
from .network import (
    Network,
    channel_stages,
    check_image_size,
    choose_device,
    example_image,
    freeze_layers,
    from_scratch,
    head_path,
    read_network,
    save_network,
    start_network,
    with_activation,
)
from .pruning import output_widths
from .published import find_weights
from .sparsity import make_sparsity

MAY_CHANGE = {"device", "workers", "cache", "data_root", "download"}
"""Flags that a run may be resumed with: what it finds does not depend on them."""


def train(flags: TrainFlags, world: World | None = None) -> FitResult | None:
    """Train in a new run folder, or with --resume in that of a run; None where that run is finished."""
    world = world or World()
    opened = world.broadcast_from_rank0(lambda: open_run(flags))
    if opened is None:
        return None
    run, flags = opened
    with run.held() if world.is_first else contextlib.nullcontext():
        resume_state = read_training_state(run.last) if flags.resume else None
        try:
            return train_in(run, flags, resume_state=resume_state, world=world)
        except KeyboardInterrupt as stop:
            if not run.has_checkpoint:
                raise KeyboardInterrupt("no step was saved") from stop
            where = f"--project {run.path.parent} --name {run.path.name}"
            raise KeyboardInterrupt(
                f"{str(stop) or 'left at once'}; continue with: {world.launcher} {script_of(flags)} --resume {where}"
            ) from stop


def train_in(
    run: RunFolder,
    flags: TrainFlags,
    *,
    resume_state: dict[str, Any] | None = None,
    warm_start_state: dict[str, Any] | None = None,
    world: World | None = None,
    val_set: DetectionDataset | None = None,
) -> FitResult:
    """Sparse training for SparseFlags, plain training otherwise; prints a line an epoch and fills the run folder.

    ``val_set`` is the val split at ``flags.img`` pixels where it is open already.

    Under torchrun all ranks call it; the run folder, a shared one, is rank 0's.
    """
    world = world or World()
    device, batch_size = choose_device(flags.device, world), world.share(flags.loading.batch_size)
    img, seed, loading = flags.img, flags.training.seed, flags.loading
    seed_generators(seed)
    config = world.broadcast_from_rank0(lambda: open_data(flags.dataset))
    network = read_network(run.last) if resume_state is not None else starting_network(flags, config.names)
    check_image_size(network.model, img)
    print(network.note or f"weights {flags.network.weights}")
    frozen = freeze_layers(network.model, flags.network.freeze)
    if frozen is not None:
        print(frozen)
    train_set = training_set(flags, config, world)
    if (
        network.new_head and not flags.network.noautoanchor and not flags.teacher
    ):  # a teacher's maps are for its anchors
        print(fit_anchors(network, train_set, flags.gains.anchor_t, seed))
    network.trained_with(flags.augment, flags.gains)
    labels_loss = make_loss(network.model, flags.gains, img, world)
    loss: LossFunction = labels_loss
    if flags.teacher:
        loss = add_teacher(labels_loss, network, flags.teacher, flags.distill, device)
        print(f"teacher: {flags.teacher}, weight {flags.distill.weight:g}")
    stride_px = max(network.model.stride_px)
    loader = training_loader(flags, train_set, stride_px, batch_size, world)
    if val_set is None:
        val_set = DetectionDataset(config, "val", img, cache=loading.cache if world.is_first else "none")
    evaluator = Evaluator(
        val_set,
        batch_size=loading.batch_size,
        workers=0,
        device=device,
        rect_stride_px=stride_px if flags.rect else None,
    )
    sparsity = make_sparsity(flags, network.model, len(loader))
    begin_run(run, flags, network, train_set, val_set, world, is_new=resume_state is None)
    trained: nn.Module = network.model
    plain: Callable[[nn.Module], nn.Module] | None = None
    if isinstance(flags, FinetuneFlags) and flags.qat.qat:
        if world.size > 1:
            raise SlimError("--qat: runs in one process; start it without torchrun")
        images = real_images(DetectionDataset(config, "train", img, seed=seed), flags.qat.calibration_images)
        trained, plain = with_fake_quantisers(network.model, images.split(loading.batch_size), flags.qat.keep_float)
    result = fit(
        trained,
        loss,
        loader,
        config=flags.training,
        run=run,
        save=lambda path, model, state: save_network(path, plain(model) if plain else model, network.build, state),
        device=device,
        evaluate=evaluator,
        sparsity=sparsity,
        resume_state=resume_state,
        warm_start_state=warm_start_state,
        world=world,
    )
    known = result.evaluation if trained is network.model else None
    evaluation = world.broadcast_from_rank0(lambda: finish(run, img, flags.training.epochs, evaluator, result, known))
    return replace(result, evaluation=evaluation)


def begin_run(
    run: RunFolder,
    flags: TrainFlags,
    network: Network,
    train_set: DetectionDataset,
    val_set: DetectionDataset,
    world: World,
    *,
    is_new: bool,
) -> None:
    """Write what a run folder holds before the first step, and print what was left out of the data.

    The folder appears here, after everything that could have been refused.
    """
    if world.is_first:
        run.write_config({k: v for k, v in flat(flags).items() if k not in OF_THE_COMMAND_LINE_ALONE}, script_of(flags))
        for split in run.note_data({"train": train_set.digest(), "val": val_set.digest()}):
            print(f"the labels of {split} are not those that the run began with; it goes on with what is there now")
    run.adopt(world.broadcast_from_rank0(lambda: run.path))
    for problems in (train_set.problems, val_set.problems):
        for message in problems[:10]:
            print(f"left out: {message}")
        if len(problems) > 10:
            print(f"left out: {len(problems) - 10} more of the same split")
    if is_new and world.is_first:
        plot_labels(train_set.ground_truth(), train_set.names, run.path / "labels.png")
        log_start(run, network.model, train_set, flags)


def with_fake_quantisers(
    model: YOLO, batches: Sequence[Tensor], keep_float: Sequence[str]
) -> tuple[nn.Module, Callable[[nn.Module], nn.Module]]:
    """Wrap the network in fake quantisers, whose ranges are found on ``batches``; with a function to the plain network."""
    quantised = with_quantisers(model, batches, head=head_path(model), keep_float=list(keep_float))
    count = sum(len(batch) for batch in batches)
    print(f"rounds to 8 bits while it trains; ranges of {count} training images; checkpoints hold the plain network")
    template = copy.deepcopy(model).cpu()

    def plain(trained: nn.Module) -> nn.Module:
        template.load_state_dict(plain_state(trained))
        return template

    return quantised, plain


def training_set(flags: TrainFlags, config: DataConfig, world: World | None = None) -> DetectionDataset:
    """The training split, augmented; DataError where it holds no object."""
    train_set = DetectionDataset(
        config,
        "train",
        flags.img,
        flags.augment,
        flags.training.seed,
        flags.loading.cache,
        mosaic_epochs=flags.training.epochs - flags.sampling.close_mosaic,
        image_weights=flags.sampling.image_weights,
        holders=1 if world is None else world.local_size,
    )
    train_set.check_objects()
    return train_set


def training_loader(
    flags: TrainFlags, train_set: DetectionDataset, stride_px: int, batch_size: int, world: World
) -> DataLoader[Sample]:
    """Shuffled batches of this rank, of ``batch_size`` images each; with --multi-scale at sizes that ``stride_px`` divides."""
    return build_loader(
        train_set,
        batch_size,
        shuffle=True,
        workers=flags.loading.workers,
        seed=flags.training.seed,
        rank=world.rank,
        num_ranks=world.size,
        sizes_px=multi_scale_sizes(flags.img, stride_px) if flags.sampling.multi_scale else (),
    )


def script_of(flags: TrainFlags) -> str:
    """The script whose flags these are."""
    return "train_sparse.py" if isinstance(flags, SparseFlags) else "finetune.py"


def open_run(flags: TrainFlags) -> tuple[RunFolder, TrainFlags] | None:
    """A new run folder, or with --resume that of a run with its own settings; None where that is finished."""
    project, name = flags.run.project, flags.run.name
    if not flags.resume:
        for flag, weights in (("--weights", flags.network.weights), ("--teacher", flags.teacher)):
            if weights:
                find_weights(weights, flags.dataset.download, flag)
        return RunFolder.create(project, name, flags.exist_ok), flags
    run = RunFolder.newest(project, name) if flags.resume == BARE["resume"] else RunFolder.of(flags.resume)
    flags = resumed(flags, run)
    if run.metrics_file.is_file() and (run.path / "report.html").is_file():  # the last files that a training writes
        print(f"{run.path}: finished, nothing is left to resume")
        return None
    return run, flags


def resumed(flags: TrainFlags, run: RunFolder) -> TrainFlags:
    """The settings of a run that is resumed: its own, with those flags of the command line that do not change what it finds.

    Raises SlimError for a flag that would.
    """
    if not run.config_file.is_file():
        raise SlimError(f"{run.config_file}: no such file; this run cannot be resumed, start a new one")
    known = read(type(flags)(), ["--config", str(run.config_file)])
    old, new = flat(known), flat(flags)
    changed = {
        n: new[n] for n in sorted(flags.given - {"project", "name", *OF_THE_COMMAND_LINE_ALONE}) if new[n] != old[n]
    }
    if refused := [name for name in changed if name not in MAY_CHANGE]:
        told = ", ".join(f"--{name.replace('_', '-')} {new[name]} (the run has {old[name]})" for name in refused)
        raise SlimError(f"--resume: {told} would change the run; leave that out, or start a new run without --resume")
    if changed:
        print("resumed with " + ", ".join(f"--{name.replace('_', '-')} {new[name]}" for name in changed))
    return with_values(known, {**changed, "resume": flags.resume})


def starting_network(flags: TrainFlags, names: tuple[str, ...]) -> Network:
    """The network in the state in which its training begins: gates placed, kept or folded."""
    start = flags.network
    network = start_network(start.weights, start.cfg, names, start.width_multiple)
    check_image_size(network.model, flags.img)
    if start.act != "keep":
        network = with_activation(network, start.act)
    if isinstance(flags, FinetuneFlags) and flags.reinit:
        network = from_scratch(network, flags.training.seed)
    if isinstance(flags, SparseFlags) and flags.sparsity.where != "norm-weight":
        graph = slim.trace(network.model, example_image(flags.img))
        slim.add_gates(network.model, graph, tie=flags.sparsity.tie, where=flags.sparsity.where)
    elif isinstance(flags, SparseFlags) or (isinstance(flags, FinetuneFlags) and not flags.keep_gates):
        network.model = slim.fold_gates(network.model)
    return network


def log_start(run: RunFolder, model: YOLO, train_set: DetectionDataset, flags: TrainFlags) -> None:
    """The batch as the network sees it, what the network costs, and which of its layers are looked at together."""
    img = flags.img
    cost = slim.cost(model, example_image(img))
    if isinstance(flags, SparseFlags):
        run.log_stages(channel_stages(model, cost.layers, img))
    run.log_scalars({"cost/macs": float(cost.macs), "cost/params": float(cost.params)}, 0)
    add_picture(run, "train_batch", draw_truth(train_set))


def finish(
    run: RunFolder, img: int, epochs: int, evaluator: Evaluator, result: FitResult, evaluation: Evaluation | None
) -> Evaluation:
    """Write metrics.json and the plots of the weights in last.pt, which are evaluated unless ``evaluation`` is theirs."""
    network = read_network(run.last)
    evaluation = evaluation or evaluator(network.model)
    cost = slim.cost(network.model.cpu(), example_image(img))
    measured = measure_detections(run, evaluator, evaluation, epochs)
    metrics = {
        **evaluation.metrics(),
        **measured.metrics(),
        "params": cost.params,
        "macs": cost.macs,
        "seconds": result.seconds,
    }
    gates = slim.gate_vectors(network.model)
    run.write_metrics(
        {
            **metrics,
            "best_ap": result.best_ap,
            "best_epoch": result.best_epoch,
            "closed_share": result.closed_share,
            "gates": summarise_gates(gates) if gates else None,
            "evaluation_seconds": evaluation.seconds,
        }
    )
    (tiles,) = draw_networks({"": network.model}, evaluator.dataset).values()
    add_picture(run, "detections", tiles, epochs)
    add_picture(run, "truth", draw_truth(evaluator.dataset), epochs)
    draw_channels(run, network.model, epochs)
    run.close()
    write_report(run)
    closed = "" if result.closed_share is None else f", {result.closed_share:.1%} of the gates closed"
    conf = "" if measured.conf is None else f", best F1 at --conf {measured.conf:g}"
    aps = f"AP {evaluation.ap:.4f}, AP50 {evaluation.ap50:.4f} on {evaluation.images} val images"
    print(f"{run.path}: {aps}{conf}{closed}")
    return evaluation


def draw_channels(run: RunFolder, model: YOLO, epochs: int) -> None:
    """The picture of layers against epochs of a sparse training."""
    if history := run.read_channels():
        drawn = plot_channels(history, output_widths(model), run.path / "channels.png", "epoch")
        run.log_picture("channels", read_png(drawn), epochs)
