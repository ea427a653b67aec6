"""Slim a torchvision segmentation network, LR-ASPP on MobileNetV3, in two rounds, and keep it in a file.

    python examples/segmentation.py --out lraspp.pt

It draws its own data, discs and squares on noise, and takes under a minute on one core. The file holds the structure beside the
weights: ``slim.load(path, build)`` makes the narrow network of it, on any machine. For your own network, replace ``draw`` and
``build``.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

import slim

CLASSES = ("background", "disc", "square")
SIZE_PX, BATCH, LR, LAST_RATE = 64, 8, 0.002, 0.3


def build(settings: dict[str, Any]) -> nn.Module:
    """The dense network, from what the checkpoint keeps of it."""
    network: nn.Module = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, **settings)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # its own 0.01 needs longer trainings than this one
    return network


def draw(images: int, seed: int) -> tuple[Tensor, Tensor]:
    """A disc and a square in noise: images [n, 3, size, size] and the class of each pixel [n, size, size]."""
    random = torch.Generator().manual_seed(seed)
    pixels = torch.rand(images, 3, SIZE_PX, SIZE_PX, generator=random)
    classes = torch.zeros(images, SIZE_PX, SIZE_PX, dtype=torch.long)
    row, column = torch.meshgrid(torch.arange(SIZE_PX), torch.arange(SIZE_PX), indexing="ij")
    for image in range(images):
        for number in (1, 2):
            y, x, radius = (
                torch.rand(3, generator=random) * torch.tensor([40, 40, 8]) + torch.tensor([12, 12, 8])
            ).tolist()
            down, right = (row - y).abs(), (column - x).abs()
            inside = down.square() + right.square() < radius**2 if number == 1 else torch.maximum(down, right) < radius
            classes[image][inside] = number
            pixels[image, number, inside] += 0.5  # discs are green, squares blue
    return pixels, classes


def train(model: nn.Module, data: tuple[Tensor, Tensor], epochs: int, sparsity: slim.L1Step | None = None) -> None:
    """Adam, its rate falling in a line to ``LAST_RATE`` times ``LR``. If you add weight decay, then not on the gates."""
    images, classes = data
    optimizer = torch.optim.Adam(model.parameters(), LR)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, LAST_RATE, epochs * (len(images) // BATCH))
    model.train()
    for epoch in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
            optimizer.zero_grad()
            loss = cross_entropy(model(images[batch])["out"], classes[batch])
            loss.backward()
            optimizer.step()
            if sparsity is not None:
                sparsity.step(optimizer.param_groups[0]["lr"])
            schedule.step()
        closed = "" if sparsity is None else f", {sparsity.closed_share():.0%} of the gates closed"
        print(f"  epoch {epoch + 1} of {epochs}: loss {loss.item():.3f}{closed}")
    model.eval()


@torch.no_grad()
def mean_iou(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Intersection over union of the pixels of a class, its mean over the classes, 0..1."""
    images, truth = data
    found = torch.cat([model(batch)["out"].argmax(1) for batch in images.split(BATCH)])
    ious = [((found == c) & (truth == c)).sum() / ((found == c) | (truth == c)).sum() for c in range(len(CLASSES))]
    return torch.stack(ious).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep-macs", type=float, default=0.4, help="share of the MACs to keep, after all rounds")
    parser.add_argument("--rounds", type=int, default=2, help="of sparse training, cut and fine-tuning")
    parser.add_argument("--epochs", type=int, default=3, help="of each training; the dense one takes twice as many")
    parser.add_argument("--images", type=int, default=128, help="to train on")
    parser.add_argument("--out", default="lraspp.pt", help="the file to write")
    args = parser.parse_args()
    torch.manual_seed(0)
    training, test = draw(args.images, seed=1), draw(128, seed=2)
    settings = {"num_classes": len(CLASSES)}

    network = build(settings)
    print("dense")
    train(network, training, 2 * args.epochs)
    dense_macs, dense_iou = slim.cost(network, test[0][:1]).macs, mean_iou(network, test)

    steps = args.epochs * (args.images // BATCH)
    strength = slim.strength_for(total_lr=steps * LR * (1 + LAST_RATE) / 2, travel=4)
    keep = args.keep_macs ** (1 / args.rounds)  # each round keeps the same share of what the last one left
    for number in range(1, args.rounds + 1):
        print(f"round {number}: sparse training")
        graph = slim.trace(network, test[0][:1])
        slim.add_gates(network, graph)
        train(network, training, args.epochs, slim.BudgetL1(network, graph, macs=keep, strength=strength, steps=steps))
        plan = slim.make_plan(graph, slim.score(network, graph, "gate"), macs=keep, cost_aware=True)
        pruned = slim.apply_plan(network, plan)
        print(f"round {number}: pruned = masked, {slim.prove(slim.mask(network, plan), pruned, test[0][:16])}")
        cut_iou = mean_iou(pruned, test)
        print(f"round {number}: fine-tuning")
        network = slim.fold_gates(pruned)
        train(network, training, args.epochs)
        macs, iou = slim.cost(network, test[0][:1]).macs, mean_iou(network, test)
        print(
            f"round {number}: {macs / dense_macs:.0%} of the MACs, IoU {cut_iou:.3f} after the cut, {iou:.3f} fine-tuned"
        )

    slim.save(network, args.out, build=settings)
    again = slim.load(args.out, build).eval()
    print(f"{args.out}: differs from the network in memory by {slim.max_difference(network, again, test[0]):.1e}")
    print(f"MACs {dense_macs:,} -> {macs:,}; IoU {dense_iou:.3f} -> {iou:.3f}")


if __name__ == "__main__":
    main()
