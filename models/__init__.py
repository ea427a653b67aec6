"""YOLOv5: blocks, builder, loss, post-processing and import of published checkpoints."""

from models.builder import build_model
from models.checkpoint_import import Imported, import_checkpoint
from models.description import load_description
from models.detect import Detect
from models.errors import ModelError
from models.loss import DetectionLoss, LossGains
from models.postprocess import non_max_suppression
from models.transfer import Transfer, transfer_weights
from models.yolo import YOLO

__all__ = [
    "YOLO",
    "Detect",
    "DetectionLoss",
    "Imported",
    "LossGains",
    "ModelError",
    "Transfer",
    "build_model",
    "import_checkpoint",
    "load_description",
    "non_max_suppression",
    "transfer_weights",
]
