"""A detector under any engine: a checkpoint or an exported file, from images to boxes."""

from __future__ import annotations

import ast
import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

import slim
from deploy import SUFFIX_FOR, SUFFIXES, Decoded, ExportedNetwork, Precision, open_exported, threads_of, torch_threads
from deploy.settings import Engine
from engine import Evaluation
from models import fuse_norms, non_max_suppression
from slim import SlimError

from .evaluator import AsModel, Evaluator
from .network import Network, read_network
from .write_file import write_file


@dataclass(frozen=True)
class Detector:
    """A network under an engine, and what it says of itself.

    ``network`` takes images [B, 3, H, W], uint8 or float 0..1, and gives [B, N, 5 + classes], or where ``has_nms`` its
    final detections [B, D, 6]. ``sides_px`` (height, width) is the only size that it takes, None where any multiple of
    ``stride_px`` will do. ``precision`` is what it computes in: float32, bfloat16 or int8.
    """

    weights: str
    engine: Engine
    precision: str
    network: nn.Module
    names: list[str]
    stride_px: int
    sides_px: tuple[int, int] | None
    has_nms: bool
    file_bytes: int

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

    def check_sides(self, sides_px: tuple[int, int]) -> None:
        """SlimError for images of another height and width than the network takes."""
        if self.sides_px not in (None, sides_px):
            height, width = self.sides_px
            raise SlimError(
                f"{self.weights}: takes images of {height} x {width} pixels, {sides_px[0]} x {sides_px[1]} were asked for; "
                "give that --img, or export with another size or --dynamic"
            )
        if any(side < self.stride_px or side % self.stride_px for side in sides_px):
            raise SlimError(
                f"--img {sides_px[0]} x {sides_px[1]}: expected multiples of the largest stride, {self.stride_px}"
            )


@contextmanager
def open_detector(
    weights: str,
    engine: Engine | None = None,
    *,
    num_cores: int = 0,
    at_once: int = 1,
    precision: Precision = "auto",
    images: Tensor | None = None,
    device: torch.device | None = None,
) -> Iterator[Detector]:
    """A checkpoint or an exported file under an engine; without one, under that of its kind.

    A checkpoint under another engine than torch is exported for it to a temporary folder, with ``images`` [B, 3, H, W]
    (real ones, 0..1 in steps of 1/255), which give the size and on which it must equal torch. ``num_cores``: threads,
    0 for all, shared by ``at_once`` calls from as many threads; under torch they are the whole process's until the end.
    ``device`` is for checkpoints under torch.
    """
    with ExitStack() as stack:
        path = Path(weights)
        if not is_exported(weights):
            network = read_network(weights)
            if engine is not None and engine != "torch":
                if images is None:
                    raise SlimError(f"{weights}: --engine {engine} runs exported files; write one with export.py first")
                folder = stack.enter_context(TemporaryDirectory())
                path = Path(folder) / f"network{SUFFIX_FOR[engine]}"
                write_file(network, path, images)
        if is_exported(str(path)):
            exported = open_exported(path, engine, num_cores=num_cores, precision=precision, at_once=at_once)
            detector = of_file(weights, exported)
        else:
            detector = of_checkpoint(weights, network, precision, device or torch.device("cpu"))
        if detector.engine == "torch":
            total = threads_of(num_cores) if num_cores else torch.get_num_threads()
            stack.enter_context(torch_threads(max(1, total // at_once)))
        yield detector


def is_exported(weights: str) -> bool:
    """Whether a path names an exported file rather than a checkpoint."""
    return Path(weights).suffix in SUFFIXES


def evaluate_detector(detector: Detector, evaluator: Evaluator) -> Evaluation:
    """AP; of a network that has its suppression inside at that one's threshold and IoU."""

    def final(output: Tensor) -> list[Tensor]:
        return detector.detections(
            output, conf=evaluator.conf, iou=evaluator.iou, max_detections=evaluator.max_det, multi_label=True
        )

    return evaluator(AsModel(detector.network), final)


def of_file(weights: str, network: ExportedNetwork) -> Detector:
    """The detector of an exported file; its metadata say which classes it has."""
    metadata = network.metadata
    try:
        names = [str(name) for name in ast.literal_eval(metadata["names"]).values()]
        stride = int(float(metadata["stride"]))
        nms = json.loads(metadata.get("nms", "null"))
    except (KeyError, ValueError, SyntaxError, AttributeError) as error:
        raise SlimError(
            f"{weights}: its metadata do not name its classes and its stride ({error!r}); expected a detector as export.py "
            "or YOLOv5's own export writes it"
        ) from error
    height, width = network.input_shape[2:]
    return Detector(
        weights=weights,
        engine=network.engine,
        precision=network.precision,
        network=network,
        names=names,
        stride_px=stride,
        sides_px=(height, width) if height is not None and width is not None else None,
        has_nms=nms is not None,
        file_bytes=network.bytes_on_disk,
    )


def of_checkpoint(weights: str, network: Network, precision: Precision, device: torch.device) -> Detector:
    """The detector of a checkpoint in torch's eager mode: gates folded, batch norms fused."""
    eager = Eager.of(network.model, precision, device)
    return Detector(
        weights=weights,
        engine="torch",
        precision=eager.precision,
        network=eager,
        names=network.names,
        stride_px=max(network.model.stride_px),
        sides_px=None,
        has_nms=False,
        file_bytes=Path(weights).stat().st_size,
    )


class Eager(nn.Module):
    """A network in torch that takes bytes as well as floats, and gives float32."""

    def __init__(self, network: nn.Module, kind: torch.dtype) -> None:
        super().__init__()
        self.network, self.kind = network, kind

    @classmethod
    def of(cls, model: nn.Module, precision: Precision, device: torch.device | None = None) -> Eager:
        """A copy of a detector in evaluation mode: gates folded, batch norms fused, boxes decoded."""
        kind = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
        fused = fuse_norms(slim.fold_gates(copy.deepcopy(model).cpu()).eval())
        return cls(Decoded(fused).to(device or torch.device("cpu"), kind), kind).eval()

    @property
    def precision(self) -> str:
        return str(self.kind).removeprefix("torch.")

    def forward(self, images: Tensor) -> Tensor:
        device = next(self.network.parameters()).device
        images = images.to(device)
        scaled = (images / 255 if images.dtype == torch.uint8 else images).to(self.kind)
        output: Tensor = self.network(scaled)
        return output.float().cpu()
