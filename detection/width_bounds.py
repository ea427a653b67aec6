"""What the flags of widths mean for `slim.make_plan`."""

from __future__ import annotations

from typing import Any

from slim import SlimError

from .flags import WidthSettings


def width_bounds(widths: WidthSettings) -> dict[str, Any]:
    """Bounds and scope as ``slim.make_plan`` takes them, but for the rounding, which a latency chooses by itself."""
    return {
        "min_channels": widths.min_channels,
        "min_keep": widths.min_keep,
        "scope": widths.scope,
        "overrides": dict(width_override(text) for text in widths.overrides),
        "ignore": widths.ignore,
    }


def width_override(text: str) -> tuple[str, float]:
    """'model.0*=0.5' or 'model.0*=32' as a pattern and a share or a count."""
    pattern, _, width = text.rpartition("=")
    try:
        return pattern, int(width) if width.strip().isdigit() else float(width)
    except ValueError as error:
        raise SlimError(
            f"--overrides {text}: expected PATTERN=WIDTH, such as 'model.0*=0.5' or 'model.0*=32'"
        ) from error
