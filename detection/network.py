"""Where models, data, engine and slim meet: networks from files, data sets for them, evaluation and checkpoints."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import slim
from boxes import cxcywh_to_xyxy as cxcywh_to_xyxy
from data import Augment, DataConfig, DetectionDataset, build_loader, find_root, load_data_config, make_shapes
from data.download import download_data
from data.sampling import Draw
from engine import EngineError, Evaluation, Frozen, World, draw_detections, evaluate, freeze
from engine.checkpoint import TRAINING_STATE_KEY
from engine.command import RunFlags, existing_file, flag
from models import (
    LOWEST_RECALL,
    Detect,
    DetectionLoss,
    DistillationLoss,
    DistillGains,
    LossGains,
    ModelError,
    anchor_fit,
    build_model,
    has_activation,
    import_checkpoint,
    load_description,
    non_max_suppression,
    refit_anchors,
    renew_head,
    swap_activations,
    transfer_weights,
)

SHAPES = {"train": 400, "val": 120, "test": 120, "image_size_px": 160, "seed": 0}


@dataclass(frozen=True)
class DataFlags(RunFlags):
    """What every script takes that reads a data set."""

    data: str = flag("data/bccd.yaml", "data set description (a YOLOv5 data.yaml)")
    download: bool = flag(False, "fetch the data set first where it is missing, as its yaml's download key says")
    data_root: str | None = flag(None, "folder of data sets; else $SLIM_DATA_ROOT, else ./datasets")
    classes: list[int | str] = flag([], "names or numbers of the classes to look at, in their new order; else all")  # noqa: RUF009
    single_cls: bool = flag(False, "all classes as one, named object")

    def open_data(self) -> DataConfig:
        """The data set that the flags describe."""
        return open_data(
            self.data, self.data_root, download=self.download, classes=self.classes, single_cls=self.single_cls
        )


@dataclass
class Network:
    """A detector and what it takes to build it again; ``build`` is plain data."""

    model: nn.Module
    build: dict[str, Any]
    note: str = ""
    new_head: bool = False
    """Whether its head has yet to learn the data set's classes: from scratch, or trained for classes of other names."""

    @property
    def names(self) -> list[str]:
        return list(self.build["names"])


def build_network(build: Mapping[str, Any]) -> nn.Module:
    """The dense network of a checkpoint's ``build`` entry (``slim.load``'s builder)."""
    return build_model(build["description"], build["num_classes"])


def make_build(model: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    """The ``build`` entry: model description, classes, anchors and strides."""
    return {
        "kind": "yolov5",
        "description": model.description,
        "num_classes": len(names),
        "names": list(names),
        "anchors_px": model.anchors_px.tolist(),
        "stride_px": list(model.stride_px),
    }


def read_network(path: str | Path) -> Network:
    """A checkpoint of ours (dense, gated or pruned) or a published YOLOv5 ``.pt``, on the CPU."""
    try:
        content = slim.read(path)
    except slim.SlimError as not_ours:
        if not Path(path).is_file():
            raise
        try:
            return imported_network(path)
        except ModelError as not_published:
            raise EngineError(f"{not_published} (nor is it a checkpoint of this project)") from not_ours
    if content["build"].get("kind") != "yolov5":
        raise EngineError(f"{path}: a slim checkpoint of another kind of network; expected a YOLOv5 of this project")
    return Network(slim.restore(content, build_network, str(path)), content["build"])


def imported_network(path: str | Path) -> Network:
    """A published YOLOv5 ``.pt``."""
    imported = import_checkpoint(path)
    model = build_model(imported.description)
    report = transfer_weights(model, imported.state_dict)
    names = imported.names or [f"class{i}" for i in range(model.num_classes)]
    return Network(model, make_build(model, names), str(report))


def start_network(weights: str, cfg: str, names: Sequence[str]) -> Network:
    """The network that a training starts from: ``weights`` where given, else ``cfg`` from scratch.

    Weights of other classes keep their structure and get a head for ``names``, see ``with_classes``.
    """
    if not weights:
        model = build_model(load_description(cfg), len(names))
        return Network(model, make_build(model, names), f"{cfg} from scratch", new_head=True)
    return with_classes(read_network(weights), names)


def box_sizes_px(dataset: DetectionDataset) -> Tensor:
    """[n, 2]: width and height of the labels in pixels of the network's input."""
    truth = dataset.ground_truth()
    scales = {image["id"]: dataset.image_size_px / max(image["width"], image["height"]) for image in truth["images"]}
    sizes = [[side * scales[a["image_id"]] for side in a["bbox"][2:]] for a in truth["annotations"] if not a["iscrowd"]]
    return torch.tensor(sizes, dtype=torch.float32).reshape(-1, 2)


def fit_anchors(network: Network, dataset: DetectionDataset, anchor_t: float, seed: int) -> str:
    """Refits the anchors to the labels where they can recall too few of them and others more; what was done, in a line.

    For a new head alone: a trained one has learnt sizes relative to its anchors. ``build`` is changed with the network.
    """
    sizes = box_sizes_px(dataset)
    if not len(sizes):
        return "anchors: kept, since the training split has no boxes"
    detect = network.model.detect
    assert isinstance(detect, Detect)
    before = anchor_fit(detect.anchors_px, sizes, anchor_t)
    line = f"anchors at {dataset.image_size_px} px: {before}"
    if before.recall >= LOWEST_RECALL:
        return line
    anchors = refit_anchors(sizes, detect.anchors[..., 0].numel(), anchor_t=anchor_t, seed=seed)
    after = anchor_fit(anchors, sizes, anchor_t)
    if after.recall <= before.recall:
        return f"{line}; kept, since a refit is no better"
    detect.set_anchors(anchors)
    levels = detect.anchors_px.tolist()
    network.build["anchors_px"] = levels
    flat = [[side for anchor in level for side in anchor] for level in levels]
    network.build["description"] = network.model.description = {**network.build["description"], "anchors": flat}
    return f"{line}; refitted: {after}"


def with_classes(network: Network, names: Sequence[str]) -> Network:
    """The network for a data set's classes, with its widths and gates; only the head's last layer can change.

    As many classes, none of which stood in another place, keep the head whole: at most they were renamed. Otherwise
    each class takes what the head knows under its name, see ``renew_head``.
    """
    known = {name: index for index, name in enumerate(network.names)}
    kept = [name for name in names if name in known]
    moved = [name for index, name in enumerate(names) if known.get(name, index) != index]
    if len(names) == len(network.names) and not moved:
        renamed = sum(name not in known for name in names)
        note = f"{network.note}\nhead: kept, {renamed} of its classes have other names now" if renamed else network.note
        return Network(network.model, {**network.build, "names": list(names)}, note.strip(), new_head=not kept)
    renew_head(network.model, [known.get(name) for name in names])
    what = f"kept are the rows of {', '.join(kept)}" if kept else "no class in common, so it starts anew"
    note = f"{network.note}\nhead: {len(network.names)} classes before, {len(names)} now; {what}"
    return Network(network.model, make_build(network.model, names), note.strip(), new_head=not kept)


def with_activation(network: Network, act: str) -> Network:
    """The network with another activation in all of its blocks, and with its gates folded where that changes anything."""
    if has_activation(network.model, act):
        return network
    model = slim.fold_gates(network.model)
    count = swap_activations(model, act)
    note = f"{network.note}\nactivations: {act} in {count} places".strip()
    return Network(model, {**network.build, "description": model.description}, note, new_head=network.new_head)


def save_network(
    path: Path, model: nn.Module, build: Mapping[str, Any], training_state: Mapping[str, Any] | None = None
) -> None:
    """Write a checkpoint, with the training state where given."""
    slim.save(model, path, build, None if training_state is None else {TRAINING_STATE_KEY: training_state})


def open_data(
    data: str,
    data_root: str | None,
    *,
    download: bool = False,
    classes: Sequence[int | str] = (),
    single_cls: bool = False,
) -> DataConfig:
    """A data set's description, of some of its classes or of all as one where that is asked.

    Synthetic shapes are drawn first where they are not there yet, with ``download`` others are fetched (progress is printed).
    """
    if Path(data).stem == "shapes":
        make_shapes(find_root(data_root) / "shapes", **SHAPES)
    elif download:
        download_data(data, data_root)
    config = load_data_config(data, data_root)
    config = config.select(classes) if classes else config
    return config.single() if single_cls else config


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(existing_file(str(path), "a checkpoint").read_bytes()).hexdigest()


def data_digest(config: DataConfig, split: str, img: int) -> str:
    """`DetectionDataset.digest` of a split; no pixel is decoded."""
    return DetectionDataset(config, split, img, cache="none").digest()


def example_image(img: int) -> Tensor:
    """An input to trace with, [1, 3, img, img]."""
    return torch.zeros(1, 3, img, img)


def sides_of(img: int | str) -> tuple[int, int]:
    """Height and width of an --img: one side, or both as 384x640."""
    parts = str(img).lower().split("x")
    if len(parts) > 2 or not all(part.strip().isdecimal() for part in parts):
        raise EngineError(f"--img {img}: expected one side in pixels, or height x width as in 384x640")
    return int(parts[0]), int(parts[-1])


def img_of(sides_px: tuple[int, int]) -> int | str:
    """The --img of which ``sides_of`` gives this height and width."""
    height, width = sides_px
    return height if height == width else f"{height}x{width}"


def head_path(model: nn.Module) -> str:
    """The path of a detector's last module, which predicts."""
    return f"model.{len(model.model) - 1}"


def check_image_size(model: nn.Module, img: int) -> None:
    """Sizes that are no multiple of the largest stride cannot be concatenated in the neck."""
    stride = max(model.stride_px)
    if img < stride or img % stride:
        nearest = max(stride, round(img / stride) * stride)
        raise EngineError(f"--img {img}: expected a multiple of the largest stride, {stride}; the nearest is {nearest}")


class Named(Protocol):
    """What says which classes it detects."""

    @property
    def names(self) -> list[str]: ...


def check_classes(network: Named, config: DataConfig, weights: str, data: str) -> None:
    """An evaluation with other classes than the network's would be meaningless."""
    if len(network.names) != len(config.names):
        raise EngineError(
            f"{weights}: detects {len(network.names)} classes, {data} has {len(config.names)} ({', '.join(config.names[:5])}); "
            "give the data set and the --classes or --single-cls that it was trained on, or train it on this one"
        )
    if list(config.names) != network.names and sorted(config.names) == sorted(network.names):
        raise EngineError(
            f"{weights}: its classes are in the order {', '.join(network.names[:5])}, those of {data} in the order "
            f"{', '.join(config.names[:5])}; give --classes in the network's order"
        )


def make_loss(model: nn.Module, gains: LossGains, img: int, world: World | None = None) -> DetectionLoss:
    """YOLOv5's loss with its gains scaled to the task; for one rank of several its part of the whole batch's loss."""
    reduce = None if world is None or world.size == 1 else world.sum
    return DetectionLoss(model, gains.scaled(model.num_classes, img, len(model.stride_px)), reduce)


def add_teacher(
    loss: DetectionLoss, network: Network, teacher: str, gains: DistillGains, device: torch.device
) -> DistillationLoss:
    """The loss with the distance to the checkpoint ``teacher`` added, whose gates are folded."""
    existing_file(teacher, "the checkpoint of --teacher, which a resumed run needs too")
    known = read_network(teacher)
    if known.names != network.names:
        raise EngineError(
            f"--teacher {teacher}: its classes are {', '.join(known.names[:5])} ({len(known.names)} in all), the "
            f"student's {', '.join(network.names[:5])} ({len(network.names)}); expected the same in the same order"
        )
    model = slim.fold_gates(known.model).to(device, memory_format=torch.channels_last)
    return DistillationLoss(loss, model, gains)


def freeze_layers(model: nn.Module, layers: Sequence[str]) -> Frozen | None:
    """Freeze layers of a YOLO; None where there is nothing to freeze.

    One number is a count of layers from the first on; several are indices, and all else are patterns of module paths.
    """
    count = len(model.model)
    first = len(layers) == 1 and layers[0].isdecimal()
    highest = count if first else count - 1
    for number in filter(str.isdecimal, layers):
        if int(number) > highest:
            what = "a number of layers" if first else "the index of a layer"
            raise EngineError(f"--freeze {number}: expected {what} from 0 to {highest}, or the path of a module")
    numbered = [str(i) for i in range(int(layers[0]))] if first else layers
    patterns = [f"model.{layer}" if layer.isdecimal() else layer for layer in numbered]
    return freeze(model, patterns) if patterns else None


def training_loss(
    model: nn.Module, config: DataConfig, img: int, batch_size: int, seed: int
) -> tuple[Iterator[Any], Callable[[nn.Module, Any], Tensor]]:
    """Shuffled batches of the training split, not augmented, and the loss of a model on one of them (default gains)."""
    loader = build_loader(DetectionDataset(config, "train", img), batch_size, shuffle=True, seed=seed)
    criterion = make_loss(model, LossGains(), img)

    def loss(network: nn.Module, batch: Any) -> Tensor:
        # In evaluation mode the head gives (decoded, raw maps).
        device = next(network.parameters()).device
        _, raw = network(batch.images.to(device).float() / 255)
        return criterion(raw, batch.targets)[0]

    return iter(loader), loss


def training_images(config: DataConfig, img: int, batch_size: int, batches: int, seed: int) -> Iterator[Tensor]:
    """Shuffled training images, augmented as in training: float [B, 3, img, img]."""
    dataset = DetectionDataset(config, "train", img, Augment(), seed)
    for batch in itertools.islice(build_loader(dataset, batch_size, shuffle=True, seed=seed), batches):
        yield batch.images.float() / 255


class Evaluator:
    """AP of a network on one split; ``last`` is the newest result.

    With ``rect_stride_px``, the network's largest stride, images of like shape share batches without much padding:
    fewer pixels, and an AP that differs a little, since the network sees other borders. With ``canvas_hw`` all images
    have that height and width.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        *,
        batch_size: int,
        workers: int,
        device: torch.device,
        conf: float = 0.001,
        iou: float = 0.65,
        rect_stride_px: int | None = None,
        canvas_hw: tuple[int, int] | None = None,
    ) -> None:
        self.loader = build_loader(
            dataset, batch_size, shuffle=False, workers=workers, rect_stride_px=rect_stride_px, canvas_hw=canvas_hw
        )
        self.ground_truth = dataset.ground_truth()
        self.dataset, self.device = dataset, device
        self.conf, self.iou = conf, iou
        self.last: Evaluation | None = None

    def __call__(self, model: nn.Module, postprocess: Callable[[Tensor], list[Tensor]] | None = None) -> Evaluation:
        """AP of a network; ``postprocess`` instead of this class's own, for one that gives no [B, N, 5 + classes]."""
        model.to(self.device)
        final = postprocess or self.postprocess
        self.last = evaluate(model, self.loader, final, self.ground_truth, self.dataset.names, self.device)
        return self.last

    def postprocess(self, decoded: Tensor) -> list[Tensor]:
        """Multi-label detections as pycocotools wants them: low threshold, at most 300 an image."""
        return non_max_suppression(decoded, self.conf, self.iou, max_detections=300, multi_label=True)


def draw_networks(
    networks: Mapping[str, nn.Module],
    dataset: DetectionDataset,
    count: int = 4,
    canvas_hw: tuple[int, int] | None = None,
    postprocess: Callable[[Tensor], list[Tensor]] = non_max_suppression,
) -> dict[str, list[Tensor]]:
    """The first images with each network's detections, uint8 [3, img, img] each; the networks are left on the CPU.

    ``canvas_hw`` and ``postprocess`` as for the ``Evaluator``.
    """
    images = real_images(dataset, count, canvas_hw)
    drawn = {}
    for title, model in networks.items():
        with slim.evaluation_mode(model.cpu()), torch.no_grad():
            found = postprocess(model(images)[0])
        drawn[title] = [
            draw_detections((image * 255).byte(), boxes, dataset.names)
            for image, boxes in zip(images, found, strict=True)
        ]
    return drawn


def real_images(dataset: DetectionDataset, count: int, canvas_hw: tuple[int, int] | None = None) -> Tensor:
    """The first images as a network input, float [count, 3, img, img], or of the height and width of ``canvas_hw``."""
    count = min(count, len(dataset))
    return torch.stack([dataset[Draw(i, canvas_hw)].image for i in range(count)]).float() / 255


def so_many_images(dataset: DetectionDataset, count: int, sides_px: tuple[int, int]) -> Tensor:
    """As ``real_images``, again from the first where there are too few."""
    found = real_images(dataset, count, sides_px)
    return found[torch.arange(count) % len(found)]
