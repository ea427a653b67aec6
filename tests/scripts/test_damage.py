"""What can happen to a run between two starts, and under it: each ends in one line or carries on, nothing finished is lost."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import engine.training
from engine import read_training_state
from tests.scripts.runs import ROOT, SMALL, Done, Runner

EPOCHS = 3
HOLDER = """
import sys, time
from tracking import RunFolder
with RunFolder(sys.argv[1]).held():
    print("held", flush=True)
    time.sleep(600)
"""


def command(data: Path, project: Path, *more: object) -> list[str]:
    given = ["--data", data, *SMALL, "--epochs", EPOCHS, "--project", project, "--name", "d", *more]
    return [str(a) for a in given]


@pytest.fixture
def stopped(own: Path, script: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on it that was left at once in its second epoch."""
    original = engine.training.train_one_epoch

    def interrupted(state, loss_fn, batches, epoch):  # type: ignore[no-untyped-def]
        if epoch.number == 1:
            raise KeyboardInterrupt
        return original(state, loss_fn, batches, epoch)

    with monkeypatch.context() as patched:
        patched.setattr(engine.training, "train_one_epoch", interrupted)
        done = script("finetune", *command(own, tmp_path / "runs"))
    run = tmp_path / "runs" / "d"
    assert done.code == 130
    assert f"continue with: python finetune.py --resume --project {run.parent} --name d" in done.err
    assert read_training_state(run / "weights" / "last.pt")["progress"]["next_epoch"] == 1
    return run


def resume(script: Runner, run: Path) -> Done:
    return script("finetune", "--resume", "--project", run.parent, "--name", run.name)


def one_line(done: Done, *parts: str) -> None:
    assert done.code == 1 and done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
    assert "a defect of this program" not in done.err, done.err
    for part in parts:
        assert part in done.err, done.err


def test_a_truncated_checkpoint_is_named_and_the_rest_of_the_run_stays(stopped: Path, script: Runner) -> None:
    last = stopped / "weights" / "last.pt"
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    rows = (stopped / "results.csv").read_text()
    one_line(resume(script, stopped), "last.pt: not a readable checkpoint")
    assert (stopped / "results.csv").read_text() == rows
    last.write_bytes(whole)
    assert resume(script, stopped).code == 0


@pytest.mark.parametrize("left", ["folder", "config"])
def test_a_folder_without_a_finished_step_has_nothing_to_resume(
    own: Path, script: Runner, tmp_path: Path, left: str
) -> None:
    run = tmp_path / "runs" / "d"
    (run / "weights").mkdir(parents=True)
    if left == "config":
        (run / "config.yaml").write_text("epochs: 3\n")
    one_line(resume(script, run), "no run with weights/last.pt to resume; start one without --resume")
    assert script("finetune", *command(own, tmp_path / "runs")).code == 0
    assert (tmp_path / "runs" / "d2" / "metrics.json").is_file()


def test_labels_that_changed_are_said_and_the_run_goes_on(stopped: Path, script: Runner) -> None:
    label = next((stopped.parents[1] / "own" / "labels" / "train").glob("*.txt"))
    label.write_text("0 0.5 0.5 0.25 0.25\n")
    done = resume(script, stopped)
    assert done.code == 0 and "the labels of train are not those that the run began with" in done.out
    assert "the labels of val" not in done.out


def test_an_image_that_becomes_unreadable_ends_in_one_line_and_the_epochs_before_are_kept(
    own: Path, script: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = engine.training.train_one_epoch
    image = sorted((tmp_path / "own" / "images" / "train").iterdir())[3]
    whole = image.read_bytes()

    def damaging(state, loss_fn, batches, epoch):  # type: ignore[no-untyped-def]
        image.write_bytes(whole[:100] if epoch.number == 2 else whole)
        return original(state, loss_fn, batches, epoch)

    monkeypatch.setattr(engine.training, "train_one_epoch", damaging)
    done = script("finetune", *command(own, tmp_path / "runs", "--cache", "none"))
    one_line(done, image.name, "cannot be read", "restore or remove it")
    run = tmp_path / "runs" / "d"
    assert read_training_state(run / "weights" / "last.pt")["progress"]["next_epoch"] == 2
    monkeypatch.setattr(engine.training, "train_one_epoch", original)
    image.write_bytes(whole)
    assert resume(script, run).code == 0


def test_a_second_process_on_the_same_run_is_refused(stopped: Path, tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLDER, str(stopped)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        arguments = ["finetune.py", "--resume", "--project", str(stopped.parent), "--name", "d"]
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
        one_line(Done(done.returncode, done.stdout, done.stderr), f"{stopped}: in use by another process")
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    # The lock of a process that was killed holds nobody up.
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for one checkpoint and not for the next one beside it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=46m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_ends_in_one_line_and_the_run_continues_once_there_is_room(
    own: Path, script: Runner, small_disk: Path
) -> None:
    done = script("finetune", *command(own, small_disk, "--eval-every", 9))
    one_line(done, "last.pt: cannot be written", "free disk space")
    run = small_disk / "d"
    assert read_training_state(run / "weights" / "last.pt")["progress"]["next_epoch"] == 1
    assert [p.name for p in (run / "weights").iterdir()] == ["last.pt"], "the unfinished file is gone"
    subprocess.run(["mount", "-o", "remount,size=400m", str(small_disk)], check=True)
    done = resume(script, run)
    assert done.code == 0, done.err
    whole = script("finetune", *command(own, small_disk, "--eval-every", 9))
    assert whole.code == 0, whole.err
    states = [torch.load(r / "weights" / "last.pt", weights_only=True)["state_dict"] for r in (run, small_disk / "d2")]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_a_file_that_may_not_grow_is_a_full_disk_too(own: Path, tmp_path: Path) -> None:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))

    arguments = command(own, tmp_path / "runs", "--eval-every", 9)
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "finetune.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=limit,
        env=environment,
    )
    one_line(Done(done.returncode, done.stdout, done.stderr), "last.pt: cannot be written")
    assert not list((tmp_path / "runs" / "d" / "weights").iterdir())


@pytest.mark.long
def test_a_training_killed_at_any_moment_continues_to_the_same_weights(
    own: Path, script: Runner, tmp_path: Path
) -> None:
    whole = script("finetune", *command(own, tmp_path / "whole"))
    assert whole.code == 0, whole.err
    run = tmp_path / "runs" / "d"
    chance, environment = random.Random(0), {**os.environ, "PYTHONUNBUFFERED": "1"}
    for _ in range(4):
        begun = (run / "weights" / "last.pt").exists()
        if not begun:
            shutil.rmtree(run, ignore_errors=True)
        arguments = [*command(own, tmp_path / "runs"), *(["--resume"] if begun else [])]
        process = subprocess.Popen(
            [sys.executable, "finetune.py", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch"):
                time.sleep(chance.uniform(0, 0.3))
                break
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert resume(script, run).code == 0
    states = [torch.load(r / "weights" / "last.pt", weights_only=True) for r in (run, tmp_path / "whole" / "d")]
    assert all(torch.equal(v, states[1]["state_dict"][k]) for k, v in states[0]["state_dict"].items())
