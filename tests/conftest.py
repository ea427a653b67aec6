"""A tiny shapes data set, and folders that are filled once for all processes of a run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock

from data import make_shapes
from tests.scripts.runs import NAMES, SMALL_ANCHORS

THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def as_many_threads_as_before() -> Iterator[None]:
    """Scripts set torch's threads for their process, and sums in another order differ in the last bit."""
    yield
    torch.set_num_threads(THREADS)


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """A folder by its name, which the first process of pytest-xdist that asks for it fills and all of them read."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def filled(name: str, fill: Callable[[Path], object]) -> Path:
        folder, whole = root / "once" / name, root / "once" / f"{name}.whole"
        folder.parent.mkdir(exist_ok=True)
        with FileLock(folder.with_name(f"{name}.lock")):
            if not whole.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                whole.touch()
        return folder

    return filled


@pytest.fixture(scope="session")
def tiny(once: Once) -> Path:
    """data.yaml of 16 train, 6 val and 6 test images of 64 pixels, four classes."""

    def draw(folder: Path) -> None:
        images = folder / "tiny"
        make_shapes(images, train=16, val=6, test=6, image_size_px=64, seed=3)
        splits = "".join(f"{split}: images/{split}\n" for split in ("train", "val", "test"))
        names = "".join(f"  {i}: {name}\n" for i, name in enumerate(NAMES))
        (folder / "tiny.yaml").write_text(f"path: {images}\n{splits}names:\n{names}")

    return once("datasets", draw) / "tiny.yaml"


@pytest.fixture(scope="session")
def small_cfg(once: Once) -> Path:
    """A network of two levels that trains in a second."""
    description = {
        "nc": 4,
        "anchors": SMALL_ANCHORS,
        "backbone": [[-1, 1, "Conv", [32, 6, 4, 2]], [-1, 1, "Conv", [32, 3, 2]], [-1, 1, "C3", [32]]],
        "head": [
            [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
            [[-1, 0], 1, "Concat", [1]],
            [-1, 1, "C3", [32, "False"]],
            [[5, 2], 1, "Detect", ["nc", "anchors"]],
        ],
    }
    return once("cfg", lambda folder: (folder / "small.yaml").write_text(yaml.safe_dump(description))) / "small.yaml"
