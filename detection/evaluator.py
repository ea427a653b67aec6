"""AP of networks on a split, and pictures of what they detect."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

import slim
from data import DetectionDataset, build_loader
from data.dataset import Draw
from engine import Evaluation, evaluate
from models import non_max_suppression
from tracking import Painter, draw_detections, drawn_by, save_png, side_by_side

from .datasets import real_images


class Evaluator:
    """AP of a network on one split.

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
        max_det: int = 300,
        rect_stride_px: int | None = None,
        canvas_hw: tuple[int, int] | None = None,
    ) -> None:
        dataset.check_objects()
        self.loader = build_loader(
            dataset, batch_size, shuffle=False, workers=workers, rect_stride_px=rect_stride_px, canvas_hw=canvas_hw
        )
        self.ground_truth = dataset.ground_truth()
        self.dataset, self.device = dataset, device
        self.conf, self.iou, self.max_det = conf, iou, max_det

    def __call__(self, model: nn.Module, postprocess: Callable[[Tensor], list[Tensor]] | None = None) -> Evaluation:
        """AP of a network; ``postprocess`` instead of this class's own, for one that gives no [B, N, 5 + classes]."""
        model.to(self.device)
        final = postprocess or self.postprocess
        return evaluate(model, self.loader, final, self.ground_truth, self.dataset.names, self.device)

    def postprocess(self, decoded: Tensor) -> list[Tensor]:
        """Multi-label detections as pycocotools wants them: low threshold, several classes a box."""
        return non_max_suppression(decoded, self.conf, self.iou, max_detections=self.max_det, multi_label=True)


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


def draw_side_by_side(networks: Mapping[str, nn.Module], dataset: DetectionDataset, path: Path) -> Tensor:
    """The pictures of ``draw_networks``, a column a network, uint8 [3, H, W]; they are written to a file, too."""
    picture = side_by_side(draw_networks(networks, dataset))
    save_png(picture, path, drawn_by(draw_networks, draw_detections, Painter, side_by_side))
    return picture


def draw_truth(dataset: DetectionDataset, count: int = 4, canvas_hw: tuple[int, int] | None = None) -> list[Tensor]:
    """The same images as the network sees them with their labels, uint8 [3, H, W] each."""
    tiles = []
    for i in range(min(count, len(dataset))):
        sample = dataset[Draw(i, canvas_hw)]
        height, width = sample.image.shape[1:]
        boxes = box_convert(sample.targets[:, 1:], "cxcywh", "xyxy") * torch.tensor([width, height, width, height])
        labels = torch.cat([boxes, torch.ones(len(boxes), 1), sample.targets[:, :1]], 1)
        tiles.append(draw_detections(sample.image, labels, dataset.names, scores=False))
    return tiles


class AsModel(nn.Module):
    """A network [B, N, 5 + classes] as a detector in evaluation mode gives it: with no raw maps."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.network(images), []
