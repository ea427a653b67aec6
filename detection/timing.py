"""How long calls take on this machine, interleaved so that the machine's drift hits all of them alike."""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from engine.evaluation import evaluating
from slim import SlimError

BLOCK = 3
"""Measured runs in a row of a call in a round."""
SETTLE_MS = 20.0
"""How long a call runs unmeasured before each of its blocks."""
CERTAINTY = 0.01
"""The standard error, as a share of a ratio, at which ``compare`` takes the ratio for known."""
LEAST_ROUNDS = 10
MOST_SECONDS = 15.0
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """The measured runs of one call, milliseconds each, in their order."""

    runs_ms: tuple[float, ...]

    def percentile_ms(self, percent: float) -> float:
        """A percentile, between two runs by linear interpolation."""
        return float(np.percentile(self.runs_ms, percent))

    @property
    def median_ms(self) -> float:
        return self.percentile_ms(50)

    def summary(self) -> dict[str, Any]:
        """What a record keeps of the runs."""
        percentiles = {f"p{percent}_ms": self.percentile_ms(percent) for percent in (10, 90)}
        return {"median_ms": self.median_ms, **percentiles, "runs": len(self.runs_ms)}


class InterleavedTimer(Generic[Key]):
    """Measures several calls in rounds, in each of which every call runs a block.

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
        before: Callable[[Key], object] = lambda key: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if block < 1:
            raise SlimError(f"timing: blocks of {block} runs; expected at least 1")
        self.calls, self.block, self.settle_ms, self.before, self.clock = dict(calls), block, settle_ms, before, clock
        self._runs_ms: dict[Key, list[float]] = {key: [] for key in self.calls}

    def round(self, counts: bool = True) -> None:
        """Run a block of each call; without ``counts`` only to warm up."""
        for key, call in self.calls.items():
            self.before(key)
            settled_ms = self._run_ms(call)
            while settled_ms < self.settle_ms:
                settled_ms += self._run_ms(call)
            runs_ms = [self._run_ms(call) for _ in range(self.block)]
            if counts:
                self._runs_ms[key] += runs_ms

    def timings(self) -> dict[Key, Timing]:
        """All measured runs so far."""
        return {key: Timing(tuple(runs_ms)) for key, runs_ms in self._runs_ms.items()}

    def _run_ms(self, call: Callable[[], object]) -> float:
        started = self.clock()
        call()
        return 1000 * (self.clock() - started)


def rounds_for(repeats: int, warmup: int, block: int = BLOCK) -> list[bool]:
    """Whether each round counts, for ``repeats`` measured runs of each call, rounded up to whole blocks."""
    if repeats < 1 or warmup < 0:
        raise SlimError(f"timing: repeats={repeats}, warmup={warmup}; expected at least 1 and at least 0")
    return [False] * warmup + [True] * math.ceil(repeats / block)


def milliseconds_per_image(
    models: Mapping[str, nn.Module], images: Tensor, repeats: int = 30, warmup: int = 2
) -> dict[str, float]:
    """Median milliseconds per image by model name, in evaluation mode, interleaved.

    ``images`` is float [B, 3, H, W] on the models' device; the median is divided by B. Each has ``repeats``
    measured runs, rounded up to whole blocks, after ``warmup`` rounds that do not count.
    """
    rounds = rounds_for(repeats, warmup)
    timer = InterleavedTimer({name: functools.partial(_finished, model, images) for name, model in models.items()})
    with contextlib.ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluating(model))
        for counts in rounds:
            timer.round(counts)
    return {name: timing.median_ms / len(images) for name, timing in timer.timings().items()}


def _finished(model: nn.Module, images: Tensor) -> None:
    model(images)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)


@dataclass(frozen=True)
class Comparison:
    """The second call's time over the first's: the median of the rounds' ratios, and its standard error."""

    first: Timing
    second: Timing
    ratio: float
    error: float


def compare(
    first: Callable[[], object], second: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> Comparison:
    """Measure two calls until their ratio's standard error is at most ``CERTAINTY`` of it, or ``MOST_SECONDS`` have passed.

    A round's ratio is that of its medians: what disturbs a whole round disturbs both, and a round that is disturbed in part
    is one of many.
    """
    timer = InterleavedTimer({0: first, 1: second}, clock=clock)
    timer.round(counts=False)
    ratios: list[float] = []
    started = clock()
    while True:
        timer.round()
        timings = timer.timings()
        one, other = (statistics.median(timings[key].runs_ms[-timer.block :]) for key in (0, 1))
        ratios.append(other / one)
        ratio, error = statistics.median(ratios), standard_error(ratios)
        known = len(ratios) >= LEAST_ROUNDS and error <= CERTAINTY * ratio
        if known or clock() - started > MOST_SECONDS:
            return Comparison(timings[0], timings[1], ratio, error)


def standard_error(values: Sequence[float]) -> float:
    """The standard error of the median, from the median absolute deviation, as for normal values; 0 for a single value."""
    middle = statistics.median(values)
    spread = 1.4826 * statistics.median(abs(value - middle) for value in values)
    return float(1.2533 * spread / len(values) ** 0.5)
