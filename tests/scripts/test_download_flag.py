"""--download from a server on this machine to a finished run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.data.file_server import serve
from tests.data.test_archives import zipped
from tests.scripts.runs import NAMES, SMALL, Runner
from tests.scripts.test_failures import fails


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


def describe(tmp_path: Path, url: str) -> Path:
    file = tmp_path / "served.yaml"
    content = {"path": "served", "train": "images/train", "val": "images/val", "names": list(NAMES), "download": url}
    file.write_text(yaml.safe_dump(content))
    return file


def test_a_set_is_fetched_trained_on_evaluated_and_cut(
    script: Runner, tiny: Path, small_cfg: Path, tmp_path: Path
) -> None:
    source = tiny.parent / "tiny"
    members = {
        f"served/{p.relative_to(source)}": p.read_bytes() for p in source.rglob("*") if p.suffix in (".jpg", ".txt")
    }
    with serve({"served.zip": zipped(tmp_path / "a.zip", members).read_bytes()}) as server:
        data = ("--data", describe(tmp_path, f"{server.url}/served.zip"), "--data-root", tmp_path / "root")
        fails(
            script("train_sparse", *data, *SMALL, "--project", tmp_path),
            "--data-root",
            "--download fetches the data set",
        )
        arguments = (
            "--epochs",
            1,
            "--sparse-from",
            0,
            "--project",
            tmp_path,
            "--name",
            "s",
            "--download",
            "--cfg",
            small_cfg,
        )
        done = script("train_sparse", *data, *SMALL, *arguments)
        assert done.code == 0, done.err
        assert "pinned in" in done.out and "AP " in done.out
        weights = ("--weights", tmp_path / "s" / "weights" / "last.pt", "--img", 64, "--project", tmp_path)
        done = script("val", *weights, *data, "--download")
        assert done.code == 0 and "the data set is there already; nothing was downloaded" in done.out, done.err
        done = script("prune", *weights, *data, "--download", "--channels", 0.8)
        assert done.code == 0, done.err
        assert len(server.asked) == 1


def test_failures_are_one_line(script: Runner, tmp_path: Path) -> None:
    with serve({}) as server:
        data = ("--data", describe(tmp_path, f"{server.url}/none.zip"), "--data-root", tmp_path / "root", "--download")
        done = script("train_sparse", *data, "--project", tmp_path)
        fails(done, "none.zip: the server answers 404 (Not Found)")
    data = ("--data", describe(tmp_path, "import os"), "--download")
    fails(
        script("train_sparse", *data, "--project", tmp_path),
        "download is a script ('import os'), and scripts are never run",
    )
