"""The wheel holds slim alone, typed, under its own name; the README's example runs with it; needs are imports."""

from __future__ import annotations

import configparser
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
from tests.test_architecture import ALLOWED, SCRIPTS, imports, modules

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout gets no build folder."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in ("slim", "models", "engine", "data"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_wheel_holds_slim_alone_and_is_typed(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"slim"}
    assert "slim/py.typed" in names
    modules = {f"slim/{p.name}" for p in (ROOT / "slim").glob("*.py")}
    assert modules <= set(names)
    metadata = next(n for n in names if n.endswith("METADATA"))
    lines = zipfile.ZipFile(wheel).read(metadata).decode().splitlines()
    needs = [line for line in lines if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert needs == ["Requires-Dist: torch>=2.6"]
    assert {"Name: channel-slim", f"Version: {slim.__version__}"} <= set(lines)


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
    assert product | through_torch == needed["slim"] | needed["detect"]
    extras = ("experiments", "ray", "slurm", "bench")
    more = set().union(*(needed[extra] for extra in extras))
    assert (distributions("experiments") - needed["slim"] - needed["detect"]) | through_pandas | {
        "ray",
        "submitit",
    } == more
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
def test_examples_run_as_printed_with_the_installed_wheel(wheel: Path, tmp_path: Path, document: str) -> None:
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)],
        check=True,
        capture_output=True,
    )
    code = f"import sys; sys.path.insert(0, {str(site)!r})\n{EXAMPLE}"
    done = subprocess.run(
        [sys.executable, "-c", code, str(site), str(ROOT / document)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
