"""Where models, data, engine and slim meet: networks from files, data sets for them, evaluation and checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import slim
from data import Augment, DataConfig
from engine import TRAINING_STATE_KEY, Frozen, World, freeze, seed_generators
from models import (
    YOLO,
    LossGains,
    ModelError,
    build_model,
    has_activation,
    imported_from,
    load_description,
    read_checkpoint,
    reinitialise,
    renew_head,
    swap_activations,
    transfer_weights,
    unfused,
)
from slim import SlimError
from slim.checkpoint import checked, is_ours
from slim.graph import LayerCost
from tracking.stages import Stages, stages_of


@dataclass
class Network:
    """A detector and what it takes to build it again; ``build`` is plain data."""

    model: YOLO
    build: dict[str, Any]
    note: str = ""
    new_head: bool = False
    """Whether its head has yet to learn the data set's classes: from scratch, or trained for classes of other names."""

    @property
    def names(self) -> list[str]:
        return list(self.build["names"])

    @property
    def augment(self) -> Augment:
        """How its training images were augmented; the defaults where its checkpoint does not say."""
        return Augment(**self.build.get("augment", {}))

    @property
    def gains(self) -> LossGains:
        """The weights of its loss's parts; the defaults where its checkpoint does not say."""
        return LossGains(**self.build.get("gains", {}))

    def trained_with(self, augment: Augment, gains: LossGains) -> None:
        """Note how it is trained, for cuts of its checkpoints; changes ``build``."""
        self.build |= {"augment": asdict(augment), "gains": asdict(gains)}


def build_network(build: Mapping[str, Any]) -> YOLO:
    """The dense network of a checkpoint's ``build`` entry (``slim.load``'s builder)."""
    return build_model(build["description"], build["num_classes"])


def make_build(model: YOLO, names: Sequence[str]) -> dict[str, Any]:
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
    path = Path(path)
    content = read_checkpoint(path)
    if not is_ours(content):
        return imported_network(content, path)
    build = checked(content, str(path))["build"]
    if build.get("kind") != "yolov5":
        raise SlimError(f"{path}: a slim checkpoint of another kind of network; expected a YOLOv5 of this project")
    return checked_network(Network(slim.restore(content, build_network, str(path)), build), path)


def imported_network(content: Any, path: Path) -> Network:
    """A published YOLOv5 ``.pt``, of which ``content`` was read."""
    imported = imported_from(content, path)
    try:
        model = build_model(imported.description)
        state = unfused(model, imported.state_dict)
        report = transfer_weights(model, state)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    wrong = [reason for reason in report.skipped if "num_batches_tracked" not in reason]
    if wrong:
        raise ModelError(
            f"{path}: its weights are not those of the network that its YAML describes ({wrong[0]}, {len(wrong)} in all); "
            "expected a YOLOv5 detector as its training saved it"
        )
    note = str(report)
    if state.keys() != imported.state_dict.keys():
        note += "\nbatch norms: fused before it was saved, their statistics are lost; to train, take the file from before that"
    names = imported.names or [f"class{i}" for i in range(model.num_classes)]
    return checked_network(Network(model, make_build(model, names), note), path)


def checked_network(network: Network, path: Path) -> Network:
    """A network that detects as many classes as it has names, in images of three channels; SlimError for another."""
    names, count = network.build.get("names"), network.model.num_classes
    if not isinstance(names, list) or len(names) != count:
        found = f"{len(names)} names" if isinstance(names, list) else "no names"
        raise SlimError(
            f"{path}: {found} for the {count} classes that its head detects; save it again with one for each"
        )
    channels = network.model.description.get("ch", 3)
    if channels != 3:
        raise SlimError(f"{path}: takes images of {channels} channels, expected 3 (red, green, blue)")
    return network


def start_network(weights: str, cfg: str, names: Sequence[str], width_multiple: float | None = None) -> Network:
    """The network that a training starts from: ``weights`` where given, else ``cfg`` from scratch.

    Weights of other classes keep their structure and get a head for ``names``, see ``with_classes``. ``width_multiple``
    takes the place of that of ``cfg``.
    """
    if weights:
        return with_classes(read_network(weights), names)
    description = load_description(cfg)
    if width_multiple is not None:
        description = {**description, "width_multiple": width_multiple}
    model = build_model(description, len(names))
    width = "" if width_multiple is None else f" with width_multiple {width_multiple:g}"
    return Network(model, make_build(model, names), f"{cfg} from scratch{width}", new_head=True)


def from_scratch(network: Network, seed: int) -> Network:
    """The structure alone: gates folded, widths and anchors kept, all weights drawn anew as the builder draws them.

    Liu et al., "Rethinking the Value of Network Pruning" (ICLR 2019), train a pruned structure so, for as many epochs as
    the network that was pruned (scratch-E) or with as much computation (scratch-B).
    """
    model = slim.fold_gates(network.model)
    seed_generators(seed)  # reading a checkpoint draws, too: what it drew decides nothing here
    reinitialise(model)
    note = f"{network.note}\nweights: drawn anew, seed {seed}; widths and anchors are the checkpoint's".strip()
    return Network(model, network.build, note, new_head=True)


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


def choose_device(name: str, world: World | None = None) -> torch.device:
    """A torch device by its name, its GPU's number, or ``auto``; on several ranks a GPU for each. SlimError without it."""
    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{name}" if name.isdecimal() else name)
        if world is not None:
            device = world.device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().splitlines()[0]
        raise SlimError(f"--device {name}: not available ({first}); use cpu or auto") from error
    return device


def existing_file(path: str, what: str) -> Path:
    """A path that must be a file."""
    if not Path(path).is_file():
        raise SlimError(f"{path}: no such file; expected {what}")
    return Path(path)


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(existing_file(str(path), "a checkpoint").read_bytes()).hexdigest()


def example_image(img: int) -> Tensor:
    """An input to trace with, [1, 3, img, img]."""
    return torch.zeros(1, 3, img, img)


def sides_of(img: int | str) -> tuple[int, int]:
    """Height and width of an --img: one side, or both as 384x640."""
    parts = str(img).lower().split("x")
    if len(parts) > 2 or not all(part.strip().isdecimal() for part in parts):
        raise SlimError(f"--img {img}: expected one side in pixels, or height x width as in 384x640")
    return int(parts[0]), int(parts[-1])


def img_of(sides_px: tuple[int, int]) -> int | str:
    """The --img of which ``sides_of`` gives this height and width."""
    height, width = sides_px
    return height if height == width else f"{height}x{width}"


def head_path(model: YOLO) -> str:
    """The path of a detector's last module, which predicts."""
    return f"model.{len(model.model) - 1}"


def channel_stages(model: YOLO, layers: Sequence[LayerCost], img: int) -> Stages:
    """The stages of backbone and neck, for TensorBoard; the layers that predict have no channels to spare.

    ``layers`` are those of the network's ``slim.cost`` for images of ``img`` pixels.
    """
    backbone, head = len(model.description["backbone"]), head_path(model)

    def part_of(path: str) -> str | None:
        number = int(path.split(".")[1])
        return None if path.startswith(f"{head}.") else "backbone" if number < backbone else "neck"

    return stages_of(layers, img * img, part_of)


def check_image_size(model: YOLO, img: int) -> None:
    """Sizes that are no multiple of the largest stride cannot be concatenated in the neck."""
    check_side(img, max(model.stride_px))


def check_side(img: int, stride_px: int) -> None:
    """Raise SlimError for a side of an image that is no multiple of a network's largest stride."""
    if img < stride_px or img % stride_px:
        nearest = max(stride_px, round(img / stride_px) * stride_px)
        raise SlimError(
            f"--img {img}: expected a multiple of the largest stride, {stride_px}; the nearest is {nearest}"
        )


class Named(Protocol):
    """What says which classes it detects."""

    @property
    def names(self) -> list[str]: ...


def check_classes(network: Named, config: DataConfig, weights: str, data: str) -> None:
    """An evaluation with other classes than the network's would be meaningless."""
    if len(network.names) != len(config.names):
        raise SlimError(
            f"{weights}: detects {len(network.names)} classes, {data} has {len(config.names)} ({', '.join(config.names[:5])}); "
            "give the data set and the --classes or --single-cls that it was trained on, or train it on this one"
        )
    if list(config.names) != network.names and sorted(config.names) == sorted(network.names):
        raise SlimError(
            f"{weights}: its classes are in the order {', '.join(network.names[:5])}, those of {data} in the order "
            f"{', '.join(config.names[:5])}; give --classes in the network's order"
        )


def freeze_layers(model: YOLO, layers: Sequence[str]) -> Frozen | None:
    """Freeze layers of a YOLO; None where there is nothing to freeze.

    One number is a count of layers from the first on; several are indices, and all else are patterns of module paths.
    """
    count = len(model.model)
    first = len(layers) == 1 and layers[0].isdecimal()
    highest = count if first else count - 1
    for number in filter(str.isdecimal, layers):
        if int(number) > highest:
            what = "a number of layers" if first else "the index of a layer"
            raise SlimError(f"--freeze {number}: expected {what} from 0 to {highest}, or the path of a module")
    numbered = [str(i) for i in range(int(layers[0]))] if first else layers
    patterns = [f"model.{layer}" if layer.isdecimal() else layer for layer in numbered]
    return freeze(model, patterns) if patterns else None
