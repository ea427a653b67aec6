"""How much of an engine's own speed is left when detect.py annotates a video with it, interleaved in one run.

python -m benchmarks.detect_speed --weights F.pt                  a checkpoint, exported for the other engines
python -m benchmarks.detect_speed --weights F.xml                 an exported file, under the engines that run it

The video is drawn here (`data.moving_shapes`). Each round measures, for each engine:

- alone: inference of its frames and nothing else, one after another, with all threads: what benchmark.py reports;
- end to end: detect.py's own stages from the video file to the annotated video file, wall clock.

The share is the median over the rounds, each of neighbours in time. On a machine that does other work, believe the CPU
milliseconds of a frame (all threads together): what end to end takes more is reading, drawing, writing.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Annotated

import torch
from torch import Tensor

from data.moving_shapes import write_video
from deploy import ENGINES, SUFFIXES, Engine, RuntimeSettings, threads_of, torch_threads
from detection.command import run_script
from detection.detector import Detector, open_detector
from detection.flags import DetectFlags
from detection.video.detection_files import DetectionFiles
from detection.video.job import DetectJob, canvas_of, pictures_at_once
from detection.video.pictures import read_pictures
from detection.video.pipeline import StageTimes
from detection.video.sources import find_sources
from slim import SlimError

_WARM_UP = 3
_DIFFERENT = 16
"""Frames that the engine alone is given, again and again."""


@dataclass(frozen=True)
class DetectSpeedFlags:
    """A comparison of detect.py with its engines."""

    weights: Annotated[str, "checkpoint or exported file"] = ""
    engines: Annotated[tuple[Engine, ...], "engines to measure; those that do not run the file are left out"] = ENGINES
    img: Annotated[tuple[int, ...], "height and width of the video and of the network's input, in pixels"] = (384, 640)
    frames: Annotated[int, "frames of the video"] = 150
    repeats: Annotated[int, "rounds"] = 5
    num_cores: Annotated[int, "CPU threads"] = 2
    at_once: Annotated[int, "as detect.py's"] = 0


@dataclass(frozen=True)
class Speed:
    """Frames a second, and CPU milliseconds of a frame."""

    fps: float
    cpu_ms: float


@dataclass(frozen=True)
class EngineSpeed:
    """An engine's medians over the rounds; ``share`` is end to end's of the engine's alone."""

    engine: str
    precision: str
    at_once: int
    alone: Speed
    end_to_end: Speed
    share: float

    def __str__(self) -> str:
        one, whole = self.alone, self.end_to_end
        return (
            f"| {self.engine}, {self.precision} | {self.at_once} | {one.fps:.1f} | {whole.fps:.1f} | {self.share:.0%} "
            f"| {one.cpu_ms:.1f} | {whole.cpu_ms:.1f} |"
        )


HEAD = (
    "| engine | frames at once | alone, FPS | end to end, FPS | share | alone, CPU ms | end to end, CPU ms |\n|"
    + " --- |" * 7
)


def measure(flags: DetectSpeedFlags, on_row: Callable[[EngineSpeed], None] = lambda row: None) -> list[EngineSpeed]:
    """Measure a row an engine."""
    if len(flags.img) != 2 or min(flags.frames, flags.repeats, flags.num_cores) < 1:
        raise SlimError("expected a height and a width, and at least 1 frame, repeat and core")
    rows = []
    with TemporaryDirectory() as folder:
        video = Path(folder) / "shapes.mp4"
        write_video(video, flags.frames, (flags.img[0], flags.img[1]))
        for engine in engines_of(flags):
            given = DetectFlags(
                weights=flags.weights,
                source=(str(video),),
                runtime=RuntimeSettings(engine=engine, num_cores=flags.num_cores),
                img=tuple(flags.img),
                at_once=flags.at_once,
                device="cpu",
            )
            rows.append(measured(given, flags.repeats, Path(folder)))
            on_row(rows[-1])
    return rows


def engines_of(flags: DetectSpeedFlags) -> list[Engine]:
    """The engines that run the file; all run checkpoints, which are exported for them."""
    own = SUFFIXES.get(Path(flags.weights).suffix, ENGINES)
    return [engine for engine in flags.engines if engine in own]


def measured(flags: DetectFlags, repeats: int, folder: Path) -> EngineSpeed:
    """Measure one engine, both ways in each round."""
    sources, cores = find_sources(flags.source), threads_of(flags.runtime.num_cores)
    at_once = pictures_at_once(flags, sources, torch.device("cpu"))
    images = torch.rand(1, 3, *flags.img).mul(255).round() / 255
    alone: list[Speed] = []
    whole: list[Speed] = []
    with contextlib.ExitStack() as stack:
        one, many = (
            stack.enter_context(
                open_detector(flags.weights, flags.runtime.engine, num_cores=cores, at_once=calls, images=images)
            )
            for calls in (1, at_once)
        )
        canvas = canvas_of(flags.img, one)
        frames = [picture.letterboxed(canvas)[0][None] for picture in islice(read_pictures(sources[0]), _DIFFERENT)]
        count = sum(1 for _ in read_pictures(sources[0]))
        for _ in range(repeats):
            with torch_threads(cores if one.engine == "torch" else 1):
                alone.append(inference(one, frames, count))
            with torch_threads(max(1, cores // at_once) if one.engine == "torch" else 1):
                whole.append(end_to_end(flags, many, at_once, folder, count))
    middle = [Speed(median(s.fps for s in way), median(s.cpu_ms for s in way)) for way in (alone, whole)]
    share = median(w.fps / s.fps for w, s in zip(whole, alone, strict=True))
    return EngineSpeed(one.engine, one.precision, at_once, middle[0], middle[1], share)


def inference(detector: Detector, frames: list[Tensor], count: int) -> Speed:
    """The engine alone on so many frames."""
    for frame in islice(cycle(frames), _WARM_UP):
        detector(frame)
    with clocked(count) as speed:
        for frame in islice(cycle(frames), count):
            detector(frame)
    return speed[0]


def end_to_end(flags: DetectFlags, detector: Detector, at_once: int, folder: Path, count: int) -> Speed:
    """detect.py's stages, with a detector that is open already."""
    with (
        DetectionFiles(folder, detector.names, text=False, scores=False, as_json=False) as files,
        clocked(count) as speed,
    ):
        job = DetectJob(flags, find_sources(flags.source), detector, folder / "annotated", files)
        job.folder.mkdir(exist_ok=True)
        timing = StageTimes(at_once)
        job.run(timing)
    # The CPU time of the warm-up before the clock starts is in it, too: to be spread over a video that is not too short.
    return Speed(timing.fps, speed[0].cpu_ms)


@contextlib.contextmanager
def clocked(count: int) -> Iterator[list[Speed]]:
    """The speed of what the block does with so many frames, filled in at its end."""
    found: list[Speed] = []
    wall, cpu = perf_counter(), process_time()
    yield found
    found.append(Speed(count / (perf_counter() - wall), 1000 * (process_time() - cpu) / count))


def main(flags: DetectSpeedFlags) -> None:
    """Print the table."""
    height, width = flags.img
    print(f"{flags.weights}, a video of {flags.frames} frames of {width} x {height}, {flags.num_cores} CPU threads")
    print(HEAD)
    measure(flags, lambda row: print(row, flush=True))


def cli(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_script(DetectSpeedFlags, main, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(cli())
