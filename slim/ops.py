"""Which ATen operator moves, mixes or keeps channels: one table from operator name to the kind of rule.

Names are those of ``func._schema.name`` without ``aten::`` and without the underscore of the in-place form.
An operator that is in no table freezes every channel that enters it.
"""

from __future__ import annotations

# Each output element depends on the input elements at the same (broadcast) position alone.
# fmt: off
ELEMENTWISE = [
    "abs", "add", "addcdiv", "addcmul", "alias", "atan2", "bitwise_and", "bitwise_not", "bitwise_or", "ceil",
    "celu", "clamp", "clamp_max", "clamp_min", "clone", "copy", "cos", "detach", "div", "dropout", "elu", "eq",
    "erf", "exp", "expm1", "floor", "ge", "gelu", "gt", "hardshrink", "hardsigmoid", "hardswish", "hardtanh",
    "le", "leaky_relu", "lerp", "lift_fresh", "log", "log1p", "log_sigmoid_forward", "logical_and", "logical_not",
    "logical_or", "lt", "masked_fill", "maximum", "minimum", "mish", "mul", "nan_to_num", "ne", "neg", "pow",
    "prelu", "_prelu_kernel", "reciprocal", "relu", "relu6", "round", "rsqrt", "rsub", "selu", "sigmoid", "sign",
    "silu", "sin", "softplus", "softshrink", "sqrt", "square", "sub", "tanh", "threshold", "_to_copy", "to",
    "where", "native_dropout", "contiguous",
]
# fmt: on

# Windows over the trailing axes of one map; channels keep their place.
SPATIAL = [
    *(
        f"{stem}{d}d"
        for d in (1, 2, 3)
        for stem in (
            "avg_pool",
            "max_pool",
            "adaptive_avg_pool",
            "_adaptive_avg_pool",
            "adaptive_max_pool",
            "upsample_nearest",
            "_upsample_nearest_exact",
            "reflection_pad",
            "replication_pad",
        )
    ),
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "mkldnn_max_pool2d",
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "upsample_trilinear3d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
]

# The output is a rearrangement of the inputs' elements: the very same operator is applied to the labels.
# fmt: off
MOVE = [
    "view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "expand", "squeeze",
    "unsqueeze", "slice", "select", "split", "split_with_sizes", "unbind", "flip", "repeat", "stack", "cat",
    "constant_pad_nd", "pixel_shuffle", "pixel_unshuffle", "roll", "index_select", "narrow", "diagonal", "unfold",
    "index", "channel_shuffle", "native_channel_shuffle",
]
# fmt: on

REDUCE = ["mean", "sum", "amax", "amin", "var", "std", "prod"]

BATCH_NORM = [
    "_native_batch_norm_legit_no_training",
    "_native_batch_norm_legit",
    "native_batch_norm",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "_batch_norm_no_update",
    "_batch_norm_with_update",
    "batch_norm",
]

CONVOLUTION = ["convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution", "convolution_overrideable"]

MATMUL = ["mm", "addmm", "linear"]

KINDS: dict[str, str] = {
    **dict.fromkeys(ELEMENTWISE, "elementwise"),
    **dict.fromkeys(SPATIAL, "spatial"),
    **dict.fromkeys(MOVE, "move"),
    **dict.fromkeys(REDUCE, "reduce"),
    **dict.fromkeys(BATCH_NORM, "batch_norm"),
    **dict.fromkeys(CONVOLUTION, "convolution"),
    **dict.fromkeys(MATMUL, "matmul"),
}


def operator_name(func: object) -> tuple[str, bool]:
    """(name without namespace and in-place underscore, whether it works in place) of an ATen overload."""
    name: str = func._schema.name.removeprefix("aten::")  # type: ignore[attr-defined]
    in_place = name.endswith("_") and not name.endswith("__")
    return (name[:-1] if in_place else name), in_place
