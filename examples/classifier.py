"""Slim a torchvision classifier, ResNet-18: gates, sparse training, cut, proof, fine-tuning, ONNX.

    python examples/classifier.py --out resnet18.onnx

It draws its own data, striped images whose class is the stripes' direction, and takes under a minute on one core. For your own
network, replace ``draw`` and the line that builds the model; the rest stays as it is.
"""

from __future__ import annotations

import argparse
import math

import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.models import resnet18

import slim

CLASSES, SIZE_PX, BATCH, LR, LAST_RATE = 4, 32, 16, 0.02, 0.3


def draw(images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Stripes in noise: images [n, 3, size, size], and which of four directions they have [n]."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % CLASSES
    angle = labels * (math.pi / CLASSES) + torch.rand(images, generator=random) * 0.4
    row, column = torch.meshgrid(torch.arange(SIZE_PX), torch.arange(SIZE_PX), indexing="ij")
    along = angle.cos()[:, None, None] * row + angle.sin()[:, None, None] * column
    period, phase = 4 + 8 * torch.rand(2, images, 1, 1, generator=random)
    colours = torch.rand(images, 3, 1, 1, generator=random)
    stripes = (along * (2 * math.pi / period) + phase).sin()[:, None] * colours
    return stripes + 0.7 * torch.randn(images, 3, SIZE_PX, SIZE_PX, generator=random), labels


def train(model: nn.Module, data: tuple[Tensor, Tensor], epochs: int, sparsity: slim.L1Step | None = None) -> None:
    """SGD, its rate falling in a line to ``LAST_RATE`` times ``LR``. If you add weight decay, then not on the gates."""
    images, labels = data
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, LAST_RATE, epochs * (len(images) // BATCH))
    model.train()
    for epoch in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
            optimizer.zero_grad()
            loss = cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            if sparsity is not None:
                sparsity.step(optimizer.param_groups[0]["lr"])
            schedule.step()
        closed = "" if sparsity is None else f", {sparsity.closed_share():.0%} of the gates closed"
        print(f"  epoch {epoch + 1} of {epochs}: loss {loss.item():.3f}{closed}")
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    images, labels = data
    return float((model(images).argmax(1) == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep-macs", type=float, default=0.3, help="share of the MACs to keep")
    parser.add_argument("--epochs", type=int, default=4, help="of each of the three trainings")
    parser.add_argument("--images", type=int, default=512, help="to train on")
    parser.add_argument("--out", default="resnet18.onnx", help="the file to write")
    args = parser.parse_args()
    torch.manual_seed(0)
    training, test = draw(args.images, seed=1), draw(512, seed=2)
    example = test[0][:1]

    model = resnet18(num_classes=CLASSES)
    print("dense")
    train(model, training, args.epochs)
    dense = accuracy(model, test)

    print("sparse")
    graph = slim.trace(model, example)
    slim.add_gates(model, graph)
    steps = args.epochs * (args.images // BATCH)
    strength = slim.strength_for(total_lr=steps * LR * (1 + LAST_RATE) / 2, travel=4)
    sparsity = slim.BudgetL1(model, graph, macs=args.keep_macs, strength=strength, steps=steps)
    train(model, training, args.epochs, sparsity)

    plan = slim.make_plan(graph, slim.score(model, graph, "gate"), macs=args.keep_macs, cost_aware=True)
    pruned = slim.apply_plan(model, plan)
    print(slim.prove(slim.mask(model, plan), pruned, test[0][:16]))
    cut = accuracy(pruned, test)

    print("fine-tuning")
    network = slim.fold_gates(pruned)
    train(network, training, args.epochs)

    torch.onnx.export(network, (example,), args.out, input_names=["images"], dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(args.out, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": example.numpy()})
    difference = (torch.from_numpy(found) - network(example)).abs().max().item()
    print(f"{args.out}: differs from torch by {difference:.1e}")
    print(f"MACs {plan.macs[0]:,} -> {plan.macs[1]:,}, parameters {plan.params[0]:,} -> {plan.params[1]:,}")
    print(f"accuracy: dense {dense:.3f}, right after the cut {cut:.3f}, fine-tuned {accuracy(network, test):.3f}")


if __name__ == "__main__":
    main()
