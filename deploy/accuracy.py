"""INT8 within a bound of accuracy: the blocks that quantising hurts most stay in floating point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from tqdm import tqdm

from slim import SlimError

from .network import ExportedNetwork
from .open_file import open_exported
from .quantiser import Quantiser

PROBE_IMAGES = 4
"""On which a block's noise is measured."""
Measure = Callable[[ExportedNetwork], float]


@dataclass(frozen=True)
class Quantised:
    """An INT8 file. ``kept``: the blocks that went back to floating point for the sake of ``ap``, which is None if unknown."""

    ap: float | None
    ap_float: float | None
    kept: tuple[str, ...] = ()


def quantise(
    quantiser: Quantiser,
    path: Path,
    keep_float: Sequence[str],
    measure: Measure | None = None,
    max_drop: float | None = None,
    rank: Callable[[], Sequence[str]] | None = None,
) -> Quantised:
    """Write the INT8 file; modules that match ``keep_float`` stay in floating point.

    ``measure`` gives the AP of a file. With ``max_drop``, the AP that it may lose against the float file: while it loses
    more, the noisiest 1, 2, 4 ... blocks stay float too, up to half of them; SlimError if that does not do. ``rank`` says
    which come first, instead of ``noisiest``.
    """
    fixed = quantiser.operators.within(keep_float)
    quantiser.write(path, fixed)
    if measure is None:
        return Quantised(None, None)
    before, after = measure(open_exported(quantiser.source, precision="float32")), measure(open_exported(path))
    if max_drop is None or before - after <= max_drop:
        return Quantised(after, before)
    ranked = list(rank() if rank else noisiest(quantiser, fixed))
    count, best = 1, after
    while count <= len(ranked) // 2:
        kept = ranked[:count]
        quantiser.write(path, fixed | quantiser.operators.within(kept))
        after = measure(open_exported(path))
        if before - after <= max_drop:
            return Quantised(after, before, tuple(kept))
        best, count = max(best, after), 2 * count
    raise SlimError(
        f"--max-drop {max_drop:g}: AP {before:.4f} falls by {before - best:.4f} to {best:.4f} in INT8, also with {count // 2} of "
        f"{len(ranked)} blocks in float; nothing was written; allow more, or train with finetune.py --qat"
    )


def noisiest(quantiser: Quantiser, kept: frozenset[str]) -> list[str]:
    """The blocks that are quantised while ``kept`` is not, first the one that, alone quantised, changes the output most."""
    everything = frozenset(quantiser.operators.module_of)
    blocks = quantiser.operators.blocks(kept)
    exact = open_exported(quantiser.source, precision="float32")
    images = torch.stack([*quantiser.images[:PROBE_IMAGES]])
    wanted = exact(images)
    noise = {}
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"block{quantiser.suffix}"
        for block in tqdm(blocks, "noise of each block", disable=None, leave=False):
            quantiser.write(path, kept | (everything - quantiser.operators.inside(block)), rough=True)
            noise[block] = relative_noise(wanted, open_exported(path)(images))
    return sorted(blocks, key=lambda block: -noise[block])


def relative_noise(wanted: Tensor, found: Tensor) -> float:
    """The mean squared difference of each entry of the last axis relative to its variance, averaged."""
    places = tuple(range(wanted.ndim - 1))
    return float(((found - wanted).square().mean(places) / wanted.var(places).clamp(min=1e-12)).mean())
