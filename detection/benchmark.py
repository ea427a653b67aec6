"""Milliseconds an image of checkpoints and exported files under any engine, interleaved so that drift cancels."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from data import DetectionDataset
from deploy import (
    ENGINES,
    SUFFIXES,
    Engine,
    RuntimePrecision,
    network_file,
    profile,
    profile_text,
    threads_of,
    torch_threads,
)
from engine import Evaluation
from tracking import RunFolder
from tracking.progress import progress

from .benchmark_table import Row, machine_text, markdown, short_names, write
from .command import flat
from .datasets import open_data, so_many_images
from .detector import Detector, is_exported, open_detector
from .evaluator import Evaluator
from .flags import BenchmarkFlags
from .network import check_classes, img_of, sides_of
from .published import find_weights
from .timing import InterleavedTimer, rounds_for

Sides = tuple[int, int]
DEFAULT_SIDES: Sides = (416, 416)
Images = Callable[[Sides, int], Tensor]
"""Gives images of a height and width, and as many as are asked for: float 0..1 in steps of 1/255, [B, 3, H, W]."""


@dataclass(frozen=True, eq=False)
class Setup:
    """A detector with what it is run on: ``images`` [B, 3, H, W], in the type that the network takes."""

    detector: Detector
    images: Tensor
    num_cores: int

    @property
    def sides_px(self) -> Sides:
        return self.images.shape[2], self.images.shape[3]

    @property
    def ap_key(self) -> tuple[object, ...]:
        """What decides about its AP."""
        return self.detector.weights, self.detector.engine, self.detector.precision_text, self.sides_px

    def set_threads(self) -> None:
        """Set the threads of torch, which are those of the whole process; other engines have their own."""
        if self.detector.engine == "torch":
            torch.set_num_threads(threads_of(self.num_cores))

    def run(self) -> Tensor:
        return self.detector(self.images)


def open_setups(flags: BenchmarkFlags, images: Images, names: Sequence[str], stack: ExitStack) -> list[Setup]:
    """All combinations of the flags that there are, each once: what was asked for as ``auto`` may be float32 as well.

    They stay open as long as ``stack``. SlimError for weights of which none of the engines, sizes or precisions can be had.
    """
    asked = list(dict.fromkeys(sides_of(img) for img in flags.img))
    found: dict[tuple[object, ...], Setup] = {}
    for weights in dict.fromkeys(flags.weights):
        for engine, precision in runtimes_of(weights, flags.engine, flags.precision):
            combinations = itertools.product(asked or [DEFAULT_SIDES], dict.fromkeys(flags.batch_size), flags.num_cores)
            for sides, count, cores in combinations:
                opened = open_detector(
                    weights,
                    engine,
                    num_cores=cores,
                    precision=precision,
                    images=images(sides, count),
                    names=names,
                    trust=flags.trust.trust,
                )
                detector = stack.enter_context(opened)
                # Where a file takes none of the sizes, the first one's refusal says so.
                own = detector.sides_px
                taken = own if own and (own in asked or not asked) else sides
                detector.check_sides(taken)
                setup = Setup(detector, detector.network.as_taken(images(taken, count)), cores)
                found.setdefault((setup.ap_key, count, cores), setup)
    return list(found.values())


def runtimes_of(
    weights: str, engines: Sequence[Engine], precisions: Sequence[RuntimePrecision]
) -> list[tuple[Engine | None, RuntimePrecision]]:
    """The engines that run a file, and their precisions; where there is none, a pair whose refusal says why.

    All engines run checkpoints, which are exported for them.
    """
    own = SUFFIXES.get(network_file(weights).suffix, ENGINES)

    def can_run(engine: Engine | None, precision: RuntimePrecision) -> bool:
        chosen = engine or own[0]
        has_bfloat16 = chosen == "openvino" or (chosen == "torch" and not is_exported(weights))
        return chosen in own and (precision != "bfloat16" or has_bfloat16)

    pairs = list(itertools.product(dict.fromkeys(engines) or [None], dict.fromkeys(precisions)))
    return [pair for pair in pairs if can_run(*pair)] or pairs[:1]


class BenchmarkData:
    """The images that setups are run on, and their AP where there is a data set."""

    def __init__(self, flags: BenchmarkFlags) -> None:
        self.flags = flags
        self.config = None if flags.dataset.data is None else open_data(flags.dataset)
        self.dataset = functools.cache(self._dataset)
        self.evaluations: dict[tuple[object, ...], Evaluation] = {}

    def _dataset(self, img: int) -> DetectionDataset:
        assert self.config is not None
        return DetectionDataset(self.config, self.flags.split, img)

    def images(self, sides: Sides, count: int) -> Tensor:
        """Images of the split, again from the first where it is too small, or without data random ones."""
        if self.config is None:
            generator = torch.Generator().manual_seed(self.flags.seed)
            return torch.randint(0, 256, (count, 3, *sides), generator=generator).float() / 255
        return so_many_images(self.dataset(max(sides)), count, sides)

    def evaluate(self, setup: Setup) -> None:
        """Measure AP, once for setups that compute the same."""
        if setup.ap_key not in self.evaluations:
            setup.set_threads()
            evaluator = Evaluator(
                self.dataset(max(setup.sides_px)),
                batch_size=16,
                workers=0,
                device=torch.device("cpu"),
                conf=self.flags.nms.conf,
                iou=self.flags.nms.iou,
                max_det=self.flags.nms.max_det,
                canvas_hw=setup.sides_px,
            )
            self.evaluations[setup.ap_key] = setup.detector.evaluate(evaluator)


def benchmark(flags: BenchmarkFlags) -> list[Row]:
    """Measure and print a row for each combination; fills the run folder, when interrupted with what is measured by then."""
    for weights in flags.weights or [""]:
        find_weights(weights, flags.dataset.download)
    for cores in flags.num_cores:
        threads_of(cores)
    rounds, data, names = rounds_for(flags.repeats, flags.warmup), BenchmarkData(flags), short_names(flags.weights)
    rows: list[Row] = []
    with torch_threads(), ExitStack() as stack:
        setups = open_setups(flags, data.images, data.config.names if data.config else (), stack)
        if data.config is not None:
            for one in setups:
                check_classes(one.detector, data.config, one.detector.weights, str(flags.dataset.data))
        run = RunFolder.create(flags.run.project, flags.run.name)
        run.write_config(flat(flags), "benchmark.py")
        threads = max(threads_of(one.num_cores) for one in setups)
        timer = InterleavedTimer({one: one.run for one in setups}, before=Setup.set_threads, threads=threads)
        finished = False
        try:
            with torch.no_grad():
                timer.run(progress(rounds, desc="rounds", unit="round"), flags.max_seconds)
            if data.config is not None:
                for one in progress(setups, desc="AP", leave=False):
                    data.evaluate(one)
            if flags.profile:
                print_profiles(setups, names)
            finished = True
        finally:
            if all(timing.runs_ms for timing in timer.timings().values()):
                rows = rows_of(timer, names, data.evaluations)
                write(rows, machine_text(), run.path, finished=finished)
    print(f"results: {run.path}\n\n{markdown(rows, machine_text())}")
    return rows


def rows_of(
    timer: InterleavedTimer[Setup], names: dict[str, str], evaluations: dict[tuple[object, ...], Evaluation]
) -> list[Row]:
    """The table of all setups.

    ``milliseconds`` (median), ``p10_ms`` and ``p90_ms`` are of an image, ``fps`` is images in a second, ``speed_up`` the
    first row's median over this one's. ``bytes`` are those of the file that runs, of a checkpoint without training state.
    ``warning`` says what makes the times say little, "" for nothing. None and "" stand for unknown.
    """
    rows: list[Row] = []
    for one, timing in timer.timings().items():
        detector, count, found = one.detector, len(one.images), evaluations.get(one.ap_key)
        median_ms = timing.median_ms / count
        rows.append(
            {
                "weights": detector.weights,
                "network": names[detector.weights],
                "engine": detector.engine,
                "precision": detector.precision_text,
                "img": str(img_of(one.sides_px)),
                "batch_size": count,
                "num_cores": one.num_cores,
                "milliseconds": median_ms,
                "p10_ms": timing.percentile_ms(10) / count,
                "p90_ms": timing.percentile_ms(90) / count,
                "fps": 1000 / median_ms,
                "speed_up": rows[0]["milliseconds"] / median_ms if rows else 1.0,
                "ap": found.ap if found else None,
                "ap50": found.ap50 if found else None,
                "bytes": detector.network.bytes_on_disk,
                "macs": detector.macs(one.sides_px),
                "params": detector.params,
                "activation": detector.activation,
                "runs": len(timing.runs_ms),
                "warning": timing.warning,
            }
        )
    return rows


def print_profiles(setups: Sequence[Setup], names: dict[str, str]) -> None:
    """Print the operators of each setup by its engine's own clock."""
    for one in setups:
        one.set_threads()
        title = (
            f"{names[one.detector.weights]}, {one.detector.engine}, {one.detector.precision_text}, "
            f"{img_of(one.sides_px)} pixels, cores: {one.num_cores or 'all'}, batch size {len(one.images)}"
        )
        layers = profile(one.detector.network, one.images)
        print(f"\n{title}: the engine's own time, medians\n\n{profile_text(layers)}")
