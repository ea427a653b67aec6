"""The command line of each script: settings of all packages put together, free of torch.

See ``detection.command`` for how these dataclasses become flags.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NoReturn

from data.settings import Augment, DataSettings, ImageSettings, LoaderSettings, SamplingSettings
from deploy.settings import Engine, Int8Settings, LatencySettings, RuntimePrecision, RuntimeSettings, TrustSettings
from engine.settings import OptimConfig, SparsitySettings, TrainConfig
from models.settings import DistillGains, LossGains, NmsSettings
from tracking.settings import RunSettings

ROUND_TO = 8
KEEP_MACS = 0.4
SHAPES = "data/shapes.yaml"


def _refuse(message: str) -> NoReturn:
    from slim import SlimError  # which imports torch

    raise SlimError(message)


@dataclass(frozen=True)
class ScriptFlags:
    """Options of every script."""

    device: Annotated[str, "auto, cpu, cuda, cuda:N or N; auto takes the first GPU where there is one"] = "auto"
    run: RunSettings = RunSettings()


@dataclass(frozen=True)
class NetworkSettings:
    """Network."""

    weights: Annotated[
        str, "checkpoint to start from (ours or a published YOLOv5 .pt); '' trains --cfg from scratch"
    ] = ""
    cfg: Annotated[str, "model description, used without --weights"] = "models/yolov5n.yaml"
    width_multiple: Annotated[
        float | None,
        "instead of that of --cfg: factor of all widths, which are rounded up to multiples of 8",
        "above 0",
    ] = None
    act: Annotated[
        Literal["keep", "silu", "hardswish", "relu"],
        "activation of all blocks; swapped where --weights have another, which costs AP until trained on",
    ] = "keep"
    freeze: Annotated[
        tuple[str, ...], "layers left as they are: a count from the first, indices or paths as model.1.*"
    ] = ()
    noautoanchor: Annotated[bool, "keep the anchors even where they fit the training boxes badly"] = False

    def __post_init__(self) -> None:
        if self.width_multiple is not None and self.weights:
            _refuse(
                f"--width-multiple {self.width_multiple:g}: the widths are those of --weights {self.weights}; it goes with --cfg "
                "and --weights ''"
            )


@dataclass(frozen=True)
class TrainFlags(ScriptFlags):
    """Options."""

    img: Annotated[int, "image size in pixels, a multiple of the largest stride"] = 320
    network: NetworkSettings = NetworkSettings()
    dataset: DataSettings = DataSettings()
    loading: LoaderSettings = LoaderSettings()
    training: TrainConfig = TrainConfig()
    gains: LossGains = LossGains()
    teacher: Annotated[str, "trained checkpoint of the same classes whose outputs are learned beside the labels"] = ""
    distill: Annotated[DistillGains, "distill_"] = DistillGains()
    augment: Augment = Augment()
    sampling: SamplingSettings = SamplingSettings()
    rect: Annotated[bool, "evaluate on rectangular batches with little padding instead of squares"] = False
    resume: Annotated[
        str,
        "continue a run with its own settings: that of a run folder or its weights/last.pt; without a value, the newest of this "
        "--project and --name",
    ] = ""
    exist_ok: Annotated[
        bool, "train in the folder of that --name though there is one: what a run has left there is removed"
    ] = False
    given: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not 0 <= self.sampling.close_mosaic <= self.training.epochs:
            _refuse(f"--close-mosaic {self.sampling.close_mosaic}: expected 0 to --epochs, {self.training.epochs}")


@dataclass(frozen=True)
class WidthSettings:
    """Widths after the cut, or that a budget of sparse training leads to."""

    scope: Annotated[
        Literal["global", "local", "isomorphic"],
        "rank all channels together, keep the same share of each group, or of each class of like groups",
    ] = "global"
    round_to: Annotated[
        int | None,
        "kept widths are multiples of this many channels; else 8, for a latency 8 or 16, whichever measures faster",
    ] = None
    min_channels: Annotated[int, "every group keeps at least this many channels"] = 8
    min_keep: Annotated[float, "every group keeps at least this share of its channels", "0 to 1"] = 0.0
    overrides: Annotated[tuple[str, ...], "PATTERN=WIDTH, layers of a set width: a share (0.5) or a count (32)"] = ()
    ignore: Annotated[tuple[str, ...], "patterns of layers that stay whole, such as 'model.24.*'"] = ()


@dataclass(frozen=True)
class SparseFlags(TrainFlags):
    """Options of sparse training."""

    run: RunSettings = RunSettings(project="runs/sparse")
    sparsity: SparsitySettings = SparsitySettings()
    widths: WidthSettings = WidthSettings()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity.sparse_from >= self.training.epochs:
            _refuse(
                f"--sparse-from {self.sparsity.sparse_from} leaves no epoch with the L1 step; expected less than "
                f"--epochs {self.training.epochs}"
            )


@dataclass(frozen=True)
class QatSettings:
    """Quantisation-aware training."""

    qat: Annotated[bool, "round weights and maps to 8 bits while training, for an INT8 export that loses less"] = False
    keep_float: Annotated[tuple[str, ...], "with --qat: patterns of modules beside the head that are not rounded"] = ()
    calibration_images: Annotated[int, "with --qat: training images on which the ranges are found", "at least 1"] = 64

    def __post_init__(self) -> None:
        if self.keep_float and not self.qat:
            _refuse("--keep-float: says what --qat leaves alone; add --qat, or leave it out")


@dataclass(frozen=True)
class FinetuneFlags(TrainFlags):
    """Options of fine-tuning."""

    run: RunSettings = RunSettings(project="runs/finetune")
    keep_gates: Annotated[bool, "train on with the gates of the checkpoint instead of folding them first"] = False
    reinit: Annotated[bool, "take only the structure of --weights: its widths, with all weights drawn anew"] = False
    qat: QatSettings = QatSettings()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.qat.qat and self.keep_gates:
            _refuse("--qat and --keep-gates: gates are folded before a network is quantised; leave one out")
        if self.reinit and not self.network.weights:
            _refuse(
                "--reinit: draws the weights of a checkpoint's structure anew; add --weights, or leave it out for --cfg"
            )
        if self.reinit and self.keep_gates:
            _refuse("--reinit and --keep-gates: gates are folded before weights are drawn anew; leave one out")


@dataclass(frozen=True)
class TargetSettings:
    """Target of the cut."""

    macs: Annotated[float | None, "MACs to keep: a share above 0 to 1, or a count"] = None
    params: Annotated[float | None, "parameters to keep: a share above 0 to 1, or a count"] = None
    channels: Annotated[float | None, "prunable channels to keep: a share above 0 to 1, or a count"] = None
    threshold: Annotated[
        float | None, "instead: cut every channel whose score is below this (gates: 0.01 is closed)"
    ] = None

    def __post_init__(self) -> None:
        for name, value in [("macs", self.macs), ("params", self.params), ("channels", self.channels)]:
            if value is not None and 2 <= value <= 100:
                _refuse(
                    f"--{name} {value:g}: expected a share above 0 to 1, or a count above 100; {value:g} % is {value / 100:g}"
                )

    @property
    def given(self) -> tuple[str, ...]:
        """The flags that name a target."""
        return tuple(f"--{name}" for name, value in vars(self).items() if value is not None)


@dataclass(frozen=True)
class ScoreSettings:
    """Ranking of the channels."""

    criterion: Annotated[str, "what ranks the channels: gate, bn, l1, l2, fpgm, taylor (needs --data) or random"] = (
        "gate"
    )
    reduction: Annotated[Literal["mean", "max", "sum"] | None, "over a group's layers; else the criterion's own"] = None
    normalise: Annotated[Literal["mean", "max", "none"] | None, "within each layer; else the criterion's own"] = None
    taylor_batches: Annotated[int, "training batches whose gradients --criterion taylor averages"] = 8
    cost_aware: Annotated[bool, "rank by score per MAC (or parameter) saved"] = False


@dataclass(frozen=True)
class PruneFlags(ScriptFlags):
    """Options of the cut."""

    run: RunSettings = RunSettings(project="runs/prune")
    seed: Annotated[int, "seed of every random generator"] = 0
    weights: Annotated[str, "checkpoint to cut (ours or a published YOLOv5 .pt)"] = ""
    img: Annotated[int, "image size in pixels at which MACs are counted and the proof is made"] = 320
    out: Annotated[str | None, "file for the narrow network; else weights/pruned.pt in the run folder"] = None
    target: TargetSettings = TargetSettings()
    latency: LatencySettings = LatencySettings()
    score: ScoreSettings = ScoreSettings()
    widths: WidthSettings = WidthSettings()
    recalibrate: Annotated[
        int, "training batches on which batch-norm statistics are re-estimated after the cut; 0 keeps them"
    ] = 0
    unstructured: Annotated[
        float | None,
        "instead of cutting channels: share of the convolutions' weights set to zero, the smallest",
        "above 0 to below 1",
    ] = None
    unstructured_scope: Annotated[
        Literal["layer", "global"], "with --unstructured: this share of each convolution's weights, or of all together"
    ] = "layer"
    dataset: DataSettings = DataSettings(data=None)
    loading: LoaderSettings = LoaderSettings(workers=0)

    def __post_init__(self) -> None:
        if self.recalibrate and self.dataset.data is None:
            _refuse("--recalibrate needs --data: statistics are re-estimated on its training images")
        given = [*self.target.given, *self.latency.given]
        if len(given) > 1:
            _refuse(f"{' and '.join(given)}: give exactly one target")
        if self.unstructured is None:
            return
        if others := [*given, *(["--recalibrate"] if self.recalibrate else [])]:
            _refuse(
                f"--unstructured and {', '.join(others)}: zeroed weights leave every width as it is; cut channels in a run of "
                "its own"
            )


def share_of_drop(max_drop: float | str) -> float | None:
    """0.05 of a --max-drop of 5%, None of one in AP; SlimError for what is neither."""
    if isinstance(max_drop, str):
        with contextlib.suppress(ValueError):
            if max_drop.endswith("%") and 0 <= (share := float(max_drop[:-1]) / 100) < 1:
                return share
    elif 0 <= max_drop <= 1:
        return None
    _refuse(f"--max-drop {max_drop}: expected an AP from 0 to 1 such as 0.02, or a share of the dense AP such as 5%")


@dataclass(frozen=True)
class IterateFlags(ScriptFlags):
    """Options of the loop."""

    run: RunSettings = RunSettings(project="runs/iterate")
    seed: Annotated[int, "seed of every random generator"] = 0
    weights: Annotated[str, "trained checkpoint to slim; its AP is the baseline"] = ""
    img: Annotated[int, "image size in pixels, a multiple of the largest stride"] = 320
    rounds: Annotated[int, "how many times to train sparsely and cut", "at least 1"] = 3
    macs: Annotated[
        float | None,
        "share of the MACs of --weights to keep in the end; else 0.4, unless a latency is the target",
        "above 0 to 1",
    ] = None
    sparse_epochs: Annotated[int, "epochs of sparse training a round"] = 10
    recovery_epochs: Annotated[
        int, "epochs of training after each cut, before it is judged; 0 judges it at once", "at least 0"
    ] = 5
    finetune_epochs: Annotated[int, "epochs of fine-tuning at the end"] = 20
    max_drop: Annotated[
        float | str,
        "a round is accepted while AP and the worst class's AP are at most so far below dense: AP as 0.02, or a share of "
        "dense as 5%",
    ] = 0.02
    attempts: Annotated[
        int, "cuts to try in a round, each half as far as the one before, until one is accepted", "at least 1"
    ] = 3
    recalibrate: Annotated[
        int, "training batches on which batch-norm statistics are re-estimated after a cut", "at least 0"
    ] = 8
    teacher: Annotated[
        str, "checkpoint whose outputs every training learns beside the labels, such as --weights itself"
    ] = ""
    export: Annotated[
        Literal["onnx", "openvino", "torchscript", "none"],
        "also leave the slim network for other runtimes: weights/slim.onnx, slim.xml, slim.torchscript, or none",
    ] = "onnx"
    train: Annotated[tuple[str, ...], "further flags of every training, as name=value"] = ()
    sparse: Annotated[tuple[str, ...], "further flags of the sparse trainings, as name=value"] = ()
    finetune: Annotated[tuple[str, ...], "further flags of recovery and fine-tuning, as name=value"] = ()
    prune: Annotated[tuple[str, ...], "further flags of the cuts, as name=value, such as criterion=l1 scope=local"] = ()
    dataset: DataSettings = DataSettings()
    loading: LoaderSettings = LoaderSettings()
    optim: OptimConfig = OptimConfig()
    distill: Annotated[DistillGains, "distill_"] = DistillGains()
    sparsity: SparsitySettings = SparsitySettings(sparse_from=1)
    widths: WidthSettings = WidthSettings()
    latency: LatencySettings = LatencySettings()

    def __post_init__(self) -> None:
        share_of_drop(self.max_drop)
        if self.latency.given and self.macs is not None:
            _refuse("--macs and a latency: give one target")
        if self.sparsity.keep_macs != SparsitySettings.keep_macs:
            _refuse("--keep-macs: each round's follows from --macs; give that, or --sparse keep-macs=X for all")

    def resolved(self) -> IterateFlags:
        """With the values of flags that were not given."""
        if self.latency.given:
            return self
        widths = replace(self.widths, round_to=ROUND_TO if self.widths.round_to is None else self.widths.round_to)
        return replace(self, macs=KEEP_MACS if self.macs is None else self.macs, widths=widths)


@dataclass(frozen=True)
class TextSettings:
    """Text files of detections."""

    save_txt: Annotated[bool, "also write YOLO text to labels/, one file a picture"] = False
    save_conf: Annotated[bool, "with --save-txt: also the scores"] = False

    def __post_init__(self) -> None:
        if self.save_conf and not self.save_txt:
            _refuse("--save-conf: the scores stand in the text files; add --save-txt")


@dataclass(frozen=True)
class ValFlags(ScriptFlags):
    """Options of the evaluation."""

    run: RunSettings = RunSettings(project="runs/val")
    seed: Annotated[int, "seed of every random generator"] = 0
    weights: Annotated[
        str, "checkpoint (ours or a published YOLOv5 .pt) or exported file (.onnx, .xml, .torchscript)"
    ] = ""
    split: Annotated[str, "train, val or test"] = "val"
    img: Annotated[
        int | str | None,
        "image size in pixels, multiples of the largest stride: one side, or height x width as in 384x640. Else an "
        "exported file's own, or 320",
    ] = None
    rect: Annotated[bool, "rectangular batches with little padding instead of squares: faster"] = False
    save_json: Annotated[
        bool,
        "also write predictions.json to the run folder: COCO results, by the ids of the data set's COCO file or of YOLOv5",
    ] = False
    text: TextSettings = TextSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    trust: TrustSettings = TrustSettings()
    nms: NmsSettings = NmsSettings(conf=0.001, iou=0.65)
    dataset: DataSettings = DataSettings()
    loading: LoaderSettings = LoaderSettings(workers=0)


@dataclass(frozen=True)
class ExportFlags(ScriptFlags):
    """Options of the export."""

    run: RunSettings = RunSettings(project="runs/export")
    seed: Annotated[int, "seed of every random generator"] = 0
    weights: Annotated[str, "checkpoint (ours or a published YOLOv5 .pt)"] = ""
    include: Annotated[tuple[Literal["onnx", "openvino", "torchscript"], ...], "formats to write"] = ("onnx",)
    img: Annotated[
        tuple[int, ...], "image size in pixels, multiples of the largest stride: one side or height and width"
    ] = (320,)
    batch_size: Annotated[int, "images at once, where --dynamic does not leave that free", "at least 1"] = 1
    dynamic: Annotated[bool, "number, height and width of the images are free, in multiples of the largest stride"] = (
        False
    )
    uint8_input: Annotated[bool, "the file takes bytes 0 to 255 and scales them itself, instead of float 0 to 1"] = (
        False
    )
    half: Annotated[bool, "weights in 16 bits, computed in float32 as before: half the file; onnx and openvino"] = False
    opset: Annotated[int | None, "operator set of ONNX files; else that of torch's exporter", "15 to 23"] = None
    out: Annotated[str | None, "file to write, its suffix by the format; else weights/ in the run folder"] = None
    nms: Annotated[bool, "the file gives final detections [batch, --max-det, 6]: box, score, class"] = False
    suppression: NmsSettings = NmsSettings()
    int8: Int8Settings = Int8Settings()
    dataset: DataSettings = DataSettings(data=SHAPES)

    def __post_init__(self) -> None:
        if self.half and (self.int8.int8 or "torchscript" in self.include):
            _refuse("--half: for onnx and openvino files in float; leave it out with --int8 and --include torchscript")
        if self.opset is not None and "onnx" not in self.include:
            _refuse(f"--opset {self.opset}: of ONNX files alone; add --include onnx, or leave it out")


@dataclass(frozen=True)
class BenchmarkFlags(ScriptFlags):
    """Options of the comparison.

    Of engines, sizes, cores, batch sizes and precisions all combinations are measured.
    """

    run: RunSettings = RunSettings(project="runs/benchmark")
    seed: Annotated[int, "seed of every random generator"] = 0
    weights: Annotated[tuple[str, ...], "checkpoints and exported files; ratios are against the first"] = ()
    engine: Annotated[
        tuple[Engine, ...],
        "engines, each for the files that it can run (checkpoints are exported for it). Else a file's own, or torch",
    ] = ()
    img: Annotated[
        tuple[int | str, ...],
        "image sizes in pixels, one side or height x width as in 384x640. Else a file's own, or 416",
    ] = ()
    num_cores: Annotated[tuple[int, ...], "CPU threads, 0 for all", "at least 0"] = (2,)
    batch_size: Annotated[tuple[int, ...], "images at once", "at least 1"] = (1,)
    precision: Annotated[tuple[RuntimePrecision, ...], "what the engine computes in; auto leaves it the choice"] = (
        "auto",
    )
    repeats: Annotated[int, "measured runs of each network"] = 30
    warmup: Annotated[int, "rounds before measuring"] = 2
    max_seconds: Annotated[
        float, "for each network: after so long no further runs, though --repeats are not reached", "above 0"
    ] = 30.0
    profile: Annotated[bool, "also print and write the engine's own time for each operator"] = False
    split: Annotated[str, "with --data: train, val or test"] = "val"
    trust: TrustSettings = TrustSettings()
    nms: NmsSettings = NmsSettings(conf=0.001, iou=0.65)
    dataset: DataSettings = DataSettings(data=None)


@dataclass(frozen=True)
class DrawingSettings:
    """Drawing."""

    line_thickness: Annotated[int, "pixels of a box's line; 0: by the picture's size", "at least 0"] = 0
    hide_labels: Annotated[bool, "draw no class names"] = False
    hide_conf: Annotated[bool, "draw no scores"] = False


@dataclass(frozen=True)
class DetectFlags(ScriptFlags):
    """Options of the detection."""

    run: RunSettings = RunSettings(project="runs/detect")
    seed: Annotated[int, "seed of every random generator"] = 0
    weights: Annotated[
        str, "checkpoint (ours or a published YOLOv5 .pt) or exported file (.onnx, .xml, .torchscript)"
    ] = ""
    download: Annotated[bool, "fetch --weights first where they are missing and published (yolov5n.pt)"] = False
    source: Annotated[
        tuple[str, ...],
        "images, videos, folders, globs, .txt lists of these, the number of a webcam, addresses of streams (rtsp://...)",
    ] = ()
    img: Annotated[
        tuple[int, ...],
        "pixels: one side, which the longer side of a picture gets, or height and width; else the file's own size or 640",
    ] = ()
    at_once: Annotated[
        int,
        "pictures in inference side by side, which share --num-cores; 0: one a core, up to 4, and 1 for webcams, streams, GPUs",
        "at least 0",
    ] = 0
    vid_stride: Annotated[int, "look at every so many frames of a video", "at least 1"] = 1
    save_json: Annotated[bool, "also write detections.json"] = False
    save_crop: Annotated[bool, "also write each detection as a picture of its own to crops/CLASS/"] = False
    nosave: Annotated[bool, "write no annotated images and videos"] = False
    encoder: Annotated[
        tuple[str, ...],
        "what writes videos: an encoder of FFmpeg's and its options, such as h264_nvenc preset=p1; else the quickest for CPUs",
    ] = ()
    text: TextSettings = TextSettings()
    images: ImageSettings = ImageSettings()
    runtime: RuntimeSettings = RuntimeSettings(num_cores=2)
    trust: TrustSettings = TrustSettings()
    nms: NmsSettings = NmsSettings()
    names: Annotated[
        tuple[str, ...], "classes of an exported file that does not name them, or a data.yaml with them"
    ] = ()
    classes: Annotated[tuple[int | str, ...], "names or numbers of the classes to keep; else all"] = ()
    agnostic_nms: Annotated[bool, "boxes of different classes remove each other, too"] = False
    drawing: DrawingSettings = DrawingSettings()

    def __post_init__(self) -> None:
        if len(self.img) > 2:
            _refuse(f"--img {' '.join(map(str, self.img))}: expected one side, or height and width")
