"""Float files quantised to INT8 on real images, without training, within a bound of accuracy."""

from __future__ import annotations

import contextlib
import io
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from slim import SlimError

from .network import EngineNetwork, as_bytes, whole_or_nothing
from .open_file import open_exported
from .openvino_file import read_openvino, save_openvino
from .operator_index import OperatorIndex
from .settings import Int8Target

ROUGH_IMAGES = 8
"""How many images calibrate a network that is only compared with others."""
PROBE_IMAGES = 4
"""How many images a block's noise is measured on."""


class Quantiser(ABC):
    """A float file that can be written again in INT8, with any of its operators left in floating point.

    Args:
        source: the float file
        images: float 0..1, [3, H, W] each, of the size that the file takes; they choose the ranges of activations
        target: the CPUs that an ONNX file is for; OpenVINO's files are the same for all
    """

    suffix: ClassVar[str]

    def __init__(self, source: str | Path, images: Sequence[Tensor], target: Int8Target = "any") -> None:
        self.source, self.target = Path(source), target
        if not len(images):
            raise SlimError(f"{source}: no images to calibrate on; INT8 needs some of those that the network will see")
        network = open_exported(source)
        network.check_size(images[0][None])
        self.images, self.batch_size, self.takes_bytes = images, network.input_shape[0] or 1, network.takes_bytes
        self.metadata = network.metadata
        self.operators = OperatorIndex.of(self.source)

    @abstractmethod
    def write(self, path: Path, kept: frozenset[str], *, rough: bool = False) -> None:
        """Write the INT8 file; operators in ``kept`` stay float. ``rough``: from few images, to compare networks."""

    def batches(self, rough: bool) -> list[Tensor]:
        """The calibration images as the file takes them; the first ones again where the last batch is not full."""
        count = min(len(self.images), ROUGH_IMAGES) if rough else len(self.images)
        places = torch.arange(-(-count // self.batch_size) * self.batch_size) % count
        batches = [torch.stack([self.images[i] for i in part.tolist()]) for part in places.split(self.batch_size)]
        return [as_bytes(batch) for batch in batches] if self.takes_bytes else batches


class OpenVinoQuantiser(Quantiser):
    """``.xml`` files, by nncf: weights per channel and symmetric, activations asymmetric, biases corrected."""

    suffix = ".xml"

    def write(self, path: Path, kept: frozenset[str], *, rough: bool = False) -> None:
        import nncf  # takes seconds, and prints

        images = [batch.numpy() for batch in self.batches(rough)]
        shown = tqdm(images, "calibration", disable=rough or None, leave=False)
        with _quiet(), whole_or_nothing(path) as temporary:
            quantised = nncf.quantize(
                read_openvino(self.source)[0],
                nncf.Dataset(shown),
                subset_size=len(images),
                preset=nncf.QuantizationPreset.MIXED,  # activations of SiLU are hardly negative
                ignored_scope=nncf.IgnoredScope(names=sorted(kept)),
                advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=rough),
            )
            save_openvino(quantised, temporary, self.metadata)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep nncf's report from standard output."""
    logger = logging.getLogger("nncf")  # its own set_log_level also sets that of handlers which others put there
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True)
class Quantised:
    """What became of an INT8 file.

    Attributes:
        ap, ap_float: its AP and the float file's; None where not measured
        kept: the blocks that are float for the sake of ``ap``
        changed: where AP is not measured, how many detections were lost or gained, and how many the float file has
    """

    ap: float | None
    ap_float: float | None
    kept: tuple[str, ...] = ()
    changed: tuple[int, int] | None = None


def quantise(
    quantiser: Quantiser,
    path: Path,
    keep_float: Sequence[str],
    measure_ap: Callable[[EngineNetwork], float] | None = None,
    max_drop: float | None = None,
    rank: Callable[[], Sequence[str]] | None = None,
) -> Quantised:
    """Write an INT8 file, with as many blocks in floating point as a bound of accuracy asks for.

    Args:
        quantiser: of the float file
        path: the INT8 file
        keep_float: patterns of modules that stay in floating point in any case
        measure_ap: the AP of a file; None leaves it unknown
        max_drop: the AP that may be lost against the float file. While more is lost, the noisiest 1, 2, 4 ... blocks stay
            float too, up to half of them; SlimError if that does not do
        rank: the blocks, the noisiest first, instead of ``noisiest_blocks``
    """
    fixed = quantiser.operators.within(keep_float)
    quantiser.write(path, fixed)
    if measure_ap is None:
        return Quantised(None, None)
    before, after = measure_ap(open_exported(quantiser.source, precision="float32")), measure_ap(open_exported(path))
    if max_drop is None or before - after <= max_drop:
        return Quantised(after, before)
    ranked = list(rank() if rank else noisiest_blocks(quantiser, fixed))
    count, best = 1, after
    while count <= len(ranked) // 2:
        kept = ranked[:count]
        quantiser.write(path, fixed | quantiser.operators.within(kept))
        after = measure_ap(open_exported(path))
        if before - after <= max_drop:
            return Quantised(after, before, tuple(kept))
        best, count = max(best, after), 2 * count
    raise SlimError(
        f"--max-drop {max_drop:g}: AP {before:.4f} falls by {before - best:.4f} to {best:.4f} in INT8, also with {count // 2} of "
        f"{len(ranked)} blocks in float; nothing was written; allow more, or train with finetune.py --qat"
    )


def noisiest_blocks(quantiser: Quantiser, kept: frozenset[str]) -> list[str]:
    """The blocks that are quantised while ``kept`` is not, first the one that, alone quantised, changes the output most.

    A block's noise is the mean squared difference of each entry of the output's last axis, relative to its variance.
    """
    operators = quantiser.operators
    images = torch.stack([*quantiser.images[:PROBE_IMAGES]])
    wanted = open_exported(quantiser.source, precision="float32")(images)
    rows = tuple(range(wanted.ndim - 1))
    noise = {}
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"block{quantiser.suffix}"
        for block in tqdm(operators.blocks(kept), "noise of each block", disable=None, leave=False):
            others = frozenset(operators.module_of) - (operators.within([block]) - operators.within([]))
            quantiser.write(path, kept | others, rough=True)
            lost = open_exported(path)(images) - wanted
            noise[block] = float((lost.square().mean(rows) / wanted.var(rows).clamp(min=1e-12)).mean())
    return sorted(noise, key=lambda block: -noise[block])
