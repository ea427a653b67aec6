"""The one family of errors that slim raises for what a user can mend."""

from __future__ import annotations


class SlimError(ValueError):
    """A wrong input, plan, target or file; the message says what, where, what was expected and what to do."""
