"""Train a YOLOv5 with gates under the smallest-half pull, so that half of its channels close."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

import slim
from data import Augment, DataConfig, DetectionDataset, build_loader, multi_scale_sizes
from deploy.qat import plain_state
from engine import (
    Evaluation,
    FitResult,
    LossFunction,
    OptimConfig,
    Precision,
    Sparsity,
    TrainConfig,
    World,
    fit,
    learning_rate_sum,
    read_training_state,
    seed_generators,
)
from models import DistillGains, LossGains
from slim import SlimError
from tracking import (
    RunFolder,
    draw_detections,
    plot_gates,
    plot_labels,
    plot_results,
    save_png,
    summarise_gates,
    write_report,
)

from .command import choose_device, flag
from .datasets import DataFlags, real_images
from .evaluator import Evaluator, draw_networks
from .losses import add_teacher, fit_anchors, make_loss
from .network import (
    Network,
    check_image_size,
    example_image,
    freeze_layers,
    read_network,
    save_network,
    start_network,
    with_activation,
)


@dataclass(frozen=True)
class Rounding:
    """How a network comes to round while it trains: ``make(model, images)``, ``images`` [B, 3, H, W] each, so many in all.

    Checkpoints hold the plain network.
    """

    make: Callable[[nn.Module, Sequence[Tensor]], nn.Module]
    images: int


@dataclass(frozen=True)
class TrainFlags(DataFlags):
    """What every training takes."""

    weights: str = flag("", "checkpoint to start from (ours or a published YOLOv5 .pt); '' trains --cfg from scratch")
    cfg: str = flag("models/yolov5n.yaml", "model description, used without --weights")
    act: Literal["keep", "silu", "hardswish", "relu"] = flag(
        "keep", "activation of all blocks; swapped where --weights have another, which costs AP until trained on"
    )
    img: int = flag(320, "image size in pixels, a multiple of the largest stride")
    epochs: int = flag(30, "epochs of the whole run")
    batch_size: int = flag(16, "images a step, of all ranks together")
    workers: int = flag(2, "loader processes, of each rank")
    cache: Literal["ram", "disk", "none"] = flag(
        "ram", "decoded images stay in memory, in .slim-cache beside the data, or not"
    )
    optimizer: Literal["sgd", "adamw"] = flag("sgd", "SGD with Nesterov momentum, or AdamW")
    lr: float = flag(0.01, "learning rate after the warm-up")
    final_lr_ratio: float = flag(0.01, "last learning rate as a share of --lr")
    schedule: Literal["linear", "cosine"] = flag("linear", "how the learning rate falls")
    momentum: float = flag(0.937, "SGD's momentum, AdamW's beta1")
    weight_decay: float = flag(5e-4, "on weights of convolutions; never on gates and norms")
    warmup_epochs: float = flag(3.0, "epochs of rising learning rate, at most a tenth of the run")
    clip_norm: float = flag(10.0, "largest gradient norm")
    eval_every: int = flag(1, "epochs between evaluations on the val split")
    patience: int = flag(0, "stop after so many epochs without a better AP; 0 never does")
    sync_bn: bool = flag(False, "under torchrun, batch norms see the whole batch (slower; for few images a rank)")
    precision: Precision = flag("auto", "float16 on a GPU and bfloat16 on a CPU that has it (auto), or the one named")  # noqa: RUF009
    box: float = flag(0.05, "weight of the box loss")
    obj: float = flag(1.0, "weight of the objectness loss at 640 pixels; scaled by (img / 640) squared")
    cls: float = flag(0.5, "weight of the class loss for 80 classes; scaled by their number / 80")
    label_smoothing: float = flag(0.0, "of the class targets, 0 to 1")
    teacher: str = flag("", "trained checkpoint of the same classes whose outputs are learned beside the labels")
    distill_weight: float = flag(1.0, "with --teacher: weight of its outputs beside the labels")
    distill_box: float = flag(1.0, "with --teacher: weight of its boxes, on top of --box")
    distill_obj: float = flag(1.0, "with --teacher: weight of its objectness, on top of --obj")
    distill_cls: float = flag(1.0, "with --teacher: weight of its classes, on top of --cls")
    freeze: list[str] = flag([], "layers left as they are: a count from the first, indices or paths as model.1.*")  # noqa: RUF009
    mosaic: float = flag(1.0, "probability that four images make one training sample")
    scale: float = flag(0.5, "training images are scaled by 1 - scale to 1 + scale")
    translate: float = flag(0.1, "training images are moved by at most this share of their size")
    degrees: float = flag(0.0, "training images are turned by at most this many degrees")
    fliplr: float = flag(0.5, "probability of a left-right flip")
    flipud: float = flag(0.0, "probability of an upside-down flip")
    noautoanchor: bool = flag(False, "keep the anchors even where they fit the training boxes badly")
    shear: float = flag(0.0, "training images are sheared by at most this many degrees")
    hsv_h: float = flag(0.015, "the hue of training images turns by at most this share of the colour circle")
    hsv_s: float = flag(0.7, "their saturation is multiplied by 1 - hsv_s to 1 + hsv_s")
    hsv_v: float = flag(0.4, "their brightness is multiplied by 1 - hsv_v to 1 + hsv_v")
    mixup: float = flag(0.0, "probability that a training sample is blended with a second one")
    close_mosaic: int = flag(0, "last epochs without mosaic and mixup")
    multi_scale: bool = flag(False, "each training batch at another size, 0.5 to 1.5 times --img")
    image_weights: bool = flag(False, "draw training images with rare classes more often")
    rect: bool = flag(False, "evaluate on rectangular batches with little padding instead of squares")
    resume: bool = flag(False, "continue the newest run of this --project and --name with its own settings")

    def gains(self) -> LossGains:
        return LossGains(box=self.box, obj=self.obj, cls=self.cls, label_smoothing=self.label_smoothing)

    def distill_gains(self) -> DistillGains:
        return DistillGains(self.distill_weight, self.distill_box, self.distill_obj, self.distill_cls)

    def augment(self) -> Augment:
        return Augment(
            mosaic=self.mosaic,
            scale=self.scale,
            translate=self.translate,
            degrees=self.degrees,
            fliplr=self.fliplr,
            flipud=self.flipud,
            shear=self.shear,
            hsv_h=self.hsv_h,
            hsv_s=self.hsv_s,
            hsv_v=self.hsv_v,
            mixup=self.mixup,
        )

    def rounding(self) -> Rounding | None:
        """How the network rounds while it trains, where it does."""
        return None

    def mosaic_epochs(self) -> int:
        """The first epoch without mosaic and mixup."""
        if not 0 <= self.close_mosaic <= self.epochs:
            raise SlimError(f"--close-mosaic {self.close_mosaic}: expected 0 to --epochs, {self.epochs}")
        return self.epochs - self.close_mosaic

    def optim(self) -> OptimConfig:
        return OptimConfig(
            optimizer=self.optimizer,
            lr=self.lr,
            final_lr_ratio=self.final_lr_ratio,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            warmup_epochs=self.warmup_epochs,
            schedule=self.schedule,
            clip_norm=self.clip_norm,
        )


@dataclass(frozen=True)
class SparseFlags(TrainFlags):
    """Sparse training."""

    project: str = flag("runs/sparse", "folder that holds the run folders")
    strength: float | Literal["auto"] = flag("auto", "pull a unit of learning rate; auto closes the pulled gates")
    travel: float = flag(2.0, "with --strength auto: how far an unopposed gate would move (gates start at 1)")
    fraction: float = flag(0.5, "part of each gate vector that is pulled: its smallest entries")
    closed_share: float | None = flag(
        None, "instead of --strength: raise or lower it so that this share of all gates is closed at the end"
    )
    pull_from: int = flag(3, "first epoch with the pull; before it the gates find their order")
    tie: Literal["group", "layer"] = flag("group", "one gate vector a group, or one an activation")


@dataclass(frozen=True)
class TrainResult:
    """What a training leaves."""

    run: RunFolder
    fit: FitResult
    evaluation: Evaluation


def train(flags: TrainFlags, *, keep_gates: bool = True, world: World | None = None) -> TrainResult:
    """Train in a new run folder, or with --resume in the newest of that name."""
    world = world or World()
    run, flags = world.from_first(lambda: open_run(flags))
    with run.held() if world.is_first else contextlib.nullcontext():
        resume_state = read_training_state(run.last) if flags.resume else None
        try:
            return train_in(run, flags, keep_gates=keep_gates, resume_state=resume_state, world=world)
        except KeyboardInterrupt as stop:
            if not run.last.is_file():
                raise KeyboardInterrupt(f"no step was saved in {run.path}") from stop
            where = f"--project {run.path.parent} --name {run.path.name}"
            raise KeyboardInterrupt(
                f"{str(stop) or 'left at once'}; continue with: {world.launcher} {script_of(flags)} --resume {where}"
            ) from stop


def train_in(
    run: RunFolder,
    flags: TrainFlags,
    *,
    keep_gates: bool = True,
    resume_state: dict[str, Any] | None = None,
    carried_state: dict[str, Any] | None = None,
    world: World | None = None,
) -> TrainResult:
    """Sparse training for SparseFlags, plain training otherwise; prints a line an epoch and fills the run folder.

    Under torchrun all ranks call it; the run folder, a shared one, is rank 0's.
    """
    world = world or World()
    device, batch_size = choose_device(flags.device, world), world.share(flags.batch_size)
    seed_generators(flags.seed)
    config = world.from_first(flags.open_data)
    network = starting_network(flags, run, resume_state, config.names, keep_gates)
    check_image_size(network.model, flags.img)
    print(network.note or f"weights {flags.weights}")
    frozen = freeze_layers(network.model, flags.freeze)
    if frozen is not None:
        print(frozen)
    train_set = training_set(flags, config, world)
    if network.new_head and not flags.noautoanchor and not flags.teacher:  # a teacher's maps are for its anchors
        print(fit_anchors(network, train_set, flags.gains().anchor_t, flags.seed))
    loss = training_criterion(flags, network, device, world)
    loader = build_loader(
        train_set,
        batch_size,
        shuffle=True,
        workers=flags.workers,
        seed=flags.seed,
        rank=world.rank,
        num_ranks=world.size,
        sizes_px=multi_scale_sizes(flags.img, max(network.model.stride_px)) if flags.multi_scale else (),
    )
    val_set = DetectionDataset(config, "val", flags.img, cache=flags.cache if world.is_first else "none")
    evaluator = Evaluator(
        val_set,
        batch_size=flags.batch_size,
        workers=0,
        device=device,
        rect_stride_px=max(network.model.stride_px) if flags.rect else None,
    )
    sparsity = make_sparsity(flags, network.model, len(loader))
    if world.is_first:
        run.write_config(asdict(flags), script_of(flags))
        for split in run.note_data({"train": train_set.digest(), "val": val_set.digest()}):
            print(f"the labels of {split} are not those that the run began with; it goes on with what is there now")
    for message in [*train_set.problems, *val_set.problems][:10]:
        print(f"left out: {message}")
    if resume_state is None and world.is_first:
        plot_labels(train_set.ground_truth(), train_set.names, run.path / "labels.png")
        log_start(run, network.model, train_set, flags)
    trained, plain = rounding_network(flags, network.model, config, world)
    result = fit(
        trained,
        loss,
        loader,
        config=TrainConfig(
            flags.epochs,
            flags.optim(),
            precision=flags.precision,
            eval_every=flags.eval_every,
            patience=flags.patience,
            sync_bn=flags.sync_bn,
            seed=flags.seed,
        ),
        run=run,
        save=lambda path, model, state: save_network(path, plain(model), network.build, state),
        device=device,
        evaluate=evaluator,
        sparsity=sparsity,
        resume_state=resume_state,
        carried_state=carried_state,
        world=world,
    )
    evaluation = world.from_first(lambda: finish(run, flags, evaluator, result))
    return TrainResult(run, result, evaluation)


def rounding_network(
    flags: TrainFlags, model: nn.Module, config: DataConfig, world: World
) -> tuple[nn.Module, Callable[[nn.Module], nn.Module]]:
    """What is trained, and what makes of it the network of the checkpoints: ``model`` itself unless the flags round it."""
    rounding = flags.rounding()
    if rounding is None:
        return model, lambda trained: trained
    if world.size > 1:
        raise SlimError("--qat: runs in one process; start it without torchrun")
    calibration = DetectionDataset(config, "train", flags.img, seed=flags.seed)
    images = real_images(calibration, rounding.images)
    rounded = rounding.make(model, images.split(flags.batch_size))
    print(
        f"rounds to 8 bits while it trains; ranges of {len(images)} training images; checkpoints hold the plain network"
    )
    return rounded, unrounded(model)


def unrounded(model: nn.Module) -> Callable[[nn.Module], nn.Module]:
    """From a network with quantisers back to the plain one, ``model``'s structure with the trained weights."""
    template = copy.deepcopy(model).cpu()

    def plain(trained: nn.Module) -> nn.Module:
        template.load_state_dict(plain_state(trained))
        return template

    return plain


def training_set(flags: TrainFlags, config: DataConfig, world: World | None = None) -> DetectionDataset:
    """The training split, augmented."""
    return DetectionDataset(
        config,
        "train",
        flags.img,
        flags.augment(),
        flags.seed,
        flags.cache,
        mosaic_epochs=flags.mosaic_epochs(),
        image_weights=flags.image_weights,
        holders=1 if world is None else world.local_size,
    )


def script_of(flags: TrainFlags) -> str:
    """The script whose flags these are."""
    return "train_sparse.py" if isinstance(flags, SparseFlags) else "finetune.py"


def open_run(flags: TrainFlags) -> tuple[RunFolder, TrainFlags]:
    """A new run folder, or with --resume the newest of that name with its own settings."""
    if not flags.resume:
        return RunFolder.create(flags.project, flags.name), flags
    taken = [p for p in Path(flags.project).glob(f"{flags.name}*") if (p / "weights" / "last.pt").is_file()]
    numbered = {
        int(p.name.removeprefix(flags.name) or 1): p
        for p in taken
        if p.name.removeprefix(flags.name).isdigit() or p.name == flags.name
    }
    if not numbered:
        raise SlimError(
            f"{flags.project}/{flags.name}: no run with weights/last.pt to resume; start one without --resume"
        )
    run = RunFolder.open(numbered[max(numbered)])
    known = run.read_config()
    return run, replace(flags, **{**known, "resume": True, "debug": flags.debug})


def starting_network(
    flags: TrainFlags, run: RunFolder, resume_state: object, names: tuple[str, ...], keep_gates: bool
) -> Network:
    """The network in the state in which its training begins or continues: gates placed, kept or folded."""
    if resume_state is not None:
        return read_network(run.last)
    network = start_network(flags.weights, flags.cfg, names)
    check_image_size(network.model, flags.img)
    if flags.act != "keep":
        network = with_activation(network, flags.act)
    if isinstance(flags, SparseFlags):
        graph = slim.trace(network.model, example_image(flags.img))
        slim.add_gates(network.model, graph, tie=flags.tie)
    elif not keep_gates:
        network.model = slim.fold_gates(network.model)
    return network


def training_criterion(
    flags: TrainFlags, network: Network, device: torch.device, world: World | None = None
) -> LossFunction:
    """The labels' loss, with --teacher also the teacher's."""
    loss = make_loss(network.model, flags.gains(), flags.img, world)
    if not flags.teacher:
        return loss
    distilling = add_teacher(loss, network, flags.teacher, flags.distill_gains(), device)
    print(f"teacher: {flags.teacher}, weight {flags.distill_weight:g}")
    return distilling


def make_sparsity(flags: TrainFlags, model: nn.Module, steps: int) -> Sparsity | None:
    """The pull of sparse training; without one, gates that are trained are only kept at or above 0."""
    if not isinstance(flags, SparseFlags):
        trained = [vector for vector in slim.gate_vectors(model).values() if vector.requires_grad]
        return Sparsity(slim.SmallestHalfL1(model, strength=0.0), None, None) if trained else None
    if flags.pull_from >= flags.epochs:
        raise SlimError(
            f"--pull-from {flags.pull_from} leaves no epoch with the pull; expected less than --epochs {flags.epochs}"
        )
    total_lr = learning_rate_sum(flags.optim(), steps, flags.epochs, flags.pull_from)
    strength = slim.strength_for(total_lr, flags.travel) if flags.strength == "auto" else float(flags.strength)
    pull = slim.SmallestHalfL1(model, strength=strength, fraction=flags.fraction)
    what = f"the smallest {flags.fraction:.0%} of each gate vector, from epoch {flags.pull_from}"
    if flags.closed_share is None:
        print(f"pull: strength {strength:.4g} on {what}")
        return Sparsity(pull, from_epoch=flags.pull_from)
    if flags.strength != "auto":
        raise SlimError(f"--strength {strength:g} and --closed-share {flags.closed_share:g}: give one of them")
    print(f"pull: on {what}, as strong as closes {flags.closed_share:.0%} of all gates")
    return Sparsity(pull, slim.ClosedShareController(pull, flags.closed_share, total_lr), flags.pull_from)


def log_start(run: RunFolder, model: nn.Module, train_set: DetectionDataset, flags: TrainFlags) -> None:
    """The batch as the network sees it, and what the network costs."""
    cost = slim.cost(model, example_image(flags.img))
    run.log_scalars({"cost/macs": float(cost.macs), "cost/params": float(cost.params)}, 0)
    tiles = []
    for i in range(min(4, len(train_set))):
        sample = train_set[i]
        boxes = box_convert(sample.targets[:, 1:], "cxcywh", "xyxy") * flags.img
        ones = torch.ones(len(boxes), 1)
        tiles.append(draw_detections(sample.image, torch.cat([boxes, ones, sample.targets[:, :1]], 1), train_set.names))
    run.log_picture("train_batch", torch.cat(tiles, 2))
    save_png(torch.cat(tiles, 2), run.path / "train_batch.png")


def finish(run: RunFolder, flags: TrainFlags, evaluator: Evaluator, result: FitResult) -> Evaluation:
    """metrics.json and the plots, from the weights in last.pt."""
    network = read_network(run.last)
    evaluation = evaluator.last or evaluator(network.model)
    cost = slim.cost(network.model.cpu(), example_image(flags.img))
    metrics = {**evaluation.metrics(), "params": cost.params, "macs": cost.macs, "seconds": result.seconds}
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
    plot_results(run)
    if gates:
        plot_gates(gates, run.path / "gates.png")
    (tiles,) = draw_networks({"": network.model}, evaluator.dataset).values()
    picture = torch.cat(tiles, 2)
    save_png(picture, run.path / "detections.png")
    run.log_picture("detections", picture, flags.epochs)
    run.close()
    write_report(run)
    closed = "" if result.closed_share is None else f", {result.closed_share:.1%} of the gates closed"
    print(f"{run.path}: AP {evaluation.ap:.4f}, AP50 {evaluation.ap50:.4f} on {evaluation.images} val images{closed}")
    return evaluation


def main(flags: SparseFlags, world: World) -> None:
    train(flags, world=world)
