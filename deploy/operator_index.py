"""Which operators of an exported file belong to which module, to say by module what stays in floating point.

Operators are named after their modules (``model.0.conv/Conv``), and OpenVINO keeps these names and adds to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from slim import SlimError

from .onnx_file import read_onnx
from .openvino_file import read_openvino

WEIGHTED = {"Conv", "ConvTranspose", "MatMul", "Gemm", "Convolution", "GroupConvolution", "ConvolutionBackpropData"}
"""Kinds of operators with weights, of both formats."""


@dataclass(frozen=True)
class OperatorIndex:
    """The operators of a file: ``module_of`` has each one's module path, '' where it has none; ``weighted`` have weights."""

    module_of: dict[str, str]
    weighted: frozenset[str]

    @classmethod
    def of(cls, path: Path) -> OperatorIndex:
        """Index an ``.onnx`` or ``.xml`` file; an operator without a name of a module belongs to what it reads."""
        if path.suffix == ".onnx":
            nodes = [(node.name, node.op_type, node.input, node.output) for node in read_onnx(path).graph.node]
        else:
            nodes = [
                (op.get_friendly_name(), op.get_type_name(), _inputs(op), [op.get_friendly_name()])
                for op in read_openvino(path)[0].get_ordered_ops()
            ]
        module_of: dict[str, str] = {}
        made_in: dict[str, str] = {}
        for name, _, inputs, outputs in nodes:
            read = (made_in[tensor] for tensor in inputs if made_in.get(tensor))
            module_of[name] = name.split("/")[0] if "/" in name else next(read, "")
            made_in.update(dict.fromkeys(outputs, module_of[name]))
        return cls(module_of, frozenset(name for name, kind, _, _ in nodes if kind in WEIGHTED))

    def within(self, patterns: Sequence[str]) -> frozenset[str]:
        """The operators in modules that match ``patterns`` (shell style), with all below them, and those of no module.

        SlimError for a pattern that matches none.
        """
        found = {name for name, module in self.module_of.items() if not module}
        for pattern in patterns:
            hits = {name for name, module in self.module_of.items() if _matches(module, pattern)}
            if not hits:
                modules = sorted(set(self.module_of.values()) - {""})
                some = modules[:: max(1, (len(modules) + 1) // 4)]
                raise SlimError(
                    f"--keep-float {pattern}: matches no module of the network; its modules are such as {', '.join(some)}"
                )
            found |= hits
        return frozenset(found)

    def blocks(self, kept: frozenset[str]) -> list[str]:
        """The modules around the weighted operators that are not ``kept``, in order: a convolution with its activation."""
        rows = (module for name, module in self.module_of.items() if name in self.weighted and name not in kept)
        return list(dict.fromkeys(module.rpartition(".")[0] or module for module in rows))


def _inputs(operator: object) -> list[str]:
    return [value.get_node().get_friendly_name() for value in operator.input_values()]  # type: ignore[attr-defined]


def _matches(module: str, pattern: str) -> bool:
    parts = module.split(".") if module else []
    return any(fnmatchcase(".".join(parts[: n + 1]), pattern) for n in range(len(parts)))
