"""Reference data lies beside the project, in ``../shared``; without it the tests that need it are skipped."""

from pathlib import Path

import pytest

import models

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = PROJECT.parent / "shared"
    if not (folder / "reference").is_dir() or not (folder / "weights" / "yolov5n.pt").is_file():
        pytest.skip("no reference data: ../shared/reference or ../shared/weights/yolov5n.pt is absent")
    return folder


@pytest.fixture(scope="session")
def imported(shared: Path) -> models.Imported:
    return models.import_checkpoint(shared / "weights" / "yolov5n.pt")


@pytest.fixture(scope="session")
def published(imported: models.Imported) -> models.YOLO:
    """YOLOv5n with the published weights, in evaluation mode; shared, so not to be changed."""
    model = models.build_model(imported.description)
    models.transfer_weights(model, imported.state_dict)
    return model.eval()


@pytest.fixture
def tiny() -> dict:
    """Two levels at strides 2 and 4, 2 classes, a few thousand parameters."""
    return {
        "nc": 2,
        "anchors": [[4, 5, 6, 6], [12, 10, 20, 24]],
        "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [8, 3, 2]], [-1, 2, "C3", [8]]],
        "head": [
            [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
            [[-1, 0], 1, "Concat", [1]],
            [-1, 1, "C3", [8, "False"]],
            [[5, 2], 1, "Detect", ["nc", "anchors"]],
        ],
    }
