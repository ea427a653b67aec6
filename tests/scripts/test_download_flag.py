"""--download from a server on this machine to a finished run."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import yaml

from detection import published
from tests.data.file_server import serve
from tests.data.test_archives import zipped
from tests.scripts.runs import NAMES, ROOT, SMALL, Runner
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


def test_published_weights_are_fetched_and_their_digest_is_pinned(
    script: Runner, small_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, weights = small_weights.read_bytes(), tmp_path / "sub" / "yolov5s.pt"
    given = (
        "prune",
        "--weights",
        weights,
        "--img",
        64,
        "--macs",
        0.8,
        "--criterion",
        "l1",
        "--project",
        tmp_path / "runs",
    )
    with serve({"yolov5s.pt": content}) as server:
        monkeypatch.setattr(published, "RELEASE", server.url)
        fails(script(*given), f"{weights}: no such file; --download fetches it from {server.url}/yolov5s.pt")
        assert not server.asked and not weights.parent.exists()
        done = script(*given, "--download")
        assert done.code == 0 and weights.read_bytes() == content, done.err
        digest, pin = hashlib.sha256(content).hexdigest(), weights.with_name("yolov5s.pt.sha256")
        assert f"pinned in {pin}: sha256 {digest}" in done.out and pin.read_text() == f"{digest}  yolov5s.pt\n"
        assert script(*given, "--download").code == 0 and len(server.asked) == 1
    weights.unlink()
    with serve({"yolov5s.pt": b"another file"}) as server:
        monkeypatch.setattr(published, "RELEASE", server.url)
        done = script(*given, "--download")
        assert done.code == 1 and f"yolov5s.pt: expected SHA-256 {digest}, found" in done.err
        assert f"({pin} pins the digest)" in done.err
    assert not weights.exists()


def test_weights_that_are_not_those_of_a_known_digest_are_refused(
    script: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "yolov5n.pt"
    given = ("--weights", weights, "--download", "--project", tmp_path / "runs")
    with serve({"yolov5n.pt": b"no network"}) as server:
        monkeypatch.setattr(published, "RELEASE", server.url)
        for name in ("finetune", "val", "detect", "benchmark"):
            done = script(name, *given)
            assert done.code == 1 and f"expected SHA-256 {published.SHA256['yolov5n.pt']}, found" in done.err, name
    assert not weights.exists()


def test_the_known_digest_is_that_of_the_published_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = ROOT.parent / "shared" / "weights" / "yolov5n.pt"
    if not file.is_file():
        pytest.skip(f"{file} is absent")
    with serve({"yolov5n.pt": file.read_bytes()}) as server:
        monkeypatch.setattr(published, "RELEASE", server.url)
        published.find_weights(str(tmp_path / "yolov5n.pt"), download=True)
    assert (tmp_path / "yolov5n.pt").read_bytes() == file.read_bytes()
    assert not (tmp_path / "yolov5n.pt.sha256").exists()


def test_a_teacher_is_fetched_too(script: Runner, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("--data", tiny, "--teacher", tmp_path / "yolov5x6.pt", "--project", tmp_path / "runs")
    fails(script("finetune", *given), "yolov5x6.pt: no such file; --download fetches it from")
    with serve({}) as server:
        monkeypatch.setattr(published, "RELEASE", server.url)
        fails(script("finetune", *given, "--download"), "yolov5x6.pt: the server answers 404")


def test_failures_are_one_line(script: Runner, tmp_path: Path) -> None:
    with serve({}) as server:
        data = ("--data", describe(tmp_path, f"{server.url}/none.zip"), "--data-root", tmp_path / "root", "--download")
        done = script("train_sparse", *data, "--project", tmp_path)
        fails(done, "none.zip: the server answers 404 (Not Found)")
    data = ("--data", describe(tmp_path, "import os"), "--data-root", tmp_path / "root", "--download")
    fails(
        script("train_sparse", *data, "--project", tmp_path),
        "download is a script ('import os'), and scripts are never run",
    )


@pytest.mark.parametrize("download", ["", "download: bash get_coco.sh\n"])
def test_a_set_that_is_there_needs_no_address(
    script: Runner, own: Path, small_weights: Path, tmp_path: Path, download: str
) -> None:
    own.write_text(own.read_text() + download)
    done = script(
        "val", "--weights", small_weights, "--data", own, *SMALL, "--download", "--project", tmp_path / "runs"
    )
    assert done.code == 0, done.err
