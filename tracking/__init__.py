"""What a run leaves and shows: run folder, journal, TensorBoard, plots, drawings, reports."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # what __init__.pyi lists, when it is used
