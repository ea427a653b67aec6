"""Training, evaluation, run folders and checkpoints of detectors that the caller passes in."""

from .batch import Batch, network_input
from .checkpoint import (
    CARRIED_STATE_KEY,
    TRAINING_STATE_KEY,
    Progress,
    Trainee,
    pack_carried_state,
    read_state,
    read_training_state,
    seed_generators,
)
from .detection_files import DetectionFiles
from .distributed import World
from .drawing import Painter, draw_detections
from .epoch import LossFunction
from .errors import EngineError
from .evaluation import Evaluation, coco_ap, evaluate, evaluating, save_coco_json
from .freezing import Frozen, freeze
from .optimiser import (
    OptimConfig,
    WeightAverage,
    build_optimizer,
    build_scheduler,
    gate_parameters,
    learning_rate_factor,
    learning_rate_sum,
    recalibrate,
)
from .pipeline import StageTimes, Work, run_overlapped
from .plots import (
    plot_gates,
    plot_labels,
    plot_results,
    plot_trade_off,
    plot_widths,
    read_png,
    save_png,
    side_by_side,
)
from .precision import Precision
from .report import (
    COMPARISON_FILE,
    summarise_gates,
    write_report,
)
from .run_folder import CUT_METRIC_KEYS, METRIC_KEYS, RunFolder
from .sparsity import Sparsity
from .timing import Timing, Turns, milliseconds_per_image, rounds_for
from .trainee import TrainConfig
from .training import FitResult, fit

__all__ = [
    "CARRIED_STATE_KEY",
    "COMPARISON_FILE",
    "CUT_METRIC_KEYS",
    "METRIC_KEYS",
    "TRAINING_STATE_KEY",
    "Batch",
    "DetectionFiles",
    "EngineError",
    "Evaluation",
    "FitResult",
    "Frozen",
    "LossFunction",
    "OptimConfig",
    "Painter",
    "Precision",
    "Progress",
    "RunFolder",
    "Sparsity",
    "StageTimes",
    "Timing",
    "TrainConfig",
    "Trainee",
    "Turns",
    "WeightAverage",
    "Work",
    "World",
    "build_optimizer",
    "build_scheduler",
    "coco_ap",
    "draw_detections",
    "evaluate",
    "evaluating",
    "fit",
    "freeze",
    "gate_parameters",
    "learning_rate_factor",
    "learning_rate_sum",
    "milliseconds_per_image",
    "network_input",
    "pack_carried_state",
    "plot_gates",
    "plot_labels",
    "plot_results",
    "plot_trade_off",
    "plot_widths",
    "read_png",
    "read_state",
    "read_training_state",
    "recalibrate",
    "rounds_for",
    "run_overlapped",
    "save_coco_json",
    "save_png",
    "seed_generators",
    "side_by_side",
    "summarise_gates",
    "write_report",
]
