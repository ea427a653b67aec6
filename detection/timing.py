"""How long calls take on this machine, measured in turns so that drift hits all of them alike."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from engine.evaluation import evaluating
from slim import SlimError

BLOCK = 3
"""Measured runs in a row of a call in a round."""
SETTLE_MS = 20.0
"""How long a call runs unmeasured before each of its blocks."""
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """The measured runs of one call, milliseconds each, in their order."""

    runs_ms: tuple[float, ...]

    def percentile_ms(self, percent: float) -> float:
        """Between two runs by linear interpolation."""
        return float(np.percentile(self.runs_ms, percent))

    @property
    def median_ms(self) -> float:
        return self.percentile_ms(50)


class Turns(Generic[Key]):
    """Calls that are measured in turns: every round runs a block of each.

    A block is ``block`` runs in a row after as many unmeasured ones as ``settle_ms`` take, at least one. They bring the
    call's own weights back into the caches and outlast the threads of the call before, which runtimes leave spinning
    for some milliseconds: a figure in company is then the figure alone.

    Args:
        calls: what is measured
        before: called with a call's key before each of its blocks, for settings that hold for the whole process
        clock: seconds
    """

    def __init__(
        self,
        calls: Mapping[Key, Callable[[], object]],
        *,
        block: int = BLOCK,
        settle_ms: float = SETTLE_MS,
        before: Callable[[Key], object] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if block < 1:
            raise SlimError(f"timing: blocks of {block} runs; expected at least 1")
        self.calls, self.block, self.settle_ms, self.before, self.clock = dict(calls), block, settle_ms, before, clock
        self._runs_ms: dict[Key, list[float]] = {key: [] for key in self.calls}

    def round(self, counts: bool = True) -> None:
        """A block of each call; without ``counts`` only to warm up."""
        for key, call in self.calls.items():
            if self.before is not None:
                self.before(key)
            settled_ms = self._run_ms(call)
            while settled_ms < self.settle_ms:
                settled_ms += self._run_ms(call)
            runs_ms = [self._run_ms(call) for _ in range(self.block)]
            if counts:
                self._runs_ms[key] += runs_ms

    def timings(self) -> dict[Key, Timing]:
        """Of all rounds so far that count."""
        return {key: Timing(tuple(runs_ms)) for key, runs_ms in self._runs_ms.items()}

    def _run_ms(self, call: Callable[[], object]) -> float:
        started = self.clock()
        call()
        return 1000 * (self.clock() - started)


def milliseconds_per_image(
    models: Mapping[str, nn.Module], images: Tensor, repeats: int = 30, warmup: int = 2
) -> dict[str, float]:
    """Median milliseconds per image by model name, in evaluation mode, measured in ``Turns``.

    ``images`` is float [B, 3, H, W] on the models' device; the median is divided by B. Each has ``repeats``
    measured runs, rounded up to whole blocks, after ``warmup`` rounds that do not count.
    """
    rounds = rounds_for(repeats, warmup)
    turns = Turns({name: functools.partial(_finished, model, images) for name, model in models.items()})
    with contextlib.ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluating(model))
        for counts in rounds:
            turns.round(counts)
    return {name: timing.median_ms / len(images) for name, timing in turns.timings().items()}


def rounds_for(repeats: int, warmup: int, block: int = BLOCK) -> list[bool]:
    """Rounds that give each call ``repeats`` measured runs, rounded up to whole blocks, as whether they count."""
    if repeats < 1 or warmup < 0:
        raise SlimError(f"timing: repeats={repeats}, warmup={warmup}; expected at least 1 and at least 0")
    return [False] * warmup + [True] * math.ceil(repeats / block)


def _finished(model: nn.Module, images: Tensor) -> None:
    model(images)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
