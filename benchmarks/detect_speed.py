"""How much of an engine's own speed is left when detect.py annotates a video with it, measured in turns in one run.

python -m benchmarks.detect_speed --weights F.pt                  a checkpoint, exported for the other engines
python -m benchmarks.detect_speed --weights F.xml                 an exported file, under the engines that run it

The video is drawn here (`data.moving_shapes`). Each round measures, for each engine:

- alone: inference of its frames and nothing else, one after another, with all threads: what benchmark.py reports, and what
  detect.py's speed is held against;
- side by side: the same with as many frames at once as detect.py takes, each with its share of the threads;
- end to end: detect.py's own stages from the video file to the annotated video file, wall clock.

The shares are medians over the rounds, each of neighbours in time. On a machine that does other work, believe the CPU
milliseconds of a frame (all threads together): what end to end takes more than side by side is reading, drawing, writing.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
from deploy import ENGINES, SUFFIX_FOR, SUFFIXES, threads_of, torch_threads
from deploy.settings import Engine, RuntimeSettings
from detection.command import run_script
from detection.detector import Detector, open_detector
from detection.flags import DetectFlags
from detection.network import read_network
from detection.video.detection_files import DetectionFiles
from detection.video.job import Detection, canvas_of, pictures_at_once
from detection.video.pictures import read_pictures
from detection.video.pipeline import StageTimes
from detection.video.sources import find_sources
from detection.write_file import write_file
from slim import SlimError

_WARM_UP = 3
_DIFFERENT = 16
"""Frames that the engine alone is given, again and again."""


@dataclass(frozen=True)
class SpeedFlags:
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
    """Of one way in one round."""

    fps: float
    cpu_ms: float


@dataclass(frozen=True)
class Row:
    """An engine's medians over the rounds."""

    engine: str
    precision: str
    at_once: int
    alone: Speed
    side_by_side: Speed
    end_to_end: Speed
    of_alone: float
    of_side_by_side: float

    def __str__(self) -> str:
        speeds = (self.alone, self.side_by_side, self.end_to_end)
        fps = " | ".join(f"{speed.fps:.1f}" for speed in speeds)
        cpu = " | ".join(f"{speed.cpu_ms:.1f}" for speed in speeds)
        name = f"{self.engine}, {self.precision}"
        return f"| {name} | {self.at_once} | {fps} | {self.of_alone:.0%} | {self.of_side_by_side:.0%} | {cpu} |"


HEAD = (
    "| engine | frames at once | alone, FPS | side by side, FPS | end to end, FPS | of alone | of side by side "
    "| alone, CPU ms | side by side, CPU ms | end to end, CPU ms |\n|" + " --- |" * 10
)


def measure(flags: SpeedFlags, on_row: Callable[[Row], None] = lambda row: None) -> list[Row]:
    """A row an engine."""
    if len(flags.img) != 2 or min(flags.frames, flags.repeats, flags.num_cores) < 1:
        raise SlimError("expected a height and a width, and at least 1 frame, repeat and core")
    rows = []
    with TemporaryDirectory() as folder:
        video = Path(folder) / "shapes.mp4"
        write_video(video, flags.frames, (flags.img[0], flags.img[1]))
        for engine, file in files_of(flags, Path(folder)).items():
            given = DetectFlags(
                weights=file,
                source=(str(video),),
                runtime=RuntimeSettings(engine=engine, num_cores=flags.num_cores),
                img=tuple(flags.img),
                at_once=flags.at_once,
                device="cpu",
            )
            rows.append(measured(given, flags.repeats, Path(folder)))
            on_row(rows[-1])
    return rows


def files_of(flags: SpeedFlags, folder: Path) -> dict[Engine, str]:
    """The file that each engine runs; a checkpoint is exported."""
    suffix = Path(flags.weights).suffix
    if suffix in SUFFIXES:
        return {engine: flags.weights for engine in flags.engines if engine in SUFFIXES[suffix]}
    network, images = read_network(flags.weights), torch.rand(1, 3, *flags.img).mul(255).round() / 255
    files: dict[Engine, str] = {}
    for engine in flags.engines:
        files[engine] = flags.weights
        if engine != "torch":
            out = folder / f"network{SUFFIX_FOR[engine]}"
            write_file(network, out, images)
            files[engine] = str(out)
    return files


def measured(flags: DetectFlags, repeats: int, folder: Path) -> Row:
    """One engine, all ways in turns."""
    sources = find_sources(flags.source)
    at_once, cores = pictures_at_once(flags, sources, torch.device("cpu")), threads_of(flags.runtime.num_cores)
    found: dict[str, list[Speed]] = {"alone": [], "side": [], "whole": []}
    with contextlib.ExitStack() as stack:
        one, many = (
            stack.enter_context(open_detector(flags.weights, flags.runtime.engine, num_cores=cores, at_once=calls))
            for calls in (1, at_once)
        )
        canvas = canvas_of(flags.img, one)
        images = [picture.letterboxed(canvas)[0][None] for picture in islice(read_pictures(sources[0]), _DIFFERENT)]
        count = sum(1 for _ in read_pictures(sources[0]))
        of_torch = one.engine == "torch"
        for _ in range(repeats):
            with torch_threads(cores if of_torch else 1):
                found["alone"].append(inference(one, 1, images, count))
            with torch_threads(max(1, cores // at_once) if of_torch else 1):
                found["side"].append(inference(many, at_once, images, count))
                found["whole"].append(end_to_end(flags, many, at_once, folder, count))
    middle = {
        name: Speed(median(s.fps for s in speeds), median(s.cpu_ms for s in speeds)) for name, speeds in found.items()
    }
    shares = {
        name: median(w.fps / s.fps for w, s in zip(found["whole"], found[name], strict=True))
        for name in ("alone", "side")
    }
    return Row(
        engine=one.engine,
        precision=one.precision,
        at_once=at_once,
        alone=middle["alone"],
        side_by_side=middle["side"],
        end_to_end=middle["whole"],
        of_alone=shares["alone"],
        of_side_by_side=shares["side"],
    )


def inference(detector: Detector, at_once: int, images: list[Tensor], count: int) -> Speed:
    """So many frames, in as many threads as there are at once."""
    share = -(-count // at_once)

    def run(times: int) -> None:
        for image in islice(cycle(images), times):
            detector(image)

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(run, [_WARM_UP] * at_once))
        with clocked(share * at_once) as speed:
            list(pool.map(run, [share] * at_once))
    return speed[0]


def end_to_end(flags: DetectFlags, detector: Detector, at_once: int, folder: Path, count: int) -> Speed:
    """detect.py's stages, with a detector that is open already."""
    with DetectionFiles(folder, detector.names, text=False, scores=False, as_json=False) as files:
        run = Detection(flags, find_sources(flags.source), detector, folder / "annotated", files)
        run.folder.mkdir(exist_ok=True)
        timing = StageTimes(at_once)
        started = process_time()
        run.run(timing)
    # The CPU time of the warm-up before the clock starts is in it, too: to be spread over a video that is not too short.
    return Speed(timing.fps, 1000 * (process_time() - started) / count)


@contextlib.contextmanager
def clocked(count: int) -> Iterator[list[Speed]]:
    """The speed of what the block does with so many frames, filled in at its end."""
    found: list[Speed] = []
    wall, cpu = perf_counter(), process_time()
    yield found
    found.append(Speed(count / (perf_counter() - wall), 1000 * (process_time() - cpu) / count))


def main(flags: SpeedFlags) -> None:
    height, width = flags.img
    print(f"{flags.weights}, a video of {flags.frames} frames of {width} x {height}, {flags.num_cores} CPU threads")
    print(HEAD)
    measure(flags, lambda row: print(row, flush=True))


def cli(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    return run_script(SpeedFlags, main, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(cli())
