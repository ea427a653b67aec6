"""The error of this package that a user can cause."""

from slim import SlimError


class ModelError(SlimError):
    """A model description, a checkpoint or an input that cannot be used: what, where, and what to do."""
