"""Every command of README, docs and recipes: what stands on a line of its own runs, smaller; elsewhere its flags are known."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from detection.command import ALIASES, flags_of
from experiments.settings import GridFlags
from experiments.tables import TablesFlags
from tests.data.videos import short_video
from tests.detection.test_command import SCRIPTS
from tests.scripts.fake_clock import FakeClock
from tests.scripts.runs import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PRINTED = re.compile(r"^ {4}((?:python|torchrun|make|pip|slim-\w+|docker) .*)$", re.MULTILINE)
INLINE = re.compile(r"`([^`]+)`")
TRAINING = "--img 64 --batch-size 8 --workers 0"
SMALLER = {
    "train_sparse": f"{TRAINING} --epochs 2 --sparse-from 1 --keep-macs 0.7 --min-channels 1 --round-to 1",
    "finetune": f"{TRAINING} --epochs 1",
    "prune": "--img 64 --macs 0.7 --min-channels 1 --round-to 1",
    "iterate": f"{TRAINING} --rounds 1 --sparse-epochs 2 --sparse-from 1 --finetune-epochs 1 --recovery-epochs 0 --max-drop 1 "
    "--min-channels 1 --round-to 1",
    "export": "--img 64 --max-drop 1 --calibration-images 8",
    "detect": "",
    "val": "--img 64",
    "benchmark": "--img 64 --repeats 3",
}
"""What is said after the words of a command, so that it takes seconds."""
OF_OTHERS = {"nproc-per-node", "logdir", "help", "config", "hyp"}
"""Flags of other programs, and of every script."""


def text_of(document: Path) -> str:
    """A document, or the comments of a recipe, with commands on one line each."""
    text = document.read_text(encoding="utf-8")
    if document.suffix == ".yaml":
        text = "\n".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
        text = re.sub(r"^#? {4}", "    ", text, flags=re.MULTILINE)
    return re.sub(r"\\\n\s*", "", text)


def printed_commands(document: Path) -> list[str]:
    """The commands that stand on lines of their own, in order."""
    return PRINTED.findall(text_of(document))


@pytest.fixture
def place(tiny: Path, small_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, any_ap: None) -> Path:
    """A folder with what a reader of the documents has: data of his own, the published checkpoint, a video."""
    (tmp_path / "data").mkdir()
    for name in ("data.yaml", "data/bccd.yaml", "data/cards.yaml"):
        shutil.copy(tiny, tmp_path / name)
    for name in ("yolov5n", "dense", "slim-30", "slim-20", "slim-10"):
        shutil.copy(small_weights, tmp_path / f"{name}.pt")
    short_video(tmp_path / "video.mp4")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    FakeClock().install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str) -> None:
    """Run a command of a document, smaller; it must succeed."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        script = words.index(next(word for word in words if word.endswith(".py")))
        flags = SMALLER[words[script].removesuffix(".py")].split()
        words = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *words[1:script],
            str(ROOT / words[script]),
            *words[script + 1 :],
        ]
        done = subprocess.run([*words, *flags], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    else:
        assert words[0] == "python", f"{command}: not run by this test"
        name = words[1].removesuffix(".py")
        assert importlib.import_module(name).cli([*words[2:], *SMALLER[name].split()]) == 0, command


@pytest.mark.slow
@pytest.mark.parametrize("document", [d for d in DOCUMENTS if printed_commands(d)], ids=lambda path: path.name)
def test_printed_commands_run_one_after_another(document: Path, place: Path, small_weights: Path) -> None:
    setting_up = ("make ", "pip ", "python -m venv ")
    commands = [command for command in printed_commands(document) if not command.startswith(setting_up)]
    if document.name == "guide.md":  # which goes on where README ends
        provide(place, "dense", small_weights)
    for command in commands:
        run(command)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_as_it_says(recipe: Path, place: Path, small_weights: Path) -> None:
    commands = printed_commands(recipe)
    assert f"--config recipes/{recipe.name} " in commands[0]
    for name in ("dense", "mine"):
        provide(place, name, small_weights)
    for command in commands:
        run(command)


def provide(place: Path, name: str, weights: Path) -> None:
    """The last checkpoint of a fine-tuning of that name."""
    folder = place / "runs" / "finetune" / name / "weights"
    folder.mkdir(parents=True)
    shutil.copy(weights, folder / "last.pt")


@pytest.mark.parametrize("document", [*DOCUMENTS, *RECIPES], ids=lambda path: path.name)
def test_flags_targets_and_modules_that_documents_name_are_there(document: Path) -> None:
    known = {script: {name.replace("_", "-") for name in flags_of(kind())} for script, kind in SCRIPTS.items()}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    others = (
        name.replace("_", "-") for names in (ALIASES, flags_of(GridFlags()), flags_of(TablesFlags())) for name in names
    )
    anywhere = {*OF_OTHERS, *others}.union(*known.values())
    for span in [*INLINE.findall(text_of(document)), *printed_commands(document)]:
        named = re.search(r"\b(\w+)\.py\b", span)
        of_script = {*known[named[1]], *OF_OTHERS} if named and named[1] in known else anywhere
        flags = {flag.removeprefix("no-") for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", span)}
        assert flags <= of_script, f"{span}: {flags - of_script}"
        if make := re.match(r"make ([\w-]+)", span):
            assert make[1] in targets, span
        if module := re.match(r"python -m ([\w.]+)", span):
            assert importlib.util.find_spec(module[1]), span
