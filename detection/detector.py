"""A detector under any engine: a checkpoint or an exported file, from images to boxes."""

from __future__ import annotations

import ast
import copy
import functools
import io
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import slim
from data.images import Canvas
from deploy import (
    SUFFIX_FOR,
    SUFFIXES,
    Decoded,
    Engine,
    EngineNetwork,
    RuntimePrecision,
    network_file,
    open_exported,
    threads_of,
    torch_threads,
)
from deploy.network import read_list
from engine import Evaluation
from models import fuse_norms, non_max_suppression
from slim import SlimError

from .evaluator import AsModel, Evaluator
from .network import Network, check_image_size, check_side, read_network
from .write_file import metadata_of, write_file

SIDE_PX = 640
"""The size that pictures are scaled to where nobody says."""
_STRIDE_PX = 32
"""Where a file does not say: that of YOLOv5's networks for 640 pixels."""


class TorchNetwork(EngineNetwork):
    """A checkpoint's network in torch's eager mode, its boxes decoded; results are on the CPU.

    Args:
        network: the network; a copy of it runs
        weights: its file
        precision: what it computes in; ``auto`` is float32
        device: the CPU where none is given
        as_trained: keep gates and batch norms as modules of their own instead of folding them, as exports do
    """

    engine = "torch"

    def __init__(
        self,
        network: Network,
        weights: str = "",
        precision: RuntimePrecision = "auto",
        device: torch.device | None = None,
        as_trained: bool = False,
    ) -> None:
        name = "float32" if precision == "auto" else precision
        super().__init__(Path(weights), metadata_of(network), (None,) * 4, takes_bytes=False, precision=name)
        self.bytes_on_disk = min(self.bytes_on_disk, weight_bytes(network.model))  # without training state
        self.kind = getattr(torch, name)
        model = copy.deepcopy(network.model).cpu().eval()
        model = model if as_trained else fuse_norms(slim.fold_gates(model))
        self.network = Decoded(model).to(device or torch.device("cpu"), self.kind).eval()

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.network(self.as_taken(images.to(self.device)).to(self.kind))
        return output.float().cpu()


def weight_bytes(model: nn.Module) -> int:
    """The size of a file of a network's weights alone."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return len(file.getbuffer())


@dataclass(frozen=True)
class Detector:
    """A network under an engine and what its metadata say of it.

    ``weights`` is the file as the user named it. ``network`` takes images [B, 3, H, W], uint8 or float 0..1, and gives
    [B, N, 5 + classes], or where ``has_nms`` its final detections [B, D, 6].
    """

    weights: str
    network: EngineNetwork
    names: list[str]
    stride_px: int
    has_nms: bool

    @classmethod
    def of(cls, weights: str, network: EngineNetwork, names: Sequence[str] = ()) -> Detector:
        """Read the metadata; SlimError where they are not those of a detector.

        Classes that they do not name are ``names``, or without these class0, class1 and so on, as YOLOv5 calls them.
        """
        try:
            known = ast.literal_eval(network.metadata.get("names", "[]"))
            own = [str(name) for name in (known.values() if isinstance(known, dict) else known)]
            stride = int(float(network.metadata.get("stride", _STRIDE_PX)))
            nms = json.loads(network.metadata.get("nms", "null"))
        except (ValueError, SyntaxError, TypeError) as error:
            raise SlimError(
                f"{weights}: its metadata do not name its classes and its stride ({error!r}); expected a detector as "
                "export.py or YOLOv5's own export writes it"
            ) from error
        names = own or list(names) or [f"class{i}" for i in range((network.columns or 0) - 5)]
        if not names:
            raise SlimError(
                f"{weights}: its metadata name no classes; add --names, the classes or a data.yaml with them"
            )
        if nms is None and network.columns not in (None, 5 + len(names)):
            raise SlimError(
                f"{weights}: its boxes have {network.columns} values each, expected {5 + len(names)}: x, y, width, height, "
                f"objectness and {len(names)} classes ({', '.join(names[:5])}); give the classes that it was trained for"
            )
        return cls(weights, network, names, stride, nms is not None)

    @property
    def engine(self) -> Engine:
        return self.network.engine

    @property
    def precision(self) -> str:
        """What it computes in: float32, bfloat16, or int8 where a part of it is quantised."""
        return self.network.precision

    @property
    def precision_text(self) -> str:
        """The same, of a quantised network with that of its other layers, unless that is float32."""
        floating = getattr(self.network, "floating_precision", "float32")
        return self.precision if floating in ("float32", self.precision) else f"{self.precision} + {floating}"

    @property
    def sides_px(self) -> tuple[int, int] | None:
        """The only (height, width) that it takes; None where any multiples of ``stride_px`` will do."""
        height, width = self.network.input_shape[2:]
        return None if height is None or width is None else (height, width)

    @property
    def activation(self) -> str:
        """The name of its activation, '' where the file does not say."""
        return self.network.metadata.get("activation", "")

    @property
    def params(self) -> int | None:
        """The number of its parameters, None where the file does not say."""
        text = self.network.metadata.get("params", "")
        return int(text) if text.isdecimal() else None

    def macs(self, sides_px: tuple[int, int]) -> int | None:
        """The multiply-accumulates of an image of a size, with whose area they go; None where the file does not say."""
        text, made_for = self.network.metadata.get("macs", ""), read_list(self.network.metadata, "imgsz")
        if not text.isdecimal() or len(made_for) != 2:
            return None
        return int(text) * sides_px[0] * sides_px[1] // (made_for[0] * made_for[1])

    def facts(self, sides_px: tuple[int, int]) -> dict[str, Any]:
        """What ``metrics.json`` says of it, for images of a size."""
        return {
            "params": self.params,
            "macs": self.macs(sides_px),
            "engine": self.engine,
            "precision": self.precision,
            "bytes": self.network.bytes_on_disk,
        }

    def describe(self, sides_px: tuple[int, int]) -> str:
        """The same in a line."""
        parts = [self.engine, self.precision, f"{self.network.bytes_on_disk / 1e6:.2f} MB"]
        parts.append(f"{sides_px[0]} x {sides_px[1]} pixels")
        macs = self.macs(sides_px)
        if macs is not None and self.params is not None:
            parts.append(f"{macs / 1e6:.1f} M MACs, {self.params / 1e6:.3f} M parameters")
        end = "; AP is at the threshold and IoU inside of the file" if self.has_nms else ""
        return ", ".join(parts) + end

    def canvas(self, img: Sequence[int] = ()) -> Canvas:
        """What pictures are scaled to: one side or height and width, else the file's own or 640; SlimError as ``check_sides``."""
        fixed = self.sides_px
        sides = (img[0], img[-1]) if img else fixed or (SIDE_PX, SIDE_PX)
        self.check_sides(sides)
        return Canvas(sides, self.stride_px if fixed is None and len(img) < 2 else None)

    def class_numbers(self, words: Sequence[int | str]) -> list[int] | None:
        """The numbers of classes by name or number; None for all. SlimError for one that it does not know."""
        found = []
        for word in words:
            number = (
                self.names.index(str(word)) if str(word) in self.names else int(word) if str(word).isdecimal() else -1
            )
            if not 0 <= number < len(self.names):
                raise SlimError(
                    f"--classes {word}: {self.weights} knows {', '.join(self.names[:5])}"
                    f"{' ...' if len(self.names) > 5 else ''}; expected one of these names or 0 to {len(self.names) - 1}"
                )
            found.append(number)
        return found or None

    def __call__(self, images: Tensor) -> Tensor:
        """The network's output for images [B, 3, H, W], uint8 or float 0..1."""
        with torch.no_grad():
            output: Tensor = self.network(images)
        return output

    def detections(
        self,
        output: Tensor,
        *,
        conf: float = 0.25,
        iou: float = 0.45,
        max_detections: int = 300,
        multi_label: bool = False,
        classes: Sequence[int] | None = None,
        class_agnostic: bool = False,
    ) -> list[Tensor]:
        """An output's boxes, per image [n, 6]: x1, y1, x2, y2 in pixels of the input, score, class; the best first.

        Of a network that has its suppression inside only ``conf`` and ``classes`` still choose.
        """
        if not self.has_nms:
            return non_max_suppression(output, conf, iou, max_detections, multi_label, classes, class_agnostic)
        kept = [rows[rows[:, 4] > conf] for rows in output]
        if classes is not None:
            wanted = torch.tensor(list(classes))
            kept = [rows[torch.isin(rows[:, 5].long(), wanted)] for rows in kept]
        return [rows[:max_detections] for rows in kept]

    def evaluate(self, evaluator: Evaluator) -> Evaluation:
        """AP; of a network that has its suppression inside at that one's threshold and IoU."""

        def final(output: Tensor) -> list[Tensor]:
            return self.detections(
                output, conf=evaluator.conf, iou=evaluator.iou, max_detections=evaluator.max_det, multi_label=True
            )

        return evaluator(AsModel(self.network), final)

    def check_sides(self, sides_px: tuple[int, int]) -> None:
        """Raise SlimError for images of another height and width than the network takes."""
        if self.sides_px not in (None, sides_px):
            height, width = self.sides_px
            raise SlimError(
                f"{self.weights}: takes images of {height} x {width} pixels, {sides_px[0]} x {sides_px[1]} were asked for; "
                "give that --img, or export with another size or --dynamic"
            )
        for side in sides_px:
            check_side(side, self.stride_px)


@contextmanager
def open_detector(
    weights: str,
    engine: Engine | None = None,
    *,
    num_cores: int = 0,
    at_once: int = 1,
    precision: RuntimePrecision = "auto",
    images: Tensor | None = None,
    device: torch.device | None = None,
    as_trained: bool = False,
    names: Sequence[str] = (),
    trust: bool = False,
) -> Iterator[Detector]:
    """Open a checkpoint or an exported file under an engine; without one, under that of its kind.

    Args:
        weights: the file
        engine: what runs it. A checkpoint is exported to a temporary folder for another engine than torch
        num_cores: threads, 0 for all; under torch they are the whole process's until the end
        at_once: calls from as many threads, which share ``num_cores``
        precision: what the engine computes in
        images: [B, 3, H, W], real ones, 0..1 in steps of 1/255: a checkpoint's export takes their size, and must equal
            torch on them
        device: of a checkpoint under torch
        as_trained: a checkpoint under torch keeps its gates and batch norms
        names: the classes of an exported file that does not name them
        trust: run a TorchScript file, a program, of which no digest of our export says that it is what was written
    """
    with ExitStack() as stack:
        path = network_file(weights)
        if not is_exported(weights) and engine not in (None, "torch"):
            if images is None:
                raise SlimError(f"{weights}: --engine {engine} runs exported files; write one with export.py first")
            path = Path(stack.enter_context(TemporaryDirectory())) / f"network{SUFFIX_FOR[engine]}"
            source = read_network(weights)
            for side in images.shape[2:]:
                check_image_size(source.model, side)
            write_file(source, path, images)
        network: EngineNetwork
        if is_exported(path):
            network = open_exported(
                path, engine, num_cores=num_cores, precision=precision, at_once=at_once, trust=trust
            )
        else:
            network = TorchNetwork(read_network(weights), weights, precision, device, as_trained)
        if network.warning:
            _warn_once(network.warning)
        if network.engine == "torch":
            total = threads_of(num_cores) if num_cores else torch.get_num_threads()
            stack.enter_context(torch_threads(max(1, total // at_once)))
        yield Detector.of(weights, network, names)


@functools.cache
def _warn_once(text: str) -> None:
    """Say so once, however often a file is opened."""
    logging.getLogger(__name__).warning("warning: %s", text)


def is_exported(weights: str | Path) -> bool:
    """Whether a path names an exported file rather than a checkpoint."""
    return network_file(weights).suffix in SUFFIXES
