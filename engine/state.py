"""Everything that a training changes, and how it is saved: as plain values and tensors, read with ``weights_only=True``."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from slim import L1Step, SlimError
from slim.archive import read_archive

from .distributed import World
from .optimiser import WeightAverage, build_optimizer, learning_rate_factor
from .settings import Precision, TrainConfig
from .sparsity import Sparsity

TRAINING_STATE_KEY = "training_state"
WARM_START_KEY = "carried_state"
_FORMAT = 3


@dataclass(frozen=True)
class EpochSums:
    """How far an epoch has come: finished batches, steps taken, sums of the loss parts over these steps.

    `measured` is the L1 step's strength over the gradient, at the last step.
    """

    batches: int = 0
    steps: int = 0
    lr: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    measured: float | None = None

    def plus(self, values: Mapping[str, float], batches: int, lr: float, measured: float | None) -> EpochSums:
        """These sums after one more step, the one of batch number `batches`."""
        sums = {name: self.sums.get(name, 0.0) + value for name, value in values.items()}
        return EpochSums(batches, self.steps + 1, lr, sums, measured)

    def means(self) -> dict[str, float]:
        """The means of the loss parts over the steps."""
        return {name: total / max(1, self.steps) for name, total in self.sums.items()}


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    `next_epoch` counts from 0, APs are None until something was evaluated, `so_far` is the finished part of an epoch that
    was interrupted.
    """

    next_epoch: int = 0
    best_ap: float | None = None
    best_epoch: int | None = None
    best_closed_share: float = 0.0
    last_ap: float | None = None
    so_far: EpochSums = field(default_factory=EpochSums)


@dataclass
class TrainState:
    """Everything that a training step changes, and the number format (`dtype`) in which the network computes.

    `ddp` is what images are sent through where several ranks train one model.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    scaler: torch.amp.GradScaler
    average: WeightAverage
    dtype: torch.dtype = torch.float32
    l1: L1Step | None = None
    ddp: nn.Module | None = None

    @classmethod
    def create(
        cls,
        model: nn.Module,
        config: TrainConfig,
        steps_per_epoch: int,
        device: torch.device,
        sparsity: Sparsity | None = None,
        world: World | None = None,
    ) -> TrainState:
        """Put `model` on its device in its memory format, and make optimiser, schedule and moving average for it."""
        dtype = compute_dtype(config.precision, device)
        model.to(device)
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
        ddp = world.wrap(model) if world is not None and world.size > 1 else None
        optimizer = build_optimizer(model, config.optim)
        return cls(
            model=model,
            optimizer=optimizer,
            scheduler=LambdaLR(optimizer, learning_rate_factor(config.optim, steps_per_epoch, config.epochs)),
            scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
            average=WeightAverage(model, config.optim),
            dtype=dtype,
            l1=None if sparsity is None else sparsity.l1,
            ddp=ddp,
        )

    def pack(self, progress: Progress, world: World) -> dict[str, Any]:
        """The whole state between two steps; its tensors are this state's own, so save them before the next step.

        All ranks have to call it: only their random generators differ.
        """
        return {
            "format": _FORMAT,
            "progress": {**vars(progress), "so_far": dict(vars(progress.so_far))},
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {key: value for key, value in self.scheduler.state_dict().items() if key != "lr_lambdas"},
            "scaler": self.scaler.state_dict(),
            "average": self.average.state_dict(),
            "pull": None if self.l1 is None else self.l1.state(),
            "rng": world.gather(_pack_rng()),
        }

    def restore(self, packed: dict[str, Any], world: World) -> Progress:
        """Continue from a packed state, in place, random generators included; ranks that it does not know keep theirs.

        Raises SlimError when the state is of another format or of another network.
        """
        if packed.get("format") != _FORMAT:
            found = packed.get("format")
            raise SlimError(f"training state of format {found!r}, expected {_FORMAT}; start a new run from its weights")
        try:
            self.model.load_state_dict(packed["model"])
            self.average.load_state_dict(packed["average"])
            self.optimizer.load_state_dict(packed["optimizer"])
            self.scheduler.load_state_dict({**packed["scheduler"], "lr_lambdas": [None]})
            if packed["scaler"] and self.scaler.is_enabled():
                self.scaler.load_state_dict(packed["scaler"])
            if self.l1 is not None:
                self.l1.restore(packed["pull"])
            if world.rank < len(packed["rng"]):
                _unpack_rng(packed["rng"][world.rank])
            progress = packed["progress"]
            return Progress(**{**progress, "so_far": EpochSums(**progress["so_far"])})
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise SlimError(
                f"training state does not fit this run ({type(error).__name__}: {_first_line(error)}); "
                "resume with the run's own config.yaml, or start a new run from its weights"
            ) from error

    def warm_start(self, packed: Mapping[str, Any]) -> None:
        """Take over weights, optimiser state and moving average of an earlier training, in place; the schedule stays new.

        Raises SlimError when they are of another network or optimiser.
        """
        own = self.optimizer.state_dict()
        assert not own["state"], "an optimiser that has stepped takes nothing over"
        try:
            self.model.load_state_dict(packed["model"])
            self.average.load_state_dict(packed["average"])
            self.optimizer.load_state_dict({"state": packed["optimizer"], "param_groups": own["param_groups"]})
        except (KeyError, ValueError, RuntimeError) as error:
            raise SlimError(
                f"the state carried over does not fit this training ({type(error).__name__}: {_first_line(error)}); "
                "use the --optimizer of the run before, or train from the weights alone"
            ) from error


def pack_warm_start(model: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module) -> dict[str, Any]:
    """What one training hands to the next, of another length or schedule: weights, optimiser state, moving average."""
    state = optimizer.state_dict()["state"]
    return {"model": model.state_dict(), "average": average.state_dict(), "optimizer": state}


def read_training_state(path: str | Path) -> dict[str, Any]:
    """Read the training state inside a `last.pt`, on the CPU; runs no code of the file.

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
    """Read an entry of a checkpoint of this project, on the CPU; None where it has no such entry."""
    path = Path(path)
    if not path.is_file():
        raise SlimError(f"{path}: no such file; to resume give a run folder that holds weights/last.pt")
    content = read_archive(path)
    state = content.get(key) if isinstance(content, dict) else None
    return state if isinstance(state, dict) else None


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The number format that autocast multiplies in; float32 means no autocast.

    "auto" is float16 on a GPU (Micikevicius et al., "Mixed Precision Training", 2018), bfloat16 on a CPU with
    instructions for it (Kalamkar et al., arXiv:1905.12322), and float32 elsewhere. SlimError for float16 on a CPU.
    """
    if precision == "auto":
        # Emulated bfloat16 would be slower than float32.
        has_bfloat16 = any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))
        on_cpu = torch.bfloat16 if has_bfloat16 else torch.float32
        return {"cuda": torch.float16, "cpu": on_cpu}.get(device.type, torch.float32)
    if precision == "float16" and device.type == "cpu":
        raise SlimError("precision float16 on a CPU: expected auto, float32 or bfloat16, float16 needs a GPU")
    dtype: torch.dtype = getattr(torch, precision)
    return dtype


def seed_generators(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _pack_rng() -> dict[str, Any]:
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


def _unpack_rng(state: dict[str, Any]) -> None:
    """The inverse of `_pack_rng`; GPU states are left out where the number of GPUs differs."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([generator.cpu() for generator in state["cuda"]])


def _first_line(error: BaseException) -> str:
    """Torch's messages run over many lines."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
