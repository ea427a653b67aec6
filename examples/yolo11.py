"""Slim a YOLO11n inside Ultralytics' own trainer: gates and L1 step by callback, cut, proof, fine-tuning, ONNX.

    python examples/yolo11.py --weights yolo11n.pt --data coco128.yaml --img 640 --epochs 100 --lr 0.01

By default it starts from random weights, on a small data set that it draws, and takes seven minutes on one core. Needs
ultralytics, onnx and onnxruntime; Ultralytics is under AGPL-3.0.

Three things make it work. A trainer whose ``model`` is a network, and not a file's name, trains that very network and builds none
anew. A hook that PyTorch calls after each step of an optimiser takes the L1 step there, while the trainer still has the gradients
and before it updates its moving average. And two habits of these networks are changed before the trace, see ``dense_network``.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.modules import C2f, Conv

import slim


def dense_network(settings: dict[str, Any]) -> nn.Module:
    """The network that Ultralytics would train: of these weights, with a head for the classes of this data."""
    trainer = DetectionTrainer(overrides=settings)
    trainer.setup_model()
    for module in trainer.model.modules():
        if isinstance(module, Conv):
            module.act = copy.deepcopy(module.act)  # all share one, behind which no gate could sit
        elif isinstance(module, C2f):
            # What an export runs, with a count of channels that the trace must see.
            module.forward = module.forward_split
    return trainer.model


def train(
    network: nn.Module, settings: dict[str, Any], name: str, sparse: tuple[slim.ChannelGraph, float] | None = None
) -> YOLO:
    """Train this network, sparsely towards a share of its MACs if one is given; what the trainer's last checkpoint holds."""
    trainer = DetectionTrainer(overrides={**settings, "name": name})
    trainer.model = network

    def add_l1_step(trainer: DetectionTrainer) -> None:
        """Called when the optimiser stands: gates take no weight decay, and an L1 step follows each of its steps."""
        graph, keep_macs = sparse
        gates = {id(gate) for gate in slim.gate_parameters(network)}
        group_of = {group["param_group"]: group for group in trainer.optimizer.param_groups}
        weights, norms = group_of["weight"], group_of["bn"]
        norms["params"] += [p for p in weights["params"] if id(p) in gates]
        weights["params"] = [p for p in weights["params"] if id(p) not in gates]
        steps = len(trainer.train_loader) // trainer.accumulate  # an epoch
        total_lr = steps * sum(norms["initial_lr"] * trainer.lf(epoch) for epoch in range(trainer.epochs))
        sparsity = slim.BudgetL1(
            network, graph, macs=keep_macs, strength=slim.strength_for(total_lr, travel=7), steps=steps * trainer.epochs
        )
        trainer.optimizer.register_step_post_hook(lambda *_: sparsity.step(norms["lr"]))
        trainer.add_callback("on_train_epoch_end", lambda _: print(f"{sparsity.closed_share():.0%} of gates closed"))

    if sparse is not None:
        trainer.add_callback("on_pretrain_routine_end", add_l1_step)
    trainer.train()
    return YOLO(trainer.last)


def box_ap(yolo: YOLO, settings: dict[str, Any]) -> float:
    """AP over IoU 0.5 to 0.95 on the validation split, 0..1."""
    unfused = copy.deepcopy(yolo)  # validation folds the norms away
    return unfused.val(
        **{key: settings[key] for key in ("data", "imgsz", "project", "exist_ok", "plots", "device")}
    ).box.map


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--weights", default="yolo11n.yaml", help="a checkpoint of Ultralytics, or a yaml for random weights"
    )
    parser.add_argument("--data", help="a data set's yaml; without one, shapes are drawn")
    parser.add_argument("--img", type=int, default=128, help="side of the images, pixels")
    parser.add_argument("--epochs", type=int, default=20, help="of each of the three trainings")
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate at the start of each")
    parser.add_argument("--keep-macs", type=float, default=0.5, help="share of the MACs to keep")
    parser.add_argument("--device", default="cpu", help="cpu, or the number of a GPU")
    parser.add_argument("--out", type=Path, default=Path("runs/yolo11"), help="folder of the runs")
    args = parser.parse_args()
    out = args.out.resolve()
    settings = {
        "model": args.weights,
        "data": args.data or str(drawn_shapes(out / "shapes")),
        "imgsz": args.img,
        "epochs": args.epochs,
        "optimizer": "SGD",
        "lr0": args.lr,
        "lrf": 0.1,
        "nbs": 16,
        "device": args.device,
        "project": str(out),
        "exist_ok": True,
        "plots": False,
        "seed": 0,
    }

    dense = train(dense_network(settings), settings, "dense")
    dense_ap = box_ap(dense, settings)

    network = dense.model
    images = torch.rand(4, 3, args.img, args.img, device=next(network.parameters()).device)
    graph = slim.trace(network, images[:1])
    slim.add_gates(network, graph)
    sparse = train(network, settings, "sparse", (graph, args.keep_macs)).model

    plan = slim.make_plan(graph, slim.score(sparse, graph, "gate"), macs=args.keep_macs, cost_aware=True)
    pruned = slim.apply_plan(sparse, plan)
    print(slim.prove(slim.mask(sparse, plan), pruned, images))

    slimmed = train(slim.fold_gates(pruned), settings, "slim")
    ap = box_ap(slimmed, settings)
    expected: Tensor = slimmed.model.eval()(images)[0]
    path = slimmed.export(format="onnx", batch=len(images))
    (found,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(
        None, {"images": images.cpu().numpy()}
    )
    difference = (torch.from_numpy(found) - expected.cpu()).abs().max().item()
    print(f"{path}: differs from torch by {difference:.1e}, of {expected.abs().max().item():.1e}")
    print(f"MACs {plan.macs[0]:,} -> {plan.macs[1]:,}, parameters {plan.params[0]:,} -> {plan.params[1]:,}")
    print(f"AP: dense {dense_ap:.3f}, slim {ap:.3f}")


def drawn_shapes(folder: Path) -> Path:
    """A data set of drawn shapes in YOLO's format; the path of its description."""
    from data.shapes import SHAPE_NAMES, make_shapes

    make_shapes(folder, train=320, val=80, test=0, image_size_px=128)
    description = folder.with_suffix(".yaml")
    names = "".join(f"\n  {number}: {name}" for number, name in enumerate(SHAPE_NAMES))
    description.write_text(f"path: {folder}\ntrain: images/train\nval: images/val\nnames:{names}\n", encoding="utf-8")
    return description


if __name__ == "__main__":
    main()
