"""Every failure that a user can cause: one clear line, exit code 1, nothing lost."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.data.videos import short_video
from tests.scripts.runs import NAMES, ROOT, SMALL, Runner

SCRIPTS = ("train_sparse", "finetune", "val", "prune", "iterate", "benchmark", "export", "detect")
NEEDS = dict.fromkeys(SCRIPTS, ()) | {"prune": ("--macs", "0.5"), "detect": ("--source", "docs/detections.png")}


def fails(done: tuple[int, str, str], *parts: str) -> None:
    code, _, err = done
    assert code == 1
    assert err.startswith("error: ") and err.count("\n") == 1 and "a defect of this program" not in err, err
    for part in parts:
        assert part in err, err


@pytest.fixture(autouse=True)
def no_folder_is_left(tmp_path: Path) -> Iterator[None]:
    """A command that fails before it has something to keep leaves nothing behind."""
    yield
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_missing_weights(name: str, script: Runner, tiny: Path, tmp_path: Path) -> None:
    data = () if name in ("prune", "benchmark", "detect") else ("--data", tiny)
    fails(
        script(name, "--weights", tmp_path / "none.pt", *NEEDS[name], *data, "--project", tmp_path / "runs"),
        "none.pt",
        "no such file",
    )


@pytest.mark.parametrize("name", sorted({*SCRIPTS} - {"train_sparse", "finetune"}))
def test_forgotten_weights(name: str, script: Runner, tmp_path: Path) -> None:
    done = script(name, *NEEDS[name], "--project", tmp_path / "runs")
    fails(
        done,
        "--weights: none given; name a file, such as yolov5n.pt (published by YOLOv5's authors; --download fetches it)",
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_published_weights_say_where_they_come_from(name: str, script: Runner, tmp_path: Path) -> None:
    done = script(name, "--weights", tmp_path / "yolov5s6.pt", *NEEDS[name], "--project", tmp_path / "runs")
    fails(
        done,
        "yolov5s6.pt: no such file; --download fetches it from https://github.com/ultralytics/yolov5/releases/download/v7.0/yolov5s6.pt",
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_checkpoint_of_another_kind(name: str, script: Runner, tiny: Path, tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    data = () if name in ("prune", "benchmark", "detect") else ("--data", tiny)
    fails(
        script(name, "--weights", tmp_path / "other.pt", *NEEDS[name], *data, "--project", tmp_path / "runs"),
        "other.pt",
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_truncated_checkpoint(name: str, script: Runner, sparse_run: Path, tiny: Path, tmp_path: Path) -> None:
    whole = (sparse_run / "weights" / "best.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 3])
    data = () if name in ("prune", "benchmark", "detect") else ("--data", tiny)
    fails(script(name, "--weights", tmp_path / "cut.pt", *NEEDS[name], *data, "--project", tmp_path / "runs"), "cut.pt")


def other_classes(tiny: Path, tmp_path: Path) -> Path:
    """The same images under two class names too many."""
    file = tmp_path / "more.yaml"
    names = [*NAMES, "fifth", "sixth"]
    file.write_text(f"path: {tiny.parent / 'tiny'}\ntrain: images/train\nval: images/val\nnames: {names}\n")
    return file


@pytest.mark.parametrize("name", ["val", "prune", "iterate"])
def test_wrong_class_count(name: str, script: Runner, sparse_run: Path, tiny: Path, tmp_path: Path) -> None:
    fails(
        script(
            name,
            "--weights",
            sparse_run / "weights" / "best.pt",
            *NEEDS[name],
            "--data",
            other_classes(tiny, tmp_path),
            "--img",
            64,
            "--project",
            tmp_path / "runs",
        ),
        "best.pt",
        "4 classes",
        "6",
    )


@pytest.mark.parametrize("name", ["train_sparse", "finetune", "val"])
def test_empty_data_set(name: str, script: Runner, sparse_run: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "empty" / "images" / split).mkdir(parents=True)
    file = tmp_path / "empty.yaml"
    file.write_text(f"path: {tmp_path / 'empty'}\ntrain: images/train\nval: images/val\nnames: {list(NAMES)}\n")
    fails(
        script(
            name,
            "--weights",
            sparse_run / "weights" / "best.pt",
            "--data",
            file,
            "--img",
            64,
            "--project",
            tmp_path / "runs",
        ),
        "no image",
    )


def test_missing_data_set_says_where_to_put_it(script: Runner, tmp_path: Path) -> None:
    fails(
        script("finetune", "--data", "data/voc.yaml", "--data-root", tmp_path, "--project", tmp_path / "runs"),
        "--data-root",
    )


def test_unreachable_target_names_the_binding_floors(script: Runner, sparse_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept.pt"
    out.write_bytes(b"earlier")
    fails(
        script(
            "prune",
            "--weights",
            sparse_run / "weights" / "best.pt",
            "--img",
            64,
            "--macs",
            0.01,
            "--out",
            out,
            "--project",
            tmp_path / "runs",
        ),
        "macs=0.01 cannot be reached",
        "floors",
        "model.",
        "channels",
    )
    assert out.read_bytes() == b"earlier"


def test_gate_criterion_without_gates(script: Runner, tiny: Path, tmp_path: Path, sparse_run: Path) -> None:
    from detection.network import read_network, save_network
    from slim import fold_gates

    network = read_network(sparse_run / "weights" / "best.pt")
    save_network(tmp_path / "plain.pt", fold_gates(network.model), network.build)
    fails(
        script("prune", "--weights", tmp_path / "plain.pt", "--img", 64, "--macs", 0.5, "--project", tmp_path / "runs"),
        "no gates",
        "--criterion l1",
    )


def test_pruning_options_that_do_not_fit(script: Runner, tmp_path: Path, sparse_run: Path) -> None:
    base = ("prune", "--weights", sparse_run / "weights" / "last.pt", "--img", 64, "--project", tmp_path / "runs")
    fails(script(*base, "--macs", 0.5, "--criterion", "taylor"), "--criterion taylor needs --data")
    fails(script(*base, "--macs", 0.5, "--overrides", "model.0"), "--overrides model.0", "PATTERN=WIDTH")
    fails(script(*base, "--macs", 0.5, "--ignore", "modle.1*"), "ignore", "modle.1*", "near names", "model.1")
    fails(script(*base, "--macs", 0.5, "--threshold", 0.1), "exactly one target")
    fails(script(*base, "--macs", 1.5), "macs=1.5", "keep ratio", "whole number")
    for flag in ("--macs", "--params", "--channels"):
        fails(script(*base, flag, 30), f"{flag} 30: expected a share above 0 to 1, or a count above 100; 30 % is 0.3")
    fails(script(*base), "--macs: no target given; --macs 0.4 keeps 40 % of the MACs")
    fails(script(*base, "--macs", 0.5, "--params", 0.5), "--macs and --params: give exactly one target")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--img", 100), ("--img 100", "multiple", "32")),
        (("--epochs", "many"), ("epochs", "many")),
        (("--no-such-flag", 1), ("--no-such-flag",)),
        (("--epochs", 3, "--sparse-from", 3), ("--sparse-from 3", "--epochs 3")),
        (("--tie", "all"), ("tie", "all")),
        (("--keep-macs", 0.01), ("macs=0.01 cannot be reached", "floors")),
        (("--where", "norm-weight"), ("--where norm-weight", "--fraction")),
        (("--lr", -1), ("--lr -1", "above 0")),
        (("--label-smoothing", 2), ("--label-smoothing 2:", "0 to 1")),
        (("--freeze", 26), ("--freeze 26", "0 to 25")),
        (("--freeze", 3, 25), ("--freeze 25", "0 to 24")),
        (("--freeze", 25), ("leaves nothing to train",)),
        (("--freeze", "model.2.cv9"), ("model.2.cv9", "near names", "model.2.cv1")),
        (("--teacher", "gone.pt"), ("gone.pt", "no such file", "--teacher")),
        (("--device", "cuda:99"), ("cuda:99", "not available")),
        (("--resume", "--name", "never"), ("never", "no run")),
        (("--cfg", "models/none.yaml"), ("none.yaml",)),
    ],
)
def test_bad_flags_of_training(
    arguments: tuple[object, ...], parts: tuple[str, ...], script: Runner, tiny: Path, tmp_path: Path
) -> None:
    fails(script("train_sparse", "--data", tiny, *SMALL, "--project", tmp_path / "runs", *arguments), *parts)


def test_unknown_key_in_a_config_file(script: Runner, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("epochs: 3\nepoch: 4\n")
    fails(script("finetune", "--config", tmp_path / "c.yaml"), "epoch")


def test_traceback_only_with_debug(script: Runner, tmp_path: Path) -> None:
    assert "Traceback" not in script("val", "--weights", tmp_path / "none.pt").err
    assert "Traceback" in script("val", "--weights", tmp_path / "none.pt", "--debug").err


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_names_units_and_defaults(name: str) -> None:
    done = subprocess.run(
        [sys.executable, f"{name}.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stderr == ""
    assert "--seed" in done.stdout and "default" in done.stdout and "pixels" in done.stdout


@pytest.mark.parametrize(
    ("name", "arguments", "missing", "extra"),
    [
        ("export", ("--img", 64), "onnx", "deploy"),
        ("export", ("--img", 64, "--include", "openvino"), "openvino", "deploy"),
        ("benchmark", ("--img", 64, "--engine", "onnxruntime"), "onnxruntime", "deploy"),
        ("iterate", ("--img", 64, "--data", "DATA"), "onnxruntime", "deploy"),
        ("detect", ("--source", "VIDEO"), "av", "video"),
    ],
)
def test_a_missing_extra_is_named(
    name: str,
    arguments: tuple[object, ...],
    missing: str,
    extra: str,
    small_weights: Path,
    tiny: Path,
    script: Runner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    video = short_video(tmp_path / "video.mp4")
    for loaded in [module for module in sys.modules if module.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, missing, None)
    words = [{"VIDEO": video, "DATA": tiny}.get(str(word), word) for word in arguments]
    done = script(name, "--weights", small_weights, *words, "--project", tmp_path / "runs")
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith(
        f"error: {missing} is not installed; pip install -e '.[{extra}]' has it"
    )
