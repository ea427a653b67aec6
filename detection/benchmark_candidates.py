"""What is to be measured: checkpoints and exported files under engines, at sizes, in precisions, on some cores."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

import torch
from torch import Tensor

import slim
from deploy import SUFFIX_FOR, SUFFIXES, Precision, as_bytes, open_exported
from deploy.network import read_list, threads_of
from deploy.settings import Engine
from detection.detector import Detector, is_exported, of_checkpoint, of_file
from detection.network import Network, check_image_size, read_network
from detection.write_file import write_file
from models import activation_name

Sides = tuple[int, int]
DEFAULT_SIDES: Sides = (416, 416)
Images = Callable[[Sides, int], Tensor]
"""Height and width, and how many: float 0..1 in steps of 1/255, [B, 3, H, W]."""


@dataclass(frozen=True)
class Wanted:
    """What to combine. Without ``engines`` and ``sides_px`` each file runs as it is made to, else at ``DEFAULT_SIDES``."""

    weights: Sequence[str]
    engines: Sequence[Engine] = ()
    sides_px: Sequence[Sides] = ()
    num_cores: Sequence[int] = (0,)
    batch_sizes: Sequence[int] = (1,)
    precisions: Sequence[Precision] = ("auto",)


@dataclass(frozen=True)
class Facts:
    """What a network costs, where that is known: MACs of an image, parameters, the name of its activation."""

    macs: int | None = None
    params: int | None = None
    activation: str = ""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A detector with what it is run on: ``images`` [B, 3, H, W], in the type that the network takes."""

    detector: Detector
    images: Tensor
    num_cores: int
    facts: Facts
    reopened: Callable[[], Detector]
    """The same with the engine measuring every operator, see ``deploy.profile``."""

    @property
    def sides_px(self) -> Sides:
        return self.images.shape[2], self.images.shape[3]

    @property
    def precision_text(self) -> str:
        """In force: of a quantised network also that of its other layers, unless that is float32."""
        floating = getattr(self.detector.network, "floating_precision", self.detector.precision)
        return " + ".join(dict.fromkeys([self.detector.precision, *([] if floating == "float32" else [floating])]))

    @property
    def ap_key(self) -> tuple[object, ...]:
        """What decides about its AP."""
        return self.detector.weights, self.detector.engine, self.precision_text, self.sides_px

    def set_threads(self) -> None:
        """The threads of torch are those of the whole process; other engines have their own."""
        if self.detector.engine == "torch":
            torch.set_num_threads(threads_of(self.num_cores))

    def run(self) -> Tensor:
        return self.detector(self.images)


class Candidates:
    """Opens candidates; exports that were made for them last as long as this does."""

    def __init__(self, images: Images) -> None:
        self.images = images
        self._folder = TemporaryDirectory()
        self._networks: dict[str, Network] = {}
        self._exports: dict[tuple[object, ...], Path] = {}
        self._in_torch: dict[tuple[str, Precision], Detector] = {}
        self._own_sides: dict[tuple[str, Engine | None], Sides | None] = {}

    def __enter__(self) -> Candidates:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._folder.cleanup()

    def of(self, wanted: Wanted) -> list[Candidate]:
        """All combinations that there are, each once: what was asked for as ``auto`` may be float32 as well.

        SlimError or SlimError for weights of which none of the engines, sizes or precisions can be had.
        """
        found: dict[tuple[object, ...], Candidate] = {}
        for weights in dict.fromkeys(wanted.weights):
            for engine, precision in engines_of(weights, wanted):
                for sides, batch_size in itertools.product(
                    self._sides_of(weights, engine, wanted), dict.fromkeys(wanted.batch_sizes)
                ):
                    for num_cores in dict.fromkeys(wanted.num_cores):
                        made = self._open(weights, engine, precision, sides, batch_size, num_cores)
                        found.setdefault((made.ap_key, batch_size, num_cores), made)
        return list(found.values())

    def _open(
        self, weights: str, engine: Engine | None, precision: Precision, sides: Sides, batch_size: int, num_cores: int
    ) -> Candidate:
        images = self.images(sides, batch_size)
        if is_exported(weights):
            path, facts = Path(weights), None
        else:
            network = self._network(weights)
            for side in sides:
                check_image_size(network.model, side)
            facts = facts_of(network, sides)
            if engine in (None, "torch"):
                if (weights, precision) not in self._in_torch:
                    made = of_checkpoint(weights, network, precision, torch.device("cpu"))
                    self._in_torch[weights, precision] = made
                detector = self._in_torch[weights, precision]
                return Candidate(detector, images, num_cores, facts, lambda: detector)
            path = self._exported(weights, network, engine, images)

        def opened(profile: bool = False) -> Detector:
            return of_file(
                weights, open_exported(path, engine, num_cores=num_cores, precision=precision, profile=profile)
            )

        detector = opened()
        detector.check_sides(sides)
        if getattr(detector.network, "takes_bytes", False):
            images = as_bytes(images)
        facts = facts or facts_of_file(detector, sides)
        return Candidate(detector, images, num_cores, facts, lambda: opened(profile=True))

    def _network(self, weights: str) -> Network:
        if weights not in self._networks:
            self._networks[weights] = read_network(weights)
        return self._networks[weights]

    def _exported(self, weights: str, network: Network, engine: Engine, images: Tensor) -> Path:
        key = (weights, engine, images.shape)
        if key not in self._exports:
            path = Path(self._folder.name) / f"{len(self._exports)}{SUFFIX_FOR[engine]}"
            write_file(network, path, images)
            self._exports[key] = path
        return self._exports[key]

    def _sides_of(self, weights: str, engine: Engine | None, wanted: Wanted) -> Sequence[Sides]:
        asked = tuple(dict.fromkeys(wanted.sides_px))
        if not is_exported(weights):
            return asked or (DEFAULT_SIDES,)
        if (weights, engine) not in self._own_sides:
            self._own_sides[weights, engine] = of_file(weights, open_exported(weights, engine)).sides_px
        own = self._own_sides[weights, engine]
        if own is None or not asked:
            return asked or (own or DEFAULT_SIDES,)
        # Where it takes none of them, the first one's refusal says so.
        return (own,) if own in asked else asked[:1]


def engines_of(weights: str, wanted: Wanted) -> Iterator[tuple[Engine | None, Precision]]:
    """The engines that can run a file, and their precisions; where there is none, a pair whose refusal says why."""
    engines: Sequence[Engine | None] = tuple(dict.fromkeys(wanted.engines)) or (None,)
    precisions = tuple(dict.fromkeys(wanted.precisions))
    possible = [pair for pair in itertools.product(engines, precisions) if can_run(weights, *pair)]
    yield from possible or [(engines[0], precisions[0])]


def can_run(weights: str, engine: Engine | None, precision: Precision) -> bool:
    """Whether there is such an engine for a kind of file; all of them run checkpoints, which are exported for them."""
    own: tuple[Engine, ...] = SUFFIXES.get(Path(weights).suffix, ("torch", "onnxruntime", "openvino"))
    chosen = engine or own[0]
    has_bfloat16 = chosen == "openvino" or (chosen == "torch" and not is_exported(weights))
    return chosen in own and (precision != "bfloat16" or has_bfloat16)


def facts_of(network: Network, sides: Sides) -> Facts:
    """Of a checkpoint."""
    cost = slim.cost(network.model, torch.zeros(1, 3, *sides))
    return Facts(cost.macs, cost.params, activation_name(network.model))


def facts_of_file(detector: Detector, sides: Sides) -> Facts:
    """As export.py wrote them into the file; MACs, there those at the size of the export, go with the area."""
    metadata = getattr(detector.network, "metadata", {})
    macs, params = (int(metadata[key]) if metadata.get(key, "").isdecimal() else None for key in ("macs", "params"))
    made_for = read_list(metadata, "imgsz")
    if macs is not None and len(made_for) == 2:
        macs = macs * sides[0] * sides[1] // (made_for[0] * made_for[1])
    return Facts(macs, params, metadata.get("activation", ""))
