"""Training state as plain values and tensors, so that a checkpoint loads with ``weights_only=True``."""

from __future__ import annotations

import pickle
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from slim import SlimError

from .distributed import World
from .optimiser import WeightAverage

TRAINING_STATE_KEY = "training_state"
CARRIED_STATE_KEY = "carried_state"
_FORMAT = 3


class Mover(Protocol):
    """What moves the gates, as far as its state goes."""

    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...


@dataclass
class Trainee:
    """Everything that a training step changes, and the number format (`dtype`) in which it computes.

    `parallel` is what images are sent through where several ranks train one model.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    scaler: torch.amp.GradScaler
    average: WeightAverage
    dtype: torch.dtype = torch.float32
    mover: Mover | None = None
    parallel: nn.Module | None = None


@dataclass(frozen=True)
class EpochSums:
    """How far an epoch has come: batches that are done, steps that were taken, sums of the loss parts over these.

    `measured` is the pull against the gradient, at the last step.
    """

    batches: int = 0
    steps: int = 0
    lr: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    measured: float | None = None

    def plus(self, values: Mapping[str, float], batches: int, lr: float, measured: float | None) -> EpochSums:
        """After one more step, the one of batch number `batches`."""
        sums = {name: self.sums.get(name, 0.0) + value for name, value in values.items()}
        return EpochSums(batches, self.steps + 1, lr, sums, measured)

    def means(self) -> dict[str, float]:
        return {name: total / max(1, self.steps) for name, total in self.sums.items()}


@dataclass(frozen=True)
class Progress:
    """How far a run has come. `next_epoch` counts from 0; APs are None until something was evaluated.

    `so_far` is what an interrupted epoch has done already.
    """

    next_epoch: int = 0
    best_ap: float | None = None
    best_epoch: int | None = None
    best_closed_share: float = 0.0
    last_ap: float | None = None
    so_far: EpochSums = field(default_factory=EpochSums)


def pack_training_state(trainee: Trainee, progress: Progress, world: World) -> dict[str, Any]:
    """The whole state between two steps; tensors are shared with `trainee`, so save before the next step.

    All ranks have to call it: only their random generators differ.
    """
    return {
        "format": _FORMAT,
        "progress": {**vars(progress), "so_far": dict(vars(progress.so_far))},
        "model": trainee.model.state_dict(),
        "optimizer": trainee.optimizer.state_dict(),
        "scheduler": {key: value for key, value in trainee.scheduler.state_dict().items() if key != "lr_lambdas"},
        "scaler": trainee.scaler.state_dict(),
        "average": trainee.average.state_dict(),
        "pull": None if trainee.mover is None else trainee.mover.state(),
        "rng": world.gather(pack_rng()),
    }


def unpack_training_state(state: dict[str, Any], trainee: Trainee, world: World) -> Progress:
    """Put `state` back into `trainee` and into the random generators; with more ranks than before the further ones keep theirs.

    Raises SlimError when the state is of another format or of another network.
    """
    if state.get("format") != _FORMAT:
        raise SlimError(
            f"training state of format {state.get('format')!r}, expected {_FORMAT}; start a new run from its weights"
        )
    try:
        trainee.model.load_state_dict(state["model"])
        trainee.average.load_state_dict(state["average"])
        trainee.optimizer.load_state_dict(state["optimizer"])
        trainee.scheduler.load_state_dict({**state["scheduler"], "lr_lambdas": [None]})
        if state["scaler"] and trainee.scaler.is_enabled():
            trainee.scaler.load_state_dict(state["scaler"])
        if trainee.mover is not None:
            trainee.mover.restore(state["pull"])
        if world.rank < len(state["rng"]):
            unpack_rng(state["rng"][world.rank])
        progress = state["progress"]
        return Progress(**{**progress, "so_far": EpochSums(**progress["so_far"])})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise SlimError(
            f"training state does not fit this run ({type(error).__name__}: {first_line(error)}); "
            "resume with the run's own config.yaml, or start a new run from its weights"
        ) from error


def pack_carried_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module
) -> dict[str, dict[str, Any]]:
    """What one training hands to the next, of another length or schedule: weights, optimiser state, moving average."""
    states = {"model": model, "average": average}
    return {
        **{name: module.state_dict() for name, module in states.items()},
        "optimizer": optimizer.state_dict()["state"],
    }


def unpack_carried_state(state: Mapping[str, Any], trainee: Trainee) -> None:
    """Put weights, optimiser state and moving average of an earlier training into `trainee`; its schedule stays new.

    Raises SlimError when they are of another network or optimiser.
    """
    own = trainee.optimizer.state_dict()
    try:
        trainee.model.load_state_dict(state["model"])
        trainee.average.load_state_dict(state["average"])
        assert not own["state"], "an optimiser that has stepped takes nothing over"
        trainee.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": own["param_groups"]})
    except (KeyError, ValueError, RuntimeError) as error:
        raise SlimError(
            f"the state carried over does not fit this training ({type(error).__name__}: {first_line(error)}); "
            "use the --optimizer of the run before, or train from the weights alone"
        ) from error


def first_line(error: BaseException) -> str:
    """Torch's messages run over many lines."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def pack_rng() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def unpack_rng(state: dict[str, Any]) -> None:
    """The inverse of `pack_rng`; GPU states are left out where the number of GPUs differs."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([generator.cpu() for generator in state["cuda"]])


def seed_generators(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def read_training_state(path: str | Path) -> dict[str, Any]:
    """The training state inside a `last.pt`, on the CPU; runs no code of the file.

    It lies under TRAINING_STATE_KEY, where ``slim.save(..., extra={TRAINING_STATE_KEY: state})`` puts it. Raises
    SlimError when the file is missing, damaged or holds weights alone.
    """
    state = read_state(path, TRAINING_STATE_KEY)
    if state is None:
        raise SlimError(
            f"{path}: holds no training state (best.pt and cut models hold weights alone); resume from last.pt, "
            "or start a new run with --weights"
        )
    return state


def read_state(path: str | Path, key: str) -> dict[str, Any] | None:
    """An entry of a checkpoint of this project, on the CPU; None where it has no such entry."""
    path = Path(path)
    if not path.is_file():
        raise SlimError(f"{path}: no such file; to resume give a run folder that holds weights/last.pt")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise SlimError(f"{path}: not a readable checkpoint of this project ({type(error).__name__})") from error
    state = content.get(key) if isinstance(content, dict) else None
    return state if isinstance(state, dict) else None
