"""Who may import whom, no circles, light imports, thin scripts, and what must not be in the repository."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {p.stem for p in ROOT.glob("*.py")}
BELOW = {"slim", "models", "data", "tracking", "engine", "deploy"}
ALLOWED = {
    "slim": set(),
    "models": {"slim"},  # for its errors and its reader of files alone, see below
    "data": {"slim"},
    "tracking": {"slim"},
    "engine": {"slim", "tracking"},
    "deploy": {"slim"},
    "detection": BELOW,
    "experiments": {*BELOW, "detection"},
    "benchmarks": {*BELOW, "detection"},
}
SLIM_MAY_USE = {"torch", *sys.stdlib_module_names}
RUNTIMES = ("onnx", "onnxruntime", "openvino", "nncf", "onnxscript", "onnxslim", "av")
LONGEST_SCRIPT = 60


def modules(package: str) -> dict[str, Path]:
    """{dotted name: file} of a package."""
    files = sorted((ROOT / package).rglob("*.py"))
    dotted = (path.relative_to(ROOT).with_suffix("").parts for path in files)
    return {".".join(parts).removesuffix(".__init__"): path for parts, path in zip(dotted, files, strict=True)}


MODULES = {name: path for package in ALLOWED for name, path in modules(package).items()}


def imports(name: str, path: Path) -> Iterator[tuple[str, str | None]]:
    """(module, name taken from it or None) of each import of a file, wherever it stands, under TYPE_CHECKING too."""
    parts = name.split(".")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            depth = len(parts) - node.level + (path.name == "__init__.py")
            base = [*parts[:depth], *([node.module] if node.module else [])] if node.level else [node.module or ""]
            yield from ((".".join(base), alias.name) for alias in node.names)


def edges(name: str, path: Path) -> set[str]:
    """The modules of ours that a module imports; of ``from package import module`` the module alone."""
    found = {f"{module}.{what}" if f"{module}.{what}" in MODULES else module for module, what in imports(name, path)}
    return found & MODULES.keys() - {name}


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_only_what_the_layout_allows(package: str) -> None:
    for name, path in modules(package).items():
        roots = {module.split(".")[0] for module, _ in imports(name, path)}
        foreign = roots & {*ALLOWED, *SCRIPTS, "tests"} - ALLOWED[package] - {package}
        assert not foreign, f"{name} imports {sorted(foreign)}"


@pytest.mark.parametrize(
    ("package", "may_take"), [("models", {"SlimError", "Record", "read_archive"}), ("data", {"SlimError"})]
)
def test_models_and_data_take_little_of_slim(package: str, may_take: set[str]) -> None:
    """The base class of their errors, and the one reader of torch's files."""
    for name, path in modules(package).items():
        taken = {what for module, what in imports(name, path) if module.split(".")[0] == "slim"}
        assert taken <= may_take, name


def test_slim_needs_torch_and_the_standard_library_alone() -> None:
    for name, path in modules("slim").items():
        roots = {module.split(".")[0] for module, _ in imports(name, path)}
        assert roots <= {*SLIM_MAY_USE, "slim"}, name


def test_no_circles() -> None:
    """Repeatedly leave out the modules that import none of those that are left: nothing may remain."""
    left = {name: edges(name, path) for name, path in MODULES.items()}
    while leaves := {name for name, targets in left.items() if not targets & left.keys()}:
        left = {name: targets for name, targets in left.items() if name not in leaves}
    assert not left, {name: sorted(targets & left.keys()) for name, targets in left.items()}


def test_a_module_does_not_import_its_own_package() -> None:
    """The package's face is for others: through it, circles would be hidden from the test above."""
    for name, path in MODULES.items():
        package = name.split(".")[0]
        if "." in name:
            own = [
                what for module, what in imports(name, path) if module == package and f"{module}.{what}" not in MODULES
            ]
            assert not own, f"{name} takes {own} from {package}"


def test_scripts_are_thin() -> None:
    """A script reads its command line, calls one job of `detection` and prints; it imports nothing else of ours."""
    expected = {"train_sparse", "prune", "finetune", "iterate", "val", "export", "detect", "benchmark"}
    assert expected == SCRIPTS
    for script in SCRIPTS:
        path = ROOT / f"{script}.py"
        assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_SCRIPT, script
        assert {module.split(".")[0] for module, _ in imports(script, path)} & {*ALLOWED, *SCRIPTS} == {"detection"}


def modules_after(code: str) -> set[str]:
    """What a fresh process has imported after some code."""
    code += "\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_slim_loads_nothing_but_torch() -> None:
    more = {name.split(".")[0] for name in modules_after("import slim") - modules_after("import torch")}
    assert more - sys.stdlib_module_names == {"slim"}


def test_importing_everything_has_no_effect_and_loads_no_runtime() -> None:
    """No thread count, no seed, no environment, no output, no argument parsing."""
    names = [name for name in MODULES if not name.endswith("__main__")]
    code = (
        "import os, torch, torchvision, cv2  # which set variables of their own\n"
        "before = torch.get_num_threads(), torch.get_rng_state().sum(), dict(os.environ)\n"
        f"import {', '.join([*SCRIPTS, *names])}, sys\n"
        "assert before == (torch.get_num_threads(), torch.get_rng_state().sum(), dict(os.environ))\n"
        f"loaded = [name for name in {RUNTIMES} if name in sys.modules]\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--nonsense"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_no_file_is_named_after_nothing() -> None:
    banned = {"utils", "helpers", "common", "misc", "general"}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    assert not [name for name in tracked if Path(name).stem in banned]


def test_the_ways_through_the_code_are_those_of_the_files() -> None:
    """docs/design.md names the files to follow a cut, a step, the loop and a frame, with their lines."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\d+\. `([\w/]+\.py)` \((\d+)\)", text, re.MULTILINE)
    assert len(listed) >= 20
    for name, lines in listed:
        found = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert abs(found - int(lines)) <= 0.2 * found, f"{name} has {found} lines, docs/design.md says {lines}"
