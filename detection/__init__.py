"""Where models, data, engine, tracking, deploy and slim meet: a module for each kind of work of the scripts.

For programs of one's own: ``detection.load(weights).predict(image)``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # what __init__.pyi lists, when it is used
