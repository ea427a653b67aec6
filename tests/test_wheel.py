"""The wheel holds slim, typed, under its own name, and the scripts as commands; the examples run with it; needs are imports."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

import slim
from detection.command import EXTRAS
from tests.test_architecture import ALLOWED, SCRIPTS, imports, modules

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("slim", "models", "data", "engine", "tracking", "deploy", "detection")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout gets no build folder."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", *(f"{script}.py" for script in SCRIPTS)):
        shutil.copy(ROOT / name, source)
    for package in (*PACKAGES, "experiments"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True, capture_output=True)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the wheel is installed."""
    site = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-deps", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True, capture_output=True)
    return site


def test_wheel_holds_slim_which_is_typed_and_the_scripts_beside_it(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info" not in name}
    slim_files = {str(p.relative_to(ROOT)) for p in (ROOT / "slim").iterdir() if p.suffix in (".py", ".typed")}
    assert {name for name in names if not name.startswith("slim_commands/")} == slim_files
    kinds = (".py", ".pyi", ".yaml", ".html")
    files = [p.relative_to(ROOT) for package in PACKAGES[1:] for p in (ROOT / package).rglob("*") if p.suffix in kinds]
    scripts = {*(f"{script}.py" for script in SCRIPTS), *map(str, files)} - {"detection/commands/__init__.py"}
    inside = {
        name.removeprefix("slim_commands/scripts/") for name in names if name.startswith("slim_commands/scripts/")
    }
    assert inside == scripts
    metadata = next(name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("METADATA"))
    lines = zipfile.ZipFile(wheel).read(metadata).decode().splitlines()
    needs = [line for line in lines if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert needs == ["Requires-Dist: torch>=2.6"]
    assert {"Name: channel-slim", f"Version: {slim.__version__}"} <= set(lines)


def run_command(site: Path, folder: Path, name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A console command of the installed wheel, far from the checkout."""
    return subprocess.run(
        [sys.executable, str(site / "bin" / name), *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_commands_are_the_scripts(site: Path, tmp_path: Path) -> None:
    commands = {path.name.removeprefix("slim-") for path in (site / "bin").glob("slim-*")}
    assert commands == {*SCRIPTS - {"train_sparse"}, "train"}
    for command in commands:
        done = run_command(site, tmp_path, f"slim-{command}", "--help")
        assert done.returncode == 0 and done.stdout.startswith(f"usage: slim-{command} "), done.stderr


def test_installed_commands_find_their_descriptions(site: Path, tmp_path: Path) -> None:
    """models/yolov5n.yaml and data/shapes.yaml are the installed ones where the folder has none of its own."""
    small = ["--img", 64, "--batch-size", 8, "--workers", 0, "--epochs", 2, "--sparse-from", 1, "--fraction", 0.5]
    description = (ROOT / "data" / "shapes.yaml").read_text(encoding="utf-8")
    (tmp_path / "few.yaml").write_text(re.sub(r"(train|val|test): \d+", r"\1: 8", description), encoding="utf-8")
    done = run_command(
        site, tmp_path, "slim-train", "--weights", "", "--width-multiple", 0.02, "--data", "few.yaml", *small
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "sparse" / "exp" / "weights" / "last.pt").is_file()
    done = run_command(
        site, tmp_path, "slim-val", "--weights", "runs/sparse/exp/weights/last.pt", "--data", "bccd.yaml"
    )
    assert done.returncode == 1 and "bccd" in done.stderr and "data set description" not in done.stderr


def test_docker_sees_what_the_wheel_is_made_of() -> None:
    seen = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[0] == "!"}
    assert seen == {"setup.cfg", "pyproject.toml", "README.md", "LICENSE", "*.py", *PACKAGES}


@pytest.mark.long
@pytest.mark.skipif(shutil.which("docker") is None, reason="needs docker")
def test_the_image_runs_the_commands() -> None:
    subprocess.run(["docker", "build", "--tag", "slim-test", str(ROOT)], check=True, capture_output=True)
    command = ["docker", "run", "--rm", "slim-test", "slim-detect", "--help"]
    assert "usage: slim-detect" in subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("missing", ["yaml", "lazy_loader"])
def test_commands_without_their_extra_say_so(site: Path, missing: str) -> None:
    code = f"import sys; sys.path.insert(0, {str(site)!r}); sys.modules[{missing!r}] = None\n"
    code += "import slim_commands; sys.exit(slim_commands.train())"
    done = subprocess.run([sys.executable, "-c", code], cwd=site, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {missing} is not installed; pip install 'channel-slim[train]' has it\n"


def test_citation_names_this_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == slim.__version__


def imported_packages(*folders: str) -> set[str]:
    """What other people's packages the files of these folders, and the scripts, import."""
    files = [item for folder in folders for item in modules(folder).items()]
    scripts = [(script, ROOT / f"{script}.py") for script in SCRIPTS]
    roots = {module.split(".")[0] for item in (*files, *scripts) for module, _ in imports(*item)}
    return roots - sys.stdlib_module_names - {*ALLOWED, *SCRIPTS, "tests"}


def test_what_is_needed_is_what_is_imported() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = {"slim": setup["options"]["install_requires"], **setup["options.extras_require"]}
    needed = {extra: set(re.findall(r"^[\w-]+", text, re.MULTILINE)) for extra, text in extras.items()}
    known, everything = packages_distributions(), set().union(*needed.values())

    def distributions(*folders: str) -> set[str]:
        """By the names that pip has; several distributions may hold one package, as opencv-python and its headless twin."""
        names = [{n.lower().replace("_", "-") for n in (*known.get(p, []), p)} for p in imported_packages(*folders)]
        return set().union(*(name & everything or name for name in names))

    through_torch = {"onnxscript", "tensorboard"}  # by torch.onnx's exporter and torch.utils.tensorboard
    assert distributions("slim") == needed["slim"]
    through_pandas = {"jinja2"}  # by DataFrame.style's LaTeX
    product = distributions(*ALLOWED.keys() - {"benchmarks", "experiments"})
    scripts = needed["slim"] | needed["train"] | needed["deploy"] | needed["video"]
    assert product | through_torch == scripts
    assert {extra: needed[extra] for extra in EXTRAS.values()} == {
        extra: {name.replace("_", "-") for name, of in EXTRAS.items() if of == extra} for extra in EXTRAS.values()
    }
    extras = ("experiments", "ray", "slurm", "bench")
    more = set().union(*(needed[extra] for extra in extras))
    assert (distributions("experiments") - scripts) | through_pandas == more
    assert distributions("benchmarks", "tests") <= everything


EXAMPLE = """
import doctest, sys, torch
import slim
assert slim.__file__.startswith(sys.argv[1]), slim.__file__
torch.manual_seed(0)
result = doctest.testfile(sys.argv[2], module_relative=False)
assert result.attempted >= 8, result
sys.exit(result.failed)
"""


@pytest.mark.parametrize("document", ["README.md", "docs/library.md"])
def test_examples_run_as_printed_with_the_installed_wheel(site: Path, tmp_path: Path, document: str) -> None:
    code = f"import sys; sys.path.insert(0, {str(site)!r})\n{EXAMPLE}"
    done = subprocess.run(
        [sys.executable, "-c", code, str(site), str(ROOT / document)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
