from .predictor import Detections as Detections
from .predictor import Predictor as Predictor
from .predictor import load as load
