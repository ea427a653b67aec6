"""What goes wrong with a user's data set."""

from slim import SlimError


class DataError(SlimError):
    """A data set, its description or its labels cannot be used; the message is one line with the remedy."""
