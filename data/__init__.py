"""Data sets in YOLO, COCO and VOC formats: description, labels, cache, augmentation, loading, and a synthetic set for trials."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # what __init__.pyi lists, when it is used
