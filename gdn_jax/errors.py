"""The one exception for a user's mistake: its message is a sentence that names the value, the rule and the way out."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Wrong input. The command line prints the message alone and exits with 2."""


class Damaged(UserError):
    """A checkpoint that is not what was written."""


def nearest(name: str, options: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest option, or nothing when none is close."""
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
