"""Modules' own idea of their channel counts: read from their tensors after a cut, checked, and saved where no tensor tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from slim.errors import SlimError


def refresh_widths(model: nn.Module) -> None:
    """Set the modules' channel counts from their tensors, in place."""
    for module in model.modules():
        for kind, refresh in FROM_TENSORS.items():
            if isinstance(module, kind):
                refresh(module)


def refresh_convolution(module: Any) -> None:
    """A depthwise convolution has as many groups as input channels; other group counts never change."""
    weight, transposed = module.weight, module.transposed
    rows, columns = weight.shape[0], weight.shape[1]
    depthwise = module.groups > 1 and module.groups == module.in_channels
    if transposed:
        module.groups = rows if depthwise else module.groups
        module.in_channels, module.out_channels = rows, columns * module.groups
    else:
        module.groups = rows // (module.out_channels // module.groups) if depthwise else module.groups
        module.in_channels, module.out_channels = columns * module.groups, rows


def refresh_linear(module: Any) -> None:
    module.out_features, module.in_features = module.weight.shape


def refresh_norm(module: Any) -> None:
    vector = module.weight if module.weight is not None else module.running_mean
    module.num_features = module.num_features if vector is None else vector.numel()


def refresh_layer_norm(module: Any) -> None:
    module.normalized_shape = module.normalized_shape if module.weight is None else tuple(module.weight.shape)


def refresh_group_norm(module: Any) -> None:
    module.num_channels = module.num_channels if module.weight is None else module.weight.numel()


def refresh_prelu(module: Any) -> None:
    module.num_parameters = module.weight.numel()


FROM_TENSORS: dict[type[nn.Module], Callable[[Any], None]] = {
    nn.modules.conv._ConvNd: refresh_convolution,
    nn.Linear: refresh_linear,
    nn.modules.batchnorm._NormBase: refresh_norm,
    nn.LayerNorm: refresh_layer_norm,
    nn.GroupNorm: refresh_group_norm,
    nn.PReLU: refresh_prelu,
}

ATTRIBUTES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.modules.batchnorm._NormBase: ("num_features",),
    nn.LayerNorm: ("normalized_shape",),
    nn.GroupNorm: ("num_channels", "num_groups"),
}
"""Counts of norms, which may have no tensor that tells them."""


def norm_widths(model: nn.Module) -> dict[str, dict[str, Any]]:
    """{path: {attribute: count}} of every norm: plain data."""
    return {
        path: {name: plain(getattr(module, name)) for name in names}
        for path, module in model.named_modules()
        for kind, names in ATTRIBUTES.items()
        if isinstance(module, kind)
    }


def plain(count: int | tuple[int, ...]) -> int | list[int]:
    return list(count) if isinstance(count, tuple) else count


def set_norm_widths(model: nn.Module, widths: Mapping[str, Mapping[str, Any]]) -> None:
    """The inverse of ``norm_widths``, in place."""
    for path, counts in widths.items():
        module = model.get_submodule(path)
        for name, count in counts.items():
            setattr(module, name, tuple(count) if isinstance(count, list) else count)


def set_count(model: nn.Module, name: str, axis: int, count: int) -> None:
    """Set one counting attribute ``module.path.attribute``, or one entry of it where it is a tuple; in place."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    value = getattr(module, attribute)
    if isinstance(value, tuple):
        count = (*value[:axis], count, *value[axis + 1 :])  # type: ignore[assignment]
    setattr(module, attribute, count)


def check_layers(model: nn.Module) -> None:
    """SlimError naming the first layer whose tensors do not fit each other."""
    for path, module in model.named_modules():
        problem = next((p for kind, check in CHECKS.items() if isinstance(module, kind) if (p := check(module))), None)
        if problem:
            raise SlimError(
                f"the plan would break {path}: {problem}; make the plan with slim.make_plan on a graph of this very network"
            )


def wrong_convolution(module: Any) -> str | None:
    if module.in_channels % module.groups or module.out_channels % module.groups:
        return f"{module.in_channels} to {module.out_channels} channels do not divide into {module.groups} groups"
    return wrong_bias(module, module.out_channels)


def wrong_linear(module: Any) -> str | None:
    return wrong_bias(module, module.out_features)


def wrong_bias(module: Any, outputs: int) -> str | None:
    if module.bias is not None and module.bias.numel() != outputs:
        return f"its bias has {module.bias.numel()} entries for {outputs} output channels"
    return None


def wrong_norm(module: Any) -> str | None:
    vectors = [module._parameters.get("weight"), module._parameters.get("bias")]
    vectors += [module._buffers.get("running_mean"), module._buffers.get("running_var")]
    sizes = {v.numel() for v in vectors if v is not None}
    return f"its vectors have {' and '.join(map(str, sorted(sizes)))} entries" if len(sizes) > 1 else None


def wrong_group_norm(module: Any) -> str | None:
    if module.num_channels % module.num_groups:
        return f"{module.num_channels} channels do not divide into {module.num_groups} groups"
    return wrong_norm(module)


CHECKS: dict[type[nn.Module], Callable[[Any], str | None]] = {
    nn.modules.conv._ConvNd: wrong_convolution,
    nn.Linear: wrong_linear,
    nn.modules.batchnorm._NormBase: wrong_norm,
    nn.LayerNorm: wrong_norm,
    nn.GroupNorm: wrong_group_norm,
}
