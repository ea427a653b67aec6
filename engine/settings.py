"""Settings of a training, free of torch: a command line is read before the seconds that importing it costs.

An annotated field is a command-line flag of the same name, and the annotation its help (see ``detection.command``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn, get_args

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""What torchrun tells each process."""

Precision = Literal["auto", "float32", "bfloat16", "float16"]


def _refuse(name: str, value: Any, expected: str) -> NoReturn:
    from slim import SlimError  # which imports torch

    raise SlimError(f"{name}={value!r}: expected {expected}")


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and learning rate."""

    optimizer: Annotated[Literal["sgd", "adamw"], "SGD with Nesterov momentum, or AdamW"] = "sgd"
    lr: Annotated[float, "learning rate after the warm-up"] = 0.01
    final_lr_ratio: Annotated[float, "last learning rate as a share of --lr"] = 0.01
    schedule: Annotated[Literal["linear", "cosine"], "how the learning rate falls"] = "linear"
    momentum: Annotated[float, "SGD's momentum, AdamW's beta1"] = 0.937
    weight_decay: Annotated[float, "on weights of convolutions; never on gates and norms"] = 5e-4
    warmup_epochs: Annotated[float, "epochs of rising learning rate, at most a tenth of the run"] = 3.0
    clip_norm: Annotated[float, "largest gradient norm; larger gradients are scaled down to it"] = 10.0
    ema_decay: Annotated[float, "decay of the moving average of the weights, reached gradually"] = 0.9999
    ema_warmup_steps: Annotated[int, "that decay at step s is ema_decay * (1 - exp(-s / ema_warmup_steps))"] = 2000

    def __post_init__(self) -> None:
        for name, names in (("optimizer", ("sgd", "adamw")), ("schedule", ("linear", "cosine"))):
            if getattr(self, name) not in names:
                _refuse(name, getattr(self, name), f"one of {', '.join(names)}")
        for name in ("lr", "clip_norm", "ema_warmup_steps"):
            if not getattr(self, name) > 0:
                _refuse(name, getattr(self, name), "a number above 0")
        for name in ("weight_decay", "warmup_epochs"):
            if not getattr(self, name) >= 0:
                _refuse(name, getattr(self, name), "a number of at least 0")
        for name in ("momentum", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                _refuse(name, getattr(self, name), "at least 0 and below 1")
        if not 0 <= self.final_lr_ratio <= 1:
            _refuse("final_lr_ratio", self.final_lr_ratio, "0 to 1")


@dataclass(frozen=True)
class TrainConfig:
    """Training.

    ``channels_last`` is the memory format of images and convolutions. Weights, loss, statistics and gates are float32 in
    every ``precision``.
    """

    epochs: Annotated[int, "epochs of the whole run, resumed epochs included"] = 30
    optim: OptimConfig = OptimConfig()
    precision: Annotated[Precision, "float16 on a GPU and bfloat16 on a CPU that has it (auto), or the one named"] = (
        "auto"
    )
    channels_last: bool = True
    eval_every: Annotated[int, "epochs between evaluations on the val split; the last epoch is always evaluated"] = 1
    patience: Annotated[int, "stop after so many epochs without a better AP; 0 never does"] = 0
    sync_bn: Annotated[bool, "under torchrun, batch norms see the whole batch (slower; for few images a rank)"] = False
    seed: Annotated[int, "seed of every random generator"] = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("eval_every", 1), ("patience", 0)):
            if getattr(self, name) < least:
                _refuse(name, getattr(self, name), f"at least {least}")
        if self.precision not in get_args(Precision):
            _refuse("precision", self.precision, f"one of {', '.join(get_args(Precision))}")


@dataclass(frozen=True)
class SparsitySettings:
    """Gates and the L1 step."""

    strength: Annotated[
        float | Literal["auto"], "L1 step a unit of learning rate; auto closes the gates that it shrinks"
    ] = "auto"
    travel: Annotated[float, "with --strength auto: how far an unopposed gate would move (gates start at 1)"] = 2.0
    fraction: Annotated[float, "part of each gate vector that the L1 step shrinks: its smallest entries"] = 0.5
    closed_share: Annotated[
        float | None, "instead of --strength: raise or lower it so that this share of all gates is closed at the end"
    ] = None
    sparse_from: Annotated[int, "first epoch with the L1 step; before it the gates find their order"] = 3
    tie: Annotated[Literal["group", "layer"], "one gate vector a group, or one an activation"] = "group"

    def __post_init__(self) -> None:
        if self.closed_share is not None and self.strength != "auto":
            from slim import SlimError

            raise SlimError(f"--strength {self.strength:g} and --closed-share {self.closed_share:g}: give one of them")
