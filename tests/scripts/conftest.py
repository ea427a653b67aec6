"""The scripts run in this process as from a shell."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Once
from tests.scripts.runs import HALF, ROOT, SMALL, Done, Runner


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
def sparse_run(tiny: Path, once: Once) -> Path:
    """The run folder of two epochs of sparse training, the second with the L1 step on the smallest half."""
    return once("sparse", lambda project: sparse_training(tiny, ROOT / "models" / "yolov5n.yaml", project, "s")) / "s"


def sparse_training(data: Path, cfg: Path, project: Path, name: str) -> None:
    import train_sparse

    arguments = ["--data", data, "--cfg", cfg, *SMALL, "--epochs", 2, "--sparse-from", 1, *HALF]
    assert train_sparse.cli([*map(str, arguments), "--project", str(project), "--name", name]) == 0


@pytest.fixture(scope="session")
def small_run(tiny: Path, small_cfg: Path, once: Once) -> Path:
    """The run folder of two epochs of sparse training of the network that is exported in seconds."""
    return once("small-sparse", lambda project: sparse_training(tiny, small_cfg, project, "exp")) / "exp"


@pytest.fixture(scope="session")
def cut(small_run: Path, once: Once) -> Path:
    """A checkpoint of the small network, cut to half of its MACs, gates kept."""

    def cut_to_half(folder: Path) -> None:
        import prune

        arguments = ["--weights", small_run / "weights" / "last.pt", "--img", 64, "--macs", 0.5]
        assert prune.cli([*map(str, arguments), "--out", str(folder / "cut.pt"), "--project", str(folder)]) == 0

    return once("cut", cut_to_half) / "cut.pt"


@pytest.fixture
def own(tiny: Path, tmp_path: Path) -> Path:
    """The description of a copy of the tiny data set, in ``own`` beside it."""
    shutil.copytree(tiny.parent / "tiny", tmp_path / "own")
    file = tmp_path / "own.yaml"
    file.write_text(tiny.read_text().replace(str(tiny.parent / "tiny"), str(tmp_path / "own")))
    return file


@pytest.fixture(autouse=True)
def no_plots() -> Iterator[None]:
    """Session fixtures come before this one: their trainings plot."""
    with without_plots():
        yield


@contextmanager
def without_plots() -> Iterator[None]:
    """Trainings without their plots, which take longer than the training of a test."""
    from detection import evaluation_pictures, training
    from tracking.report import sections

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation_pictures, "draw_measured", lambda *_: None)
        for name in ("plot_labels", "draw_channels"):
            patch.setattr(training, name, lambda *_: None)
        for name in ("plot_results", "plot_gates"):
            patch.setattr(sections, name, lambda *_: None)
        yield


@pytest.fixture
def any_ap() -> Iterator[None]:
    with accepting_any_ap():
        yield


@contextmanager
def accepting_any_ap() -> Iterator[None]:
    """Loops that accept networks which find nothing, such as tests train in seconds."""
    from detection import candidates

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "LEAST_AP", -1.0)
        yield


@pytest.fixture(scope="session")
def small_weights(small_cfg: Path, tiny: Path, once: Once) -> Path:
    """The checkpoint of a small network that was trained until it finds something."""

    def train(project: Path) -> None:
        import finetune

        given = ["--weights", "", "--cfg", small_cfg, "--data", tiny, "--project", project, "--name", "small"]
        sizes = ["--img", 64, "--batch-size", 4, "--workers", 0]
        same = [word for flag in ("--mosaic", "--scale", "--translate", "--hsv-v") for word in (flag, 0)]
        schedule = ["--epochs", 50, "--eval-every", 50, "--optimizer", "adamw"]
        with without_plots():
            assert finetune.cli([str(word) for word in (*given, *sizes, *same, *schedule)]) == 0

    return once("small", train) / "small" / "weights" / "last.pt"


@pytest.fixture(scope="session")
def exported(small_weights: Path, tiny: Path, once: Once) -> Path:
    """A folder of exports of ``small_weights`` for images of 64 pixels; the one with its suppression as val.py has it."""

    def export(folder: Path) -> None:
        from data import DataSettings, DetectionDataset
        from detection.datasets import open_data, real_images
        from detection.network import read_network
        from detection.write_file import write_file
        from models import NmsSettings

        images = real_images(DetectionDataset(open_data(DataSettings(data=str(tiny))), "val", 64), 1)
        options: dict[str, dict[str, Any]] = {
            "net.onnx": {},
            "net.xml": {},
            "net.torchscript": {},
            "dynamic.onnx": {"dynamic": True},
            "bytes.xml": {"uint8_input": True},
            "nms.onnx": {"nms": NmsSettings(0.001, 0.65, 300)},
        }
        for name, more in options.items():
            write_file(read_network(small_weights), folder / name, images, **more)

    return once("exported", export)
