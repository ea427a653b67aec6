"""The scripts run in this process as from a shell."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.scripts.runs import ROOT, SMALL, SMALL_ANCHORS, Done, Runner

PLOTS = ("plot_labels", "plot_results", "plot_gates")


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Run a script by name with arguments; (exit code, standard output, standard error)."""
    monkeypatch.chdir(ROOT)

    def run(name: str, *arguments: object) -> Done:
        capsys.readouterr()
        code = importlib.import_module(name).cli([str(a) for a in arguments])
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def sparse_run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two epochs of sparse training, the second with the pull."""
    import train_sparse

    project = tmp_path_factory.mktemp("runs")
    arguments = ["--data", tiny, *SMALL, "--epochs", 2, "--pull-from", 1, "--project", project, "--name", "s"]
    assert train_sparse.cli([*map(str, arguments), "--cfg", str(ROOT / "models" / "yolov5n.yaml")]) == 0
    return project / "s"


@pytest.fixture(scope="session")
def small_cfg(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    file = tmp_path_factory.mktemp("cfg") / "small.yaml"
    file.write_text(yaml.safe_dump(description))
    return file


@pytest.fixture(scope="session")
def small_run(tiny: Path, small_cfg: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two epochs of sparse training of the network that is exported in seconds."""
    import train_sparse

    project = tmp_path_factory.mktemp("runs")
    arguments = ["--data", tiny, "--cfg", small_cfg, *SMALL, "--epochs", 2, "--pull-from", 1, "--project", project]
    assert train_sparse.cli([*map(str, arguments)]) == 0
    return project / "exp"


@pytest.fixture(scope="session")
def cut(sparse_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint cut to half of its MACs, gates kept."""
    import prune

    out = tmp_path_factory.mktemp("cut") / "cut.pt"
    arguments = ["--weights", sparse_run / "weights" / "last.pt", "--img", 64, "--macs", 0.5, "--out", out]
    assert prune.cli([*map(str, arguments), "--project", str(out.parent)]) == 0
    return out


@pytest.fixture
def no_plots() -> Iterator[None]:
    with without_plots():
        yield


@contextmanager
def without_plots() -> Iterator[None]:
    """Trainings without their plots, which take longer than the training of a test."""
    from detection import training

    with pytest.MonkeyPatch.context() as patch:
        for name in PLOTS:
            patch.setattr(training, name, lambda *_: None)
        yield


@pytest.fixture(scope="session")
def small_weights(small_cfg: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a small network that was trained until it finds something."""
    import finetune

    project = tmp_path_factory.mktemp("small")
    arguments = ["--weights", "", "--cfg", small_cfg, "--data", tiny, "--img", 64, "--batch-size", 4, "--workers", 0]
    same = [word for flag in ("--mosaic", "--scale", "--translate", "--hsv-v") for word in (flag, 0)]
    schedule = ["--epochs", 50, "--eval-every", 50, "--optimizer", "adamw", "--project", project, "--name", "small"]
    with without_plots():
        assert finetune.cli([*map(str, arguments), *map(str, schedule), *map(str, same)]) == 0
    return project / "small" / "weights" / "last.pt"


@pytest.fixture(scope="session")
def exported(small_weights: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of exports of ``small_weights`` for images of 64 pixels; the one with its suppression as val.py has it."""
    from data import DetectionDataset
    from detection.datasets import open_data, real_images
    from detection.network import read_network
    from detection.write_file import Nms, write_file

    folder = tmp_path_factory.mktemp("exported")
    images = real_images(DetectionDataset(open_data(str(tiny), None), "val", 64), 1)
    options: dict[str, dict[str, Any]] = {
        "net.onnx": {},
        "net.xml": {},
        "net.torchscript": {},
        "dynamic.onnx": {"dynamic": True},
        "bytes.xml": {"uint8_input": True},
        "nms.onnx": {"nms": Nms(0.001, 0.65, 300)},
    }
    for name, more in options.items():
        write_file(read_network(small_weights), folder / name, images, **more)
    return folder
