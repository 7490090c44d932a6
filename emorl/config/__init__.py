"""What a user may write: frozen dataclasses from YAML, and the one error for every mistake in it. Never torch."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake the user can mend; the command line prints its one line and exits with code 2."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """`; did you mean …?` with the closest valid names, or all of them where none is close."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"valid: {', '.join(valid) or 'none'}"
