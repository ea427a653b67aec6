"""Detect in images, videos, webcams and streams, with a checkpoint or an exported file, and draw what is found."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import slim
from data import DataError
from data.images import Canvas
from data.letterbox import Letterbox
from deploy import SUFFIXES, Precision, threads_of, torch_threads
from deploy.open_file import Engine
from slim import SlimError
from tracking import Painter, RunFolder

from ..command import RunFlags, choose_device, flag
from ..detector import Detector, open_detector
from .detection_files import DetectionFiles
from .pictures import ImagePicture, Picture, VideoPicture, planes_of, read_pictures
from .pipeline import StageTimes, Work, run_overlapped
from .sources import Source, find_sources
from .writer import VideoWriter, write_image

_SIDE_PX = 640
_MOST_AT_ONCE = 4
"""Pictures in inference side by side, where the user does not say."""
_WARM_UP = 2
_BURST = 4
"""Frames of videos in a row. Images are larger, and cameras are not to be kept waiting."""


@dataclass(frozen=True)
class DetectFlags(RunFlags):
    """What to look at, with what, and what to keep of it."""

    project: str = flag("runs/detect", "folder that holds the run folders")
    weights: str = flag("", "checkpoint (ours or a published YOLOv5 .pt) or exported file (.onnx, .xml, .torchscript)")
    source: list[str] = flag(  # noqa: RUF009
        [], "images, videos, folders, globs, the number of a webcam, addresses of streams (rtsp://...)"
    )
    engine: Engine | None = flag(None, "torch, onnxruntime or openvino; else that of the file's kind")  # noqa: RUF009
    img: list[int] = flag(  # noqa: RUF009
        [],
        "pixels: one side, which the longer side of a picture gets, or height and width; else the file's own size or 640",
    )
    conf: float = flag(0.25, "lowest score of a detection, 0 to 1")
    iou: float = flag(0.45, "IoU above which a box removes a less confident one, 0 to 1")
    max_det: int = flag(300, "detections of a picture")
    classes: list[int | str] = flag([], "names or numbers of the classes to keep; else all")  # noqa: RUF009
    agnostic_nms: bool = flag(False, "boxes of different classes remove each other, too")
    num_cores: int = flag(2, "CPU threads of the network, 0 for all")
    at_once: int = flag(
        0,
        "pictures in inference side by side, which share --num-cores; 0: one a core, up to 4, and 1 for webcams, streams, GPUs",
    )
    precision: Precision = flag("auto", "auto, float32 or bfloat16, of what is not quantised")  # noqa: RUF009
    vid_stride: int = flag(1, "look at every so many frames of a video")
    save_txt: bool = flag(False, "also write YOLO text to labels/, one file a picture")
    save_conf: bool = flag(False, "with --save-txt: also the scores")
    save_json: bool = flag(False, "also write detections.json")
    nosave: bool = flag(False, "write no annotated images and videos")
    line_thickness: int = flag(0, "pixels of a box's line; 0: by the picture's size")
    hide_labels: bool = flag(False, "draw no class names")
    hide_conf: bool = flag(False, "draw no scores")

    def check(self) -> None:
        """SlimError for what no network could do."""
        if not (0 <= self.conf <= 1 and 0 <= self.iou <= 1 and self.max_det > 0):
            raise SlimError(
                f"--conf {self.conf:g}, --iou {self.iou:g}, --max-det {self.max_det}: expected 0 to 1, 0 to 1 and above 0"
            )
        if self.vid_stride < 1 or self.line_thickness < 0 or self.at_once < 0 or self.num_cores < 0:
            raise SlimError(
                f"--vid-stride {self.vid_stride}, --line-thickness {self.line_thickness}, --at-once {self.at_once}, "
                f"--num-cores {self.num_cores}: expected at least 1, 0, 0 and 0"
            )
        if self.save_conf and not self.save_txt:
            raise SlimError("--save-conf: the scores stand in the text files; add --save-txt")

    def wanted(self, names: list[str], weights: str) -> list[int] | None:
        """The numbers of --classes."""
        found = []
        for word in self.classes:
            number = names.index(str(word)) if str(word) in names else int(word) if str(word).isdecimal() else -1
            if not 0 <= number < len(names):
                raise SlimError(
                    f"--classes {word}: {weights} knows {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}; expected one "
                    f"of these names or 0 to {len(names) - 1}"
                )
            found.append(number)
        return found or None

    def canvas(self, detector: Detector) -> Canvas:
        """What pictures are scaled to."""
        if len(self.img) > 2:
            raise SlimError(f"--img {' '.join(map(str, self.img))}: expected one side, or height and width")
        fixed = detector.sides_px
        sides = (self.img[0], self.img[-1]) if self.img else fixed or (_SIDE_PX, _SIDE_PX)
        detector.check_sides(sides)
        return Canvas(sides, detector.stride_px if fixed is None and len(self.img) < 2 else None)

    def pictures_at_once(self, sources: list[Source], device: torch.device) -> int:
        """Of a source that does not wait the newest picture counts, which all cores together finish first."""
        if self.at_once:
            return self.at_once
        on_gpu = device.type != "cpu" and Path(self.weights).suffix not in SUFFIXES
        if on_gpu or any(source.kind in ("camera", "stream") for source in sources):
            return 1
        return min(self.cores, _MOST_AT_ONCE)

    @property
    def cores(self) -> int:
        return threads_of(self.num_cores)


@dataclass
class Detection:
    """A run: the stages of `engine.Work`, and what they share. One thread each reads, writes."""

    flags: DetectFlags
    sources: list[Source]
    detector: Detector
    folder: Path
    files: DetectionFiles
    problems: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    frames_known: int | None = None
    video: VideoWriter | None = None
    video_of: Source | None = None

    def __post_init__(self) -> None:
        self.canvas = self.flags.canvas(self.detector)
        self.classes = self.flags.wanted(self.detector.names, self.detector.weights)
        style = {"labels": not self.flags.hide_labels, "scores": not self.flags.hide_conf}
        self.painters = {
            space: Painter(self.detector.names, space, line_px=self.flags.line_thickness, **style)
            for space in ("rgb", "yuv")
        }

    def read(self) -> Iterator[Picture]:
        """All pictures; a source that cannot be read is told and passed over, unless there is no other."""
        given = 0
        for source in self.sources:
            try:
                for picture in read_pictures(source, self.flags.vid_stride):
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
        return picture.letterboxed(self.canvas)

    def infer(self, prepared: tuple[Tensor, Letterbox]) -> Tensor:
        return self.detector(prepared[0][None])

    def interpret(self, picture: Picture, prepared: tuple[Tensor, Letterbox], output: Tensor) -> list[list[float]]:
        """Rows of x1, y1, x2, y2 in the picture's pixels, score, class."""
        with torch.inference_mode():  # a tenth cheaper
            (found,) = self.detector.detections(
                output,
                conf=self.flags.conf,
                iou=self.flags.iou,
                max_detections=self.flags.max_det,
                classes=self.classes,
                class_agnostic=self.flags.agnostic_nms,
            )
            return torch.cat([prepared[1].to_original(found[:, :4]), found[:, 4:]], 1).tolist()

    def write(self, picture: Picture, rows: list[list[float]]) -> None:
        source = picture.source
        frame = None if source.is_image else picture.number
        self.files.add(source.where, source.name, frame, rows, picture.size_hw)
        if self.flags.nosave:
            return
        if isinstance(picture, ImagePicture):
            self.painters["rgb"].draw(picture.planes(), rows)
            out = self.folder / (source.name + Path(source.where).suffix)
            write_image(picture.pixels, out)
            self.outputs.append(str(out))
            return
        frame_out = picture.upright()
        self.painters["yuv"].draw(planes_of(frame_out), rows)
        self._writer_of(picture).write(frame_out)

    def _writer_of(self, picture: VideoPicture) -> VideoWriter:
        if self.video is None or self.video_of is not picture.source:
            self.close()
            out = self.folder / f"{picture.source.name}.mp4"
            self.video = VideoWriter(out, picture.size_hw, picture.info, self.flags.vid_stride)
            self.video_of = picture.source
            self.outputs.append(str(out))
        return self.video

    def close(self) -> None:
        """Finish the video that is being written."""
        video, self.video = self.video, None
        if video is not None:
            video.close()

    def run(self, timing: StageTimes) -> None:
        """All pictures; ``timing`` is filled whatever happens."""
        pictures = self.read()
        first = next(pictures)
        image, _ = self.prepare(first)
        for _ in range(_WARM_UP * timing.at_once):
            self.detector(image[None])
        work = Work(again(first, pictures), self.prepare, self.infer, self.interpret, self.write)
        with (
            contextlib.closing(self),
            tqdm(total=self._total(first), unit=" frames", desc=first.source.name[-30:]) as bar,
        ):

            def show() -> None:
                bar.set_postfix_str(f"{self.files.detections} detections", refresh=False)
                bar.update(timing.items - bar.n)

            videos = all(source.kind == "video" for source in self.sources)
            run_overlapped(work, timing, burst=_BURST if videos else 1, on_progress=show)

    def _total(self, first: Picture) -> int | None:
        if len(self.sources) > 1:
            return len(self.sources) if all(source.is_image for source in self.sources) else None
        if isinstance(first, ImagePicture):
            return 1
        return -(-first.info.frames // self.flags.vid_stride) or None


def again(first: Picture, others: Iterator[Picture]) -> Iterator[Picture]:
    """All pictures, of which the first was taken already; closes the others."""
    with contextlib.closing(others):  # type: ignore[type-var]
        yield first
        yield from others


def detect(flags: DetectFlags) -> Path:
    """The run folder, filled."""
    flags.check()
    sources = find_sources(flags.source)
    device = choose_device(flags.device)
    at_once = flags.pictures_at_once(sources, device)
    timing = StageTimes(at_once)
    with contextlib.ExitStack() as stack:
        detector = stack.enter_context(
            open_detector(
                flags.weights,
                flags.engine,
                num_cores=flags.num_cores,
                at_once=at_once,
                precision=flags.precision,
                device=device,
            )
        )
        if detector.engine != "torch":  # or torch's idle threads take the network's time with waiting
            stack.enter_context(torch_threads(1))
        flags.canvas(detector), flags.wanted(detector.names, flags.weights)
        run = RunFolder.create(flags.project, flags.name)
        run.write_config(asdict(flags), "detect.py")
        files = stack.enter_context(
            DetectionFiles(
                run.path, detector.names, text=flags.save_txt, scores=flags.save_conf, as_json=flags.save_json
            )
        )
        detection = Detection(flags, sources, detector, run.path, files)
        try:
            detection.run(timing)
        finally:
            report(run.path, detection, timing)
    return run.path


def report(folder: Path, detection: Detection, timing: StageTimes) -> None:
    """Print where the time went, and write it to detect.json."""
    detector, cores = detection.detector, detection.flags.cores
    summary = {
        "weights": detector.weights,
        "engine": detector.engine,
        "precision": detector.precision,
        "threads": cores,
        **timing.summary(),
        "detections": detection.files.detections,
        "outputs": detection.outputs,
        "problems": detection.problems,
    }
    slim.write_text_atomically(folder / "detect.json", json.dumps(summary, indent=1))
    if not timing.items:
        return
    print(
        f"{detector.engine}, {detector.precision}, {timing.at_once} frames at once on {cores} CPU threads: "
        f"{timing.items} frames, {detection.files.detections} detections"
    )
    milliseconds = timing.milliseconds()
    print("| ms of a frame | " + " | ".join(milliseconds) + " |\n| --- |" + " --- |" * len(milliseconds))
    print("| mean | " + " | ".join(f"{value:.2f}" for value in milliseconds.values()) + " |")
    print(
        f"{timing.fps:.1f} FPS from end to end, {timing.fps / timing.engine_fps:.0%} of the {timing.engine_fps:.1f} FPS of "
        f"inference alone ({timing.at_once} x 1000 / {milliseconds['inference']:.2f} ms, as measured here); in {folder}"
    )


def main(flags: DetectFlags) -> None:
    detect(flags)
