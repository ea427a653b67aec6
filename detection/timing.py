"""How long calls take on this machine, interleaved so that the machine's drift hits all of them alike."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from deploy import threads_of
from engine.evaluation import evaluating
from slim import SlimError

LOGGER = logging.getLogger(__name__)

BLOCK = 3
"""Measured runs in a row of a call in a round."""
SETTLE_MS = 20.0
"""How long a call runs unmeasured before each of its blocks."""
CERTAINTY = 0.01
"""The standard error, as a share of a ratio, at which ``compare`` takes the ratio for known."""
LEAST_ROUNDS = 10
MOST_SECONDS = 15.0
"""How long a call is measured: of a slow one there are fewer runs."""
SPREAD = 2.0
"""The 90th percentile of a call's runs over the 10th above which they say little of it."""
BUSY = 0.1
"""The share of the cores that other processes may use beside the call's threads."""
LEAST_OTHERS_S = 0.05
"""CPU time of other processes below which it is lost in the kernel's ticks of 10 ms."""
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """The measured runs of one call, milliseconds each, in their order, and what makes them say little, if anything."""

    runs_ms: tuple[float, ...]
    warning: str = ""

    def percentile_ms(self, percent: float) -> float:
        """A percentile, between two runs by linear interpolation."""
        return float(np.percentile(self.runs_ms, percent))

    @property
    def median_ms(self) -> float:
        return self.percentile_ms(50)

    def summary(self) -> dict[str, Any]:
        """What a record keeps of the runs."""
        percentiles = {f"p{percent}_ms": self.percentile_ms(percent) for percent in (10, 90)}
        warning = {"warning": self.warning} if self.warning else {}
        return {"median_ms": self.median_ms, **percentiles, "runs": len(self.runs_ms), **warning}


def other_cpu_seconds() -> float:
    """CPU time that all processes but this one have used so far, on the cores that it may use; 0 where nothing tells.

    Unlike the load average, of which our own threads are a part, it says what they used in the very time of a measurement.
    """
    try:
        lines = Path("/proc/stat").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    cores, ticks = {f"cpu{number}" for number in os.sched_getaffinity(0)}, 0
    for name, *fields in map(str.split, lines):
        if name in cores:
            user, nice, system, _idle, _iowait, *interrupts_and_stolen = map(int, fields[:8])
            ticks += user + nice + system + sum(interrupts_and_stolen)
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def disturbance(runs_ms: Sequence[float], others_cores: float, threads: int) -> str:
    """What makes runs on so many threads say little, while other processes used so many cores; "" for nothing."""
    cores, said = threads_of(0), []
    if others_cores > max(0, cores - threads) + BUSY * cores:
        said.append(f"other processes used {others_cores:.1f} of {cores} cores meanwhile")
    low, high = np.percentile(runs_ms, (10, 90))
    if high > SPREAD * low:
        said.append(f"the 90th percentile is {high / low:.1f} times the 10th")
    return " and ".join(said)


def timing_warning(warnings: Iterable[str]) -> str:
    """One line for several measurements, of each of which ``warnings`` has the warning or ""; "" where none has one."""
    warnings = list(warnings)
    said = [warning for warning in warnings if warning]
    if not said:
        return ""
    return (
        f"warning: times that say little ({len(said)} of {len(warnings)} measurements): {max(said, key=len)}; measure again on "
        "an idle machine"
    )


class InterleavedTimer(Generic[Key]):
    """Measures several calls in rounds, in each of which every call runs a block.

    A block is ``block`` runs in a row after as many unmeasured ones as ``settle_ms`` take, at least one. They bring the
    call's own weights back into the caches and outlast the threads of the call before, which runtimes leave spinning
    for some milliseconds: a figure in company is then the figure alone.

    Args:
        calls: what is measured
        before: called with a call's key before each of its blocks, for settings that hold for the whole process
        threads: of the calls, 0 for as many as there are cores
        clock: seconds
        others: CPU seconds of other processes so far
    """

    def __init__(
        self,
        calls: Mapping[Key, Callable[[], object]],
        *,
        block: int = BLOCK,
        settle_ms: float = SETTLE_MS,
        before: Callable[[Key], object] = lambda key: None,
        threads: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        others: Callable[[], float] = other_cpu_seconds,
    ) -> None:
        if block < 1:
            raise SlimError(f"timing: blocks of {block} runs; expected at least 1")
        self.calls, self.block, self.settle_ms, self.before, self.clock = dict(calls), block, settle_ms, before, clock
        self.threads, self.others = threads_of(threads), others
        self._runs_ms: dict[Key, list[float]] = {key: [] for key in self.calls}
        self._measured_s = self._others_s = 0.0

    def run(self, rounds: Iterable[bool], most_seconds: float = MOST_SECONDS) -> None:
        """Run rounds, see ``rounds_for``; after ``most_seconds`` for each call no further ones but for a first that counts."""
        started, left_out = self.clock(), 0
        for counts in rounds:
            is_late = self.clock() - started > most_seconds * len(self.calls)
            if is_late and (not counts or self._measured_s):
                left_out += counts
            else:
                self.round(counts)
        if left_out:
            runs = max(map(len, self._runs_ms.values()))
            LOGGER.info(
                "measured %d runs of each network, %d fewer than asked for: %g s a network were over",
                *(runs, left_out * self.block, most_seconds),
            )

    def round(self, counts: bool = True) -> None:
        """Run a block of each call; without ``counts`` only to warm up."""
        started, others_before = self.clock(), self.others()
        for key, call in self.calls.items():
            self.before(key)
            settled_ms = self._run_ms(call)
            while settled_ms < self.settle_ms:
                settled_ms += self._run_ms(call)
            runs_ms = [self._run_ms(call) for _ in range(self.block)]
            if counts:
                self._runs_ms[key] += runs_ms
        if counts:
            self._measured_s += self.clock() - started
            self._others_s += self.others() - others_before

    def timings(self) -> dict[Key, Timing]:
        """All measured runs so far."""
        others_cores = self._others_s / self._measured_s if self._others_s > LEAST_OTHERS_S else 0.0
        return {
            key: Timing(tuple(runs_ms), disturbance(runs_ms, others_cores, self.threads) if runs_ms else "")
            for key, runs_ms in self._runs_ms.items()
        }

    def _run_ms(self, call: Callable[[], object]) -> float:
        started = self.clock()
        call()
        return 1000 * (self.clock() - started)


def rounds_for(repeats: int, warmup: int, block: int = BLOCK) -> list[bool]:
    """Whether each round counts, for ``repeats`` measured runs of each call, rounded up to whole blocks."""
    if repeats < 1 or warmup < 0:
        raise SlimError(f"timing: repeats={repeats}, warmup={warmup}; expected at least 1 and at least 0")
    return [False] * warmup + [True] * math.ceil(repeats / block)


def time_models(
    models: Mapping[str, nn.Module], images: Tensor, repeats: int = 30, warmup: int = 2
) -> dict[str, Timing]:
    """The runs of models on ``images``, float [B, 3, H, W] on the models' device, in evaluation mode, interleaved.

    Each has ``repeats`` measured runs, rounded up to whole blocks, after ``warmup`` rounds that do not count.
    """
    calls = {name: functools.partial(_finished, model, images) for name, model in models.items()}
    timer = InterleavedTimer(calls, threads=torch.get_num_threads())
    with contextlib.ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluating(model))
        timer.run(rounds_for(repeats, warmup))
    return timer.timings()


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
    first: Callable[[], object],
    second: Callable[[], object],
    clock: Callable[[], float] = time.perf_counter,
    threads: int = 0,
) -> Comparison:
    """Measure two calls of so many threads until their ratio's standard error is at most ``CERTAINTY`` of it, or
    ``MOST_SECONDS`` have passed.

    A round's ratio is that of its medians: what disturbs a whole round disturbs both, and a round that is disturbed in part
    is one of many.
    """
    timer = InterleavedTimer({0: first, 1: second}, clock=clock, threads=threads)
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
