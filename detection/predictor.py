"""A detector for programs of one's own: images in, boxes out."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data.images import pixels_of, read_image
from deploy import Engine, RuntimePrecision
from models import NmsSettings
from slim import SlimError

from .detector import SIDE_PX, Detector, open_detector


@dataclass(frozen=True)
class Detections:
    """What was found in an image, the most certain first.

    Attributes:
        boxes_xyxy: [n, 4] left, top, right, bottom in pixels of the image
        scores: [n] 0..1
        classes: [n] indices of the network's classes
        names: the name of each one's class
    """

    boxes_xyxy: Tensor
    scores: Tensor
    classes: Tensor
    names: list[str]


class Predictor:
    """A network that stays open; see ``load``.

    Attributes:
        names: the names of its classes
        detector: the network under its engine
    """

    def __init__(self, detector: Detector, img: Sequence[int], closing: ExitStack) -> None:
        self.detector, self.names = detector, detector.names
        self._canvas = detector.canvas(img)
        self.close = weakref.finalize(self, closing.close)

    def predict(
        self,
        image: str | Path | NDArray[Any] | Image.Image | Tensor,
        *,
        conf: float = NmsSettings.conf,
        iou: float = NmsSettings.iou,
        max_det: int = NmsSettings.max_det,
        classes: Sequence[int | str] = (),
    ) -> Detections:
        """Detect in one image as ``detect.py`` does.

        Args:
            image: a file's path, a Pillow image, a uint8 array [H, W, 3] of red, green and blue (OpenCV's order is the
                reverse, ``image[..., ::-1]``) or [H, W] of grey, or a uint8 tensor [3, H, W]
            conf: the lowest score
            iou: overlap above which the less certain of two boxes of a class goes
            max_det: the largest number of detections
            classes: names or indices of those to keep; all where empty

        Raises:
            SlimError: an array of another type or shape, a class that the network does not know
            DataError: a file that cannot be read

        Examples:
            >>> import detection
            >>> detection.load("yolov5n.pt").predict("bus.jpg").names  # doctest: +SKIP
            ['person', 'bus', 'person', 'person']
        """
        pixels, geometry = self._canvas.letterbox(_as_pixels(image))
        (found,) = self.detector.detections(
            self.detector(pixels[None]),
            conf=conf,
            iou=iou,
            max_detections=max_det,
            classes=self.detector.class_numbers(classes),
        )
        kinds = found[:, 5].long()
        boxes = geometry.to_original(found[:, :4])
        return Detections(boxes, found[:, 4], kinds, [self.names[kind] for kind in kinds.tolist()])


def load(
    weights: str | Path,
    engine: Engine | None = None,
    *,
    img: int | Sequence[int] = (),
    num_cores: int = 0,
    precision: RuntimePrecision = "auto",
    names: Sequence[str] = (),
    trust: bool = False,
) -> Predictor:
    """Open a checkpoint or an exported file to detect with.

    Args:
        weights: a checkpoint (ours or a published YOLOv5 ``.pt``) or an exported file (``.onnx``, ``.xml``, ``.torchscript``)
        engine: torch, onnxruntime or openvino, for which a checkpoint is exported first; else that of the file's kind
        img: the side in pixels that the longer side of an image gets, or height and width; else the file's own, or 640
        num_cores: threads, 0 for all
        precision: what the engine computes in
        names: the classes of an exported file that does not name them
        trust: run a TorchScript file, a program, of which no digest of our export says that it is what was written

    Raises:
        SlimError: a file that is no detector, or that the engine does not run

    Examples:
        >>> import detection
        >>> found = detection.load("slim.onnx").predict("bus.jpg")  # doctest: +SKIP
        >>> found.boxes_xyxy, found.scores, found.names  # doctest: +SKIP
    """
    sides = (img,) if isinstance(img, int) else tuple(img)
    height, width = (sides[0], sides[-1]) if sides else (SIDE_PX, SIDE_PX)
    noise = torch.randint(256, (1, 3, height, width), generator=torch.Generator().manual_seed(0)) / 255
    closing = ExitStack()
    opened = open_detector(
        str(weights), engine, num_cores=num_cores, precision=precision, images=noise, names=names, trust=trust
    )
    return Predictor(closing.enter_context(opened), sides, closing)


def _as_pixels(image: str | Path | NDArray[Any] | Image.Image | Tensor) -> Tensor:
    """Any kind of image as uint8 [3, H, W], red, green and blue."""
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        return pixels_of(image)
    pixels = image if isinstance(image, Tensor) else torch.from_numpy(image.copy())
    if not isinstance(image, Tensor):
        pixels = pixels[..., None].expand(-1, -1, 3) if pixels.ndim == 2 else pixels
        pixels = pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or len(pixels) != 3:
        wanted = "[3, H, W]" if isinstance(image, Tensor) else "[H, W, 3]"
        raise SlimError(f"an image of {image.dtype} {list(image.shape)}, expected uint8 {wanted}; convert it to that")
    return pixels
