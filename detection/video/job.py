"""Detect in images, videos, webcams and streams, with a checkpoint or an exported file, and draw what is found."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import slim
from data import DataError, described_names
from data.letterbox import Letterbox
from deploy import threads_of, torch_threads
from tracking import Painter, RunFolder
from tracking.progress import progress

from ..command import check_installed, flat
from ..detector import Detector, is_exported, open_detector
from ..flags import DetectFlags
from ..network import choose_device
from ..published import find_weights
from .pictures import ImagePicture, Picture, planes_of, read_pictures
from .pipeline import StageTimes, rate_alone, run_overlapped
from .sources import MediaSource, find_sources
from .writer import DetectionFiles, VideoWriter, check_encoder, stem_of, write_crops, write_image

_MOST_AT_ONCE = 4
"""Pictures in inference side by side, where the user does not say."""
_BURST = 4
"""Frames of videos in a row. Images are larger, and cameras are not to be kept waiting."""


def names_of(words: Sequence[str]) -> Sequence[str]:
    """The classes of --names: themselves, or those of a data.yaml."""
    return described_names(words[0]) if len(words) == 1 and Path(words[0]).suffix in (".yaml", ".yml") else words


def pictures_at_once(flags: DetectFlags, sources: list[MediaSource], device: torch.device) -> int:
    """How many are in inference side by side.

    Of a source that does not wait the newest picture counts, which all cores together finish first.
    """
    if flags.at_once:
        return flags.at_once
    on_gpu = device.type != "cpu" and not is_exported(flags.weights)
    if on_gpu or any(source.kind in ("camera", "stream") for source in sources):
        return 1
    return min(threads_of(flags.runtime.num_cores), _MOST_AT_ONCE)


@dataclass
class DetectJob:
    """A run over all sources: the stages of ``pipeline.Stages``, and what they share."""

    flags: DetectFlags
    sources: list[MediaSource]
    detector: Detector
    folder: Path
    files: DetectionFiles
    problems: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    video: VideoWriter | None = None
    video_of: MediaSource | None = None

    def __post_init__(self) -> None:
        self.canvas = self.detector.canvas(self.flags.img)
        self.classes = self.detector.class_numbers(self.flags.classes)
        drawing = self.flags.drawing
        style = {"labels": not drawing.hide_labels, "scores": not drawing.hide_conf}
        self.painters = {
            space: Painter(self.detector.names, space, line_px=drawing.line_thickness, **style)
            for space in ("rgb", "yuv")
        }

    def read(self) -> Iterator[Picture]:
        """All pictures; a source that cannot be read is told and passed over, unless there is no other."""
        given = 0
        for source in self.sources:
            try:
                for picture in read_pictures(source, self.flags.vid_stride, self.flags.images.max_pixels):
                    given += 1
                    yield picture
            except DataError as error:
                if len(self.sources) == 1:
                    raise
                self.problems.append(str(error))
                tqdm.write(f"warning: {error}", file=sys.stderr)
        if not given:
            reason = self.problems[0] if self.problems else f"{self.sources[0].where}: it holds no picture"
            raise DataError(f"nothing to look at in {len(self.sources)} sources; the first: {reason}")

    def prepare(self, picture: Picture) -> tuple[Tensor, Letterbox]:
        """The picture as the network takes it."""
        return picture.letterboxed(self.canvas)

    def infer(self, prepared: tuple[Tensor, Letterbox]) -> Tensor:
        """The network's output."""
        return self.detector(prepared[0][None])

    def interpret(self, picture: Picture, prepared: tuple[Tensor, Letterbox], output: Tensor) -> list[list[float]]:
        """Rows of x1, y1, x2, y2 in the picture's pixels, score, class."""
        nms = self.flags.nms
        with torch.inference_mode():  # a tenth cheaper
            (found,) = self.detector.detections(
                output,
                conf=nms.conf,
                iou=nms.iou,
                max_detections=nms.max_det,
                classes=self.classes,
                class_agnostic=self.flags.agnostic_nms,
            )
            rows: list[list[float]] = torch.cat([prepared[1].to_original(found[:, :4]), found[:, 4:]], 1).tolist()
            return rows

    def write(self, picture: Picture, rows: list[list[float]]) -> None:
        """Keep what was found, and the picture with it."""
        source = picture.source
        frame = None if source.is_image else picture.number
        self.files.add(source.where, source.name, frame, rows, picture.size_hw)
        if self.flags.save_crop and rows:  # before the picture is drawn on
            stem = stem_of(source.name, frame)
            write_crops(self.folder / "crops", stem, rows, self.detector.names, picture.pixels)
        if self.flags.nosave:
            return
        if isinstance(picture, ImagePicture):
            self.painters["rgb"].draw(picture.planes(), rows)
            out = self.folder / (source.name + source.suffix)
            write_image(picture.pixels, out)
            self.outputs.append(str(out))
            return
        frame_out = picture.upright()
        self.painters["yuv"].draw(planes_of(frame_out), rows)
        if self.video is None or self.video_of is not source:
            self.close()
            out = self.folder / f"{source.name}.mp4"
            self.video = VideoWriter(out, picture.size_hw, picture.info, self.flags.vid_stride, self.flags.encoder)
            self.video_of = source
            self.outputs.append(str(out))
        self.video.write(frame_out)

    def close(self) -> None:
        """Finish the video that is being written."""
        video, self.video = self.video, None
        if video is not None:
            video.close()

    def run(self, timing: StageTimes) -> None:
        """Take all pictures through the stages; ``timing`` is filled whatever happens."""
        pictures = self.read()
        first = next(pictures)
        image, _ = self.prepare(first)
        timing.engine_fps = rate_alone(lambda: self.detector(image[None]), timing.at_once)

        def with_first() -> Iterator[Picture]:
            yield first
            yield from pictures

        total = progress(total=self._total(first), unit=" frames", desc=first.source.name[-30:])
        with contextlib.closing(self), total as bar:

            def show() -> None:
                bar.set_postfix_str(f"{self.files.detections} detections", refresh=False)
                bar.update(timing.items - bar.n)

            videos = all(source.kind == "video" for source in self.sources)
            run_overlapped(with_first(), self, timing, burst=_BURST if videos else 1, on_progress=show)

    def _total(self, first: Picture) -> int | None:
        if all(source.is_image for source in self.sources):
            return len(self.sources)
        if len(self.sources) > 1 or isinstance(first, ImagePicture):
            return None
        return -(-first.info.frames // self.flags.vid_stride) or None


def detect(flags: DetectFlags) -> Path:
    """Detect in all sources; returns the run folder, filled."""
    find_weights(flags.weights, flags.download)
    sources = find_sources(flags.source)
    if not all(source.is_image for source in sources):
        check_installed("av")
    if flags.encoder:
        check_encoder(flags.encoder)
    device = choose_device(flags.device)
    timing = StageTimes(pictures_at_once(flags, sources, device))
    with contextlib.ExitStack() as stack:
        detector = stack.enter_context(
            open_detector(
                flags.weights,
                flags.runtime.engine,
                num_cores=flags.runtime.num_cores,
                at_once=timing.at_once,
                precision=flags.runtime.precision,
                device=device,
                names=names_of(flags.names),
                trust=flags.trust.trust,
            )
        )
        if detector.engine != "torch":  # or torch's idle threads take the network's time with waiting
            stack.enter_context(torch_threads(1))
        detector.canvas(flags.img), detector.class_numbers(flags.classes)
        run = RunFolder.create(flags.run.project, flags.run.name)
        run.write_config(flat(flags), "detect.py")
        files = DetectionFiles(
            run.path, detector.names, text=flags.text.save_txt, scores=flags.text.save_conf, as_json=flags.save_json
        )
        job = DetectJob(flags, sources, detector, run.path, stack.enter_context(files))
        try:
            job.run(timing)
        finally:
            report(run.path, job, timing)
    return run.path


def report(folder: Path, job: DetectJob, timing: StageTimes) -> None:
    """Print where the time went, and write it to detect.json."""
    detector, cores = job.detector, threads_of(job.flags.runtime.num_cores)
    summary = {
        "weights": detector.weights,
        "engine": detector.engine,
        "precision": detector.precision,
        "threads": cores,
        **timing.summary(),
        "detections": job.files.detections,
        "outputs": job.outputs,
        "problems": job.problems,
    }
    slim.write_text_atomically(folder / "detect.json", json.dumps(summary, indent=1))
    if not timing.items:
        return
    print(
        f"{detector.engine}, {detector.precision}, {timing.at_once} frames at once on {cores} CPU threads: "
        f"{timing.items} frames, {job.files.detections} detections"
    )
    milliseconds = timing.milliseconds()
    print("| ms of a frame | " + " | ".join(milliseconds) + " |\n| --- |" + " --- |" * len(milliseconds))
    print("| mean | " + " | ".join(f"{value:.2f}" for value in milliseconds.values()) + " |")
    print(
        f"{timing.fps:.1f} FPS from end to end, {timing.fps / timing.engine_fps:.0%} of the {timing.engine_fps:.1f} FPS of the "
        f"network alone, measured before the first frame; in {folder}"
    )
