"""Modules' own idea of their channel counts: read from their tensors after a cut, checked, and saved where no tensor tells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from slim.errors import SlimError
from slim.forward import evaluation_mode
from slim.ops import BATCH_NORMS


def refresh_widths(model: nn.Module) -> None:
    """Set the modules' channel counts from their tensors, in place."""
    for module in model.modules():
        tensors: Any = {**module._parameters, **module._buffers}
        # A hook makes the weight of weight_v or weight_orig (torch.nn.utils.weight_norm, spectral_norm).
        names = ("weight", "weight_v", "weight_orig", "running_mean")
        vector = next((tensors[name] for name in names if tensors.get(name) is not None), None)
        if is_parametrized(module, "weight"):
            with evaluation_mode(module), torch.no_grad():  # in training mode a spectral norm changes its estimate
                vector = module.weight
        if vector is None:
            continue
        if isinstance(module, nn.modules.conv._ConvNd):
            refresh_convolution(module, vector.shape)
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = vector.shape
        elif isinstance(module, nn.PReLU):
            module.num_parameters = vector.numel()
        elif isinstance(module, nn.LayerNorm):
            module.normalized_shape = tuple(vector.shape)
        elif isinstance(module, nn.GroupNorm):
            module.num_channels = vector.numel()
        elif isinstance(module, BATCH_NORMS):
            module.num_features = vector.numel()


def refresh_convolution(module: Any, weight_shape: Sequence[int]) -> None:
    """A depthwise convolution has as many groups as input channels; other group counts never change."""
    rows, columns = weight_shape[:2]
    if module.groups > 1 and module.groups == module.in_channels:
        module.groups = rows if module.transposed else rows // (module.out_channels // module.groups)
    wide = columns * module.groups
    module.in_channels, module.out_channels = (rows, wide) if module.transposed else (wide, rows)


NORM_COUNTS: dict[Any, tuple[str, ...]] = {
    BATCH_NORMS: ("num_features",),
    nn.LayerNorm: ("normalized_shape",),
    nn.GroupNorm: ("num_channels", "num_groups"),
    nn.modules.conv._ConvNd: ("groups",),
}
"""Counts that no tensor may tell: of norms, and the groups of convolutions."""


def layer_widths(model: nn.Module) -> dict[str, list[int]]:
    """{path: [input channels, output channels]} of every convolution and linear layer."""
    widths = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            widths[path] = [module.in_channels, module.out_channels]
        elif isinstance(module, nn.Linear):
            widths[path] = [module.in_features, module.out_features]
    return widths


def norm_widths(model: nn.Module) -> dict[str, dict[str, Any]]:
    """{path: {attribute: count}} of every norm and convolution: plain data."""
    return {
        path: {name: list(n) if isinstance(n := getattr(module, name), tuple) else n for name in names}
        for path, module in model.named_modules()
        for kind, names in NORM_COUNTS.items()
        if isinstance(module, kind)
    }


def set_norm_widths(model: nn.Module, widths: Mapping[str, Mapping[str, Any]]) -> None:
    """The inverse of ``norm_widths``, in place."""
    for path, counts in widths.items():
        module = model.get_submodule(path)
        for name, count in counts.items():
            setattr(module, name, tuple(count) if isinstance(count, list) else count)


def note_buffers(model: nn.Module, names: Iterable[str]) -> None:
    """Note buffers that a cut has narrowed and that no state dict holds, in place."""
    if noted := sorted({*getattr(model, "slim_buffers", ()), *names}):
        model.slim_buffers = noted  # type: ignore[assignment]


def set_count(model: nn.Module, name: str, axis: int, count: int) -> None:
    """Set one counting attribute ``module.path.attribute``, or one entry of it where it is a tuple or list; in place."""
    path, _, attribute = name.rpartition(".")
    module: Any = model.get_submodule(path)
    value = getattr(module, attribute)
    if isinstance(value, (tuple, list)):
        count = type(value)([*value[:axis], count, *value[axis + 1 :]])  # type: ignore[assignment]
    setattr(module, attribute, count)
    if not any(attribute in names for names in NORM_COUNTS.values()):
        model.slim_counts = sorted({*getattr(model, "slim_counts", ()), name})  # type: ignore[assignment]


def counts_of(model: nn.Module) -> dict[str, Any]:
    """{module.path.attribute: value} of the attributes of the model's own modules that a cut has changed: plain data."""
    values = {
        name: getattr(model.get_submodule(path), a)
        for name in getattr(model, "slim_counts", ())
        for path, _, a in [name.rpartition(".")]
    }
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def set_counts(model: nn.Module, counts: Mapping[str, Any]) -> None:
    """The inverse of ``counts_of``, in place."""
    for name, value in counts.items():
        path, _, attribute = name.rpartition(".")
        module: Any = model.get_submodule(path)
        setattr(module, attribute, tuple(value) if isinstance(getattr(module, attribute), tuple) else value)
    if counts:
        model.slim_counts = sorted(counts)  # type: ignore[assignment]


def check_layers(model: nn.Module) -> None:
    """SlimError naming the first layer whose tensors do not fit each other."""
    for path, module in model.named_modules():
        problem = layer_problem(module)
        if problem:
            raise SlimError(
                f"the plan would break {path}: {problem}; make the plan with slim.make_plan on a graph of this very network"
            )


def layer_problem(module: Any) -> str | None:
    """What does not fit in a layer, or None."""
    if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
        inputs, outputs = layer_widths(module)[""]
        groups = getattr(module, "groups", 1)
        if inputs % groups or outputs % groups:
            return f"{inputs} to {outputs} channels do not divide into {groups} groups"
        if module.bias is not None and module.bias.numel() != outputs:
            return f"its bias has {module.bias.numel()} entries for {outputs} output channels"
    if isinstance(module, nn.GroupNorm) and module.num_channels % module.num_groups:
        return f"{module.num_channels} channels do not divide into {module.num_groups} groups"
    if isinstance(module, (*BATCH_NORMS, nn.LayerNorm, nn.GroupNorm)):
        tensors = {**module._parameters, **module._buffers}
        vectors = [tensors.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
        sizes = {v.numel() for v in vectors if v is not None}
        if len(sizes) > 1:
            return f"its vectors have {' and '.join(map(str, sorted(sizes)))} entries"
    return None
