"""Who may import whom, and what must not be in the repository."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("slim", "models", "data", "engine", "tracking", "deploy", "detection", "experiments", "benchmarks")
SCRIPTS = {p.stem for p in ROOT.glob("*.py")}
ALLOWED = {
    "slim": set(),
    "models": {"slim"},  # for the base class of its errors
    "data": {"slim"},
    "tracking": {"slim"},
    "engine": {"slim", "tracking"},
    "deploy": {"slim"},
    "detection": {"slim", "models", "data", "tracking", "engine", "deploy"},
    "experiments": {"slim", "models", "data", "tracking", "engine", "deploy", "detection"},
    "benchmarks": {*PACKAGES},
}
SLIM_MAY_USE = {"torch", *sys.stdlib_module_names}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_the_layout_allows(package: str) -> None:
    ours = {*PACKAGES, *SCRIPTS}
    for path in (ROOT / package).rglob("*.py"):
        foreign = (imported(path) & ours) - ALLOWED[package] - {package}
        assert not foreign, f"{path.relative_to(ROOT)} imports {sorted(foreign)}"


def test_slim_needs_torch_and_the_standard_library_alone() -> None:
    for path in (ROOT / "slim").rglob("*.py"):
        assert imported(path) - SLIM_MAY_USE - {"slim"} == set(), path.name


def test_importing_anything_has_no_effect() -> None:
    """No thread count, no seed, no output, no argument parsing."""
    names = [
        *SCRIPTS,
        *PACKAGES,
        "experiments.slimming",
        "benchmarks.slim_speed",
    ]
    code = (
        "import os, torch, torchvision  # which set variables of their own\n"
        "before = torch.get_num_threads(), torch.get_rng_state().sum(), dict(os.environ)\n"
        f"import {', '.join(names)}\n"
        "assert before == (torch.get_num_threads(), torch.get_rng_state().sum(), dict(os.environ))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--nonsense"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_no_file_is_named_after_nothing() -> None:
    banned = {"utils", "helpers", "common", "misc", "general"}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    assert not [name for name in tracked if Path(name).stem in banned]
