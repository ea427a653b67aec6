"""The one error family that the engine raises for things its user can put right."""

from __future__ import annotations

from slim import SlimError


class EngineError(SlimError):
    """One line: what failed, where, what was found, what was expected, what to do."""
