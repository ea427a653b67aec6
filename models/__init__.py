"""YOLOv5: blocks, builder, loss, distillation, post-processing and import of published checkpoints."""

from models.activations import activation_name, has_activation, swap_activations
from models.anchors import LOWEST_RECALL, AnchorFit, anchor_fit, refit_anchors
from models.builder import build_model
from models.checkpoint_import import Imported, import_checkpoint
from models.description import load_description
from models.detect import Detect
from models.distillation import DistillationLoss, DistillGains
from models.errors import ModelError
from models.fusion import fuse_norms
from models.loss import DetectionLoss, LossGains
from models.postprocess import non_max_suppression
from models.transfer import Transfer, renew_head, transfer_weights
from models.yolo import YOLO

__all__ = [
    "LOWEST_RECALL",
    "YOLO",
    "AnchorFit",
    "Detect",
    "DetectionLoss",
    "DistillGains",
    "DistillationLoss",
    "Imported",
    "LossGains",
    "ModelError",
    "Transfer",
    "activation_name",
    "anchor_fit",
    "build_model",
    "fuse_norms",
    "has_activation",
    "import_checkpoint",
    "load_description",
    "non_max_suppression",
    "refit_anchors",
    "renew_head",
    "swap_activations",
    "transfer_weights",
]
