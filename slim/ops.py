"""Which ATen operator moves, mixes or keeps channels, a table from operator name to the kind of rule; and kinds of modules.

Names are those of ``func._schema.name`` without ``aten::`` and without the underscore of the in-place form; operators of
other libraries keep their namespace (``torchvision::roi_align``). An operator that is in no table freezes every channel
that enters it.
"""

from __future__ import annotations

from torch import nn

# Each output element depends on the input elements at the same (broadcast) position alone.
ELEMENTWISE = [
    "abs", "acos", "add", "addcdiv", "addcmul", "alias", "asin", "atan", "atan2", "bernoulli", "bitwise_and",
    "bitwise_not", "bitwise_or", "bitwise_xor", "ceil", "celu", "clamp", "clamp_max", "clamp_min", "clone",
    "contiguous", "copysign", "cos", "cosh", "detach", "div", "dropout", "elu", "empty_like", "eq", "erf", "erfc",
    "exp", "exp2", "expm1", "exponential", "fill", "floor", "floor_divide", "fmod", "frac", "full_like", "ge", "gelu",
    "gt", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "isfinite", "isinf", "isnan", "le", "leaky_relu",
    "lerp", "lift_fresh", "log", "log10", "log1p", "log2", "log_sigmoid_forward", "logical_and", "logical_not",
    "logical_or", "logical_xor", "logit", "lt", "masked_fill", "maximum", "minimum", "mish", "mul", "nan_to_num",
    "native_dropout", "ne", "neg", "normal", "ones_like", "pow", "prelu", "_prelu_kernel", "rand_like", "randn_like",
    "reciprocal", "relu", "relu6", "remainder", "round", "rrelu", "rrelu_with_noise", "rsqrt", "rsub", "selu",
    "sigmoid", "sign", "silu", "sin", "sinh", "softplus", "softshrink", "sqrt", "square", "sub", "tan", "tanh",
    "threshold", "to", "_to_copy", "trunc", "uniform", "where", "xlogy", "zero", "zeros_like",
]  # fmt: skip

# Windows over the trailing axes of one map; channels keep their place.
_EACH_DIMENSION = (
    "avg_pool", "max_pool", "adaptive_avg_pool", "_adaptive_avg_pool", "adaptive_max_pool", "fractional_max_pool",
    "upsample_nearest", "_upsample_nearest_exact", "reflection_pad", "replication_pad",
)  # fmt: skip
SPATIAL = [
    *(f"{stem}{d}d" for d in (1, 2, 3) for stem in _EACH_DIMENSION),
    "max_pool2d_with_indices", "max_pool3d_with_indices", "mkldnn_max_pool2d", "upsample_linear1d", "upsample_bilinear2d",
    "upsample_bicubic2d", "upsample_trilinear3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "grid_sampler_2d",
    "grid_sampler_3d",
]  # fmt: skip

VIEW = ["view", "_unsafe_view", "reshape", "_reshape_alias"]

# The output is a rearrangement of the inputs' elements: the very same operator is applied to the labels.
MOVE = [
    *VIEW, "permute", "transpose", "t", "expand", "squeeze", "unsqueeze", "slice", "select", "split",
    "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "unbind",
    "flip", "repeat", "repeat_interleave", "stack", "cat", "constant_pad_nd",
    "pixel_unshuffle", "roll", "rot90", "index_select", "narrow", "diagonal", "unfold", "index", "movedim",
    "channel_shuffle", "native_channel_shuffle",
]  # fmt: skip

# A sum or another summary over some axes, which disappear or shrink to 1.
REDUCE = [
    "mean", "sum", "amax", "amin", "var", "std", "prod", "max", "min", "argmax", "argmin", "linalg_vector_norm", "norm",
    "logsumexp", "any", "all", "median", "var_mean", "std_mean",
]  # fmt: skip

# Mix the elements along one axis and keep its length.
ALONG = ["_softmax", "_log_softmax", "softmax", "log_softmax", "cumsum", "cumprod", "sort"]

BATCH_NORM = [
    "_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "native_batch_norm", "cudnn_batch_norm",
    "miopen_batch_norm", "_batch_norm_no_update", "_batch_norm_with_update", "batch_norm",
]  # fmt: skip

CONVOLUTION = ["convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution", "convolution_overrideable"]

MATMUL = ["mm", "addmm", "linear"]

# Products of activations with each other over channels: every output element sums over many input elements.
ATTENTION = [
    "baddbmm", "_native_multi_head_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_attention_math",
]  # fmt: skip

KINDS: dict[str, str] = {
    **dict.fromkeys(ELEMENTWISE, "elementwise"),
    **dict.fromkeys(SPATIAL, "spatial"),
    **dict.fromkeys(MOVE, "move"),
    **dict.fromkeys(REDUCE, "reduce"),
    **dict.fromkeys(ALONG, "along_axis"),
    **dict.fromkeys(BATCH_NORM, "batch_norm"),
    **dict.fromkeys(CONVOLUTION, "convolution"),
    **dict.fromkeys(MATMUL, "matmul"),
    **dict.fromkeys(ATTENTION, "attention"),
    **dict.fromkeys(("new_empty", "new_full", "new_ones", "new_zeros", "new_empty_strided"), "fresh"),
    "_weight_norm_interface": "weight_norm",
    "as_strided": "as_strided",
    "bmm": "product",
    "col2im": "col2im",
    "copy": "copy",
    "glu": "gated_halves",
    "im2col": "im2col",
    "max_unpool2d": "unpool",
    "max_unpool3d": "unpool",
    "native_layer_norm": "layer_norm",
    "native_group_norm": "group_norm",
    "pixel_shuffle": "pixel_shuffle",
    "torchvision::deform_conv2d": "deformable",
    "torchvision::roi_align": "windows",
    "torchvision::roi_pool": "windows",
}

READERS = ("convolution", "matmul", "deformable", "product")
"""Kinds that read channels through a weight."""

LAYERS = (*READERS, "batch_norm", "layer_norm", "group_norm")
"""Kinds of what modules with weights of their own compute."""

LIKE_PARAMETER = (
    "t", "transpose", "permute", "detach", "alias", "_to_copy", "clone", "contiguous", "unsqueeze", "squeeze", "expand", *VIEW,
)  # fmt: skip
"""A parameter that went through one of these is still that parameter, its axes in another order or with others of size 1
between them at most."""

NONZERO_AT_ZERO = (
    "sigmoid", "hardsigmoid", "softplus", "log_sigmoid_forward", "exp", "cos", "_softmax", "_log_softmax", "rsub",
)  # fmt: skip
"""Operators whose result is not 0 where what they are given is: a gate before them would close nothing."""

ACTIVATIONS = (
    nn.SiLU, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardswish, nn.Hardtanh, nn.Mish, nn.GELU, nn.ELU,
    nn.CELU, nn.SELU, nn.Softplus,
)  # fmt: skip
"""Activations that a gate may follow. Bounded ones (sigmoid, ...) make factors of other channels, not maps."""

SCALABLE = (nn.modules.batchnorm._BatchNorm, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Layers into whose weight and bias a gate behind them folds."""


def is_scalable(module: nn.Module) -> bool:
    """Whether a module is such a layer with torch's own forward: one that does more (a norm or activation within) is not."""
    kind = next((kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn.")), nn.Module)
    own = [name for name in ("forward", "_conv_forward") if name in vars(module)]
    own += [name for name in ("forward", "_conv_forward") if getattr(type(module), name, 0) != getattr(kind, name, 0)]
    return isinstance(module, SCALABLE) and not own


BATCH_NORMS = (nn.modules.batchnorm._NormBase,)
NORMS = (*BATCH_NORMS, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
"""Normalisation layers: their weights scale channels, and weight decay has nothing to do with them."""


def operator_name(func: object) -> tuple[str, bool]:
    """(name without aten:: and in-place underscore, whether it works in place) of an operator or overload."""
    schema = getattr(func, "_schema", None)
    name: str = schema.name if schema is not None else func._qualified_op_name  # type: ignore[attr-defined]
    name = name.removeprefix("aten::")
    in_place = name.endswith("_") and not name.endswith("__")
    return (name[:-1] if in_place else name), in_place
