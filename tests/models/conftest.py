"""Reference data lies beside the project, in ``../shared``; without it the tests that need it are skipped."""

from pathlib import Path

import pytest

import models
from tests.models.networks import two_levels

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
    return two_levels()
