"""How long models take on this machine, measured in turns so that drift hits all of them alike."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .errors import EngineError
from .evaluation import evaluating


def milliseconds_per_image(
    models: Mapping[str, nn.Module], image: Tensor, repeats: int = 30, warmup: int = 5
) -> dict[str, float]:
    """Median milliseconds per image by model name, in evaluation mode.

    `image` is float [B, 3, H, W] on the models' device; the median is divided by B. Each of `repeats` rounds
    runs every model once, after `warmup` rounds that do not count.
    """
    if repeats < 1 or warmup < 0:
        raise EngineError(f"timing: repeats={repeats}, warmup={warmup}; expected at least 1 and at least 0")
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with contextlib.ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluating(model))
        for round_number in range(warmup + repeats):
            for name, model in models.items():
                elapsed = _time_once(model, image)
                if round_number >= warmup:
                    seconds[name].append(elapsed)
    return {name: 1000 * statistics.median(values) / image.shape[0] for name, values in seconds.items()}


def _time_once(model: nn.Module, image: Tensor) -> float:
    if image.is_cuda:
        torch.cuda.synchronize(image.device)
    started = time.perf_counter()
    model(image)
    if image.is_cuda:
        torch.cuda.synchronize(image.device)
    return time.perf_counter() - started
