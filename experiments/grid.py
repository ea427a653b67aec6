"""Grids as data: from a YAML file to a frozen list of runs, each known by a hash of what decides its result.

A grid's methods are chains of stages, each one of this project's scripts with flags. A method runs once for every
combination of the axes that its stages name as ``$name``, or for the points that it lists; ``@method`` stands for the network
that another method leaves with the same axes and seed. A grid's ``teacher: "@method"`` gives each method a twin, named
``<method>+teacher``, whose trainings learn from that network too. Two stages with the same hash are one node, in whatever
grid, so that what chains share, such as a dense network or one sparse training under several cuts, is trained once.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from detection.command import CommandError, as_words, flags_of, flat, read
from detection.flags import FinetuneFlags, PruneFlags, SparseFlags, ValFlags
from slim import SlimError

from .torch_pruning import TorchPruningFlags

ROOT = Path(__file__).resolve().parent.parent
DEFAULTS = Path(__file__).with_name("defaults.json")
SCRIPTS: dict[str, Any] = {
    "train_sparse": SparseFlags,
    "finetune": FinetuneFlags,
    "prune": PruneFlags,
    "torch_pruning": TorchPruningFlags,
    "val": ValFlags,
}
TRAININGS = ("train_sparse", "finetune")
DECIDE_NOTHING = {
    *("project", "name", "resume", "device", "workers", "cache", "download", "data_root", "eval_every"),
    *("save_period", "exist_ok"),
    *("weights", "teacher", "data"),
}
"""Flags that leave the last epoch's network as it is, and files, of which the content decides."""
KEYS = {"name", "data", "weights", "flags", "seeds", "splits", "axes", "methods", "epochs", "teacher", "tables"}
METHOD_KEYS = {"stages", "seeds", "epochs", "points"}


@dataclass(frozen=True)
class Data:
    """A data set: the digest of its splits, and how many images an epoch has."""

    file: str
    digest: str
    train_images: int


@dataclass(frozen=True)
class Node:
    """One run of a script.

    Args:
        key: hash of the settings that decide, the data's and the weights' digests and the parents' keys
        script: which script
        flags: what it is given, but for files that stand elsewhere on each machine
        parents: {flag: key of the node whose network it takes}
        weights: whether it starts from the grid's own checkpoint
        epochs: of a training, else 0
        data: the data set
    """

    key: str
    script: str
    flags: tuple[tuple[str, Any], ...]
    parents: tuple[tuple[str, str], ...]
    weights: bool
    epochs: int
    data: Data


@dataclass(frozen=True)
class Run:
    """A chain of nodes and the evaluations of what it leaves, one a split; ``others`` are those of the teachers' chains."""

    grid: str
    method: str
    axes: tuple[tuple[str, Any], ...]
    seed: int
    stages: tuple[Node, ...]
    others: tuple[Node, ...]
    evaluations: tuple[tuple[str, Node], ...]

    @property
    def key(self) -> str:
        """What the run is known by: the last stage's hash."""
        return self.stages[-1].key

    @property
    def words(self) -> list[str]:
        """Method, axes and seed as `--only` selects them."""
        return [self.method, *(f"{name}={value}" for name, value in self.axes), f"seed={self.seed}"]

    @property
    def nodes(self) -> list[Node]:
        return [*self.others, *self.stages, *(node for _, node in self.evaluations)]

    @property
    def epochs(self) -> int:
        return sum(node.epochs for node in self.stages)

    def __str__(self) -> str:
        return " ".join([*self.words, Path(self.stages[0].data.file).stem])


def read_grid(path: str | Path) -> dict[str, Any]:
    """A grid's YAML; SlimError with one line for what it cannot mean."""
    try:
        grid = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SlimError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(grid, dict) or not isinstance(grid.get("methods"), dict) or not grid.get("data"):
        raise SlimError(f"{path}: expected a grid with data: and methods:, see experiments/grids")
    # Keys that begin with a point hold anchors for other parts of the file.
    if unknown := {key for key in grid if not str(key).startswith(".")} - KEYS:
        raise SlimError(f"{path}: unknown {', '.join(sorted(unknown))}; expected {', '.join(sorted(KEYS))}")
    taken = {name for kind in SCRIPTS.values() for name in flags_of(kind())}
    if strange := [name for name in grid.get("flags") or {} if name.replace("-", "_") not in taken]:
        raise SlimError(f"{path}: flags: no script takes {', '.join(strange)}")
    for name, method in grid["methods"].items():
        if isinstance(method, list):
            method = grid["methods"][name] = {"stages": method}
        if not isinstance(method, dict) or not method.get("stages") or set(method) - METHOD_KEYS:
            raise SlimError(f"{path}: method {name}: expected a list of stages, or {', '.join(sorted(METHOD_KEYS))}")
        for stage in method["stages"]:
            if not isinstance(stage, dict) or len(stage) != 1 or next(iter(stage)) not in SCRIPTS:
                raise SlimError(
                    f"{path}: {name}: a stage is {stage!r}; expected one of {', '.join(SCRIPTS)} with its flags"
                )
    if teacher := grid.get("teacher"):
        twins = {f"{n}+teacher": {**m, "stages": _taught(m["stages"], teacher)} for n, m in grid["methods"].items()}
        grid["methods"] |= twins
    return {"name": Path(path).stem, "seeds": [0], "splits": ["val"], "axes": {}, "flags": {}, **grid}


def _taught(stages: Any, teacher: str) -> Any:
    """The same stages, whose trainings have a teacher."""
    return [
        {script: {**(flags or {}), "teacher": teacher} if script in TRAININGS else flags for script, flags in s.items()}
        for s in stages
    ]


def expand(grid: Mapping[str, Any], data_of: Any, weights_digest: str) -> list[Run]:
    """The runs of a grid, in the order of data sets, methods, axes and seeds.

    Args:
        grid: see ``read_grid``
        data_of: from a data set's description to its ``Data``
        weights_digest: SHA-256 of the checkpoint that the chains start from; "" where there is none

    Raises:
        SlimError: for flags that a script does not take, and methods that train for other epochs than the grid's budget.
    """
    files = grid["data"] if isinstance(grid["data"], list) else [grid["data"]]
    return [
        run
        for file in files
        for method in grid["methods"]
        for run in _runs_of(grid, method, data_of(file), weights_digest)
    ]


def _runs_of(grid: Mapping[str, Any], method: str, data: Data, weights_digest: str) -> Iterator[Run]:
    content, axes = grid["methods"][method], grid["axes"]
    used = [name for name in axes if name in _variables(grid, content["stages"])]
    product = (dict(zip(used, values, strict=True)) for values in itertools.product(*(axes[name] for name in used)))
    for chosen in content.get("points", product):
        for seed in content.get("seeds", grid["seeds"]):
            stages, others = _chain(grid, method, chosen, seed, data, weights_digest)
            last = stages[-1]
            tests = [
                (s, _node("val", {"split": s, "save_json": True}, {"weights": last.key}, grid, seed, data, ""))
                for s in grid["splits"]
            ]
            run = Run(grid["name"], method, tuple(chosen.items()), seed, stages, others, tuple(tests))
            budget = content.get("epochs", grid.get("epochs"))
            if budget not in (None, "any", run.epochs):
                raise SlimError(
                    f"{grid['name']}: {run} trains for {run.epochs} epochs, the budget is {budget}; give the method its own "
                    "epochs: where it may differ"
                )
            yield run


def _chain(
    grid: Mapping[str, Any], method: str, axes: Mapping[str, Any], seed: int, data: Data, weights_digest: str
) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """The stages of a method as nodes, each with the network of the one before; and the nodes of the chains that it takes
    networks from."""
    chain: list[Node] = []
    others: list[Node] = []
    for stage in grid["methods"][method]["stages"]:
        ((script, given),) = stage.items()
        flags = {str(name).replace("-", "_"): _filled(value, axes) for name, value in (given or {}).items()}
        parents = {"weights": chain[-1].key} if chain else {}
        for name, value in list(flags.items()):
            if isinstance(value, str) and value.startswith("@"):
                other = value[1:]
                if other not in grid["methods"]:
                    raise SlimError(f"{grid['name']}: {method}: {value} names no method of this grid")
                theirs, further = _chain(grid, other, axes, seed, data, weights_digest)
                others += [*further, *theirs]
                parents[name] = theirs[-1].key
                del flags[name]
        chain.append(_node(script, flags, parents, grid, seed, data, weights_digest))
    return tuple(chain), tuple(others)


def _node(
    script: str,
    given: Mapping[str, Any],
    parents: Mapping[str, str],
    grid: Mapping[str, Any],
    seed: int,
    data: Data,
    weights_digest: str,
) -> Node:
    known = flags_of(SCRIPTS[script]())
    shared = {name.replace("-", "_"): value for name, value in grid["flags"].items()}
    flags = {name: value for name, value in shared.items() if name in known} | dict(given) | {"seed": seed}
    from_checkpoint = "weights" not in parents and "weights" not in flags
    files = {"data": data.file, **dict.fromkeys([*parents, *(["weights"] if from_checkpoint else [])], "-")}
    try:
        settings = read(SCRIPTS[script](), as_words(flags | files))
    except (CommandError, SlimError) as error:
        raise SlimError(f"{grid['name']}: {script}: {str(error).removeprefix('command line: ')}") from error
    recorded = json.loads(DEFAULTS.read_text(encoding="utf-8"))[script]
    values = json.loads(json.dumps(flat(settings)))
    decisive = {n: v for n, v in values.items() if n not in DECIDE_NOTHING and (n not in recorded or recorded[n] != v)}
    content = [script, decisive, dict(parents), weights_digest if from_checkpoint else "", data.digest]
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    epochs = int(values["epochs"]) if script in TRAININGS else 0
    return Node(
        key, script, tuple(sorted(flags.items())), tuple(sorted(parents.items())), from_checkpoint, epochs, data
    )


def _variables(grid: Mapping[str, Any], content: Any) -> set[str]:
    """The axes that a method's stages name, and those of the methods whose networks they take."""
    text = json.dumps(content)
    found = set(re.findall(r"\$(\w+)", text))
    for other in re.findall(r'"@([^"]+)"', text):
        if other in grid["methods"]:
            found |= _variables(grid, grid["methods"][other]["stages"])
    return found


def _filled(value: Any, axes: Mapping[str, Any]) -> Any:
    """A flag's value with the axes in it: ``$name`` alone becomes the axis's own value."""
    if isinstance(value, list):
        return [_filled(item, axes) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith("$") and value[1:] in axes:
        return axes[value[1:]]
    return re.sub(r"\$(\w+)", lambda found: str(axes.get(found[1], found[0])), value)


def record_defaults() -> dict[str, dict[str, Any]]:
    """What flags meant when they first took part in a hash; a new flag is added with the default that changes nothing.

    A flag that has its recorded value is left out of hashes, so that a new flag leaves all of them as they are, and a new
    default of an old flag changes those of the runs that rely on it.
    """
    recorded: dict[str, dict[str, Any]] = json.loads(DEFAULTS.read_text(encoding="utf-8")) if DEFAULTS.is_file() else {}
    for script, kind in SCRIPTS.items():
        values = {n: v for n, v in json.loads(json.dumps(flat(kind()))).items() if n not in DECIDE_NOTHING}
        recorded[script] = values | recorded.get(script, {})
    return recorded


if __name__ == "__main__":
    DEFAULTS.write_text(json.dumps(record_defaults(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
