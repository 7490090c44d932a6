"""Passwords never reach a file or a terminal."""

import re

_IN_URL = re.compile(r"(?<=://)([^/@\s:'\"]*):[^/@\s'\"]+@")


def masked(text: str) -> str:
    """The text with `***` for each password of a URL.

    >>> masked("postgresql://emorl:hunter2@host/studies")
    'postgresql://emorl:***@host/studies'
    """
    return _IN_URL.sub(r"\1:***@", text)
