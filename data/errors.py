"""What goes wrong with a user's data set."""

from __future__ import annotations


class DataError(ValueError):
    """A data set, its description or its labels cannot be used; the message is one line with the remedy."""
