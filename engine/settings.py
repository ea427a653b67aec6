"""Settings of a training, free of torch: a command line is read before the seconds that importing it costs.

An annotated field is a command-line flag of the same name; the annotation is its help, and what values are expected,
which ``detection.command`` checks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""What torchrun tells each process."""

Precision = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and learning rate."""

    optimizer: Annotated[Literal["sgd", "adamw"], "SGD with Nesterov momentum, or AdamW"] = "sgd"
    lr: Annotated[float, "learning rate after the warm-up", "above 0"] = 0.01
    final_lr_ratio: Annotated[float, "last learning rate as a share of --lr", "0 to 1"] = 0.01
    schedule: Annotated[Literal["linear", "cosine"], "how the learning rate falls"] = "linear"
    momentum: Annotated[float, "SGD's momentum, AdamW's beta1", "0 to below 1"] = 0.937
    weight_decay: Annotated[float, "on weights of convolutions; never on gates and norms", "at least 0"] = 5e-4
    warmup_epochs: Annotated[float, "epochs of rising learning rate, at most a tenth of the run", "at least 0"] = 3.0
    clip_norm: Annotated[float, "largest gradient norm; larger gradients are scaled down to it", "above 0 to inf"] = (
        10.0
    )
    ema_decay: Annotated[float, "decay of the moving average of the weights, reached gradually", "0 to below 1"] = (
        0.9999
    )
    ema_warmup_steps: Annotated[
        int, "that decay at step s is ema_decay * (1 - exp(-s / ema_warmup_steps))", "at least 1"
    ] = 2000


@dataclass(frozen=True)
class TrainConfig:
    """Training.

    ``channels_last`` is the memory format of images and convolutions. Weights, loss, statistics and gates are float32 in
    every ``precision``.
    """

    epochs: Annotated[int, "epochs of the whole run, resumed epochs included", "at least 1"] = 30
    optim: OptimConfig = OptimConfig()
    precision: Annotated[Precision, "float16 on a GPU and bfloat16 on a CPU that has it (auto), or the one named"] = (
        "auto"
    )
    channels_last: bool = True
    eval_every: Annotated[
        int,
        "epochs between evaluations on the val split; the last epoch is always evaluated, and with 0 (or --noval) alone",
        "at least 0",
    ] = 1
    save_period: Annotated[
        int, "also keep weights/epochN.pt of every so many epochs; 0 or -1: of none", "at least -1"
    ] = -1
    patience: Annotated[int, "stop after so many epochs without a better AP; 0 never does", "at least 0"] = 0
    sync_bn: Annotated[bool, "under torchrun, batch norms see the whole batch (slower; for few images a rank)"] = False
    seed: Annotated[int, "seed of every random generator"] = 0


@dataclass(frozen=True)
class SparsitySettings:
    """Gates and the L1 step."""

    select: Annotated[
        Literal["budget", "vector", "all"],
        "what the L1 step shrinks: the least important channels that must go to meet --keep-macs, or the smallest --fraction "
        "of each gate vector, or of all together",
    ] = "budget"
    keep_macs: Annotated[
        float,
        "with a budget: share of the MACs that the open channels cost in the end; iterate.py takes it from its own target",
        "above 0 to 1",
    ] = 0.4
    rank: Annotated[
        Literal["gradient-per-mac", "gradient", "magnitude"],
        "with a budget: importance by gate times gradient, over the MACs that a channel costs or not, or by the gate alone",
    ] = "gradient-per-mac"
    fraction: Annotated[
        float | None,
        "part of the gates that the L1 step shrinks, the smallest; else 0.5. Alone it means --select vector",
        "0 to 1",
    ] = None
    rank_every: Annotated[Literal["step", "epoch", "once"], "how long a choice of what shrinks stands"] = "step"
    strength: Annotated[
        float | Literal["auto"], "L1 step a unit of learning rate; auto closes the gates that it shrinks"
    ] = "auto"
    travel: Annotated[
        float | None,
        "with --strength auto: how far an unopposed gate would move (gates start at 1); else 7 with a budget, which "
        "comes down in steps, and 2 without",
        "above 0",
    ] = None
    penalty: Annotated[
        Literal["proximal", "loss", "polarisation"],
        "L1's proximal step, or a term of the loss: L1's or the polarisation regulariser's",
    ] = "proximal"
    where: Annotated[
        Literal["activation", "norm", "norm-weight"],
        "gates behind activations, or before them, behind the norms; or no gates: the batch norms' own weights shrink",
    ] = "activation"
    sparse_from: Annotated[int, "first epoch with the L1 step; before it the gates find their order", "at least 0"] = 3
    tie: Annotated[Literal["group", "layer"], "one gate vector a group, or one an activation"] = "group"

    @property
    def has_budget(self) -> bool:
        """Whether a budget of MACs says what shrinks."""
        return self.select == "budget" and self.fraction is None

    def __post_init__(self) -> None:
        if self.where == "norm-weight" and self.has_budget:
            from slim import SlimError

            raise SlimError("--where norm-weight: a budget needs gates; add --fraction F (network slimming: 1)")
