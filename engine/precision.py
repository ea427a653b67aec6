"""The number format in which a network computes while it trains."""

from __future__ import annotations

import torch

from slim import SlimError

from .settings import Precision


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """What autocast multiplies in; float32 means none.

    "auto" is float16 on a GPU (Micikevicius et al., "Mixed Precision Training", 2018), bfloat16 on a CPU with
    instructions for it (Kalamkar et al., arXiv:1905.12322), and float32 elsewhere. SlimError for float16 on a CPU.
    """
    if precision == "auto":
        if device.type == "cuda":
            return torch.float16
        return torch.bfloat16 if device.type == "cpu" and multiplies_bfloat16() else torch.float32
    if precision == "float16" and device.type == "cpu":
        raise SlimError("precision float16 on a CPU: expected auto, float32 or bfloat16, float16 needs a GPU")
    dtype: torch.dtype = getattr(torch, precision)
    return dtype


def multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 dot products; emulated ones would be slower than float32."""
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
