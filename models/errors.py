"""The one error of this package that a user can cause."""

from __future__ import annotations


class ModelError(ValueError):
    """A model description, a checkpoint or an input that cannot be used: what, where, and what to do."""
