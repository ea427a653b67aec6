"""Which operators of an exported file belong to which module, and which of them stay in floating point.

Operators are named after their modules (``model.0.conv/Conv``), and OpenVINO keeps these names and adds to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import openvino

from slim import SlimError

from .onnx_file import read_onnx
from .openvino_file import read_openvino

WEIGHTED = {"Conv", "ConvTranspose", "MatMul", "Gemm", "Convolution", "GroupConvolution", "ConvolutionBackpropData"}
"""Kinds of operators with weights, of both formats."""


@dataclass(frozen=True)
class Operators:
    """The operators of a file. ``module_of``: by operator the path of its module, '' for what is of none."""

    module_of: dict[str, str]
    weighted: frozenset[str]

    def within(self, patterns: Sequence[str]) -> frozenset[str]:
        """The operators in modules that match ``patterns`` (shell style), and those of no module.

        A module is all that is in it. SlimError for a pattern that matches none.
        """
        found = {name for name, module in self.module_of.items() if not module}
        for pattern in patterns:
            hits = {name for name, module in self.module_of.items() if _matches(module, pattern)}
            if not hits:
                some = sorted(set(self.module_of.values()) - {""})[:: max(1, len(set(self.module_of.values())) // 4)]
                raise SlimError(
                    f"--keep-float {pattern}: matches no module of the network; its modules are such as {', '.join(some)}"
                )
            found |= hits
        return frozenset(found)

    def inside(self, block: str) -> frozenset[str]:
        """The operators of a module and of all that is in it."""
        return frozenset(name for name, module in self.module_of.items() if f"{module}.".startswith(f"{block}."))

    def blocks(self, kept: frozenset[str]) -> list[str]:
        """The modules around the weighted operators that are not ``kept``, in order: a convolution with its activation."""
        rows = (module for name, module in self.module_of.items() if name in self.weighted and name not in kept)
        return list(dict.fromkeys(module.rpartition(".")[0] or module for module in rows))


def _matches(module: str, pattern: str) -> bool:
    parts = module.split(".") if module else []
    return any(fnmatchcase(".".join(parts[: n + 1]), pattern) for n in range(len(parts)))


def operators_of(path: Path) -> Operators:
    """The operators of an ``.onnx`` or ``.xml`` file in its order. What a runtime made of several belongs to what it reads."""
    if path.suffix == ".onnx":
        nodes = [(node.name, node.op_type, node.input, node.output) for node in read_onnx(path).graph.node]
    else:
        nodes = [_row(operator) for operator in read_openvino(path)[0].get_ordered_ops()]
    module_of: dict[str, str] = {}
    made_in: dict[str, str] = {}
    for name, _, inputs, outputs in nodes:
        own = name.split("/")[0] if "/" in name else _first(made_in.get(tensor, "") for tensor in inputs)
        module_of[name] = own
        made_in.update(dict.fromkeys(outputs, own))
    return Operators(module_of, frozenset(name for name, kind, _, _ in nodes if kind in WEIGHTED))


def _row(operator: openvino.Node) -> tuple[str, str, list[str], list[str]]:
    name = operator.get_friendly_name()
    inputs = [value.get_node().get_friendly_name() for value in operator.input_values()]
    return name, operator.get_type_name(), inputs, [name]


def _first(modules: Iterable[str]) -> str:
    return next((module for module in modules if module), "")
