"""How stages say what they are doing: a protocol, and the silent implementation that libraries get by default."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Bar(Protocol):
    """One running progress bar."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Moves on by `steps`; `note` is the latest figure, such as the best score so far."""
        ...


class Progress(Protocol):
    """Where a stage's progress goes; the command line passes one that draws."""

    def say(self, line: str) -> None:
        """One line about what is happening now."""
        ...

    def warn(self, line: str) -> None:
        """One line that nobody should miss."""
        ...

    def bar(self, title: str, total: int, done: int = 0, following: int = 0) -> AbstractContextManager[Bar]:
        """A bar of `total` steps of which `done` are done, open for the length of a `with` block; as many bars like it are
        `following` in the same command."""
        ...


class _SilentBar:
    def advance(self, steps: int = 1, note: str = "") -> None:
        pass


class Silent:
    """Shows nothing."""

    def say(self, line: str) -> None:
        pass

    def warn(self, line: str) -> None:
        pass

    @contextmanager
    def bar(self, title: str, total: int, done: int = 0, following: int = 0) -> Iterator[Bar]:
        yield _SilentBar()
