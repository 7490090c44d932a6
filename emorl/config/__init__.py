"""What a user may write: frozen dataclasses from YAML, and the one error for every mistake in it. Never torch."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class UserError(ValueError):
    """A mistake the user can mend; the command line prints its one line and exits with code 2."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """`; did you mean …?` with the closest valid names, or all of them where none is close."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"valid: {', '.join(valid) or 'none'}"


def check_keys(block: Mapping[str, Any], known: Iterable[str], where: str, owner: str) -> None:
    """Refuses keys of a block that goes straight to another library's `owner` when it does not know them."""
    for key in block:
        if key not in (known := set(known)):
            raise UserError(f"unknown key '{where}.{key}' (it goes to {owner}); {nearest(key, known)}")
