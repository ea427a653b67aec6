"""What goes wrong with exported networks."""

from slim import SlimError


class DeployError(SlimError):
    """A message for the user: the file, what was found, what was expected, what to do."""
