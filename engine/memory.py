"""Running out of memory, told apart from other failures."""

from __future__ import annotations

import torch

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError, RuntimeError)
"""What may mean it; a CPU's allocator raises RuntimeError."""

_CPU_ALLOCATOR = "can't allocate memory"


def batch_that_may_fit(error: BaseException, batch_size: int, size_hw: tuple[int, ...], ranks: int = 1) -> str | None:
    """What to try after `error` with `batch_size` images on each rank; None when memory was not what failed."""
    if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and _CPU_ALLOCATOR not in str(error):
        return None
    height, width = size_hw
    found = f"out of memory with {batch_size * ranks} images of {width}x{height} pixels a step"
    if batch_size == 1:
        return f"{found}; try a smaller --img"
    return f"{found}; try --batch-size {batch_size // 2 * ranks}"
