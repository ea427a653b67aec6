"""Float files quantised to INT8 on real images, without training."""

from __future__ import annotations

import contextlib
import io
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from slim import SlimError

from .float_parts import operators_of
from .network import as_bytes
from .open_file import open_exported
from .openvino_file import read_openvino, save_openvino

ROUGH_IMAGES = 8
"""On which a network is quantised that is only to be compared with others."""


class Quantiser(ABC):
    """A float file that can be written again in INT8, with any of its operators left in floating point.

    ``images``: float 0..1, [3, H, W] each, of the size that the file takes; by them the ranges of activations are chosen.
    """

    suffix: ClassVar[str]

    def __init__(self, source: str | Path, images: Sequence[Tensor]) -> None:
        self.source = Path(source)
        if not len(images):
            raise SlimError(f"{source}: no images to calibrate on; INT8 needs some of those that the network will see")
        network = open_exported(source)
        network.check_size(images[0][None])
        self.images, self.batch_size, self.takes_bytes = images, network.input_shape[0] or 1, network.takes_bytes
        self.metadata = network.metadata
        self.operators = operators_of(self.source)

    @abstractmethod
    def write(self, path: Path, kept: frozenset[str], *, rough: bool = False) -> None:
        """The INT8 file; operators named in ``kept`` stay float. ``rough``: from few images, to compare networks."""

    def batches(self, rough: bool) -> list[Tensor]:
        """The calibration images as the file takes them; the first ones again where the last batch is not full."""
        count = min(len(self.images), ROUGH_IMAGES) if rough else len(self.images)
        places = torch.arange(-(-count // self.batch_size) * self.batch_size) % count
        return [self._batch(part.tolist()) for part in places.split(self.batch_size)]

    def _batch(self, places: list[int]) -> Tensor:
        batch = torch.stack([self.images[i] for i in places])
        return as_bytes(batch) if self.takes_bytes else batch


class OpenVinoQuantiser(Quantiser):
    """``.xml`` files, by nncf: weights per channel and symmetric, activations asymmetric, biases corrected."""

    suffix = ".xml"

    def write(self, path: Path, kept: frozenset[str], *, rough: bool = False) -> None:
        import nncf  # takes seconds, and prints

        images = tqdm(
            [batch.numpy() for batch in self.batches(rough)], "calibration", disable=rough or None, leave=False
        )
        network, _ = read_openvino(self.source)
        with _quiet(nncf):
            quantised = nncf.quantize(
                network,
                nncf.Dataset(images),
                subset_size=len(images),
                preset=nncf.QuantizationPreset.MIXED,  # activations of SiLU are hardly negative
                ignored_scope=nncf.IgnoredScope(names=sorted(kept)),
                advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=rough),
            )
        save_openvino(quantised, path, self.metadata)


@contextlib.contextmanager
def _quiet(nncf: Any) -> Iterator[None]:
    """Without nncf's report on standard output."""
    level = logging.getLogger("nncf").level
    nncf.set_log_level(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        nncf.set_log_level(level)
