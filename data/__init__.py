"""Data sets in YOLO, COCO and VOC formats: description, labels, cache, augmentation, loading, and a synthetic set for trials."""

from __future__ import annotations

from .augment import Augment as Augment
from .config import DataConfig as DataConfig
from .config import find_root as find_root
from .config import load_data_config as load_data_config
from .dataset import DetectionDataset as DetectionDataset
from .dataset import Sample as Sample
from .errors import DataError as DataError
from .loading import Batch as Batch
from .loading import build_loader as build_loader
from .loading import collate as collate
from .sampling import multi_scale_sizes as multi_scale_sizes
from .shapes import make_shapes as make_shapes

__all__ = [
    "Augment",
    "Batch",
    "DataConfig",
    "DataError",
    "DetectionDataset",
    "Sample",
    "build_loader",
    "collate",
    "find_root",
    "load_data_config",
    "make_shapes",
    "multi_scale_sizes",
]
