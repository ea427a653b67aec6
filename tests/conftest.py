"""A tiny shapes data set, drawn once for all tests of a process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data import make_shapes
from tests.scripts.runs import NAMES

THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def as_many_threads_as_before() -> Iterator[None]:
    """Scripts set torch's threads for their process, and sums in another order differ in the last bit."""
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data.yaml of 16 train, 6 val and 6 test images of 64 pixels, four classes."""
    root = tmp_path_factory.mktemp("datasets")
    make_shapes(root / "tiny", train=16, val=6, test=6, image_size_px=64, seed=3)
    file = root / "tiny.yaml"
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(NAMES))
    file.write_text(f"path: {root / 'tiny'}\ntrain: images/train\nval: images/val\ntest: images/test\nnames:\n{names}")
    return file
