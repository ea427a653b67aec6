"""Export of trained networks, each proven equal to torch before it is accepted, and the runtimes that run the files."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # what __init__.pyi lists, when it is used
